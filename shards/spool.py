"""Images copied one after another out of a file that cannot give single ones, so that they can be read by number.

A spool is three files: the images end to end, their offsets, and a record of what they were copied from. The
record is written last, so a spool that has one is whole; it goes when the spool is written again.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import whole_file, write_whole
from shards.manifest import to_json

_OFFSET_BYTES = 8


def is_spooled(folder: Path, number: int, origin: dict[str, Any]) -> bool:
    """Whether spool `number` is whole and was copied from this origin."""
    try:
        return json.loads(_path(folder, number, "json").read_bytes()) == origin
    except (OSError, ValueError):
        return False


def write_spool(folder: Path, number: int, origin: dict[str, Any], images: Iterable[Any]) -> None:
    """Copy images into spool `number`, replacing what is there; in memory stay 8 bytes per image.

    Args:
        folder: must exist.
        number: of the spool in its folder.
        origin: what identifies the file that the images come from (JSON values).
        images: bytes or buffers.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    _path(folder, number, "json").unlink(missing_ok=True)
    offsets = array("Q", [0])
    with whole_file(_path(folder, number, "images")) as file:
        for image in images:
            offsets.append(offsets[-1] + file.write(image))
    write_whole(_path(folder, number, "offsets"), offsets.tobytes())
    write_whole(_path(folder, number, "json"), to_json(origin))


def read_spooled(folder: Path, number: int, row: int) -> bytes:
    """The bytes of image `row`, counted from 0, of a spool.

    Raises:
        UserError: if the spool cannot be read or is shorter than it was.
    """
    path = _path(folder, number, "images")
    try:
        with _path(folder, number, "offsets").open("rb") as file:
            start, stop = array("Q", os.pread(file.fileno(), 2 * _OFFSET_BYTES, row * _OFFSET_BYTES))
        with path.open("rb") as file:
            image = os.pread(file.fileno(), stop - start, start)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: image {row:,} cannot be read: {error}", "Run the same command again.") from error
    if len(image) != stop - start:
        raise UserError(
            f"{path}: truncated: image {row:,} ends at byte {stop:,}", f"Remove {folder}, then run the command again."
        )
    return image


def remove_others(folder: Path, numbers: Iterable[int]) -> None:
    """Remove everything from a folder of spools but the whole spools of these numbers."""
    kept = {_path(folder, number, part).name for number in numbers for part in ("images", "offsets", "json")}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _path(folder: Path, number: int, part: str) -> Path:
    return folder / f"{number:05d}.{part}"
