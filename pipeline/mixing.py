"""Mixup and CutMix of a micro-batch on the device, keyed: a logical worker mixes the same way whichever rank runs it.

timm does the mixing. It draws from NumPy's global generator, which is seeded for each micro-batch and put back after.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from timm.data.mixup import Mixup

from pipeline.augment_schema import Mixing


class KeyedMixup:
    """Mixes images and labels.

    Args:
        section: of the recipe.
        classes: outputs of the model.
        seed: the run's seed.
    """

    def __init__(self, section: Mixing, classes: int, seed: int) -> None:
        self._seed = seed
        self._mixup = Mixup(
            mixup_alpha=section.mixup_alpha,
            cutmix_alpha=section.cutmix_alpha,
            prob=section.probability,
            switch_prob=section.switch_probability,
            mode=section.mode,
            label_smoothing=section.label_smoothing,
            num_classes=classes,
        )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, update: int, worker: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a micro-batch.

        Args:
            images: float32 (n, 3, size, size), n even; changed in place.
            labels: int64 (n,).
            update: 0-based.
            worker: j of the k logical workers, 0-based.

        Returns:
            The images, and for each the shares of the classes: float32 (n, classes).
        """
        key = hashlib.sha256(f"mixing:{self._seed}:{update}:{worker}".encode()).digest()
        kept = np.random.get_state()
        np.random.seed(np.frombuffer(key, np.uint32))
        try:
            return self._mixup(images, labels)
        finally:
            np.random.set_state(kept)
