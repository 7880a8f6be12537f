"""The middle rung, wheels alone: libjpeg-turbo decodes, torchvision's antialiased resize of bytes does the rest.

simplejpeg is imported when a decoder is made: without it there is no such rung, and nothing else changes.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.augment import Augmentation
from pipeline.rungs import RefusedError
from pipeline.schema import Transform

COLOUR_SPACES = ("YCbCr", "Gray", "RGB")
"""Of which libjpeg-turbo makes the same RGB as Pillow; inverted CMYK it takes as it is."""


class SimpleJpegDecoder:
    """Decodes undamaged JPEGs, progressive ones too, other than CMYK. Arguments as `decode_pillow.PillowDecoder`."""

    def __init__(self, transform: Transform, seed: int) -> None:
        import simplejpeg

        self.transform = transform
        self.augmentation = Augmentation(transform, seed)
        self._library = simplejpeg

    def train(self, data: bytes, out: np.ndarray, epoch: int, sample: int) -> None:
        """As `decode_pillow.PillowDecoder.train`.

        Raises:
            RefusedError: for the next rung.
        """
        size = len(out)
        pixels = self._decode(data)
        height, width, _ = pixels.shape
        view = self.augmentation.view(width, height, epoch, sample)
        if self.transform.crop == "padded":
            image = _shifted(_resize(pixels, [size, size]), view.left, view.top)
        else:
            box = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
            image = _resize(np.ascontiguousarray(box), [size, size])
        if view.flip:
            # channel by channel NumPy's loops are long: four times as fast as mirroring pixels of three bytes
            for channel in range(3):
                out[:, :, channel] = image[:, ::-1, channel]
        else:
            out[...] = image

    def evaluate(self, data: bytes, out: np.ndarray) -> None:
        """As `decode_pillow.PillowDecoder.evaluate`.

        Raises:
            RefusedError: for the next rung.
        """
        image = _resize(self._decode(data), [self.transform.evaluation_resize])
        height, width, _ = image.shape
        size = len(out)
        top, left = round((height - size) / 2), round((width - size) / 2)  # as torchvision rounds
        out[...] = image[top : top + size, left : left + size]

    def _decode(self, data: bytes) -> np.ndarray:
        """RGB, uint8 [height, width, 3]."""
        try:
            height, width, colours, _ = self._library.decode_jpeg_header(data)
        except ValueError:
            raise RefusedError("unsupported") from None
        limit = Image.MAX_IMAGE_PIXELS  # Pillow's warning of a decompression bomb is Pillow's to give
        if colours not in COLOUR_SPACES or (limit is not None and height * width > limit):
            raise RefusedError("unsupported")
        try:
            return self._library.decode_jpeg(data, "RGB", strict=True)
        except ValueError:
            raise RefusedError("damaged") from None


def _resize(pixels: np.ndarray, size: list[int]) -> np.ndarray:
    """Resize contiguous pixels, uint8 [height, width, 3], to another height and width, or to a short side.

    As a batch of one in channels_last memory: then torch resizes the bytes as they lie, and copies nothing. On views
    it would copy, and its copies start a team of threads for each thread that calls.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)[0].permute(1, 2, 0).numpy()


def _shifted(image: np.ndarray, left: int, top: int) -> np.ndarray:
    """The square of an image's own size that begins at (left, top), black where it reaches outside."""
    size = len(image)
    out = np.zeros_like(image)
    left, top = (max(-size, min(size, start)) for start in (left, top))
    rows, columns = (slice(max(0, start), min(size, start + size)) for start in (top, left))
    out[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = image[rows, columns]
    return out
