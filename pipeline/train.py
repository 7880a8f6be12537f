"""One rank's training, from the configuration to the exported weights: the story of a run.

    deepspeed --hostfile hosts --module pipeline.train ds_configs/imagenet_8k.json
    torchrun --nproc-per-node 8 -m pipeline.train ds_configs/imagenet_8k.json

`onehour train` starts the first of these after checking everything that can be checked before.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint, config, engine, model, report, resume
from pipeline.decode import PillowDecoder
from pipeline.engine import Engine, World
from pipeline.evaluate import Result, evaluate
from pipeline.experiment import add_config_arguments, check_monitors, open_run, overrides_of
from pipeline.loader import Loader, MicroBatch, default_threads, evaluation_requests, training_requests
from pipeline.monitor import Monitor, versions
from pipeline.order import Order
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from pipeline.record import RunRecord
from pipeline.resume import Checkpoint
from pipeline.samples import SampleWriter
from pipeline.sums import StepSums, Window
from pipeline.together import prepare_together
from shards.errors import UserError
from shards.files import exclusive
from shards.index import Split

MAX_WITHHELD_UPDATES = 50
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo words it


class DivergenceError(UserError):
    """The training has come apart; every rank meets it at the same update."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank. Returns the exit code: 0 finished, 1 failed, 2 a mistake of the user's."""
    args = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    place = f"rank {rank} on {socket.gethostname()}"
    training = False
    try:
        world = engine.join(args.expect_world_size)
        rank, place = world.rank, f"rank {world.rank} on {socket.gethostname()}"
        if world.device.type == "cpu":
            torch.set_num_threads(default_threads(world.local_size))
        else:
            torch.backends.cudnn.benchmark = True
        prepared = prepare_together(lambda: prepare(args.config, overrides_of(args), world), Prepared.facts)
        with Run(prepared, world) as run:
            training = True
            run.train()
        engine.leave()
    except UserError as error:
        # mistakes before the training are met by every rank, and one says them; a damaged image is one rank's own
        if rank == 0 or (training and not isinstance(error, DivergenceError)):
            print(f"onehour: {error}" + f"\n  ({place})" * training, file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER):
            print(f"onehour: {place} stopped: another rank is gone; its own message says why", file=sys.stderr)
        else:
            print(f"onehour: {place} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


@dataclass(frozen=True)
class Prepared:
    """What a rank has before it talks to the others.

    Attributes:
        plan: the resolved run.
        train_split, validation_split: the opened shards.
        saved: the checkpoint to continue from, or None.
        network: the model, with the checkpoint's weights if there is one.
        state: the engine's state out of the checkpoint, or None.
    """

    plan: Plan
    train_split: Split
    validation_split: Split
    saved: Checkpoint | None
    network: nn.Module
    state: dict[str, Any] | None

    def facts(self) -> dict[str, Any]:
        """What must be the same on every host."""
        configuration = json.dumps(self.plan.config.resolved(), sort_keys=True)
        return {
            "configuration": hashlib.sha256(configuration.encode()).hexdigest()[:12],
            "training shards": self.train_split.digest[:12],
            "validation shards": self.validation_split.digest[:12],
            "checkpoint": f"step {self.saved.step}" if self.saved is not None else "none",
            "checkpoint's digests": self.saved.digests if self.saved is not None else {},
            "versions": versions(),
        }


def prepare(config_path: str, overrides: Sequence[str], world: World) -> Prepared:
    """Read everything that this rank needs and check it; no rank talks to another here.

    Raises:
        UserError: any mistake in the configuration, the shards or the checkpoint.
    """
    experiment = config.load(config_path, overrides)
    check_monitors(experiment)
    plan, train_split, validation_split = open_run(experiment, world.size)
    saved = resume.find_latest(plan.config.run_folder)
    if saved is not None:
        resume.check(saved, plan)
    recipe = plan.config.recipe
    network = model.create(recipe.model, len(train_split.classes), recipe.seed, size=recipe.transform.size)
    state = checkpoint.load(saved, network) if saved is not None else None
    return Prepared(plan, train_split, validation_split, saved, network, state)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipeline.train", description=__doc__.splitlines()[0] if __doc__ else None)
    add_config_arguments(parser, positional=False)
    parser.add_argument("config_file", nargs="?", help="the DeepSpeed JSON file with a recipe section")
    parser.add_argument("--deepspeed_config", help="the same, as DeepSpeed's own examples name it")
    parser.add_argument("--deepspeed", action="store_true", help="accepted and without effect")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment says the same")
    parser.add_argument("--expect-world-size", type=int, help="fail if the launcher started another number of ranks")
    parser.add_argument("--overrides-base64", help="given by onehour train: a JSON list of --set arguments, in base64")
    args = parser.parse_args(argv)
    if args.overrides_base64:
        # remote shells would take the quotes and braces of values apart
        args.set = json.loads(base64.urlsafe_b64decode(args.overrides_base64)) + args.set
    args.config = args.config_file or args.deepspeed_config
    if not args.config:
        parser.error("give the configuration: pipeline.train CONFIG")
    return args


class Run:
    """The training of one plan on one rank; a context manager, so that everything opened is closed.

    Args:
        prepared: plan, data, model and where to continue.
        world: this process among the ranks.
    """

    def __init__(self, prepared: Prepared, world: World) -> None:
        plan, saved = prepared.plan, prepared.saved
        recipe = plan.config.recipe
        self.plan = plan
        self.world = world
        self.folder = plan.config.run_folder
        self.classes = len(prepared.train_split.classes)
        self.samples, self.step = (saved.samples, saved.step) if saved is not None else (0, 0)
        self.decoder = PillowDecoder(recipe.transform, recipe.seed)
        self.threads = recipe.loader.threads or default_threads(world.local_size)
        self.monitor: Monitor | None = None
        self._open = contextlib.ExitStack()
        self.train_reader, self.validation_reader = (
            self._open.enter_context(contextlib.closing(ShardReader(split)))
            for split in (prepared.train_split, prepared.validation_split)
        )
        model_lines = model.describe(
            prepared.network,
            weight_decay=plan.config.blocks.optimizer.params.get("weight_decay", 0),
            micro=plan.batch.micro,
            size=recipe.transform.size,
            precision=plan.config.precision,
        )
        self.engine = Engine(prepared.network, plan, world)
        if prepared.state is not None:
            self.engine.restore(prepared.state, samples=self.samples, step=self.step)
        if world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(exclusive(self.folder, "training"))
            resolved = {**plan.config.resolved(), **plan.batch.deepspeed()}
            checkpoint.write_atomically(self.folder / checkpoint.RESOLVED_FILE, json.dumps(resolved, indent=2) + "\n")
            page = plan.page(ranks=_where(world), model_lines=model_lines)
            resumed_from = self.samples if saved is not None else None
            self.monitor = self._open.enter_context(contextlib.closing(Monitor(plan, self.engine, page, resumed_from)))
        self._seconds_in_steps = 0.0
        self._timed_until = 0.0
        self._skipped = 0
        self._withheld_in_a_row = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def train(self) -> None:
        """Train to the end of the configured epochs, evaluate, save, export."""
        self._train()
        self._finish()

    def _train(self) -> None:
        recipe = self.plan.config.recipe
        requests = training_requests(
            Order(self.plan.train_samples, recipe.seed), self.plan.batch, self.world.rank, self.step, self.plan.steps
        )
        record = None
        if recipe.logging.record_samples:
            record = SampleWriter(self.folder, self.step, self.world.rank, self.world.size)
        recent, whole_epoch = StepSums(self.world.device), StepSums(self.world.device)
        self._timed_until = time.perf_counter()
        with contextlib.closing(self._loader(self.train_reader, requests)) as loader:
            batches = _Waiting(loader)
            while self.step < self.plan.steps:
                sums, used = self.engine.update(batches, self.samples)
                if record is not None:
                    record.write(self.step, self.engine.lr_used, [batch.ids for batch in used])
                before = self.samples
                self.step += 1
                self.samples += self.plan.batch.train
                waited = batches.take_waited()
                for window in (recent, whole_epoch):
                    window.add(sums, self.plan.batch.train, waited)
                ended = self._epochs_ended(before)
                last = self.step == self.plan.steps
                # before every save as well: what has diverged must not be saved
                if self.step % recipe.logging.every_steps == 0 or ended or last or self._save_due(before):
                    self._report_steps(recent, whole_epoch.window)
                    recent = StepSums(self.world.device)
                if ended or last:
                    self._end_epoch(whole_epoch, before, ended)
                    whole_epoch = StepSums(self.world.device)
                elif self._save_due(before):
                    line = self._save()
                    if self.monitor is not None:
                        self.monitor.line(f"update {self.step:,}", line)
                    self._timed_until = time.perf_counter()
        if record is not None:
            record.close()

    def _epochs_ended(self, before: int) -> int | None:
        """The last epoch (1-based) that ended between position `before` and now, if one did."""
        now = min(self.samples, math.ceil(self.plan.total_samples)) // self.plan.train_samples
        return now if now > before // self.plan.train_samples else None

    def _save_due(self, before: int) -> bool:
        every = self.plan.config.recipe.checkpoint.every_epochs * self.plan.train_samples
        return int(self.samples / every) > int(before / every)

    def _report_steps(self, recent: StepSums, whole_epoch: Window) -> None:
        """Print and record the updates since the last report, and stop a training that has come apart."""
        loss, top1 = recent.reduce()
        now = time.perf_counter()
        recent.window.seconds = now - self._timed_until
        whole_epoch.seconds += recent.window.seconds
        self._seconds_in_steps += recent.window.seconds
        self._timed_until = now
        skipped = self.engine.skipped_steps - self._skipped
        self._skipped += skipped
        if self.monitor is not None:
            if skipped:
                self.monitor.skips(step=self.step, skipped=skipped, loss_scale=self.engine.loss_scale)
            self.monitor.steps(
                step=self.step,
                samples=self.samples,
                loss=loss,
                top1=top1,
                lr=self.engine.lr_used,
                skipped=self._skipped,
                window=recent.window,
            )
        self._withheld_in_a_row = self._withheld_in_a_row + skipped if skipped == recent.window.steps else 0
        if self._withheld_in_a_row >= MAX_WITHHELD_UPDATES:
            raise self._divergence(
                f"{self._withheld_in_a_row} updates in a row overflowed in float16 up to update {self.step:,}"
            )
        if self.plan.config.precision != "float16" and not math.isfinite(loss):
            raise self._divergence(f"the loss is {loss} at update {self.step:,}")

    def _divergence(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"{what} (epoch {self.plan.epoch(self.samples):.2f})",
            "The training has diverged. Lower optimizer.params.lr, or lengthen scheduler.params.warmup_epochs.",
            f"The last checkpoint was saved before: {resume.checkpoints_folder(self.folder)}",
        )

    def _end_epoch(self, sums: StepSums, before: int, ended: int | None) -> None:
        recipe = self.plan.config.recipe
        last = self.step == self.plan.steps
        loss, top1 = sums.reduce()
        parts = []
        if ended is not None and self.monitor is not None:
            parts.append(
                self.monitor.epoch(epoch=ended, samples=self.samples, loss=loss, top1=top1, window=sums.window)
            )
        if last or (ended is not None and ended % recipe.evaluation.every_epochs == 0):
            result = self._evaluate()
            if self.monitor is not None:
                parts.append(self.monitor.evaluation(samples=self.samples, result=result))
        if last or self._save_due(before):
            parts.append(self._save())
        if self.monitor is not None:
            self.monitor.line(*parts)
        self._timed_until = time.perf_counter()

    def _evaluate(self) -> Result:
        recipe = self.plan.config.recipe
        images = len(self.validation_reader.split)
        micro = recipe.evaluation.micro_batch_size or self.plan.batch.micro
        model.average_statistics(self.engine.model)
        self.engine.evaluation_mode()
        requests = evaluation_requests(images, micro, self.world.rank, self.world.size)
        with self._loader(self.validation_reader, requests) as batches:
            return evaluate(self.engine.forward, batches, images=images, device=self.world.device)

    def _save(self) -> str:
        """Write a checkpoint; every rank calls it, rank 0 writes."""
        model.average_statistics(self.engine.model)
        # the loss of the last update was finite, but it was measured before its weights were changed
        broken = model.first_not_finite(self.engine.model)
        if broken is not None:
            raise self._divergence(f"{broken} is not finite after update {self.step:,}")
        if self.monitor is None:
            return ""
        began = time.perf_counter()
        folder = checkpoint.save(
            self.plan,
            self.engine.model,
            self.engine.state(),
            samples=self.samples,
            step=self.step,
            classes=self.classes,
        )
        return self.monitor.checkpoint(samples=self.samples, folder=folder, seconds=time.perf_counter() - began)

    def _finish(self) -> None:
        """Export the weights, write down that the run is complete, and make the report."""
        if self.monitor is None:
            return
        recipe = self.plan.config.recipe
        model.export(self.engine.model, self.folder / checkpoint.WEIGHTS_FILE, recipe.model, self.classes)
        record = RunRecord.read(self.folder)
        if not record.evaluations:
            raise RuntimeError(f"{self.folder}: the run ended without an evaluation on record")
        final, median = record.evaluations[-1], record.median_error()
        assert median is not None
        seconds = self.monitor.seconds()
        self.monitor.finish(
            samples=self.samples,
            top1=final["top1"],
            top5=final["top5"],
            images=final["images"],
            median_top1=median.accuracy,
            median_epochs=list(median.epochs),
            seconds=seconds,
            steps_share=self._seconds_in_steps / seconds,
        )
        try:
            report.write_report([self.folder], self.folder)
        except Exception as error:  # the training is done and saved; a page about it must not fail it
            self.monitor.warn(
                "report", f"the report could not be written: {error!r}. Retry: onehour report {self.folder}"
            )

    def _loader(self, reader: ShardReader, requests: Iterator) -> Loader:
        return Loader(
            reader,
            self.decoder,
            requests,
            threads=self.threads,
            prefetch=self.plan.config.recipe.loader.prefetch,
            pin=self.world.device.type == "cuda",
        )


def _where(world: World) -> str:
    """Where the ranks are, for the plan's page; empty for one host."""
    hosts = world.size // world.local_size
    return f"{hosts} hosts × {world.local_size}" if hosts > 1 and hosts * world.local_size == world.size else ""


class _Waiting:
    """An iterator that measures how long its consumer waits."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self._waited = 0.0

    def __iter__(self) -> _Waiting:
        return self

    def __next__(self) -> MicroBatch:
        began = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - began
        return batch

    def take_waited(self) -> float:
        """Seconds waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited


if __name__ == "__main__":
    sys.exit(main())
