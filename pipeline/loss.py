"""What training minimises, of logits in float32 whatever the network computes in.

Label smoothing is Szegedy et al.'s (2016, arXiv:1512.00567, §7). Binary cross entropy takes each class as a question of
its own, as in timm's recipes of Wightman et al. (2021, arXiv:2110.00476): the mean over images and classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from pipeline.options_schema import Loss

TrainingLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def training_loss(section: Loss) -> TrainingLoss:
    """The loss that a recipe asks for.

    Returns:
        A function: logits, float32 (n, classes), and targets, int64 (n,) of classes or, of mixed images,
        float32 (n, classes) of their shares → the mean loss of the images, a scalar.
    """
    if section.kind == "binary_cross_entropy":
        return BinaryCrossEntropy(section.label_smoothing, section.target_threshold)
    return partial(F.cross_entropy, label_smoothing=section.label_smoothing)
