"""What changes an image after its view has been cut out: colour jitter, random operations, erasing.

Torchvision does the changing; the draws are ours. Its own come from one generator of the whole process, so that they
would depend on which thread is first; here every sample draws from its own Philox streams, keyed by (seed, epoch,
sample) like its view, and one for each section: switching one on changes no draw of another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipeline.augment import Uniform
from pipeline.augment_schema import MAGNITUDES, AutoAugment, ColorJitter, RandomErasing
from pipeline.schema import Transform
from shards.errors import UserError

ERASING_ATTEMPTS = 10  # as torchvision.transforms.v2.RandomErasing

_TORCHVISION_NAMES = ("_AUGMENTATION_SPACE", "_apply_image_or_video_transform", "_fill", "interpolation")

_Change = Callable[[torch.Tensor, Uniform], torch.Tensor]
"""uint8 (3, size, size) and its draws → the same shape."""


def image_augmentation(transform: Transform, seed: int) -> ImageAugmentation | None:
    """The changes that a recipe asks for, or None if it asks for none: then they cost nothing."""
    return ImageAugmentation(transform, seed) if transform.changes_images else None


class ImageAugmentation:
    """Changes training images in place, in the order random operations, colour jitter, erasing.

    Args:
        transform: has a section for each.
        seed: the run's seed.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self._changes: list[tuple[int, _Change]] = []
        if transform.auto_augment is not None:
            mean = [round(255 * value) for value in transform.mean]
            self._changes.append((_key("auto_augment", seed), _RandomOperations(transform.auto_augment, fill=mean)))
        if transform.color_jitter is not None:
            self._changes.append((_key("color_jitter", seed), _KeyedColorJitter(transform.color_jitter)))
        if transform.random_erasing is not None:
            erasing = _Erasing(transform.random_erasing, transform.mean, transform.std)
            self._changes.append((_key("random_erasing", seed), erasing))

    def apply(self, pixels: np.ndarray, epoch: int, sample: int) -> None:
        """Change one image.

        Args:
            pixels: uint8 of shape (size, size, 3), written in place.
            epoch: 0-based.
            sample: id in the training split.
        """
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        for key, change in self._changes:
            image = change(image, Uniform(key, epoch, sample))
        pixels[...] = image.permute(1, 2, 0).numpy()


def _key(section: str, seed: int) -> int:
    """Of Philox, 128 bits."""
    return int.from_bytes(hashlib.sha256(f"image-augment:{section}:{seed}".encode()).digest()[:16], "little")


class _RandomOperations:
    """RandAugment and TrivialAugment: torchvision's operations and magnitudes, with the draws of a sample."""

    def __init__(self, section: AutoAugment, fill: list[int]) -> None:
        self._section = section
        self._operations = v2.RandAugment(fill=fill) if section.kind == "rand" else v2.TrivialAugmentWide(fill=fill)
        # torchvision's, and not public: what draws them does not take draws from elsewhere
        absent = [name for name in _TORCHVISION_NAMES if not hasattr(self._operations, name)]
        if absent:
            raise UserError(
                f"recipe.transform.auto_augment cannot be used with torchvision {version('torchvision')}: "
                f"its {type(self._operations).__name__} has no {' and no '.join(absent)}",
                "Supported are 0.23 to 0.29: install one of them, or leave the section out.",
            )
        self._space = list(self._operations._AUGMENTATION_SPACE.items())

    def __call__(self, image: torch.Tensor, draw: Uniform) -> torch.Tensor:
        is_trivial = self._section.kind == "trivial"
        for _ in range(1 if is_trivial else self._section.operations):
            name, (magnitudes_of, is_signed) = self._space[draw.integer(len(self._space) - 1)]
            index = draw.integer(MAGNITUDES - 1) if is_trivial else self._section.magnitude
            sign = -1 if draw() < 0.5 and is_signed else 1
            magnitudes = magnitudes_of(MAGNITUDES, image.shape[1], image.shape[2])
            image = self._operations._apply_image_or_video_transform(
                image,
                name,
                0.0 if magnitudes is None else sign * float(magnitudes[index]),
                interpolation=self._operations.interpolation,
                fill=self._operations._fill,
            )
        return image


class _KeyedColorJitter:
    """torchvision's ColorJitter, with the draws of a sample."""

    def __init__(self, section: ColorJitter) -> None:
        self._probability = section.probability
        self._adjustments: list[tuple[Callable[[torch.Tensor, float], torch.Tensor], float, float]] = [
            (function, max(0.0, 1 - strength), 1 + strength)
            for function, strength in (
                (F.adjust_brightness, section.brightness),
                (F.adjust_contrast, section.contrast),
                (F.adjust_saturation, section.saturation),
            )
            if strength
        ]
        if section.hue:
            self._adjustments.append((F.adjust_hue, -section.hue, section.hue))

    def __call__(self, image: torch.Tensor, draw: Uniform) -> torch.Tensor:
        if draw() >= self._probability:
            return image
        drawn = [(draw(), function, low + (high - low) * draw()) for function, low, high in self._adjustments]
        for _, function, factor in sorted(drawn, key=lambda adjustment: adjustment[0]):
            image = function(image, factor)
        return image


class _Erasing:
    def __init__(self, section: RandomErasing, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._section = section
        self._mean = 255 * torch.tensor(mean).view(3, 1, 1)
        self._std = 255 * torch.tensor(std).view(3, 1, 1)
        self._log_ratio = (math.log(section.ratio[0]), math.log(section.ratio[1]))

    def __call__(self, image: torch.Tensor, draw: Uniform) -> torch.Tensor:
        if draw() >= self._section.probability:
            return image
        rows, columns = image.shape[1:]
        low, high = self._section.scale
        for _ in range(ERASING_ATTEMPTS):
            area = rows * columns * (low + (high - low) * draw())
            ratio = math.exp(self._log_ratio[0] + (self._log_ratio[1] - self._log_ratio[0]) * draw())
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width < columns and height < rows:
                top, left = draw.integer(rows - height), draw.integer(columns - width)
                return F.erase(image, top, left, height, width, self._fill(height, width, draw))
        return image

    def _fill(self, height: int, width: int, draw: Uniform) -> torch.Tensor:
        colour = self._mean
        if self._section.fill == "noise":
            generator = np.random.Generator(np.random.Philox(key=draw.integer(2**48)))
            colour = colour + self._std * torch.from_numpy(
                generator.standard_normal((3, height, width), dtype=np.float32)
            )
        return colour.round().clamp(0, 255).to(torch.uint8)
