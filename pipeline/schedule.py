"""The learning rate as a function of samples consumed (Goyal et al. 2017, §2.1, §2.2 and §5.1).

The rate is computed in exact rational arithmetic from the decimals written in the JSON and rounded to a float once,
so the plan, the training and the report show the same number to the last bit. It depends on the position in the
stream of samples and on nothing else: not on a step counter, which an overflow can freeze, and not on the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipeline.schema import ScheduleParams


def exact(number: int | float) -> Fraction:
    """The decimal that a JSON file says, as a fraction: 0.1 is 1/10, not the nearest binary float."""
    return Fraction(repr(number))


SCALING: dict[str, Callable[[Fraction], Fraction]] = {
    "linear": lambda ratio: ratio,
    "square_root": lambda ratio: Fraction(math.sqrt(ratio)),
    "none": lambda ratio: Fraction(1),
}
"""The factor of the rate, by `recipe.scaling`, where the batch is so many times the reference batch."""


@dataclass(frozen=True)
class Schedule:
    """Warmup, then decay.

    Attributes:
        reference_lr: η, the rate at the reference batch.
        peak_lr: η̂ = η · kn / reference batch, the linear scaling rule (paper §2.1), or by another rule.
        samples_per_epoch: N.
        epochs: of the run.
        warmup: `gradual` (constant increment every update), `constant` (the first rate, then η̂) or `none`.
        warmup_epochs: its length; part of the epochs of the run.
        warmup_lr: where it starts (paper §2.2: "from η = 0.1").
        decay: `steps`; or `cosine`, `linear` and `polynomial`, which go from the end of warmup to the end of the run;
            or `constant`.
        milestones: epochs after which the rate is multiplied by `gamma`.
        gamma: the factor.
        final_lr: where `cosine`, `linear` and `polynomial` end.
        power: of the share of the way that is left, in `polynomial`.
    """

    reference_lr: Fraction
    peak_lr: Fraction
    samples_per_epoch: int
    epochs: Fraction
    warmup: str
    warmup_epochs: Fraction
    warmup_lr: Fraction
    decay: str
    milestones: tuple[Fraction, ...]
    gamma: Fraction
    final_lr: Fraction
    power: Fraction

    @classmethod
    def build(
        cls,
        params: ScheduleParams,
        *,
        lr: float,
        reference_batch: int,
        train_batch_size: int,
        samples_per_epoch: int,
        epochs: float,
        scaling: str = "linear",
    ) -> Schedule:
        """Apply the scaling rule and fix the schedule to a data set's size and to a run's length."""
        reference_lr = exact(lr)
        return cls(
            reference_lr=reference_lr,
            peak_lr=reference_lr * SCALING[scaling](Fraction(train_batch_size, reference_batch)),
            samples_per_epoch=samples_per_epoch,
            epochs=exact(epochs),
            warmup=params.warmup,
            warmup_epochs=exact(params.warmup_epochs),
            warmup_lr=reference_lr if params.warmup_lr is None else exact(params.warmup_lr),
            decay=params.decay,
            milestones=tuple(exact(epoch) for epoch in params.milestones),
            gamma=exact(params.gamma),
            final_lr=exact(params.final_lr),
            power=exact(params.power),
        )

    @property
    def warms_up(self) -> bool:
        """Whether there is a warmup at all: the paper warms up only where the rate was scaled up (kn > 256)."""
        return self.warmup != "none" and self.warmup_epochs > 0 and self.peak_lr > self.warmup_lr

    def lr(self, samples: int) -> float:
        """The rate of the update whose first sample is at position `samples` of the run (0-based)."""
        epoch = Fraction(samples, self.samples_per_epoch)
        if self.warms_up and epoch < self.warmup_epochs:
            rate = self.warmup_lr
            if self.warmup == "gradual":
                rate += (self.peak_lr - self.warmup_lr) * epoch / self.warmup_epochs
        elif self.decay in ("steps", "constant"):
            rate = self.peak_lr
        else:
            rate = self.final_lr + (self.peak_lr - self.final_lr) * self._left(epoch)
        return float(rate * self.gamma ** sum(epoch >= milestone for milestone in self.milestones))

    def _left(self, epoch: Fraction) -> Fraction:
        """The share of the way from peak to final rate that is left in `epoch`."""
        begin = self.warmup_epochs if self.warms_up else Fraction(0)
        if begin >= self.epochs:
            return Fraction(1)
        left = 1 - min(Fraction(1), (epoch - begin) / (self.epochs - begin))
        if self.decay == "cosine":
            return Fraction((1 - math.cos(math.pi * left)) / 2)
        if self.decay == "polynomial":
            return Fraction(float(left) ** float(self.power))
        return left

    def first_update_at(self, epoch: Fraction, train_batch_size: int) -> int:
        """The first update (0-based) that starts at `epoch` or later."""
        return -(-epoch * self.samples_per_epoch // train_batch_size)


class GradualWarmupLR:
    """The schedule as DeepSpeed's own mechanism runs it: `"scheduler": {"type": "GradualWarmupLR", …}`.

    `engine` registers the class in `deepspeed.runtime.lr_schedules` and adds to the parameters of the JSON block
    what only the resolved run knows. DeepSpeed calls `step` once after every update; the trainer calls `seek`
    before every update, so that the rate follows the samples consumed even where DeepSpeed skips `step`.

    Attributes:
        rate_at: the rate at a position; the schedule's, but for a range test.

    Args:
        optimizer: anything with `param_groups`; a group gets the rate, or `lr_scale` of it where it has that key.
        lr, reference_batch, train_batch_size, samples_per_epoch, epochs, scaling: see `Schedule.build`.
        params: the JSON block's parameters (`schema.ScheduleParams`).
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        lr: float,
        reference_batch: int,
        train_batch_size: int,
        samples_per_epoch: int,
        epochs: float,
        scaling: str = "linear",
        **params: Any,
    ) -> None:
        self.optimizer = optimizer
        self.train_batch_size = train_batch_size
        self.schedule = Schedule.build(
            ScheduleParams.model_validate(params),
            lr=lr,
            reference_batch=reference_batch,
            train_batch_size=train_batch_size,
            samples_per_epoch=samples_per_epoch,
            epochs=epochs,
            scaling=scaling,
        )
        self.rate_at: Callable[[int], float] = self.schedule.lr
        self.samples = 0
        self.seek(0)

    def seek(self, samples: int) -> None:
        """Set the optimizer's rate to that of the update which starts at position `samples`."""
        self.samples = samples
        rate = self.rate_at(samples)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1)

    def step(self, increment: int | None = None) -> None:
        """Advance by one update; DeepSpeed calls it after each. `increment` is in samples, default kn."""
        self.seek(self.samples + (self.train_batch_size if increment is None else increment))

    def get_last_lr(self) -> Sequence[float]:
        """The rate of each parameter group, as DeepSpeed's monitor asks for it."""
        return [group["lr"] for group in self.optimizer.param_groups]

    get_lr = get_last_lr

    def state_dict(self) -> dict[str, int]:
        """The whole state: samples consumed."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position; also sets the rate, which DeepSpeed itself would not."""
        self.seek(state["samples"])
