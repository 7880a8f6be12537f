"""Data sets whose shards lie at URLs: a remote folder, or a local one whose `index.json` lists URLs.

A remote folder is asked for its `index.json` and `classes.json` whenever it is opened, so that a run never goes by an
index that has been replaced. What must start without network is given a local folder: `shards index URL OUT` makes
one that lists the remote shards, and those in the cache are not asked for again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.cache import Pinned, ShardCache
from shards.cachefiles import NextUse, tar_path
from shards.errors import UserError
from shards.fetch import check_scheme, is_remote, join_url, mask, read_small, scheme_of
from shards.idx import index_path, read_index
from shards.labels import Labels
from shards.manifest import (
    CLASSES_NAME,
    INDEX_NAME,
    Manifest,
    Shard,
    class_names,
    parse_manifest,
    read_classes,
    read_manifest,
)
from shards.table import split_digest

_LOCAL_SCHEMES = ("file", "local")


@dataclass(frozen=True, eq=False)
class RemoteSplit:
    """One split, its samples numbered through the shards in the order of the index."""

    root: str
    """URL or local folder of the index."""
    name: str
    shards: tuple[Shard, ...]
    """With `url`; `path` is where each lies once it is in the cache."""
    classes: tuple[str, ...]
    """Names in label order."""
    digest: str
    """As `index.Split.digest`: the same data has the same digest, here or there."""
    first: np.ndarray
    """int64 [number of shards + 1]: the first sample of each shard, and the number of all."""
    labels: Labels
    """How the samples are labelled."""
    _keys: dict[int, list[str]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """The number of the shard that holds a sample, and its row in the shard's table."""
        shard = int(np.searchsorted(self.first, sample, side="right")) - 1
        return shard, int(sample - self.first[shard])

    def pin(self, cache: ShardCache, number: int, next_use: NextUse | None = None, wait: bool = True) -> Pinned | None:
        """`ShardCache.pin` for a shard of this split, whose labels must name classes.

        Raises:
            UserError: as `ShardCache.pin`; or naming shard and key of a label outside the classes.
        """
        pinned = cache.pin(self.shards[number], next_use, wait, self.labels)
        if pinned is not None:
            self._check_labels(number, pinned)
        return pinned

    def key(self, sample: int) -> str | None:
        """webdataset's key of a sample; None if its shard has not been in the cache yet."""
        number, row = self.locate(sample)
        if number not in self._keys:
            try:
                indexed = read_index(index_path(self.shards[number].path))
            except UserError:
                return None
            self._keys[number] = [sample.key for sample in indexed]
        return self._keys[number][row]

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: ``shard https://host/train-00003.tar, key n014_123``."""
        number, row = self.locate(sample)
        key = self.key(sample)
        return f"shard {mask(self.shards[number].url or '')}, {f'sample {row}' if key is None else f'key {key}'}"

    def _check_labels(self, number: int, pinned: Pinned) -> None:
        labels = pinned.samples["label"]
        row = int(np.argmax(labels))
        if labels[row] < len(self.classes):
            return
        sample, label = int(self.first[number]) + row, int(labels[row])
        pinned.close()
        raise UserError(
            f"{self.describe(sample)}: label {label} is outside the {len(self.classes):,} classes of {CLASSES_NAME}",
            f"Labels run from 0 to {len(self.classes) - 1:,}. List all classes in {mask(self.root)}/{CLASSES_NAME}.",
        )


def has_remote_shards(root: Path) -> bool:
    """Whether the `index.json` of a local folder lists shards at URLs; False if there is none that can be read."""
    try:
        return read_manifest(Path(root), remote=True).is_remote
    except UserError:
        return False  # whoever opens it as a local folder reports this


def open_remote(location: str, name: str, folder: Path) -> RemoteSplit:
    """Open one split; no shard is fetched yet.

    Args:
        location: URL of a folder with `index.json` and `classes.json`, or a local folder whose `index.json` lists
            URLs.
        name: of the split, such as ``"train"`` or ``"val"``.
        folder: of the cache.

    Raises:
        UserError: if a file is missing, cannot be read or is not what it should be; if the split is not there; or
            if the shards are at addresses that nothing installed can open. It names the place and the mend.
    """
    if is_remote(location):
        manifest, classes = _read_remote(location)
    else:
        manifest, classes = read_manifest(Path(location), remote=True), read_classes(Path(location))
    listed = _shards_of(manifest, location, name)
    shards = tuple(replace(shard, path=tar_path(folder, shard.sha256)) for shard in listed)
    for shard in {scheme_of(shard.url or ""): shard for shard in shards}.values():
        check_scheme(shard.url or "")
    first = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])]).astype(np.int64)
    digest = split_digest(shards, manifest.record)
    labels = Labels.from_record(mask(location), manifest.record, classes)
    return RemoteSplit(location, name, shards, classes, digest, first, labels)


def _read_remote(location: str) -> tuple[Manifest, tuple[str, ...]]:
    index, classes = join_url(location, INDEX_NAME), join_url(location, CLASSES_NAME)
    index_mend = "Write one beside the shards (shards index) and upload it, or run: shards index URL OUT"
    manifest = parse_manifest(_read_json(index, index_mend), Path(), mask(index), index_mend)
    classes_mend = "Upload the classes.json that shards prepare or shards index wrote."
    return (
        replace(
            manifest,
            splits={
                name: tuple(_with_url(location, shard) for shard in shards) for name, shards in manifest.splits.items()
            },
        ),
        class_names(_read_json(classes, classes_mend), mask(classes), classes_mend),
    )


def _read_json(url: str, mend: str) -> Any:
    try:
        return json.loads(read_small(url))
    except FileNotFoundError:
        raise UserError(f"{mask(url)}: no such file", mend) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{mask(url)}: no valid JSON: {error}", mend) from error


def _with_url(location: str, shard: Shard) -> Shard:
    if shard.url is None:
        return replace(shard, url=join_url(location, shard.path.as_posix()))
    if "::" in shard.url:
        raise UserError(f"{mask(location)}: its index lists {mask(shard.url)}", "Chained URLs (::) are not followed.")
    if scheme_of(shard.url) in _LOCAL_SCHEMES and scheme_of(location) not in _LOCAL_SCHEMES:
        raise UserError(f"{mask(location)}: its index lists a file of this host: {shard.url}")
    return shard


def _shards_of(manifest: Manifest, location: str, name: str) -> tuple[Shard, ...]:
    shards = manifest.splits.get(name, ())
    if not shards:
        raise UserError(
            f"{mask(location)}: has no split {name!r}, or an empty one",
            f"Splits there: {', '.join(manifest.splits) or 'none'}.",
        )
    for shard in shards:
        if shard.url is None:
            raise UserError(
                f"{location}: split {name!r} lists {shard.path.name} as a file and other shards at URLs",
                "All shards of a data set must be here, or all at URLs.",
            )
    return shards
