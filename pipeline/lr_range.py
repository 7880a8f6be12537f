"""One rank of a range test: the run's own updates at rates that grow, to the last or until the loss comes apart."""

from __future__ import annotations

import contextlib
import json
import sys
from types import TracebackType

from pipeline.decode import make_decoder
from pipeline.engine import Engine, World
from pipeline.loader import Loader, default_threads, training_requests
from pipeline.lr_curve import CURVE_FILE, Curve, Sweep, has_diverged
from pipeline.prepared import Prepared
from pipeline.readers import training_reader
from pipeline.sums import StepSums
from shards.errors import UserError
from shards.files import exclusive, write_whole


class LrRange:
    """A range test on one rank, in place of a `run.Run`. It saves, evaluates and exports nothing.

    Args:
        prepared: plan, data and model.
        world: this process among the ranks.
        sweep: the rates.

    Raises:
        UserError: a run has been saved in the folder, and would be gone on with.
    """

    def __init__(self, prepared: Prepared, world: World, sweep: Sweep) -> None:
        self.plan, self.world, self.sweep = prepared.plan, world, sweep
        self.folder = prepared.plan.config.run_folder
        if prepared.saved is not None:
            raise UserError(f"{self.folder}: has the saves of a run: a range test needs a folder of its own")
        self._open = contextlib.ExitStack()
        self._split = prepared.train_split
        self.engine = Engine(prepared.network, prepared.plan, world)
        self.engine.scheduler.rate_at = lambda samples: sweep.rate(samples // prepared.plan.batch.train)
        if world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(exclusive(self.folder, "training"))

    def __enter__(self) -> LrRange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def train(self) -> bool:
        """Do the updates and write the curve down. Returns False where somebody wanted it to stop before the end."""
        plan, world, recipe = self.plan, self.world, self.plan.config.recipe
        requests = training_requests(plan.order, plan.batch, recipe.transform, world.rank, 0, self.sweep.updates)
        reader = training_reader(
            self._split, recipe, plan.order, plan.batch, rank=world.rank, local_ranks=world.local_ranks, position=0
        )
        loader = Loader(
            reader,
            make_decoder(recipe.transform, recipe.seed, recipe.loader.decoder),
            requests,
            threads=recipe.loader.threads or default_threads(world.local_size),
            prefetch=recipe.loader.prefetch,
            copied_on=self.engine.copied_on,
        )
        rates: list[float] = []
        losses: list[float] = []
        with contextlib.closing(reader), loader:
            while len(losses) < self.sweep.updates:
                update = len(losses)
                if not world.watch.stop.may_begin(update):
                    return False
                world.watch.at("updating", update, update * plan.batch.train)
                sums, _ = self.engine.update(loader, update * plan.batch.train)
                one = StepSums(world.device)
                one.add(sums, plan.batch.train, 0.0)
                losses.append(one.reduce()[0])  # over all ranks: they end after the same update
                rates.append(self.engine.lr_used)
                if has_diverged(losses):
                    break
                if world.rank == 0 and (update + 1) % max(1, self.sweep.updates // 10) == 0:
                    self._say(update + 1, rates[-1], losses[-1])
        world.watch.at("finishing")
        curve = Curve(tuple(rates), tuple(losses), diverged=has_diverged(losses))
        if world.rank == 0:
            self._write(curve)
        return True

    def _say(self, done: int, rate: float, loss: float) -> None:
        text = f"update {done:,}/{self.sweep.updates:,}   rate {rate:.3g}   loss {loss:.3f}"
        print(text, file=sys.stderr, flush=True)

    def _write(self, curve: Curve) -> None:
        plan = self.plan
        record = {
            **curve.record(),
            "config": str(plan.config.path),
            "optimizer": plan.config.blocks.optimizer.type,
            "train_batch_size": plan.batch.train,
            "world_size": plan.batch.world_size,
            "withheld": self.engine.skipped_steps,
        }
        write_whole(self.folder / CURVE_FILE, (json.dumps(record, indent=1) + "\n").encode())
