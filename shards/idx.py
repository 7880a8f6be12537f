"""The ``.idx`` file beside a shard: where each component of each sample lies.

Byte for byte the text that NVIDIA DALI's ``wds2idx`` writes, version 1.2: a line ``v1.2 <samples>``, then one
line per sample with ``<extension> <offset> <size> <member name>`` for each of its components, all separated by
single blanks. Offsets and sizes are bytes of the component's data inside the tar.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shards.errors import UserError
from shards.files import open_regular, read_file
from shards.tar import Member, scan, split_name

VERSION = "v1.2"

MAX_INDEX_BYTES = 1 << 30
"""Of an ``.idx`` that is read; one of ten million samples has less."""


class Component(NamedTuple):
    """One file of a sample: its extension as written (no dot), and its data's offset and size in bytes."""

    extension: str
    offset: int
    size: int
    name: str


class IndexedSample(NamedTuple):
    """One sample of a shard: webdataset's key, and its components in the order of the tar."""

    key: str
    components: tuple[Component, ...]


def index_path(tar: Path) -> Path:
    """``train-00000.tar`` → ``train-00000.idx``, where DALI and this package look for it."""
    return tar.with_suffix(".idx")


def is_older_than_its_index(tar: Path) -> bool:
    """Whether a tar was last written to before its ``.idx`` was."""
    try:
        return tar.stat().st_mtime_ns < index_path(tar).stat().st_mtime_ns
    except OSError:
        return False


def group(members: Iterable[Member]) -> Iterator[IndexedSample]:
    """Neighbouring members with one key are one sample, as webdataset and ``wds2idx`` group them.

    Members without extension and hidden files are left out. Keys that come back later form a second sample
    with the same key; `shards.table` reports those.
    """
    key: str | None = None
    components: list[Component] = []
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != key:
            if key is not None:
                yield IndexedSample(key, tuple(components))
            key, components = parts[0], []
        components.append(Component(parts[1], member.offset, member.size, member.name))
    if key is not None:
        yield IndexedSample(key, tuple(components))


def format_index(samples: Iterable[IndexedSample]) -> bytes:
    """The file's content.

    Raises:
        UserError: if a member name contains blanks, which the format cannot express.
    """
    lines = []
    for sample in samples:
        _check_names(sample)
        lines.append(" ".join(f"{part.extension} {part.offset} {part.size} {part.name}" for part in sample.components))
    return "\n".join((f"{VERSION} {len(lines)}", *lines, "")).encode()


def _check_names(sample: IndexedSample) -> None:
    for component in sample.components:
        if len(component.name.split()) != 1:
            raise UserError(
                f"member name {component.name!r} contains a blank",
                "The .idx format separates its fields by blanks. Write new shards with keys that have none:",
                "shards prepare webdataset DIR OUT",
            )


def list_samples(tar: Path) -> list[IndexedSample]:
    """The samples of a tar, from its headers, all of which an ``.idx`` can express.

    Raises:
        UserError: if the tar is damaged, holds no sample, or has names that the format cannot express.
    """
    samples = list(group(scan(tar)))
    if not samples:
        raise UserError(f"{tar}: no samples in this tar")
    try:
        for sample in samples:
            _check_names(sample)
    except UserError as error:
        raise UserError(f"{tar}: {error.headline}", *error.details) from None
    return samples


def read_count(path: Path) -> int:
    """Number of samples that an ``.idx`` announces in its first line.

    Raises:
        UserError: if the file is missing, unreadable or of another version.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            words = file.readline(64).split()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error
    if len(words) != 2 or words[0] != VERSION.encode() or not words[1].isdigit():
        raise _unusable(path, f"does not begin with '{VERSION} <samples>'")
    return int(words[1])


def read_index(path: Path) -> list[IndexedSample]:
    """All samples of an ``.idx``.

    Raises:
        UserError: if the file is missing, damaged, or its line count is not what it announces.
    """
    return [_parse_line(path, number, line) for number, line in enumerate(_read_lines(path), start=2)]


def read_samples(path: Path, rows: Sequence[int]) -> list[IndexedSample]:
    """`read_index` for some samples, by their place in the tar: of the other lines, only their number is checked."""
    lines = _read_lines(path)
    return [_parse_line(path, row + 2, lines[row]) for row in rows]


def _read_lines(path: Path) -> list[str]:
    count = read_count(path)
    try:
        lines = read_file(path, MAX_INDEX_BYTES).decode("utf-8", "replace").split("\n")[1:-1]
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error
    if len(lines) != count:
        raise _unusable(path, f"announces {count:,} samples and lists {len(lines):,}")
    return lines


def _parse_line(path: Path, number: int, line: str) -> IndexedSample:
    words = line.split(" ")
    if not line or len(words) % 4:
        raise _unusable(path, f"line {number} is not '<extension> <offset> <size> <name>' per component")
    try:
        components = tuple(
            Component(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)
        )
    except ValueError:
        raise _unusable(path, f"line {number}: offset or size is no number") from None
    parts = split_name(components[0].name)
    if parts is None:
        raise _unusable(path, f"line {number}: {components[0].name!r} has no extension")
    return IndexedSample(parts[0], components)


def _unusable(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}", f"Write it again from the tars: shards index {data_set_of(path)}")


def data_set_of(path: Path) -> Path:
    """The folder to index for a file beside a shard: shards may lie in a folder for each split."""
    return next((folder for folder in path.parents if (folder / "index.json").exists()), path.parent)
