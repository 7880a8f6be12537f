"""Loss, accuracy and time over a stretch of updates; what is on the device stays there until somebody asks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


class Window:
    """Time and images between two reports.

    Attributes:
        steps: updates.
        images: over all ranks.
        seconds: from report to report, the device's work included; evaluation and saving are not.
        waited: seconds of those that the training stood still for data, on this rank.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.images = 0
        self.seconds = 0.0
        self.waited = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count one update. Its time is added to `seconds` when the device has done it, at the next report."""
        self.steps += 1
        self.images += images
        self.waited += waited

    def rates(self) -> tuple[float, float]:
        """(images per second over all ranks, share of the time that waited for data)."""
        if not self.seconds:
            return 0.0, 0.0
        return self.images / self.seconds, self.waited / self.seconds


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
