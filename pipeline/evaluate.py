"""Top-1 and top-5 over the whole validation split, exactly: every image counted once, and the count asserted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.loader import MicroBatch


@dataclass(frozen=True)
class Result:
    """An evaluation; accuracies in percent, loss per image.

    `statistics_seconds` is what recomputing BN's statistics took before it, and None where they were not.
    """

    top1: float
    top5: float
    loss: float
    images: int
    seconds: float
    statistics_seconds: float | None = None


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[MicroBatch],
    *,
    images: int,
    device: torch.device,
) -> Result:
    """Evaluate the model on this rank's share and sum over the ranks.

    Args:
        forward: uint8 images of shape (n, 3, size, size) on any device → logits (n, classes) on `device`.
        batches: this rank's micro-batches; fillers have weight 0.
        images: size of the split, over all ranks.
        device: where the sums are kept.

    Raises:
        AssertionError: the ranks together did not see exactly `images` images.
    """
    began = time.perf_counter()
    # float64: exact counts and sums that do not depend on how the images were divided
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        labels = batch.labels.to(device, non_blocking=True)
        weights = batch.weights.to(device, non_blocking=True)
        logits = forward(batch.images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none")
        rows = torch.stack([hits[:, 0].float(), hits.any(dim=1).float(), loss, torch.ones_like(loss)])
        sums += (rows * weights).double().sum(dim=1)
    if dist.is_initialized():
        dist.all_reduce(sums)
    top1, top5, loss_sum, count = sums.tolist()
    assert count == images, f"evaluation saw {count:.0f} images, the split has {images}"
    return Result(100 * top1 / count, 100 * top5 / count, loss_sum / count, images, time.perf_counter() - began)
