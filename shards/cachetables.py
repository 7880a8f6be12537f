"""What stands beside a cached shard: its sidecar files and the table of its samples."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.cachefiles import tar_path
from shards.errors import UserError
from shards.fetch import mask
from shards.files import whole_file
from shards.idx import list_samples
from shards.labels import Labels
from shards.manifest import Shard, to_json
from shards.sidecars import Extras, ShardContents, lacks_extras, write_sidecars
from shards.table import SAMPLE_DTYPE, ShardTable, build_table


def place(shard: Shard) -> str:
    """What messages call a shard: its address, not the name that the cache gave it."""
    return mask(shard.url or str(shard.path))


def table_path(folder: Path, sha256: str, labels: Labels) -> Path:
    """Where the table of a shard lies; read by another rule, its labels are others."""
    if labels == Labels():
        return folder / f"{sha256}.npy"
    rule = hashlib.sha256(to_json([labels.rule, labels.classes])).hexdigest()[:16]
    return folder / f"{sha256}-{rule}.npy"


def load_table(folder: Path, shard: Shard, labels: Labels) -> np.ndarray | None:
    """The table of a shard that has been in the cache: SAMPLE_DTYPE [n], mapped into memory; None if there is none."""
    try:
        table = np.load(table_path(folder, shard.sha256, labels), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent or not ours: built anew
        return None
    if isinstance(table, np.ndarray) and table.dtype == SAMPLE_DTYPE and table.shape == (shard.samples,):
        return table
    return None


def index_shard(folder: Path, shard: Shard, labels: Labels) -> ShardTable:
    """Write what stands beside a cached tar; the table last, for it says that all of it is there.

    Raises:
        UserError: naming the shard's address and the key, if it is no shard or a label cannot be read.
    """
    tar = tar_path(folder, shard.sha256)
    try:
        samples = list_samples(tar)
        table = build_table(tar, samples, labels)
        write_sidecars(ShardContents(tar, samples, table, shard.sha256), extras=Extras.MAKE)
    except UserError as error:
        raise UserError(error.headline.replace(str(tar), place(shard)), *error.details) from error
    with whole_file(table_path(folder, shard.sha256, labels)) as file:
        np.save(file, table.samples, allow_pickle=False)
    return table


def is_extended(folder: Path, shard: Shard) -> bool:
    """Whether nothing can be done about the optional sidecars of a shard that is in the cache."""
    return not lacks_extras(replace(shard, path=tar_path(folder, shard.sha256)), Extras.MAKE)
