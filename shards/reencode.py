"""Encoding images anew, where a person asks for it: smaller ones, or ones that fast decoders accept.

Bytes stay verbatim by default. Where they do not, pixels are those that training would see: EXIF's orientation is
never applied, colour profiles are ignored and dropped with all other metadata, grayscale stays grayscale (of
16 bits, which training would see clipped to white, with its values scaled to 8), and everything else becomes RGB by
Pillow's ``convert("RGB")``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.images import ImageHeader

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZE_QUALITY = 90
"""Default JPEG quality of resized images; chroma at half resolution (4:2:0), as in most photographs."""

NORMALIZE_QUALITY = 95
"""Default JPEG quality of odd files made ordinary; chroma at full resolution (4:4:4)."""

_HALF_CHROMA, _FULL_CHROMA = "4:2:0", "4:4:4"


@dataclass(frozen=True)
class Reencoding:
    """Which images are encoded anew, and how; by default none."""

    resize_short: int | None = None
    """Images with a longer short side are reduced to it, in pixels, and become JPEGs; others are left alone."""
    normalize_odd: bool = False
    """Images that fast decoders refuse (`ImageHeader.odd`) become ordinary JPEGs."""
    quality: int | None = None
    """Of all JPEGs written, 1 to 100; None for the defaults above."""

    def check(self) -> None:
        """Check the numbers.

        Raises:
            UserError: naming the option.
        """
        if self.resize_short is not None and self.resize_short < 1:
            raise UserError(f"--resize-short {self.resize_short}: must be at least 1 pixel")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: JPEG qualities go from 1 to 100")
        if self.quality is not None and not self.is_active:
            raise UserError(
                f"--quality {self.quality}: has no effect, for images are kept as they are",
                "It goes with --resize-short or --normalize-odd.",
            )

    @property
    def is_active(self) -> bool:
        """Whether any image may change."""
        return self.resize_short is not None or self.normalize_odd

    def record(self) -> dict[str, Any]:
        """All that the bytes depend on, for the plan: the options and the versions of the encoder."""
        if not self.is_active:
            return {}
        import PIL
        from PIL import features

        record: dict[str, Any] = {}
        if self.resize_short is not None:
            record["resize_short"] = self.resize_short
            record["resize_quality"] = self.quality or RESIZE_QUALITY
        if self.normalize_odd:
            record["normalize_odd"] = True
            record["normalize_quality"] = self.quality or NORMALIZE_QUALITY
        record["pillow"] = PIL.__version__
        record["libjpeg"] = features.version("libjpeg_turbo") or features.version("jpg") or "unknown"
        return record

    def apply(self, data: bytes, header: ImageHeader) -> bytes:
        """The bytes to store: `data` itself, or a JPEG made of it.

        Raises:
            ValueError: if the image has to be decoded and cannot be; the message says why.
        """
        normalize = self.normalize_odd and header.odd
        if not normalize and not self._may_be_large(header):
            return data
        image = decode(data)
        size = self._reduced(image.size)
        if size is None and not normalize:
            return data
        if image.mode != "L":
            image = _scale(image) if image.mode[0] in "IF" else _convert(image)
        if size is None:
            return _encode(image, self.quality or NORMALIZE_QUALITY, _FULL_CHROMA)
        from PIL.Image import Resampling

        # Lanczos widens its filter with the reduction, so this is antialiased
        return _encode(image.resize(size, Resampling.LANCZOS), self.quality or RESIZE_QUALITY, _HALF_CHROMA)

    def _may_be_large(self, header: ImageHeader) -> bool:
        if self.resize_short is None:
            return False
        return header.width is None or header.height is None or min(header.width, header.height) > self.resize_short

    def _reduced(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """New width and height, the longer side rounded down as torchvision's Resize does; None to keep the size."""
        short = min(size)
        if self.resize_short is None or short <= self.resize_short:
            return None
        width, height = (self.resize_short * side // short for side in size)
        return width, height


def decode(data: bytes) -> Image:
    """Decode an image with Pillow, in its own mode.

    Raises:
        ValueError: if it is damaged, no image, or so large that it may be meant to exhaust the memory.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF and the like, which does not concern the pixels
            image = Image.open(BytesIO(data))
            image.load()
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    return image


def _convert(image: Image) -> Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transparency, which RGB does not have
        return image.convert("RGB")


def _scale(image: Image) -> Image:
    """Gray of 16 bits as gray of 8; of more bits, nobody knows which value is white."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        raise ValueError(f"{image.format} pixels of the kind {image.mode} have no known white: make it 8-bit gray")
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _encode(image: Image, quality: int, subsampling: str) -> bytes:
    image.info = {}  # Pillow would carry a comment over
    if image.mode == "L":
        subsampling = _FULL_CHROMA  # there is none, and libjpeg would write the factors into the file all the same
    buffer = BytesIO()
    try:
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    except (OSError, ValueError) as error:  # beyond the 65,500 pixels that a side of a JPEG can have
        raise ValueError(f"{image.width} × {image.height} pixels cannot be encoded as JPEG: {error}") from error
    return buffer.getvalue()
