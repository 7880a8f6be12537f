"""Which tars of a folder are shards, and to which split each belongs.

The split comes from the folder that a tar lies in (``train/00000.tar``), else from its file name
(``imagenet1k-validation-00.tar``); if no name says anything (img2dataset's ``00000.tar``), all are training shards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError

SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?(?=[-_.\d]|$)", re.IGNORECASE)
"""How a file or a folder says which split it belongs to."""

_COMPRESSED_NAMES = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd --rm"}
_COMPRESSED_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}


@dataclass(frozen=True)
class Layout:
    """The shards of a folder."""

    splits: dict[str, list[Path]]
    """Sorted tars by split, training first."""
    left_out: tuple[Path, ...]
    """Subfolders with tars whose name says no split."""

    @property
    def tars(self) -> list[Path]:
        """All of them, split by split."""
        return [tar for part in self.splits.values() for tar in part]


def find_shards(folder: Path, known: Mapping[Path, str] | None = None) -> Layout:
    """Find the tars directly in a folder, and those below its subfolders that are named like a split.

    Args:
        folder: to look into.
        known: splits of tars that an earlier index lists, for those whose names say nothing.

    Raises:
        UserError: if there are none, some are compressed, or only some names say a split.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    tars, left_out = _list_tars(folder)
    if not tars:
        there = ", ".join(str(path) for path in left_out)
        raise UserError(
            f"{folder}: no tars in this folder",
            f"There are some in {there}: give that folder, or name it train or val."
            if there
            else f"Make some with: shards prepare SOURCE {folder}",
        )
    return Layout(sort_into_splits(folder, tars, known or {}), tuple(left_out))


def _list_tars(folder: Path) -> tuple[list[Path], list[Path]]:
    tars, left_out = _tars_in(folder, "*"), []
    for inner in _subfolders(folder):
        below = _tars_in(inner, "**/*")
        if SPLIT_IN_NAME.search(inner.name):
            tars += below
        elif below:
            left_out.append(inner)
    return sorted(tars), left_out


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _tars_in(folder: Path, pattern: str) -> list[Path]:
    tars = []
    for path in folder.glob(pattern):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        name = path.name.lower()
        if name.endswith(".tar"):
            if path.suffix != ".tar":
                raise UserError(
                    f"{path}: shards are found by the extension .tar, in lower case",
                    f"Rename it: {path.stem}.tar. If it is no shard, move it out of this folder.",
                )
            _check_uncompressed(path)
            tars.append(path)
        elif name.endswith((".tgz", *(f".tar.{ending}" for ending in _COMPRESSED_NAMES))):
            raise _compressed(path, path.suffix[1:].lower())
    return tars


def _check_uncompressed(tar: Path) -> None:
    if not tar.is_file():
        return  # a FIFO would wait for ever; what reads the tar says what is wrong with it
    try:
        with tar.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read: {error.strerror}") from error
    for magic, ending in _COMPRESSED_MAGIC.items():
        if start.startswith(magic):
            raise _compressed(tar, ending)


def _compressed(path: Path, ending: str) -> UserError:
    named = path.name if path.suffix != ".tar" else f"{path.name}.{ending}"
    return UserError(
        f"{path}: compressed, so that no image in it can be read without unpacking all before it",
        f"Images hardly shrink further: unpack it with: {_COMPRESSED_NAMES[ending]} {named}"
        + ("" if named == path.name else f" (once renamed so: it is compressed with {ending})"),
        "If it is no shard, move it out of this folder.",
    )


def sort_into_splits(folder: Path, tars: Sequence[Path], known: Mapping[Path, str]) -> dict[str, list[Path]]:
    """The split of each tar below a folder, by the rule at the top; `known` are splits of those whose names say none.

    Raises:
        UserError: if only some names say a split.
    """
    named = {tar: _split_of(folder, tar) for tar in tars}
    default = None if any(named.values()) else "train"
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for tar, name in named.items():
        split = name or known.get(tar) or default
        if split is None:
            raise UserError(
                f"{tar}: its name says no split, while other names do",
                "Begin it with train-, val- or test-, or move it to a folder of its own.",
            )
        splits.setdefault(split, []).append(tar)
    if not splits["val"]:  # as with class folders: a test split with labels serves for validation
        splits["val"] = splits.pop("test")
    return {name: part for name, part in splits.items() if part}


def _split_of(folder: Path, tar: Path) -> str | None:
    inner = tar.relative_to(folder).parts[0]
    match = SPLIT_IN_NAME.search(inner if tar.parent != folder else tar.stem)
    return match[1].lower() if match else None
