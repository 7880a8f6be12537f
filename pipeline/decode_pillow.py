"""The last rung: Pillow decodes, torchvision cuts and resizes. What it refuses is no image."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.augment import Augmentation
from pipeline.schema import Transform

# What does not concern the pixels: damaged EXIF tags, of which ImageNet has a few (the TIFF module reads them for every
# format), a second picture in one file, and transparency, which RGB does not have. Filtered once for the process:
# warnings.catch_warnings is not safe in threads. Pillow's warning of a decompression bomb stays visible.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin$")
warnings.filterwarnings("ignore", "Image appears to be a malformed MPO", UserWarning, r"PIL\.JpegImagePlugin$")
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning, r"PIL\.Image$")


class DecodeError(Exception):
    """The bytes are not an image that can be decoded; the message says what is wrong with them."""


class PillowDecoder:
    """Decodes anything that Pillow reads; grayscale, CMYK and palettes become RGB, EXIF rotation is not applied.

    (torchvision's loaders do not rotate either, and published accuracies depend on that.)

    Args:
        transform: ranges of the views, and the size before the centre crop.
        seed: the run's seed, which keys the training views.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform = transform
        self.augmentation = Augmentation(transform, seed)

    def train(self, data: bytes, out: np.ndarray, epoch: int, sample: int) -> None:
        """Decode the training view of a sample.

        Args:
            data: the encoded image.
            out: uint8 of shape (size, size, 3), written in place.
            epoch, sample: the keys of the view.

        Raises:
            DecodeError: not an image, or a damaged one.
        """
        image = _decode(data)
        size, padding = len(out), self.transform.padding
        view = self.augmentation.view(image.width, image.height, epoch, sample)
        if self.transform.crop == "padded":
            whole = F.resize(image, [size, size], InterpolationMode.BILINEAR, antialias=True)
            padded = F.pad(whole, [padding] * 4)
            image = F.crop(padded, view.top + padding, view.left + padding, size, size)
        else:
            image = F.resized_crop(
                image,
                view.top,
                view.left,
                view.height,
                view.width,
                [size, size],
                InterpolationMode.BILINEAR,
                antialias=True,
            )
        if view.flip:
            image = F.horizontal_flip(image)
        out[...] = np.asarray(image)

    def evaluate(self, data: bytes, out: np.ndarray) -> None:
        """Decode for evaluation: short side to `evaluation_resize`, centre crop of `out`'s size (fb.resnet.torch).

        Raises:
            DecodeError: not an image, or a damaged one.
        """
        image = _decode(data)
        image = F.resize(image, [self.transform.evaluation_resize], InterpolationMode.BILINEAR, antialias=True)
        out[...] = np.asarray(F.center_crop(image, [len(out)] * 2))


def _decode(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's formats raise what they like: struct.error, IndexError, EOFError, …
        raise DecodeError(f"cannot be decoded ({len(data):,} bytes): {error}") from None
