"""Updates that the loss scaler withheld because a float16 gradient overflowed: how many, and how many in a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Overflows:
    """What a counter has seen.

    Attributes:
        withheld: updates withheld since the counter was made.
        streak: updates withheld in a row up to now; 0 where the last one was applied.
        longest: the longest streak that grew since the counter was read before, with what it had grown to by then.
    """

    withheld: int
    streak: int
    longest: int


class OverflowCounter:
    """Counts withheld updates without waiting for the device, however seldom it is read.

    A fused optimizer is always called, and skips in its kernel: the flag that the scaler gives it stays on the device,
    and is counted there. Any other optimizer is not called at all on an overflow, for which the scaler has waited for
    the device already: a call that did not come is counted on the host.

    The counts are the same on all ranks: gradients are averaged over the ranks before the scaler looks at them, so
    that what is not finite on one rank is not finite on any.

    Args:
        optimizer: whose updates are counted; the scaler's if there is one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._called = False
        self._found: torch.Tensor | None = None
        self._counts = torch.zeros(3, dtype=torch.int64)  # withheld, streak, longest
        optimizer.register_step_pre_hook(self._before_step)

    @property
    def withheld(self) -> int:
        """Updates withheld since the counter was made; waits for the device."""
        return int(self._counts[0])

    def attempted(self) -> None:
        """Count one update that has just been tried, applied or not. Waits for nothing."""
        flag = torch.tensor(not self._called) if self._found is None else (self._found != 0).reshape(())
        self._called, self._found = False, None
        if self._counts.device != flag.device:  # a fused optimizer's first update: made there, not copied
            self._counts = torch.zeros_like(self._counts, device=flag.device)
        withheld, streak, longest = self._counts.unbind()
        withheld += flag
        streak += flag
        streak *= flag
        torch.maximum(longest, streak, out=longest)

    def take(self) -> Overflows:
        """What was counted, and begin to look for the longest streak anew. Waits for the device, in one transfer."""
        withheld, streak, longest = self._counts.tolist()
        self._counts[2].zero_()
        return Overflows(withheld, streak, longest)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._called = True
        self._found = getattr(optimizer, "found_inf", None)
