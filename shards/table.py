"""The table of a split's samples: where each image lies and what its label is, and the cache of that table.

Building it costs one read per label and one line of text per sample; a training run of a thousand processes
cannot pay that on every start. It is therefore kept as one ``.npy`` named by the digest of the split, which
every process maps into memory and shares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from shards.errors import UserError
from shards.files import opened, whole_file
from shards.idx import IndexedSample, index_path, list_samples, read_index
from shards.labels import Labels, is_number, read_sample
from shards.manifest import Shard

SAMPLE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("label", "<i4")])
"""One sample: offset and size in bytes of its image inside its tar, number of the shard in the split, label."""

MAX_IMAGE_BYTES = 2**32 - 1
"""That a table can express."""

CACHE_FOLDER = ".cache"


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard in the order of its tar, and a 64-bit hash of each key."""

    samples: np.ndarray
    """SAMPLE_DTYPE [n]; ``shard`` is 0 until `join` numbers the shards."""
    key_hashes: np.ndarray
    """uint64 [n]"""
    by_name: bool = False
    """Whether some label was a name that was looked up in the classes."""


def read_shard(tar: Path, labels: Labels | None = None) -> ShardTable:
    """Build the table of one shard from its ``.idx`` and its labels, by default those in ``.cls``.

    Raises:
        UserError: as `build_table`.
    """
    return build_table(tar, read_index(index_path(tar)), labels)


def build_table(
    tar: Path,
    indexed: Sequence[IndexedSample],
    labels: Labels | None = None,
    on_fault: Callable[[UserError], None] | None = None,
) -> ShardTable:
    """Build the table of one shard, reading nothing but its labels.

    The image and the label may come in either order, and other components may stand beside them.

    Args:
        tar: the shard.
        indexed: where the components of its samples lie.
        labels: how its samples are labelled, by default with a number in ``.cls``.
        on_fault: receives what is wrong with single samples, whose rows then get size 0 and label -1; without
            it the first fault is raised.

    Raises:
        UserError: naming shard and key, if a sample has no image or no label, or the label names no class.
    """
    labels = labels or Labels()
    samples = np.zeros(len(indexed), SAMPLE_DTYPE)
    key_hashes = np.empty(len(indexed), np.uint64)
    by_name = False
    with opened(tar) as descriptor:
        for row, sample in enumerate(indexed):
            key_hashes[row] = hash_key(sample.key)
            try:
                image, text, label = read_sample(tar, descriptor, sample, labels)
            except UserError as error:
                if on_fault is None:
                    raise
                on_fault(error)
                samples[row] = (0, 0, 0, -1)
                continue
            samples[row] = (image.offset, image.size, 0, label)
            by_name = by_name or not is_number(text)
    return ShardTable(samples, key_hashes, by_name)


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
    for key, first, second in repeated_keys(shards, tables):
        places = " and ".join(dict.fromkeys((str(first), str(second))))
        raise UserError(
            f"{places}: two samples of split {split!r} have the key {key}",
            "One of them would never be reached by its key. If the tar is not sorted, so that parts of",
            "one sample are apart, sort it (tar --sort=name); otherwise rename one of the two.",
        )


def repeated_keys(shards: Sequence[Shard], tables: Sequence[ShardTable]) -> Iterator[tuple[str, Path, Path]]:
    """Each key that comes again in a split: the key, the shard where it was first, and the shard where it is again."""
    hashes = np.sort(np.concatenate([table.key_hashes for table in tables]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(repeated):
        return
    found: dict[str, Path] = {}  # the keys themselves: two keys could share a hash
    for shard, table in zip(shards, tables, strict=True):
        rows = np.flatnonzero(np.isin(table.key_hashes, repeated))
        samples = list_samples(shard.path) if len(rows) else []
        for row in rows:
            key = samples[row].key
            if key in found:
                yield key, found[key], shard.path
            found.setdefault(key, shard.path)


def split_digest(shards: Sequence[Shard], record: Mapping[str, Any] | None = None) -> str:
    """SHA-256, in hexadecimal, over what a split consists of; folder and file names do not enter.

    Args:
        shards: their sha256 and counts enter, in order.
        record: of the index; how labels are read enters where it is not the usual ``.cls``.
    """
    text = "".join(f"{shard.sha256} {shard.samples}\n" for shard in shards)
    if record and record.get("label"):
        text += json.dumps(record["label"], sort_keys=True)
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
