"""Loss, accuracy and time over a stretch of updates; what is on the device stays there until somebody asks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


class Shares(NamedTuple):
    """What the time of updates went into on this rank, 0 … 1 each; NaN where it was not measured.

    `communication` is that which nothing else was done beside, waiting for slower ranks included; `compute` is all
    that was neither that nor waiting for data.
    """

    compute: float
    communication: float
    data_wait: float


class Window:
    """Time and images between two reports.

    Attributes:
        steps: updates.
        images: over all ranks.
        seconds: from report to report, the device's work included; evaluation and saving are not.
        waited: seconds of those that the training stood still for data, on this rank.
        communicated: likewise for gradients of other ranks; NaN where it was not measured.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.images = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.communicated = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count one update. `seconds` and `communicated` are set at the next report, when the device has done it."""
        self.steps += 1
        self.images += images
        self.waited += waited

    def rate(self) -> float:
        """Images per second over all ranks."""
        return self.images / self.seconds if self.seconds else 0.0

    def shares(self) -> Shares:
        """What the time went into."""
        if not self.seconds:
            return Shares(0.0, 0.0, 0.0)
        communication, waiting = self.communicated / self.seconds, self.waited / self.seconds
        return Shares(1 - communication - waiting, communication, waiting)


class StepSums:
    """Sums over updates of this rank; `reduce` makes means over all ranks.

    Args:
        device: where the sums are kept, so that adding an update waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.window = Window()
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, sums: torch.Tensor, images: int, waited: float) -> None:
        """Count one update: `sums` is (loss, correct, images) of this rank, `images` that of all ranks."""
        self._sums += sums
        self.window.add(images, waited)

    def reduce(self) -> tuple[float, float]:
        """(mean loss per image, top-1 accuracy in percent) over all ranks; waits for the device.

        Every rank must call it.
        """
        total = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        loss, correct, images = total.tolist()
        return loss / images, 100 * correct / images


def over_ranks(counts: np.ndarray, device: torch.device) -> np.ndarray:
    """Counts, int64 [n], summed over all ranks, exactly. Every rank must call it."""
    total = torch.from_numpy(counts).to(device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.cpu().numpy()
