"""Which checkpoint a run continues from, and whether it belongs to this run: facts in JSON, no weights, no torch.

A checkpoint is a folder `checkpoints/step-N` that appears whole, by a rename. Its `state.json` holds the one integer
that is the state, samples consumed, and everything that integer's meaning depends on.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.augment import VIEWS_NAME
from pipeline.augment_schema import IMAGE_AUGMENT_NAME, MIXING_NAME
from pipeline.plan import Plan
from shards.errors import UserError

STATE_FILE = "state.json"
LATEST_FILE = "latest"
STEP_FOLDER = re.compile(r"^step-(\d+)$")
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
    """

    folder: Path
    samples: int
    step: int
    facts: Facts
    digests: dict[str, str]

    def state(self) -> dict[str, Any]:
        """The content of `state.json`."""
        return {
            "format": FORMAT,
            "samples": self.samples,
            "step": self.step,
            "facts": asdict(self.facts),
            "sha256": self.digests,
        }


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def saved_steps(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete save of a run, oldest first."""
    folder = checkpoints_folder(run_folder)
    if not folder.is_dir():
        return []
    found = ((STEP_FOLDER.match(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def find_latest(run_folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from: the one that `latest` names, else the newest complete one, else None."""
    saved = dict(saved_steps(run_folder))
    if not saved:
        return None
    try:
        named = (checkpoints_folder(run_folder) / LATEST_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        named = ""
    match = STEP_FOLDER.match(named)
    step = int(match[1]) if match and int(match[1]) in saved else max(saved)
    return read(saved[step])


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint's facts.

    Raises:
        UserError: the folder is not a checkpoint of this program, or of a version that cannot be read.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"{path}: format {state['format']} cannot be read; this version reads format {FORMAT}")
        return Checkpoint(folder, state["samples"], state["step"], Facts(**state["facts"]), state["sha256"])
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint: it has no {STATE_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}", "Remove the folder to continue from the save before it.") from None


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
