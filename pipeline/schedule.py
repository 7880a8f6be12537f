"""The learning rate as a function of samples consumed (Goyal et al. 2017, §2.1, §2.2 and §5.1).

The rate is computed in exact rational arithmetic from the decimals written in the JSON and rounded to a float once,
so the plan, the training and the report show the same number to the last bit. It depends on the position in the
stream of samples and on nothing else: not on a step counter, which an overflow can freeze, and not on the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipeline.schema import ScheduleParams


def exact(number: int | float) -> Fraction:
    """The decimal that a JSON file says, as a fraction: 0.1 is 1/10, not the nearest binary float."""
    return Fraction(repr(number))


@dataclass(frozen=True)
class Schedule:
    """Warmup, then steps.

    Attributes:
        reference_lr: η, the rate at the reference batch; warmup starts from it (paper §2.2: "from η = 0.1").
        peak_lr: η̂ = η · kn / reference batch, the linear scaling rule (paper §2.1).
        samples_per_epoch: N.
        warmup: `gradual` (constant increment every update), `constant` (η, then η̂) or `none`.
        warmup_epochs: its length; part of the epochs of the run.
        milestones: epochs after which the rate is multiplied by `gamma`.
        gamma: the factor.
    """

    reference_lr: Fraction
    peak_lr: Fraction
    samples_per_epoch: int
    warmup: str
    warmup_epochs: Fraction
    milestones: tuple[Fraction, ...]
    gamma: Fraction

    @classmethod
    def build(
        cls,
        params: ScheduleParams,
        *,
        lr: float,
        reference_batch: int,
        train_batch_size: int,
        samples_per_epoch: int,
    ) -> Schedule:
        """Apply the linear scaling rule and fix the schedule to a data set's size."""
        reference_lr = exact(lr)
        return cls(
            reference_lr=reference_lr,
            peak_lr=reference_lr * train_batch_size / reference_batch,
            samples_per_epoch=samples_per_epoch,
            warmup=params.warmup,
            warmup_epochs=exact(params.warmup_epochs),
            milestones=tuple(exact(epoch) for epoch in params.milestones),
            gamma=exact(params.gamma),
        )

    @property
    def warms_up(self) -> bool:
        """Whether there is a warmup at all: the paper warms up only where the rate was scaled up (kn > 256)."""
        return self.warmup != "none" and self.warmup_epochs > 0 and self.peak_lr > self.reference_lr

    def lr(self, samples: int) -> float:
        """The rate of the update whose first sample is at position `samples` of the run (0-based)."""
        epoch = Fraction(samples, self.samples_per_epoch)
        rate = self.peak_lr
        if self.warms_up and epoch < self.warmup_epochs:
            rate = self.reference_lr
            if self.warmup == "gradual":
                rate += (self.peak_lr - self.reference_lr) * epoch / self.warmup_epochs
        passed = sum(epoch >= milestone for milestone in self.milestones)
        return float(rate * self.gamma**passed)

    def first_update_at(self, epoch: Fraction, train_batch_size: int) -> int:
        """The first update (0-based) that starts at `epoch` or later."""
        return -(-epoch * self.samples_per_epoch // train_batch_size)


class GradualWarmupLR:
    """The schedule as DeepSpeed's own mechanism runs it: `"scheduler": {"type": "GradualWarmupLR", …}`.

    `engine` registers the class in `deepspeed.runtime.lr_schedules` and adds to the parameters of the JSON block
    what only the resolved run knows. DeepSpeed calls `step` once after every update; the trainer calls `seek`
    before every update, so that the rate follows the samples consumed even where DeepSpeed skips `step`.

    Args:
        optimizer: anything with `param_groups`; all groups get the same rate.
        lr, reference_batch, train_batch_size, samples_per_epoch: see `Schedule.build`.
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
        )
        self.samples = 0
        self.seek(0)

    def seek(self, samples: int) -> None:
        """Set the optimizer's rate to that of the update which starts at position `samples`."""
        self.samples = samples
        rate = self.schedule.lr(samples)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

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
