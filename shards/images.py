"""Which bytes are an image, the extension that its content calls for, and what its header says.

File names lie: ImageNet's ``n02105855_2933.JPEG`` is a PNG. The extension of a sample therefore comes from its
first bytes, so that a reader that picks its decoder by extension picks the right one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from shards.jpeg_header import JpegHeader, read_jpeg_header

SNIFF_BYTES = 16
"""How many leading bytes `image_extension` needs."""

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif")
)
"""Extensions (lower case, no dot) that mark the image among the components of a sample."""

ORDINARY_KINDS = ("JPEG", "gray JPEG")
"""What fast decoders accept, by `ImageHeader.kind`."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
)


def image_extension(data: bytes) -> str | None:
    """Extension, without dot, of the image format that these bytes begin with; None if they are no image.

    Args:
        data: the file's bytes, or at least its first `SNIFF_BYTES`.
    """
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # the reserved field: "BM" alone begins many texts
        return "bmp"
    if data[:2] in (b"P4", b"P5", b"P6") and data[2:3].isspace():
        return {b"4": "pbm", b"5": "pgm", b"6": "ppm"}[data[1:2]]
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return None


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image's first bytes say about it; None where its format's header is not read."""

    format: str
    """As `image_extension` names it: "jpg", "png", …"""
    width: int | None = None
    """In pixels, as stored: EXIF's orientation does not enter."""
    height: int | None = None
    components: int | None = None
    """Per pixel as stored: 1 for gray and for palettes, 3, or 4 with black or alpha."""
    bits: int | None = None
    """Per component."""
    colour: str | None = None
    """"gray", "YCbCr", "RGB", "CMYK", "YCCK", "palette", "gray+alpha", "RGB+alpha"."""
    jpeg: JpegHeader | None = None
    """More about a JPEG; None also for one without a frame header."""

    @property
    def progressive(self) -> bool:
        """Whether it is a JPEG whose coefficients come in several passes."""
        return self.jpeg is not None and self.jpeg.process == "progressive"

    @property
    def kind(self) -> str:
        """For tables: "JPEG" and "gray JPEG" for ordinary ones, "progressive CMYK JPEG", "PNG", …"""
        if self.format != "jpg":
            return self.format.upper()
        if self.jpeg is None:
            return "damaged JPEG"
        one_scan = self.jpeg.one_scan or self.progressive
        colour = f"{self.components}-component" if self.colour == "unknown" else self.colour
        words = (
            None if self.bits == 8 else f"{self.bits}-bit",
            "arithmetic" if self.jpeg.arithmetic else None,
            None if self.jpeg.process in ("baseline", "extended") else self.jpeg.process,
            None if one_scan else "multi-scan",
            None if colour == "YCbCr" else colour,
        )
        return " ".join((*filter(None, words), "JPEG"))

    @property
    def odd(self) -> bool:
        """Whether fast decoders refuse it: anything but a sequential 8-bit Huffman-coded gray or YCbCr JPEG."""
        return self.kind not in ORDINARY_KINDS

    @property
    def clipped(self) -> bool:
        """Whether Pillow's ``convert("RGB")``, as training calls it, makes white of all but its darkest values."""
        return self.format in ("png", "pgm") and self.colour == "gray" and (self.bits or 0) > 8


def describe_image(data: bytes) -> ImageHeader | None:
    """Read what an image is from its header, decoding nothing; None if the bytes are no image.

    Args:
        data: the file's bytes. Damaged and hostile ones are described as far as they can be, and never raise.
    """
    extension = image_extension(data)
    if extension is None:
        return None
    if extension == "jpg":
        jpeg = read_jpeg_header(data)
        if jpeg is None:
            return ImageHeader(extension)
        return ImageHeader(extension, jpeg.width, jpeg.height, jpeg.components, jpeg.bits, jpeg.colour, jpeg)
    read = _READERS.get(extension)
    try:
        return ImageHeader(extension, *read(data)) if read else ImageHeader(extension)
    except (struct.error, ValueError, KeyError, IndexError):  # shorter than its header, or no header at all
        return ImageHeader(extension)


_Fields = tuple[int | None, int | None, int | None, int | None, str | None]
"""Width, height, components, bits, colour."""

_PNG_COLOURS = {0: (1, "gray"), 2: (3, "RGB"), 3: (1, "palette"), 4: (2, "gray+alpha"), 6: (4, "RGB+alpha")}


def _read_png(data: bytes) -> _Fields:
    width, height, bits, colour_type = struct.unpack_from(">2I2B", data, 16)
    components, colour = _PNG_COLOURS[colour_type]
    return width, height, components, bits, colour


def _read_gif(data: bytes) -> _Fields:
    width, height = struct.unpack_from("<2H", data, 6)
    return width, height, 1, 8, "palette"


def _read_bmp(data: bytes) -> _Fields:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # OS/2's header
        width, height, _, pixel_bits = struct.unpack_from("<4H", data, 18)
    else:
        width, height, _, pixel_bits = struct.unpack_from("<2i2H", data, 18)
    components, bits, colour = (1, pixel_bits, "palette") if pixel_bits <= 8 else (3, 8, "RGB")
    return abs(width), abs(height), components, bits, colour  # a negative height says that rows go downwards


def _read_webp(data: bytes) -> _Fields:
    chunk = data[12:16]
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<2H", data, 26)
        width, height, alpha = width & 0x3FFF, height & 0x3FFF, False
    elif chunk == b"VP8L":
        packed = struct.unpack_from("<I", data, 21)[0]
        width, height, alpha = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1, bool(packed >> 28 & 1)
    else:  # VP8X
        flags, low, high, height_low, height_high = struct.unpack_from("<B3xHBHB", data, 20)
        width, height, alpha = (low | high << 16) + 1, (height_low | height_high << 16) + 1, bool(flags & 0x10)
    return width, height, 4 if alpha else 3, 8, "RGB+alpha" if alpha else "RGB"


def _read_pnm(data: bytes) -> _Fields:
    words = re.sub(rb"#[^\n]*", b"", data[:1024]).split()
    width, height = int(words[1]), int(words[2])
    bits = 1 if words[0] == b"P4" else int(words[3]).bit_length()
    components, colour = (3, "RGB") if words[0] == b"P6" else (1, "gray")
    return width, height, components, bits, colour


_READERS: dict[str, Callable[[bytes], _Fields]] = {
    "png": _read_png,
    "gif": _read_gif,
    "bmp": _read_bmp,
    "webp": _read_webp,
    "pbm": _read_pnm,
    "pgm": _read_pnm,
    "ppm": _read_pnm,
}
