"""The run-time view of a data set folder: which bytes of which tar are sample *i*.

`load_split` is what a training process calls. It checks cheaply that the folder is what its index says, and
takes the table of samples from a cache, so that a split of 1.28 million samples opens in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.idx import index_path, index_tar, read_count, read_index
from shards.manifest import Manifest, Shard, read_classes, read_manifest
from shards.table import SAMPLE_DTYPE, join, load_cached, read_shard, save_cached, split_digest

__all__ = ["SAMPLE_DTYPE", "Shard", "Split", "load_split"]


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set, every sample addressable by its number."""

    root: Path
    name: str
    shards: tuple[Shard, ...]
    samples: np.ndarray
    """SAMPLE_DTYPE [N], read-only and shared between processes where it could be cached."""
    classes: tuple[str, ...]
    """Names in label order."""
    digest: str
    """SHA-256 over the shards' digests and counts in order: the same data has the same digest anywhere."""
    _keys: dict[int, list[str]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample_id: int) -> str:
        """webdataset's key of a sample, read from the shard's ``.idx`` on first use."""
        number = int(self.samples[sample_id]["shard"])
        if number not in self._keys:
            self._keys[number] = [sample.key for sample in read_index(index_path(self.shards[number].path))]
        first = sum(shard.samples for shard in self.shards[:number])
        return self._keys[number][range(len(self))[sample_id] - first]

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: ``shard train-00003.tar, key n014_123, byte 51200``."""
        sample = self.samples[sample_id]
        shard = self.shards[int(sample["shard"])].path.name
        return f"shard {shard}, key {self.key(sample_id)}, byte {int(sample['offset'])}"


def load_split(root: Path, name: str) -> Split:
    """Open one split of a data set folder.

    Every shard's presence and size, every ``.idx``'s presence and count, and the range of all labels are
    checked on each call; contents are not read again once the table of samples is cached.

    Args:
        root: folder with `index.json`.
        name: of the split, such as ``"train"`` or ``"val"``.

    Raises:
        UserError: naming the file and the mend, if anything is missing or contradicts the index.
    """
    root = Path(root)
    manifest = read_manifest(root)
    classes = read_classes(root)
    shards = _shards_of(manifest, name)
    for shard in shards:
        check_shard_files(shard)
    digest = split_digest(shards)
    samples = load_cached(root, name, digest, sum(shard.samples for shard in shards))
    if samples is None:
        for shard in shards:
            _check_index_of(shard.path)
        samples = join(name, shards, [read_shard(shard.path) for shard in shards])
        save_cached(root, name, digest, samples)
    split = Split(root, name, shards, samples, classes, digest)
    check_labels(split)
    return split


def _shards_of(manifest: Manifest, name: str) -> tuple[Shard, ...]:
    there = ", ".join(manifest.splits) or "none"
    if name not in manifest.splits:
        raise UserError(
            f"{manifest.root}: has no split {name!r}",
            f"Splits there: {there}.",
            f"Make a data set that has one, or add {name}-*.tar and run: shards index {manifest.root}",
        )
    shards = manifest.splits[name]
    if not shards:
        raise UserError(
            f"{manifest.root}: split {name!r} is empty",
            f"Splits there: {there}. Add {name}-*.tar and run: shards index {manifest.root}",
        )
    return shards


def check_shard_files(shard: Shard) -> None:
    """Check without reading data that a shard's tar and ``.idx`` are there and as recorded.

    Raises:
        UserError: naming the file and the mend.
    """
    folder = shard.path.parent
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{shard.path}: cannot be read: {error.strerror}",
            "The index lists it: copy it here again, or run the shards prepare that made this folder again.",
        ) from error
    if size != shard.size:
        raise UserError(
            f"{shard.path}: truncated or rewritten: {size:,} bytes, the index says {shard.size:,}",
            f"See what else differs with: shards verify {folder} --digests",
            "Then copy the shard again, or run the shards prepare that made this folder again.",
        )
    count = read_count(index_path(shard.path))
    if count != shard.samples:
        raise UserError(
            f"{index_path(shard.path)}: lists {count:,} samples, index.json says {shard.samples:,}",
            f"Write both again from the tars: shards index {folder}",
        )


def _check_index_of(tar: Path) -> None:
    """Before an ``.idx`` is trusted for the first time: is it the one of this tar?"""
    if index_path(tar).read_bytes() != index_tar(tar):
        raise UserError(
            f"{index_path(tar)}: does not describe {tar.name}",
            f"Write it again from the tars: shards index {tar.parent}",
        )


def check_labels(split: Split) -> None:
    """Check that every label names a class.

    Raises:
        UserError: naming shard and key of the highest label that does not.
    """
    labels = split.samples["label"]
    highest = int(np.max(labels))
    if highest < len(split.classes):
        return
    sample_id = int(np.argmax(labels))
    raise UserError(
        f"{split.shards[int(split.samples[sample_id]['shard'])].path}: label {highest} of key "
        f"{split.key(sample_id)} is outside the {len(split.classes):,} classes of classes.json",
        f"Labels run from 0 to {len(split.classes) - 1:,}. "
        f"Give all classes with: shards index {split.root} --classes FILE|N",
    )
