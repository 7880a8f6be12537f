"""Dropout and stochastic depth, keyed: a logical worker draws the same masks whichever rank runs it, and when."""

from __future__ import annotations

import hashlib

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def is_stochastic(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return True
        if isinstance(module, DropPath | DropBlock2d) and (module.drop_prob or 0) > 0:
            return True
        if isinstance(module, PatchDropout) and module.prob > 0:
            return True
    return False


def seed_worker(seed: int, update: int, worker: int) -> None:
    """Seed torch's generators, on the CPU and on the GPU, for one logical worker of one update.

    Args:
        seed: the run's.
        update: 0-based.
        worker: j of the k logical workers, 0-based.
    """
    key = hashlib.sha256(f"stochastic:{seed}:{update}:{worker}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:8], "little") >> 1)
