"""The table of a split's samples: where each image lies and what its label is, and the cache of that table.

Building it costs one read per label and one line of text per sample; a training run of a thousand processes
cannot pay that on every start. It is therefore kept as one ``.npy`` named by the digest of the split, which
every process maps into memory and shares.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from shards.errors import UserError
from shards.files import whole_file
from shards.idx import IndexedSample, index_path, read_index
from shards.images import IMAGE_EXTENSIONS
from shards.manifest import Shard

SAMPLE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("label", "<i4")])
"""One sample: offset and size in bytes of its image inside its tar, number of the shard in the split, label."""

CACHE_FOLDER = ".cache"
_LABEL_BYTES = 32
"""More than any number needs; a longer ``.cls`` is not a label."""


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard in the order of its tar, and a 64-bit hash of each key."""

    samples: np.ndarray
    """SAMPLE_DTYPE [n]; ``shard`` is 0 until `join` numbers the shards."""
    key_hashes: np.ndarray
    """uint64 [n]"""


def read_shard(tar: Path) -> ShardTable:
    """Build the table of one shard from its ``.idx`` and its ``.cls`` members.

    The image and the label may come in either order, and other components may stand beside them.

    Raises:
        UserError: naming shard and key, if a sample has no image or no label, or the label is no number.
    """
    indexed = read_index(index_path(tar))
    samples = np.zeros(len(indexed), SAMPLE_DTYPE)
    key_hashes = np.empty(len(indexed), np.uint64)
    try:
        descriptor = os.open(tar, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{tar}: cannot be opened: {error.strerror}") from error
    try:
        for row, sample in enumerate(indexed):
            offset, size, label = _sample_row(tar, descriptor, sample)
            samples[row] = (offset, size, 0, label)
            key_hashes[row] = hash_key(sample.key)
    finally:
        os.close(descriptor)
    return ShardTable(samples, key_hashes)


def _sample_row(tar: Path, descriptor: int, sample: IndexedSample) -> tuple[int, int, int]:
    image = label = None
    place = f"{tar}: key {sample.key}"
    seen = set()
    for component in sample.components:
        extension = component.extension.lower()
        if extension in seen:
            raise UserError(
                f"{place}: two members of this key have the extension .{extension}",
                "webdataset refuses such shards as well. Make the shard again with a key of its own per sample.",
            )
        seen.add(extension)
        if extension == "cls":
            label = component
        elif image is None and extension in IMAGE_EXTENSIONS:
            image = component
    if image is None or label is None:
        names = " and ".join(component.name for component in sample.components)
        raise UserError(
            f"{place}: has no {'image' if image is None else 'label (.cls)'}; it consists of {names}",
            "Every sample needs one image and one .cls with its class number.",
            "Members of one sample must be neighbours in the tar; tar --sort=name makes them so.",
        )
    if image.size >= 2**32:
        raise UserError(f"{place}: an image of {image.size:,} bytes")
    text = os.pread(descriptor, min(label.size, _LABEL_BYTES), label.offset)
    if label.size > _LABEL_BYTES or not text.strip().isdigit() or int(text) >= 2**31:
        raise UserError(
            f"{place}: label {text!r} in {label.name} is no class number",
            "A .cls member holds one whole number from 0 on, in decimal digits.",
        )
    return image.offset, image.size, int(text)


def hash_key(key: str) -> int:
    """64 bits that stand for a key where millions of keys are compared."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def join(split: str, shards: Sequence[Shard], tables: Sequence[ShardTable]) -> np.ndarray:
    """Number the shards and append their tables: SAMPLE_DTYPE [N].

    Raises:
        UserError: if two samples of the split have one key, naming both.
    """
    for number, table in enumerate(tables):
        table.samples["shard"] = number
    _check_keys_differ(split, shards, tables)
    return np.concatenate([table.samples for table in tables])


def _check_keys_differ(split: str, shards: Sequence[Shard], tables: Sequence[ShardTable]) -> None:
    hashes = np.sort(np.concatenate([table.key_hashes for table in tables]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(repeated):
        return
    found: dict[str, Path] = {}  # the keys themselves: two keys could share a hash
    for shard, table in zip(shards, tables, strict=True):
        rows = np.flatnonzero(np.isin(table.key_hashes, repeated))
        indexed = read_index(index_path(shard.path)) if len(rows) else []
        for row in rows:
            key = indexed[row].key
            if key in found:
                places = " and ".join(dict.fromkeys((str(found[key]), str(shard.path))))
                raise UserError(
                    f"{places}: two samples of split {split!r} have the key {key}",
                    "One of them would never be reached by its key. If the tar is not sorted, so that parts of",
                    "one sample are apart, sort it (tar --sort=name); otherwise rename one of the two.",
                )
            found[key] = shard.path


def split_digest(shards: Sequence[Shard]) -> str:
    """SHA-256, in hexadecimal, over the shards' sha256 and counts in order; folder and file names do not enter."""
    text = "".join(f"{shard.sha256} {shard.samples}\n" for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_paths(root: Path, split: str, digest: str) -> tuple[Path, Path]:
    """Where the table of a split may be cached: beside the shards, or in the user's cache folder."""
    name = f"{split}-{digest}.npy"
    return root / CACHE_FOLDER / name, user_cache_path("onehour") / "index" / name


def load_cached(root: Path, split: str, digest: str, count: int) -> np.ndarray | None:
    """The cached table, mapped into memory read-only; None if there is none of `count` samples."""
    for path in cache_paths(root, split, digest):
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # absent, truncated, or not ours: built anew
            continue
        if isinstance(table, np.ndarray) and table.dtype == SAMPLE_DTYPE and table.shape == (count,):
            return table
    return None


def save_cached(root: Path, split: str, digest: str, samples: np.ndarray, scratch: Path | None = None) -> None:
    """Cache a table in the first place that can be written; if none can, the next process builds it again."""
    for path in cache_paths(root, split, digest):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, scratch) as file:
                np.save(file, samples, allow_pickle=False)
            return
        except (OSError, UserError):
            continue
