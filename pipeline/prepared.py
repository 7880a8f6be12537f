"""What a rank has before it talks to the others: everything read and checked, and what must be the same everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pipeline import checkpoint, config, model, precise_bn, resume, transfer
from pipeline.batch_norm import check_ghosts
from pipeline.dataset import AnySplit
from pipeline.engine import World
from pipeline.experiment import check_monitors, open_run
from pipeline.plan import Plan
from pipeline.resume import Checkpoint
from pipeline.stochastic import is_stochastic
from pipeline.versions import versions
from shards.errors import UserError

FACT_MENDS = {
    "decoder": "Name a decoder that every host has: recipe.loader.decoder (onehour doctor shows them).",
    "start weights": "Each host reads its own copy of recipe.model.start_from: make them the same file.",
    "checkpoint": "A host that finds a save damaged goes on from the one before it: onehour checkpoints RUN --verify.",
}
"""What helps where a fact differs, besides making the hosts alike."""


@dataclass(frozen=True)
class Prepared:
    """What a rank has before it talks to the others.

    Attributes:
        plan: the resolved run.
        train_split, validation_split: the opened shards.
        saved: the checkpoint to continue from, or None.
        network: the model, with the checkpoint's weights if there is one.
        state: the engine's state out of the checkpoint, or None.
        start: the weights of `recipe.model.start_from`, where the run begins with them.
        warnings: what a person must come to know of the checkpoints.
    """

    plan: Plan
    train_split: AnySplit
    validation_split: AnySplit
    saved: Checkpoint | None
    network: nn.Module
    state: dict[str, Any] | None
    start: transfer.Start | None = None
    warnings: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What must be the same on every host."""
        resolved = self.plan.config.resolved()
        del resolved["recipe"]["data"]  # a path of the host; the digests below say whether it is the same data
        configuration = json.dumps(resolved, sort_keys=True)
        live = self.plan.rungs[0] if self.plan.rungs else None
        return {
            "configuration": hashlib.sha256(configuration.encode()).hexdigest()[:12],
            "order": self.plan.order.name,  # it depends on where a host's shards lie
            # those below it take the few images that it refuses, and their pixels differ by rounding
            "decoder": live,
            "training shards": self.train_split.digest[:12],
            "validation shards": self.validation_split.digest[:12],
            "start weights": self.start.digest[:12] if self.start is not None else "none",
            "checkpoint": f"step {self.saved.step}" if self.saved is not None else "none",
            "checkpoint's digests": self.saved.digests if self.saved is not None else {},
            "versions": {
                package: number
                for package, number in versions().items()
                if package != "simplejpeg" or live == "simplejpeg"
            },
        }


def prepare(config_path: str, overrides: Sequence[str], world: World) -> Prepared:
    """Read everything that this rank needs and check it; no rank talks to another here.

    Raises:
        UserError: any mistake in the configuration, the shards or the checkpoint.
    """
    experiment = config.load(config_path, overrides)
    check_monitors(experiment)
    plan, train_split, validation_split = open_run(experiment, world.size, world.local_ranks)
    warnings: list[str] = []
    saved = resume.find_latest(plan.config.run_folder, warnings.append)
    if saved is not None:
        resume.check(saved, plan)
    recipe = plan.config.recipe
    network = model.create(recipe.model, len(train_split.classes), recipe.seed, recipe.transform.sizes)
    start = transfer.prepare(network, recipe.model, resumes=saved is not None)
    if plan.batch.together > 1:
        try:
            check_ghosts(network, plan.batch.together, stochastic=is_stochastic(network))
        except UserError:
            if recipe.step.ghost_batches != "auto":
                raise
            plan = replace(plan, batch=replace(plan.batch, together=1))
    if recipe.evaluation.precise_bn:
        precise_bn.check(network)
    state = checkpoint.load(saved, network) if saved is not None else None
    return Prepared(plan, train_split, validation_split, saved, network, state, start, tuple(warnings))
