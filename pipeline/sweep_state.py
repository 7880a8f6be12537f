"""How far each run of a sweep is, by its own record, and whether it is the run that the sweep asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import config
from pipeline.config import RESOLVED_FILE, Config
from pipeline.identity import differences
from pipeline.metrics import FILE_NAME, Event, read_metrics
from pipeline.plan import Plan
from pipeline.record import RunRecord
from pipeline.saves import saved_steps
from pipeline.sweep_file import SweepRun
from shards.errors import UserError

LOG_FILE = "sweep.jsonl"
"""In the sweep's folder, written as a run's record is:

    run started   run log command
    run ended     run log how ("finished", "diverged", "failed", "stopped") code seconds [last]: the last lines of a log
                  of failure
"""
STARTED, ENDED = "run started", "run ended"

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")


class Resolved(NamedTuple):
    """A run, and what it would train."""

    run: SweepRun
    plan: Plan


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        kind: `finished` or `diverged`, by its record: both have ended; `begun`, and not ended; `missing`; `differs`:
            there is another training in its folder than the sweep asks for, or one that cannot be read.
        text: the same for people.
        reasons: in what it differs.
    """

    kind: Literal["finished", "diverged", "begun", "missing", "differs"]
    text: str
    reasons: tuple[str, ...] = ()


def state_of(folder: Path, plan: Plan) -> State:
    """How far the run in a folder is.

    Args:
        folder: the run's; need not exist.
        plan: what the sweep asks for.
    """
    if not (folder / FILE_NAME).exists():
        return State("missing", "missing")
    try:
        events = read_metrics(folder / FILE_NAME)
        if not any(event["event"] == "start" for event in events):
            return State("missing", "missing")  # killed before it had begun
        record = RunRecord.fold(events, folder)
        reasons = differences_from(record, plan.config, plan)
    except UserError as error:
        reasons = [error.headline]
    if reasons:
        return State("differs", f"another training: {reasons[0]}", tuple(reasons))
    if record.finished is not None:
        return State("finished", "finished")
    if record.diverged is not None:
        return State("diverged", f"diverged at epoch {record.diverged['epoch']:.2f}")
    steps = [step for step, _ in saved_steps(folder)]
    if not steps:
        return State("begun", "to begin again: nothing was saved")
    epoch = steps[-1] * plan.batch.train / plan.train_samples
    return State("begun", f"to resume at epoch {epoch:.2f} of {plan.config.recipe.epochs:g}")


def differences_from(record: RunRecord, wanted: Config, plan: Plan | None = None) -> list[str]:
    """In what a run differs from the one that is wanted, a sentence each.

    Args:
        record: the run's.
        wanted: the configuration as it would be trained now.
        plan: the same on its ranks and with its data, where that is known: without it the shards are not compared.

    Raises:
        UserError: the run's configuration cannot be read.
    """
    found = config.load(record.folder / RESOLVED_FILE).resolved()
    asked = wanted.resolved()
    if plan is not None:
        asked |= plan.batch.deepspeed()
    else:  # what the file leaves open follows from the ranks
        asked = {key: found[key] for key in BATCH_KEYS if key in found} | asked
    reasons = differences(found, asked)
    if plan is not None and plan.digest is not None:
        facts: Mapping[str, Any] = {
            "train_samples": plan.train_samples,
            "val_samples": plan.val_samples,
            "index_digest": plan.digest,
            "order": plan.order.name,
        }
        reasons += [
            f"{name} is {record.start[name]}, not {value} (recipe.data holds other shards)"
            for name, value in facts.items()
            if record.start.get(name) not in (None, value)
        ]
    return reasons


def last_endings(folder: Path) -> dict[str, Event]:
    """How the last training of each run ended, by the run's name, as far as a sweep in `folder` saw it.

    Raises:
        UserError: its record is broken.
    """
    path = folder / LOG_FILE
    events = read_metrics(path) if path.exists() else []
    return {event["run"]: event for event in events if event["event"] == ENDED}
