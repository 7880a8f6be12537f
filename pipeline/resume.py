"""Which checkpoint a run continues from, and whether it belongs to this run: facts in JSON, no weights, no torch.

The `state.json` of a checkpoint holds the one integer that is the state, samples consumed, and everything that
integer's meaning depends on. What a checkpoint is on disk, and whether it is whole, is in `saves`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.augment import VIEWS_NAME
from pipeline.augment_schema import IMAGE_AUGMENT_NAME, MIXING_NAME
from pipeline.plan import Plan
from pipeline.saves import STATE_FILE, DamagedError, checkpoints_folder, in_order_of_use, read_state, verify
from shards.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Facts:
    """What a position in the stream of samples depends on, besides the position itself.

    `image_augment` and `mixing` are None where they are off, and of checkpoints that are older than they are: a run
    may switch them on or off, as it may change any transform, but not go on with other draws.
    """

    seed: int
    train_samples: int
    index_digest: str
    order: str
    train_batch_size: int
    micro_batch: int
    views: str
    model: str
    optimizer: str
    image_augment: str | None = None
    mixing: str | None = None

    @classmethod
    def of(cls, plan: Plan) -> Facts:
        """The facts of a planned run."""
        assert plan.digest is not None
        recipe = plan.config.recipe
        transform = recipe.transform
        return cls(
            seed=recipe.seed,
            train_samples=plan.train_samples,
            index_digest=plan.digest,
            order=plan.order.name,
            train_batch_size=plan.batch.train,
            micro_batch=plan.batch.micro,
            views=VIEWS_NAME,
            model=f"{recipe.model.name} {json.dumps(recipe.model.args, sort_keys=True)}",
            optimizer=plan.config.blocks.optimizer.type,
            image_augment=IMAGE_AUGMENT_NAME if transform.changes_images else None,
            mixing=MIXING_NAME if recipe.mixing is not None else None,
        )


WHY = {
    "seed": "recipe.seed decides the order of the samples",
    "train_samples": "the training split has another size",
    "index_digest": "recipe.data holds other shards than the run was started on",
    "order": "recipe.order, recipe.cache.gigabytes, where the shards lie, or this version decide it",
    "train_batch_size": "train_batch_size decides which samples an update takes",
    "micro_batch": "train_micro_batch_size_per_gpu is BN's n",
    "views": "the crops of a sample are drawn in another way in this version",
    "model": "recipe.model names another network",
    "optimizer": "optimizer.type is another one, and cannot use what was saved",
    "image_augment": "the augmentations of a sample are drawn in another way in this version",
    "mixing": "micro-batches are mixed in another way in this version",
}

MAY_BE_OFF = ("image_augment", "mixing")
"""Facts that say nothing where they are None."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete save.

    Attributes:
        folder: where it is.
        samples: samples consumed.
        step: updates done.
        facts: of the run that saved it.
        digests: sha256 of the other files, by name.
        world_size: ranks of the process that saved it; None where an older version did. Any number may continue.
    """

    folder: Path
    samples: int
    step: int
    facts: Facts
    digests: dict[str, str]
    world_size: int | None = None

    def state(self) -> dict[str, Any]:
        """The content of `state.json`, which `saves.seal` makes a text of."""
        return {
            "format": FORMAT,
            "samples": self.samples,
            "step": self.step,
            "facts": asdict(self.facts),
            "sha256": self.digests,
            "world_size": self.world_size,
        }


def find_latest(run_folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to continue from, or None where nothing was saved.

    It is the one that `latest` names, else the newest; all its files are compared with their digests. Where it is
    damaged, the one before it is taken, and so on.

    Args:
        run_folder: of the run.
        warn: told of damaged saves that were passed over, if there are any; a person must come to know.

    Raises:
        UserError: everything that was saved is damaged, or is of a version that cannot be read.
    """
    damaged: list[str] = []
    for folder in in_order_of_use(run_folder):
        try:
            verify(folder)
            found = read(folder)
        except DamagedError as error:
            damaged.append(error.headline)
            continue
        if damaged:
            warn("\n  ".join([*damaged, f"PASSED OVER. The run continues from the save before: {folder}"]))
        return found
    if damaged:
        raise UserError(
            f"{checkpoints_folder(run_folder)}: none of the saves is whole",
            *damaged,
            "Bring one of them back from a copy, or start anew with --fresh: the run is then kept beside the new one.",
        )
    return None


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint's facts; its other files are not looked at.

    Raises:
        DamagedError: they are not what was saved.
        UserError: they are of a version that cannot be read.
    """
    path = folder / STATE_FILE
    state = read_state(folder)
    if state["format"] != FORMAT:
        raise UserError(f"{path}: format {state['format']} cannot be read; this version reads format {FORMAT}")
    try:
        facts = Facts(**state["facts"])
    except TypeError as error:
        raise UserError(f"{path}: another version of onehour saved it: {error}") from None
    return Checkpoint(folder, state["samples"], state["step"], facts, state["sha256"], state.get("world_size"))


def check(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse to continue a run whose samples, order or batches would not be those it was started with.

    Raises:
        UserError: every fact that differs, with both values.
    """
    saved, planned = asdict(checkpoint.facts), asdict(Facts.of(plan))
    differing = [
        name
        for name in saved
        if saved[name] != planned[name] and not (name in MAY_BE_OFF and None in (saved[name], planned[name]))
    ]
    if not differing:
        return
    raise UserError(
        f"{checkpoint.folder}: the checkpoint is from another run: {', '.join(differing)} differ"
        + ("s" if len(differing) == 1 else ""),
        *(f"{name}: saved {saved[name]}, now {planned[name]} ({WHY[name]})" for name in differing),
        f"Give this run a folder of its own (--run DIR), or start anew in {plan.config.run_folder} with --fresh.",
    )


def describe(checkpoint: Checkpoint, plan: Plan) -> str:
    """Where a run goes on, and what is another than in the process that saved, for people.

    Args:
        checkpoint: that `check` has accepted.
        plan: the run, on the ranks that it will have.
    """
    if checkpoint.step >= plan.steps:
        return f"nothing is left to do: all {plan.steps:,} updates are done"
    at = f"from update {checkpoint.step:,} (epoch {plan.epoch(checkpoint.samples):.2f})"
    before, batch = checkpoint.world_size, plan.batch
    if before is None or before == batch.world_size:
        return f"{at} · on {batch.world_size} rank{'s' * (batch.world_size != 1)}" + " as before" * (before is not None)
    return (
        f"{at} · ranks {before} → {batch.world_size}, "
        f"accumulation {batch.logical_workers // before} → {batch.accumulation} · "
        f"batch {batch.train:,}, rates, order and BN's n are those of any number of ranks"
    )


def outlook(plan: Plan, warn: Callable[[str], None]) -> str:
    """What a training of this plan would go on from, or why it would refuse to; empty for a new run.

    Args:
        plan: of a data set that was read.
        warn: see `find_latest`.
    """
    try:
        saved = find_latest(plan.config.run_folder, warn)
        if saved is None:
            return ""
        check(saved, plan)
    except UserError as error:
        return f"refused: {error.headline} · another folder: --run DIR, or anew: --fresh"
    return describe(saved, plan)
