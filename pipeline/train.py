"""One rank's training, from the configuration to the exported weights: the story of a run.

    deepspeed --hostfile hosts --module pipeline.train ds_configs/imagenet_8k.json
    torchrun --nproc-per-node 8 -m pipeline.train ds_configs/imagenet_8k.json

`onehour train` starts the first of these after checking everything that can be checked before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from pipeline import checkpoint, config, engine, model, report, resume
from pipeline.decode import PillowDecoder
from pipeline.engine import Engine, World
from pipeline.evaluate import Result, evaluate
from pipeline.experiment import add_config_arguments, open_run, overrides_of
from pipeline.loader import Loader, MicroBatch, default_threads, evaluation_requests, training_requests
from pipeline.monitor import Monitor
from pipeline.order import Order
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from pipeline.record import RunRecord
from pipeline.samples import SampleWriter
from pipeline.sums import StepSums
from shards.errors import UserError
from shards.index import Split

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo words it


class DivergenceError(UserError):
    """The loss is no number any more; every rank meets it at the same update."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank. Returns the exit code: 0 finished, 1 failed, 2 a mistake of the user's."""
    args = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    place = f"rank {rank} on {socket.gethostname()}"
    training = False
    try:
        experiment = config.load(args.config, overrides_of(args))
        world = engine.join(args.expect_world_size)
        rank, place = world.rank, f"rank {world.rank} on {socket.gethostname()}"
        if world.device.type == "cpu":
            torch.set_num_threads(default_threads(world.local_size))
        else:
            torch.backends.cudnn.benchmark = True
        plan, train_split, validation_split = open_run(experiment, world.size)
        run = Run(plan, train_split, validation_split, world)
        training = True
        run.train()
    except UserError as error:
        # while setting up every rank meets the same mistake, and one says it; a damaged image is one rank's own
        if rank == 0 or (training and not isinstance(error, DivergenceError)):
            print(f"onehour: {error}" + f"\n  ({place})" * training, file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER):
            print(f"onehour: {place} stopped: another rank is gone; its own message says why", file=sys.stderr)
        else:
            print(f"onehour: {place} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    finally:
        with contextlib.suppress(Exception):
            engine.leave()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipeline.train", description=__doc__.splitlines()[0] if __doc__ else None)
    add_config_arguments(parser, positional=False)
    parser.add_argument("config_file", nargs="?", help="the DeepSpeed JSON file with a recipe section")
    parser.add_argument("--deepspeed_config", help="the same, as DeepSpeed's own examples name it")
    parser.add_argument("--deepspeed", action="store_true", help="accepted and without effect")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment says the same")
    parser.add_argument("--expect-world-size", type=int, help="fail if the launcher started another number of ranks")
    args = parser.parse_args(argv)
    args.config = args.config_file or args.deepspeed_config
    if not args.config:
        parser.error("give the configuration: pipeline.train CONFIG")
    return args


class Run:
    """The training of one plan on one rank.

    Args:
        plan: the resolved run.
        train_split, validation_split: the opened shards.
        world: this process among the ranks.
    """

    def __init__(self, plan: Plan, train_split: Split, validation_split: Split, world: World) -> None:
        recipe = plan.config.recipe
        self.plan = plan
        self.world = world
        self.folder = plan.config.run_folder
        self.classes = len(train_split.classes)
        self.train_reader, self.validation_reader = ShardReader(train_split), ShardReader(validation_split)
        self.decoder = PillowDecoder(recipe.transform, recipe.seed)
        self.threads = recipe.loader.threads or default_threads(world.local_size)
        saved = resume.find_latest(self.folder)
        if saved is not None:
            resume.check(saved, plan)
        network = model.create(recipe.model, self.classes, recipe.seed)
        page = plan.page(
            ranks=f"{world.size // world.local_size} hosts × {world.local_size}"
            if world.size > world.local_size
            else "",
            model_lines=model.describe(
                network,
                weight_decay=plan.config.blocks.optimizer.params.get("weight_decay", 0),
                micro=plan.batch.micro,
                size=recipe.transform.size,
                precision=plan.config.precision,
            ),
        )
        state = checkpoint.load(saved, network) if saved is not None else None
        self.engine = Engine(network, plan, world)
        self.samples, self.step = (saved.samples, saved.step) if saved is not None else (0, 0)
        if saved is not None and state is not None:
            self.engine.restore(state, samples=self.samples, step=self.step)
        self.monitor: Monitor | None = None
        if world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            resolved = {**plan.config.resolved(), **plan.batch.deepspeed()}
            checkpoint.write_atomically(self.folder / checkpoint.RESOLVED_FILE, json.dumps(resolved, indent=2) + "\n")
            self.monitor = Monitor(plan, self.engine, page, self.samples if saved is not None else None)
        self._seconds_in_steps = 0.0

    def train(self) -> None:
        """Train to the end of the configured epochs, evaluate, save, export."""
        try:
            self._train()
            self._finish()
        finally:
            if self.monitor is not None:
                self.monitor.close()
            self.train_reader.close()
            self.validation_reader.close()

    def _train(self) -> None:
        recipe = self.plan.config.recipe
        requests = training_requests(
            Order(self.plan.train_samples, recipe.seed), self.plan.batch, self.world.rank, self.step, self.plan.steps
        )
        record = None
        if recipe.logging.record_samples:
            record = SampleWriter(self.folder, self.step, self.world.rank, self.world.size)
        recent, whole_epoch = StepSums(self.world.device), StepSums(self.world.device)
        skipped_before = 0
        with contextlib.closing(self._loader(self.train_reader, requests)) as loader:
            batches = _Waiting(loader)
            while self.step < self.plan.steps:
                began = time.perf_counter()
                sums, used = self.engine.update(batches, self.samples)
                waited = batches.take_waited()
                if record is not None:
                    record.write(self.step, self.engine.lr_used, [batch.ids for batch in used])
                before = self.samples
                self.step += 1
                self.samples += self.plan.batch.train
                seconds = time.perf_counter() - began
                self._seconds_in_steps += seconds
                for window in (recent, whole_epoch):
                    window.add(sums, self.plan.batch.train, seconds, waited)
                ended = self._epochs_ended(before)
                if self.step % recipe.logging.every_steps == 0 or ended or self.step == self.plan.steps:
                    skipped_before = self._report_steps(recent, skipped_before)
                    recent = StepSums(self.world.device)
                if ended or self.step == self.plan.steps:
                    self._end_epoch(whole_epoch, before, ended)
                    whole_epoch = StepSums(self.world.device)
                elif self._save_due(before):
                    line = self._save()
                    if self.monitor is not None:
                        self.monitor.line(f"update {self.step:,}", line)
        if record is not None:
            record.close()

    def _epochs_ended(self, before: int) -> int | None:
        """The last epoch (1-based) that ended between position `before` and now, if one did."""
        now = min(self.samples, math.ceil(self.plan.total_samples)) // self.plan.train_samples
        return now if now > before // self.plan.train_samples else None

    def _save_due(self, before: int) -> bool:
        every = self.plan.config.recipe.checkpoint.every_epochs * self.plan.train_samples
        return int(self.samples / every) > int(before / every)

    def _report_steps(self, recent: StepSums, skipped_before: int) -> int:
        """Print and record the updates since the last report; returns the skipped updates so far."""
        loss, top1 = recent.reduce()
        skipped = self.engine.skipped_steps
        if self.plan.config.precision != "float16" and not math.isfinite(loss):
            raise DivergenceError(
                f"the loss is {loss} at update {self.step:,} (epoch {self.plan.epoch(self.samples):.2f})",
                "The training has diverged. Lower optimizer.params.lr, or lengthen scheduler.params.warmup_epochs.",
                f"The last checkpoint is intact: {resume.checkpoints_folder(self.folder)}",
            )
        if self.monitor is not None:
            if skipped > skipped_before:
                self.monitor.skips(step=self.step, skipped=skipped - skipped_before, loss_scale=self.engine.loss_scale)
            self.monitor.steps(
                step=self.step,
                samples=self.samples,
                loss=loss,
                top1=top1,
                lr=self.engine.lr_used,
                window=recent.window,
            )
        return skipped

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
        if self.world.size > 1:
            dist.barrier()
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
