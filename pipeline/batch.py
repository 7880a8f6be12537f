"""The batch triangle: kn images per update = k logical workers × n images, divided over W ranks.

k and n come from the configuration, so BN's n, the divisor kn, the learning rate and the data are the same on any
W that divides k; each rank runs k/W logical workers, one after the other (gradient accumulation) or several at once
(ghost batches).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import Config
from shards.errors import UserError

WELL_FILLED = 256
"""Images at once with which a GPU of today is busy; more gain little and need memory."""


@dataclass(frozen=True)
class Batch:
    """The sizes of one update.

    Attributes:
        train: kn, images per update over all ranks (`train_batch_size`).
        micro: n, images per logical worker, over which BN normalises (`train_micro_batch_size_per_gpu`).
        accumulation: logical workers per rank (`gradient_accumulation_steps`).
        world_size: W, ranks.
        together: logical workers of a rank whose images go through the model at once (ghost batches); it divides
            accumulation.
    """

    train: int
    micro: int
    accumulation: int
    world_size: int
    together: int = 1

    @property
    def logical_workers(self) -> int:
        """k: the workers of the paper."""
        return self.accumulation * self.world_size

    @property
    def physical(self) -> int:
        """Images that go through the model at once: n, or several times n."""
        return self.micro * self.together

    @property
    def passes(self) -> int:
        """Forward and backward passes of a rank per update."""
        return self.accumulation // self.together

    def deepspeed(self) -> dict[str, int]:
        """The three keys of the configuration, all given."""
        return {
            "train_batch_size": self.train,
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
        }

    def for_engine(self) -> dict[str, int]:
        """The same keys for DeepSpeed's engine, which need not know of workers that go through the model at once."""
        return {
            "train_batch_size": self.train,
            "train_micro_batch_size_per_gpu": self.physical,
            "gradient_accumulation_steps": self.passes,
        }


def resolve(config: Config, world_size: int) -> Batch:
    """The sizes of one update on `world_size` ranks; see `divide` for what is derived and raised."""
    batch = divide(config, world_size)
    step = config.recipe.step
    if step.ghost_batches == "auto":
        most = max(1, WELL_FILLED // batch.micro) if step.compile else 1
    else:
        most = step.ghost_batches
    divisors = [workers for workers in range(1, batch.accumulation + 1) if batch.accumulation % workers == 0]
    return replace(batch, together=max(workers for workers in divisors if workers <= most))


def divide(config: Config, world_size: int) -> Batch:
    """Divide kn images over the ranks: derive the sizes that the file leaves open, by DeepSpeed's own rules.

    Args:
        config: gives one to three of the three keys.
        world_size: W, the number of ranks that will run.

    Raises:
        UserError: the sizes do not divide; the message has the arithmetic and the nearest choices.
    """
    if world_size < 1:
        raise UserError(f"world size {world_size}: at least one rank is needed")
    place = str(config.path)
    train = config.blocks.train_batch_size
    micro = config.blocks.train_micro_batch_size_per_gpu
    accumulation = config.blocks.gradient_accumulation_steps
    if train is None and micro is None:
        raise UserError(
            f"{place}: neither train_batch_size nor train_micro_batch_size_per_gpu is given",
            "Give train_batch_size and train_micro_batch_size_per_gpu (the accumulation follows from the ranks), "
            "or micro-batch and gradient_accumulation_steps (the batch grows with the ranks).",
        )
    if train is None:
        assert micro is not None
        accumulation = accumulation or 1
        return Batch(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is None:
        share = world_size * (accumulation or 1)
        if train % share:
            raise UserError(
                f"{place}: train_batch_size {train:,} cannot be split over {world_size} ranks"
                + (f" × {accumulation} accumulation" if accumulation else ""),
                f"{train:,} / {share} = {train / share:.2f} images per micro-batch.",
                f"Use train_batch_size {_multiples(train, share)}, or give train_micro_batch_size_per_gpu.",
            )
        return Batch(train, train // share, accumulation or 1, world_size)
    if train % micro:
        raise UserError(
            f"{place}: train_batch_size {train:,} is not a multiple of train_micro_batch_size_per_gpu {micro}",
            f"{train:,} / {micro} = {train / micro:.2f} logical workers.",
            f"Use train_batch_size {_multiples(train, micro * world_size * (accumulation or 1))}.",
        )
    workers = train // micro
    if workers % world_size:
        extra = ["gradient_accumulation_steps must be left out: it follows from the ranks."] if accumulation else []
        raise UserError(
            f"{place}: train_batch_size {train:,} cannot be split over {world_size} ranks",
            f"{workers} logical workers ({train:,} / micro-batch {micro}) must be a multiple of the ranks: "
            f"{workers} / {world_size} = {workers / world_size:.2f}.",
            f"Use {_nearest_divisors(workers, world_size)} ranks with this file, or train_batch_size "
            f"{_multiples(train, micro * world_size)} for {world_size}"
            f" (LR would become {_scaled_lrs(config, train, micro * world_size)}).",
            *extra,
        )
    derived = workers // world_size
    if accumulation is not None and accumulation != derived:
        raise UserError(
            f"{place}: the three batch sizes contradict each other on {world_size} ranks",
            f"train_batch_size {train:,} / (micro-batch {micro} × {world_size} ranks) = {derived}, "
            f"but gradient_accumulation_steps is {accumulation}.",
            "Leave gradient_accumulation_steps out: it follows from the ranks.",
        )
    return Batch(train, micro, derived, world_size)


def largest_world_size(config: Config, available: int) -> int:
    """The most ranks, up to `available`, that the configuration's logical workers can be divided over."""
    train, micro = config.blocks.train_batch_size, config.blocks.train_micro_batch_size_per_gpu
    if train is None or micro is None or train % micro:
        return available
    return max(ranks for ranks in range(1, available + 1) if train // micro % ranks == 0)


def _neighbours(value: int, unit: int) -> list[int]:
    below = value // unit * unit
    return [candidate for candidate in (below, below + unit) if candidate > 0]


def _multiples(value: int, unit: int) -> str:
    return " or ".join(f"{candidate:,}" for candidate in _neighbours(value, unit))


def _scaled_lrs(config: Config, train: int, unit: int) -> str:
    reference = config.recipe.reference_batch
    return " or ".join(f"{config.lr * batch / reference:g}" for batch in _neighbours(train, unit))


def _nearest_divisors(workers: int, wanted: int) -> str:
    divisors = [d for d in range(1, workers + 1) if workers % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)
