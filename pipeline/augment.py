"""Which part of an image a sample shows, keyed by (seed, epoch, sample): no thread, worker or rank enters.

The random words come from Philox with the run's seed as key and (epoch, sample id) as counter, so any sample's view
can be drawn at any time without a state. The rules are torchvision's, so that the numbers compare with everybody's.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from pipeline.schema import Transform

VIEWS_NAME = "philox-v1"
"""Name and version of how views are drawn; saved with checkpoints, so it changes with any view of any sample."""

RESIZED_CROP_ATTEMPTS = 10  # as torchvision.transforms.RandomResizedCrop


@dataclass(frozen=True)
class View:
    """A rectangle of the image, in pixels, and whether it is mirrored left to right."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


class Augmentation:
    """Draws the training view of a sample.

    Args:
        transform: sizes and ranges.
        seed: the run's seed.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform = transform
        self.key = int.from_bytes(hashlib.sha256(f"augment:{seed}".encode()).digest()[:16], "little")
        """Of Philox, 128 bits: a decoder that draws the views itself needs it."""
        self._log_ratio = (math.log(transform.ratio[0]), math.log(transform.ratio[1]))

    def view(self, width: int, height: int, epoch: int, sample: int) -> View:
        """The view of one sample in one epoch.

        Args:
            width, height: of the image, in pixels.
            epoch: 0-based.
            sample: id in the training split.

        Returns:
            `resized`: a crop of the image, to be scaled to `size` × `size`; `none`: the whole image, likewise;
            `padded`: a `size` × `size` rectangle of the image scaled to `size` × `size`, that may reach up to
            `padding` pixels outside of it.
        """
        draw = Uniform(self.key, epoch, sample)
        flip = draw() < 0.5 if self.transform.flip else False
        if self.transform.crop == "resized":
            return self._resized_crop(width, height, draw, flip)
        if self.transform.crop == "padded":
            size, padding = self.transform.size, self.transform.padding
            left, top = (draw.integer(2 * padding) - padding for _ in range(2))
            return View(left, top, size, size, flip)
        return View(0, 0, width, height, flip)

    def _resized_crop(self, width: int, height: int, draw: Uniform, flip: bool) -> View:
        """torchvision's RandomResizedCrop.get_params: area and log aspect ratio uniform, ten attempts."""
        low, high = self.transform.scale
        for _ in range(RESIZED_CROP_ATTEMPTS):
            area = width * height * (low + (high - low) * draw())
            ratio = math.exp(self._log_ratio[0] + (self._log_ratio[1] - self._log_ratio[0]) * draw())
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = draw.integer(height - crop_height)
                left = draw.integer(width - crop_width)
                return View(left, top, crop_width, crop_height, flip)
        # too long or too wide an image: the largest central crop within the ratios
        crop_width, crop_height = width, height
        if width / height < self.transform.ratio[0]:
            crop_height = round(width / self.transform.ratio[0])
        elif width / height > self.transform.ratio[1]:
            crop_width = round(height * self.transform.ratio[1])
        return View((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height, flip)


class Uniform:
    """Uniform draws from one sample's own Philox stream.

    Args:
        key: 128 bits: what is drawn for, and the run's seed.
        epoch, sample: 0-based.
    """

    WORDS = 48  # at a time: the most that one view can use is 1 + 10 attempts × 2 + 2

    def __init__(self, key: int, epoch: int, sample: int) -> None:
        self._philox = np.random.Philox(key=key, counter=[0, 0, epoch, sample])
        self._words = iter(self._philox.random_raw(self.WORDS).tolist())

    def __call__(self) -> float:
        """A float in [0, 1): the top 53 bits of a word."""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._philox.random_raw(self.WORDS).tolist())
            word = next(self._words)
        return (word >> 11) * 2.0**-53

    def integer(self, high: int) -> int:
        """An integer in [0, high], both included."""
        return int(self() * (high + 1))
