"""The list of a source's samples on disk, in the order in which they will be written.

A source of many millions of samples must not become many millions of Python objects, least of all once per
worker. The listing is streamed into two plain files that every process maps into memory; what stays in memory
meanwhile is 8 bytes per sample, twice: a hash of each key, and the shuffled order.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from shards.errors import UserError
from shards.select import Selection, select
from shards.sources.base import Entry, Source, is_valid_key
from shards.table import MAX_IMAGE_BYTES, hash_key

_ENTRY_DTYPE = np.dtype([("start", "<u8"), ("key", "<u4"), ("locator", "<u4"), ("label", "<i4"), ("size", "<i8")])
"""Byte offset in the text file, lengths of key and locator there, label, image size in bytes or -1."""

_BUFFERED_ENTRIES = 4096


@dataclass(frozen=True)
class Catalog:
    """The samples of one split, listed and shuffled; pickles as a path and a few numbers."""

    folder: Path
    split: str
    count: int
    """Of samples that are written."""
    image_bytes: int
    """Sum of their known sizes, in bytes."""
    sha256: str
    """Over keys, labels, sizes and locators in listing order: changes when the source does."""

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries at the shuffled positions `start` to `stop`."""
        entries = np.memmap(self.folder / f"{self.split}.entries", _ENTRY_DTYPE, "r")
        order = np.load(self.folder / f"{self.split}.order.npy", mmap_mode="r")
        with (self.folder / f"{self.split}.text").open("rb", buffering=0) as text:
            for row in entries[order[start:stop]]:
                yield _entry(row, text)


def training_split(source: Source) -> str:
    """The split that limits and numbers of shards are about: "train", or the first one where none is called so."""
    return "train" if "train" in source.splits else source.splits[0]


def build_catalog(source: Source, split: str, seed: int, folder: Path, selection: Selection | None = None) -> Catalog:
    """List the selected part of a split of a source into `folder` and shuffle the list.

    Raises:
        UserError: if the split is empty, two samples have one key, the source finds something wrong, or the list
            cannot be written.
    """
    try:
        return _build_catalog(source, split, seed, folder, selection or select(source.classes))
    except OSError as error:
        raise UserError(
            f"{folder}: the list of images cannot be written: {error.strerror}", "Free or choose another disk."
        ) from error


def _build_catalog(source: Source, split: str, seed: int, folder: Path, selection: Selection) -> Catalog:
    digest = hashlib.sha256()
    hashes = array("Q")
    image_bytes = 0
    with _Lists(folder, split) as lists:
        for entry in source.entries(split):
            _check(source, entry)
            label = selection.labels[entry.label]
            if label is None:
                continue
            key, locator = _encode(entry.key), _encode(entry.locator)
            digest.update(b"%b\0%d\0%d\0%b\n" % (key, label, entry.size, locator))
            hashes.append(hash_key(entry.key))
            image_bytes += max(entry.size, 0)
            lists.append(key, locator, label, entry.size)
    count = len(hashes)
    if not count:
        chosen = " of the chosen classes" if selection.record else ""
        raise UserError(f"{source.name}: split {split!r} has no images{chosen}")
    _check_keys_differ(source, split, np.frombuffer(hashes, np.uint64), folder)
    order = shuffled(count, f"onehour shards {seed} {split}")
    if selection.per_class is not None and split == training_split(source):
        entries = np.memmap(folder / f"{split}.entries", _ENTRY_DTYPE, "r")
        order = selection.thin(order, entries["label"])
        count, image_bytes = len(order), int(np.maximum(entries["size"][order], 0).sum())
    np.save(folder / f"{split}.order.npy", order)
    return Catalog(folder, split, count, image_bytes, digest.hexdigest())


class _Lists:
    """The two files of a listing, written in pieces of `_BUFFERED_ENTRIES`."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        self._entries = (folder / f"{split}.entries").open("wb")
        self._text = (folder / f"{split}.text").open("wb")
        self._start = 0
        self._rows: list[tuple[int, int, int, int, int]] = []

    def append(self, key: bytes, locator: bytes, label: int, size: int) -> None:
        self._rows.append((self._start, len(key), len(locator), label, size))
        self._start += len(key) + len(locator)
        self._text.write(key + locator)
        if len(self._rows) == _BUFFERED_ENTRIES:
            self._flush()

    def _flush(self) -> None:
        self._entries.write(np.array(self._rows, _ENTRY_DTYPE).tobytes())
        self._rows.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._entries, self._text:
            self._flush()


def shuffled(count: int, purpose: str) -> np.ndarray:
    """A uniform permutation of range(count) that depends on nothing but its arguments: int64 [count].

    NumPy guarantees the raw words of its bit generators for ever, but not the permutations made from them.
    """
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def _check(source: Source, entry: Entry) -> None:
    place = source.place(entry.locator)
    if not is_valid_key(entry.key):
        raise UserError(f"{place}: key {entry.key!r} is empty or contains dots, slashes or blanks")
    if entry.size > MAX_IMAGE_BYTES:
        raise UserError(f"{place}: an image of {entry.size:,} bytes", f"At most {MAX_IMAGE_BYTES:,} can be indexed.")
    if not 0 <= entry.label < len(source.classes):
        raise UserError(f"{place}: label {entry.label} is outside the {len(source.classes):,} classes")


def _check_keys_differ(source: Source, split: str, hashes: np.ndarray, folder: Path) -> None:
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return
    entries = np.memmap(folder / f"{split}.entries", _ENTRY_DTYPE, "r")
    found: dict[str, Entry] = {}  # the keys themselves: two keys could share a hash
    with (folder / f"{split}.text").open("rb") as text:
        for row in np.flatnonzero(np.isin(hashes, repeated)):
            entry = _entry(entries[row], text)
            other = found.setdefault(entry.key, entry)
            if other is not entry:
                raise UserError(
                    f"{source.place(other.locator)} and {source.place(entry.locator)}: both would get the key "
                    f"{entry.key}",
                    "Keys are made from class and file name without extension. Rename one of the two.",
                )


def _entry(row: np.void, text: BinaryIO) -> Entry:
    start, key_bytes, locator_bytes, label, size = row.item()
    data = os.pread(text.fileno(), key_bytes + locator_bytes, start)
    return Entry(_decode(data[:key_bytes]), label, _decode(data[key_bytes:]), size)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
