"""LARS and LAMB: a rate for each layer, by the norms of its weights and of its update; timm's implementations.

You et al. 2017 (arXiv:1708.03888) and 2020 (arXiv:1904.00962). DeepSpeed has no LARS, and its LAMB is a CUDA extension
that is compiled at start-up and does not exist on a CPU; so these are made here and handed to it. Neither decays biases
and normalisation's γ and β, nor gives them a rate of their own: timm adapts what decays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim import Lamb, Lars

from pipeline.deepspeed_schema import OptimizerBlock

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def make_optimizer(block: OptimizerBlock) -> MakeOptimizer | None:
    """What makes the optimizer of a configuration from parameter groups; None for those that DeepSpeed makes."""
    params: Mapping[str, Any] = block.params
    if block.type == "Lars":
        return lambda groups: Lars(groups, **params)
    if block.type == "Lamb":
        # timm clips at norm 1 unless told otherwise; gradient_clipping is what clips here
        return lambda groups: Lamb(groups, **params, max_grad_norm=None)
    return None
