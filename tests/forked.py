"""Whole trainings without the launcher: real ranks, forked from this process once it has imported everything."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.engine import World
from pipeline.prepared import Prepared, prepare
from pipeline.run import Run
from pipeline.together import prepare_together
from tests.conftest import fork_ranks


def train_ranks(path: Path, world_size: int, stop_at: int | None = None) -> None:
    """Train a configuration to its end, or until the first save at or after update `stop_at`."""
    fork_ranks(_train_rank, world_size, str(path), stop_at)


def _train_rank(world: World, path: str, stop_at: int | None) -> None:
    class StopError(Exception):
        pass

    class StoppingRun(Run):
        def _save(self) -> None:
            super()._save()
            if stop_at is not None and self.step >= stop_at:
                raise StopError

    prepared = prepare_together(lambda: prepare(path, [], world), Prepared.facts)
    with contextlib.suppress(StopError), StoppingRun(prepared, world) as run:
        run.train()
