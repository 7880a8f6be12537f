"""A contact sheet: small pictures in rows, each with its key and its class."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from shards.files import whole_file
from shards.images import describe_image

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

MAX_PIXELS = 100_000_000
"""A picture with more is not decoded; ImageNet's largest has 19 million."""

MAX_IMAGE_BYTES = 1 << 28

_SIDE = 176
_MARGIN = 24
_GAP = 14
_HEADING = 62
_CAPTION = 40

_PAGE, _CELL = (238, 238, 238), (205, 205, 205)
_INK, _FAINT, _RED = (24, 24, 24), (105, 105, 105), (176, 32, 32)


@dataclass(frozen=True)
class Picture:
    """One cell of the sheet."""

    data: bytes
    """The encoded image; empty if there is none, for the reason in `fault`."""
    title: str
    """The class."""
    key: str
    fault: str | None = None


def draw_sheet(
    path: Path, heading: str, subheading: str, pictures: Iterable[Picture], count: int, columns: int
) -> None:
    """Draw pictures row by row and write them as one PNG, which appears when it is complete.

    Pictures keep their shape, are never rotated by EXIF, and gray ones of 16 bits are clipped to white: so training
    reads them. What is transparent shows the cell, where training sees the colour below. A picture that cannot be
    decoded is a marked cell with the reason.

    Args:
        path: of the PNG.
        heading: first line, large.
        subheading: second line.
        pictures: at most `count`.
        count: how many there will be.
        columns: in each row.

    Raises:
        UserError: if the file cannot be written.
    """
    from PIL import Image, ImageDraw

    columns = min(columns, count)
    rows = -(-count // columns)
    width = max(2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP, 640)
    height = _MARGIN + _HEADING + rows * (_SIDE + _CAPTION + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * _MARGIN
    _text(draw, (_MARGIN, _MARGIN - 4), heading, _font(22, bold=True), room, _INK)
    _text(draw, (_MARGIN, _MARGIN + 26), subheading, _font(13), room, _FAINT)
    title_font, key_font = _font(13, bold=True), _font(11)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (_SIDE + _GAP)
        top = _MARGIN + _HEADING + row * (_SIDE + _CAPTION + _GAP)
        draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=_CELL)
        fault = picture.fault
        if fault is None:
            try:
                small = _decode(picture.data)
                sheet.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
            except Exception as error:  # a decoder fed with damaged bytes may raise anything
                fault = (str(error) or type(error).__name__).partition("\n")[0].partition(" <_io")[0]
        if fault is not None:
            _mark(draw, left, top, fault)
        _text(draw, (left, top + _SIDE + 4), picture.title, title_font, _SIDE, _INK)
        _text(draw, (left, top + _SIDE + 21), picture.key, key_font, _SIDE, _FAINT)
    with whole_file(path) as file:
        sheet.save(file, "PNG", optimize=False, compress_level=6)


def _decode(data: bytes) -> Image.Image:
    """The picture as RGB, on the cell's gray where it is transparent, at most `_SIDE` pixels wide and high."""
    from PIL import Image

    header = describe_image(data)
    if header is None:
        raise ValueError("not an image" if data else "0 bytes")
    if header.width and header.height and header.width * header.height > MAX_PIXELS:
        raise ValueError(f"{header.width:,} × {header.height:,} pixels are not decoded")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # corrupt EXIF and the like, which training does not look at either
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data)) as image:
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            image.load()
            transparent = "A" in image.getbands() or "transparency" in image.info
            pixels = image.convert("RGBA" if transparent else "RGB")
    scale = min(_SIDE / pixels.width, _SIDE / pixels.height)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    # tiny pictures are enlarged, with their pixels as squares
    small = pixels.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    if not transparent:
        return small
    page = Image.new("RGB", small.size, _CELL)
    page.paste(small, mask=small.getchannel("A"))
    return page


def _mark(draw: ImageDraw, left: int, top: int, fault: str) -> None:
    """A red frame with a cross, and the reason below it."""
    right, bottom = left + _SIDE - 1, top + _SIDE - 1
    draw.rectangle((left, top, right, bottom), outline=_RED, width=3)
    middle = left + _SIDE // 2
    for direction in (-1, 1):
        draw.line((middle - 22 * direction, top + 24, middle + 22 * direction, top + 68), fill=_RED, width=5)
    font = _font(12)
    lines = _wrap(draw, fault, font, _SIDE - 20)[:5]
    for number, line in enumerate(lines):
        _text(draw, (left + 10, top + 84 + 16 * number), line, font, _SIDE - 20, _RED)


def _wrap(draw: ImageDraw, text: str, font: FreeTypeFont, room: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _text(
    draw: ImageDraw, place: tuple[int, int], text: str, font: FreeTypeFont, room: int, ink: tuple[int, int, int]
) -> None:
    """One line, cut with … where it is longer than its room in pixels."""
    text = "".join(character if character.isprintable() else "�" for character in text[:500])
    if draw.textlength(text, font) > room:
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if draw.textlength(text[:middle] + "…", font) <= room else (low, middle - 1)
        text = text[:low].rstrip() + "…"
    draw.text(place, text, ink, font)


def _font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans as matplotlib brings it: it knows more letters than Pillow's own."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)
