"""What the items of a torchvision data set are, and where their pictures come from.

Torchvision's sets open every picture with ``PIL.Image.open``. While an item is loaded in `noting_pictures`, that
function only notes what it is given and decodes nothing: the file, or the encoded bytes, that the item is made of.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.sources.base import make_distinct


@contextmanager
def noting_pictures() -> Iterator[list[Any]]:
    """While this holds, ``PIL.Image.open`` returns one black pixel and what it was to open is noted.

    Not for processes in which other threads open images.
    """
    from PIL import Image

    noted: list[Any] = []
    original = Image.open

    def note(file: Any, *args: Any, **kwargs: Any) -> Image.Image:
        noted.append(file)
        return Image.new("RGB", (1, 1))

    Image.open = note  # type: ignore[assignment]
    try:
        yield noted
    finally:
        Image.open = original


def locate_picture(place: str, item: tuple[Any, Any], noted: list[Any]) -> Path | bytes:
    """The file that was to be opened, the encoded bytes that were, or the PNG of an array's picture."""
    if len(noted) > 1:
        raise UserError(f"{place}: is made of {len(noted)} pictures; an item must be one image and one class number")
    if noted:
        opened = noted[0]
        if isinstance(opened, io.BytesIO):
            return opened.getvalue()
        return Path(opened if isinstance(opened, str | os.PathLike) else opened.name)
    image = item[0]
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG", compress_level=0)
    except OSError as error:
        raise UserError(f"{place}: a picture of mode {image.mode} cannot be a PNG file") from error
    return buffer.getvalue()


def check_same_picture(place: str, source: Path | bytes, shown: Any) -> None:
    """Check that an item shows what its file or bytes hold, and not something made of it."""
    from PIL import Image

    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        if image.size != shown.size or image.convert(shown.mode).tobytes() != shown.tobytes():
            raise UserError(
                f"{place}: shows another picture than {source if isinstance(source, Path) else 'the one it opens'}",
                "The class changes its pictures after opening them, which shards of the original files would not show.",
            )


def class_names(dataset: Any) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Names and titles; no names if the class gives none."""
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not names:
        by_name: dict[str, int] = getattr(dataset, "class_to_idx", None) or {}
        names = sorted(by_name, key=lambda name: by_name[name])
    readable = tuple(", ".join(name) if isinstance(name, tuple | list) else str(name) for name in names)
    wnids = getattr(dataset, "wnids", None)
    return (tuple(wnids), readable) if wnids else (make_distinct(readable), None)


def is_picture(value: Any) -> bool:
    """Whether it is an image of Pillow's."""
    from PIL import Image

    return isinstance(value, Image.Image)


def whole_number(value: Any) -> int | None:
    """A class number, also as a scalar of NumPy or torch; None for anything else."""
    try:
        return None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError):  # torch: only tensors of one whole number have an index
        return None


def describe(value: Any) -> str:
    """A part of an item, for messages: its type, and its shape or value."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {list(shape)}"
    return repr(value) if value is None or isinstance(value, int | str) else type(value).__name__
