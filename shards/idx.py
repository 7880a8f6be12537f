"""The ``.idx`` file beside a shard: where each component of each sample lies.

Byte for byte the text that NVIDIA DALI's ``wds2idx`` writes, version 1.2: a line ``v1.2 <samples>``, then one
line per sample with ``<extension> <offset> <size> <member name>`` for each of its components, all separated by
single blanks. Offsets and sizes are bytes of the component's data inside the tar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.tar import Member, scan, split_name

VERSION = "v1.2"


@dataclass(frozen=True, slots=True)
class Component:
    """One file of a sample: its extension as written (no dot), and its data's offset and size in bytes."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class IndexedSample:
    """One sample of a shard: webdataset's key, and its components in the order of the tar."""

    key: str
    components: tuple[Component, ...]


def index_path(tar: Path) -> Path:
    """``train-00000.tar`` → ``train-00000.idx``, where DALI and this package look for it."""
    return tar.with_suffix(".idx")


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
        for component in sample.components:
            if len(component.name.split()) != 1:
                raise UserError(
                    f"member name {component.name!r} contains a blank",
                    "The .idx format separates its fields by blanks. Make the shard again with other keys.",
                )
        lines.append(" ".join(f"{part.extension} {part.offset} {part.size} {part.name}" for part in sample.components))
    return "\n".join((f"{VERSION} {len(lines)}", *lines, "")).encode()


def index_tar(tar: Path) -> bytes:
    """The content of the ``.idx`` for a tar, from its headers.

    Raises:
        UserError: if the tar is damaged, holds no sample, or has names that the format cannot express.
    """
    samples = list(group(scan(tar)))
    if not samples:
        raise UserError(f"{tar}: no samples in this tar")
    try:
        return format_index(samples)
    except UserError as error:
        raise UserError(f"{tar}: {error.headline}", *error.details) from None


def read_count(path: Path) -> int:
    """Number of samples that an ``.idx`` announces in its first line.

    Raises:
        UserError: if the file is missing, unreadable or of another version.
    """
    try:
        with path.open("rb") as file:
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
    count = read_count(path)
    samples = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n")[1:-1], start=2):
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
        samples.append(IndexedSample(parts[0], components))
    if len(samples) != count:
        raise _unusable(path, f"announces {count:,} samples and lists {len(samples):,}")
    return samples


def _unusable(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}", f"Write it again from the tars: shards index {path.parent}")
