"""The run-time view of a data set folder: which bytes of which tar are sample *i*.

`load_split` is what a training process calls. It checks cheaply that the folder is what its index says, and
takes the table of samples from a cache, so that a split of 1.28 million samples opens in well under a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.files import read_file
from shards.idx import format_index, index_path, list_samples, read_count, read_index
from shards.labels import Labels
from shards.manifest import Manifest, Shard, read_classes, read_manifest
from shards.pool import run_tasks
from shards.table import SAMPLE_DTYPE, ShardTable, build_table, join, load_cached, save_cached, split_digest

__all__ = ["SAMPLE_DTYPE", "Shard", "Split", "load_split"]

_WORTH_WORKERS = 50_000
"""Samples; fewer are read sooner than processes start."""


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
    """As `table.split_digest`: the same data, labelled in the same way, has the same digest anywhere."""
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


def load_split(root: Path, name: str, *, workers: int | None = 1) -> Split:
    """Open one split of a data set folder.

    Every shard's presence and size, every ``.idx``'s presence and count, and the range of all labels are
    checked on each call; contents are not read again once the table of samples is cached.

    Args:
        root: folder with `index.json`.
        name: of the split, such as ``"train"`` or ``"val"``.
        workers: processes that build the table of a large split, if it is not cached; None for one per usable
            core. They import the caller's main module anew, which must then stand such an import.

    Raises:
        UserError: naming the file and the mend, if anything is missing or contradicts the index.
    """
    root = Path(root)
    manifest = read_manifest(root)
    classes = read_classes(root)
    labels = Labels.from_record(root, manifest.record, classes)
    shards = _shards_of(manifest, name)
    for shard in shards:
        check_shard_files(root, shard)
    digest = split_digest(shards, manifest.record)
    samples = load_cached(root, name, digest, sum(shard.samples for shard in shards))
    if samples is None or not _fits(samples, shards):
        build = partial(_build_table, root, labels)
        if sum(shard.samples for shard in shards) < _WORTH_WORKERS:
            workers = 1
        tables = dict(run_tasks(build, [shard.path for shard in shards], workers))
        samples = join(name, shards, [tables[shard.path] for shard in shards])
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


def check_shard_files(root: Path, shard: Shard) -> None:
    """Check without reading data that a shard's tar and ``.idx`` are there and as recorded.

    Args:
        root: folder of the data set, for the mend.
        shard: what the index records.

    Raises:
        UserError: naming the file and the mend.
    """
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
            f"See what else differs with: shards verify {root} --digests",
            "Then copy the shard again, or run the shards prepare that made this folder again.",
        )
    count = read_count(index_path(shard.path))
    if count != shard.samples:
        raise UserError(
            f"{index_path(shard.path)}: lists {count:,} samples, index.json says {shard.samples:,}",
            f"Write both again from the tars: shards index {root}",
        )


def _fits(samples: np.ndarray, shards: Sequence[Shard]) -> bool:
    """Whether a cached table could be that of these shards: caches may lie in folders that others write to."""
    start = 0
    for number, shard in enumerate(shards):
        part = samples[start : start + shard.samples]
        start += shard.samples
        if np.any(part["shard"] != number) or np.any(part["label"] < 0) or np.any(part["size"] > shard.size):
            return False
        if np.any(part["offset"] > np.uint64(shard.size) - part["size"]):
            return False
    return True


def _build_table(root: Path, labels: Labels, tar: Path) -> ShardTable:
    indexed = list_samples(tar)
    # before an .idx is trusted for the first time: is it the one of this tar?
    if read_file(index_path(tar)) != format_index(indexed):
        raise UserError(
            f"{index_path(tar)}: does not describe {tar.name}",
            f"Write it again from the tars: shards index {root}",
        )
    return build_table(tar, indexed, labels)


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
