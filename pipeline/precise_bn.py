"""BN's statistics of the present weights, recomputed over training images before an evaluation.

Running statistics are an average over updates whose weights were others; the fewer updates there are in an epoch, the
more they lag, and early validation errors of a large minibatch are noisy for that reason alone (Goyal et al. §5.1 and
Figure 4). Here they are the means over many batches of n under the weights that are evaluated: "precise BN", of the
variances as in fvcore.nn.precise_bn (Wu and Johnson 2021, arXiv:2105.07576, §3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.batch_norm import batch_norms
from pipeline.loader import MicroBatch
from pipeline.transfer import frozen_norms
from shards.errors import UserError


def layers(network: nn.Module) -> list[_BatchNorm]:
    """The BN layers whose statistics are recomputed: not those that are frozen, nor those of a cumulative average."""
    frozen = {id(layer) for layer in frozen_norms(network)}
    return [layer for layer in batch_norms(network) if id(layer) not in frozen and layer.momentum is not None]


def check(network: nn.Module) -> None:
    """That there is something to recompute.

    Raises:
        UserError: there is not.
    """
    if not layers(network):
        raise UserError("recipe.evaluation.precise_bn: the network has no BN layer whose statistics move: leave it out")


@torch.no_grad()
def recompute(
    network: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[MicroBatch],
    *,
    leave_out_overflows: bool = False,
) -> None:
    """Replace running statistics by their means over the batches of this rank; averaging over ranks is the caller's.

    The mean of the logical workers' means, and of their unbiased variances, which is what the running statistics are
    an average of. Only BN is in training mode: nothing is dropped out.

    Args:
        network: in evaluation mode, with its BN layers set to take over what one pass computes
            (`LogicalWorkerStatistics.single_passes`); in evaluation mode afterwards.
        forward: uint8 images of shape (n, 3, size, size) → anything, through the network.
        batches: at least one.
        leave_out_overflows: means are over the passes in which a channel's statistics were finite, as where activations
            are float16; a channel that has none is left as NaN.
    """
    chosen = layers(network)
    buffers = [buffer for layer in chosen for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
    sums = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in buffers]
    passes = [torch.zeros_like(total) for total in sums]
    for layer in chosen:
        layer.train()
    for batch in batches:
        # what a pass adds its difference to, scaled by one, must not round it
        torch._foreach_zero_(buffers)
        forward(batch.images)
        for buffer, total, count in zip(buffers, sums, passes, strict=True):
            counted = torch.isfinite(buffer) if leave_out_overflows else torch.ones_like(buffer, dtype=torch.bool)
            total += torch.where(counted, buffer, 0)
            count += counted
    for layer in chosen:
        layer.eval()
    for buffer, total, count in zip(buffers, sums, passes, strict=True):
        buffer.copy_(total / count)
