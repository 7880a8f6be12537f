"""A learning rate range test: which rates are tried, when to stop, and the rate that the curve of losses suggests.

Smith 2017 (arXiv:1506.01186, §3.3): the rate grows from update to update, and the loss tells where it begins to fall,
where it falls fastest, and where it comes apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shards.errors import UserError

CURVE_FILE = "lr_range.json"
"""In the folder of a test: what was measured, and then what it suggests."""

FACTOR_OF_THE_BEST = 4.0
"""Above so many times the best smoothed loss the training has come apart (fastai's rule)."""

BELOW_THE_MINIMUM = 10.0
"""The suggestion is the rate of the lowest loss divided by this (fastai's rule)."""

FALL = 0.02
"""A smoothed loss that falls by less than this share of the first one has not been seen to fall."""

FEWEST_UPDATES = 20


@dataclass(frozen=True)
class Sweep:
    """Rates that grow by one factor from update to update.

    Attributes:
        first, last: rates of the first and the last update.
        updates: how many.

    Raises:
        UserError: they are no such range.
    """

    first: float
    last: float
    updates: int

    def __post_init__(self) -> None:
        if self.updates < FEWEST_UPDATES:
            raise UserError(f"--updates {self.updates}: a curve needs at least {FEWEST_UPDATES}")
        if not (0 < self.first < self.last and math.isfinite(self.last)):
            raise UserError(f"--from {self.first:g} --to {self.last:g}: rates must grow, from one greater than 0")

    def rate(self, update: int) -> float:
        """The rate of an update, counted from 0."""
        return self.first * (self.last / self.first) ** (update / (self.updates - 1))

    def text(self) -> str:
        """As an argument of a command line; `read` is the way back."""
        return f"{self.first!r}:{self.last!r}:{self.updates}"

    @classmethod
    def read(cls, text: str) -> Sweep:
        """From `text`."""
        first, last, updates = text.split(":")
        return cls(float(first), float(last), int(updates))


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last of the losses is not finite, or a running mean of them is far above the best it has been."""
    if not math.isfinite(losses[-1]):
        return True
    mean, best = 0.0, math.inf
    for number, loss in enumerate(losses, 1):
        mean = 0.8 * mean + 0.2 * loss
        unbiased = mean / (1 - 0.8**number)
        best = min(best, unbiased)
    return unbiased > FACTOR_OF_THE_BEST * best


@dataclass(frozen=True)
class Curve:
    """What a sweep measured.

    Attributes:
        rates: of the updates that were done.
        losses: mean training loss of each, finite but for the last.
        diverged: whether the sweep was ended by `has_diverged`.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool

    @cached_property
    def smoothed(self) -> tuple[float, ...]:
        """Each loss averaged with its neighbours within a twentieth of the curve, with weights that fall in a line.

        Symmetric, so that the curve is not moved to higher rates, as a running mean would move it.
        """
        losses = np.asarray([loss for loss in self.losses if math.isfinite(loss)])
        if not len(losses):
            return ()
        reach = max(1, round(len(losses) / 20))
        weights = np.concatenate([np.arange(1, reach + 2), np.arange(reach, 0, -1)]).astype(float)
        total = np.convolve(losses, weights)[reach : reach + len(losses)]
        return tuple(total / np.convolve(np.ones(len(losses)), weights)[reach : reach + len(losses)])

    @property
    def minimum(self) -> int:
        """The update of the lowest smoothed loss."""
        return int(np.argmin(self.smoothed))

    @property
    def steepest(self) -> int:
        """The update, up to the minimum, at which the smoothed loss falls fastest against the rate's logarithm."""
        if self.minimum == 0:
            return 0
        slopes = np.gradient(np.asarray(self.smoothed), np.log(self.rates[: len(self.smoothed)]))
        return int(np.argmin(slopes[: self.minimum + 1]))

    @property
    def problem(self) -> str | None:
        """Why the curve suggests no rate, and what to try; None where it does."""
        first, lowest = self.smoothed[0], self.smoothed[self.minimum]
        if lowest > (1 - FALL) * first:
            return "the loss does not fall: lower --from, or give it more --updates"
        if self.minimum >= len(self.smoothed) - 2 and not self.diverged:
            return "the loss still falls at the highest rate: raise --to"
        if self.rates[self.minimum] / BELOW_THE_MINIMUM < self.rates[0]:
            return "the loss is lowest within ten times the lowest rate: lower --from"
        return None

    @property
    def suggested(self) -> float | None:
        """The peak rate that the curve suggests, at the batch that was swept; None where there is a `problem`."""
        return None if self.problem else self.rates[self.minimum] / BELOW_THE_MINIMUM

    def table(self, rows: int = 14) -> list[tuple[int, str]]:
        """(update, what it is) of the rows that a table shows: evenly over the sweep, and those of note."""
        last = len(self.smoothed) - 1
        noted = {self.minimum: "lowest", self.steepest: "falls fastest"}
        if self.suggested is not None:
            nearest = int(np.argmin(np.abs(np.log(np.asarray(self.rates[: last + 1]) / self.suggested))))
            noted[nearest] = "suggested" if nearest not in noted else f"{noted[nearest]}, suggested"
        even = {round(number * last / (rows - 1)) for number in range(rows)}
        close = max(1, last // (3 * rows))
        shown = {update for update in even if all(abs(update - other) > close for other in noted)} | set(noted)
        return [(update, noted.get(update, "")) for update in sorted(shown)]

    def record(self) -> dict[str, Any]:
        """As JSON holds it; `restore` is the way back."""
        finite = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {"rates": list(self.rates), "losses": finite, "smoothed": list(self.smoothed), "diverged": self.diverged}

    @classmethod
    def restore(cls, record: dict[str, Any]) -> Curve:
        """From `record`."""
        losses = tuple(math.nan if loss is None else loss for loss in record["losses"])
        return cls(tuple(record["rates"]), losses, record["diverged"])
