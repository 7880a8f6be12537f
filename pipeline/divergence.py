"""What ends a training that has come apart, and what to try."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.plan import Plan
from pipeline.saves import checkpoints_folder, in_order_of_use
from shards.errors import UserError


class DivergenceError(UserError):
    """The training has come apart; every rank meets it at the same update.

    Attributes:
        is_result: whether that is what the recipe comes to, and its record says so.
    """

    is_result = True


class NeverAppliedError(DivergenceError):
    """No update was ever applied: nothing was trained, and the precision is what has to be mended."""

    is_result = False


def not_finite(plan: Plan, what: str, samples: int) -> DivergenceError:
    """A loss or a weight is NaN or infinite.

    Args:
        plan: of the run.
        what: what is not finite, and at which update.
        samples: consumed.
    """
    return DivergenceError(
        f"{what} (epoch {plan.epoch(samples):.2f})",
        "The training has diverged. Lower optimizer.params.lr, or lengthen scheduler.params.warmup_epochs.",
        _saved(plan),
    )


def overflowed(
    plan: Plan, in_a_row: int, *, step: int, samples: int, none_applied: bool, loss_scale: float
) -> DivergenceError:
    """As many float16 updates in a row overflowed as `recipe.watchdog.withheld_updates` says, or more.

    Args:
        plan: of the run.
        in_a_row: how many there were; the last of them may lie before `step`.
        step: updates tried.
        samples: consumed.
        none_applied: not one of them was applied, so that the learning rate is not the cause.
        loss_scale: the present one.
    """
    config, epoch = plan.config, plan.epoch(samples)
    headline = f"{in_a_row} updates in a row overflowed in float16 by update {step:,} (epoch {epoch:.2f})"
    lines = [
        _begin_lower(config, loss_scale),
        f"bfloat16 has float32's range: {_bfloat16(config)}.",
        f"recipe.watchdog.withheld_updates is {config.recipe.watchdog.withheld_updates}; 0 goes on whatever overflows.",
    ]
    if none_applied:
        return NeverAppliedError(f"{headline}: none was ever applied", *lines)
    return DivergenceError(
        headline,
        "Where the loss rose before, it has diverged. Lower optimizer.params.lr, or lengthen "
        "scheduler.params.warmup_epochs.",
        *lines,
        _saved(plan),
    )


def _begin_lower(config: Config, loss_scale: float) -> str:
    fp16 = config.blocks.fp16
    if not fp16.enabled:
        return (
            f"The loss scale is {loss_scale:g} now. Where it begins is for the fp16 block to say: "
            '"fp16": {"enabled": true, "initial_scale_power": 8} in place of torch_autocast.'
        )
    if fp16.loss_scale:
        return f"The loss scale is fixed at {loss_scale:g}: lower fp16.loss_scale, or leave it out for a dynamic one."
    power = fp16.initial_scale_power
    return f"The loss scale began at 2^{power} and is {loss_scale:g} now. Begin lower: fp16.initial_scale_power."


def _bfloat16(config: Config) -> str:
    if config.blocks.fp16.enabled:
        return '"bf16": {"enabled": true} in place of fp16'
    return 'torch_autocast.dtype "bfloat16"'


def _saved(plan: Plan) -> str:
    """Of the present moment: a save that is still being written is none yet."""
    folder = plan.config.run_folder
    saved = in_order_of_use(folder)
    if not saved:
        return f"No checkpoint had been saved by then: there is none in {checkpoints_folder(folder)}"
    return f"The last checkpoint was saved before: {saved[0]}"
