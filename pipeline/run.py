"""The story of a run: updates to the end of the configured epochs, evaluations, saves, the exported weights."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType

from pipeline import checkpoint, config, divergence, model, report, transfer
from pipeline.batch_norm import average_statistics
from pipeline.decode import make_decoder
from pipeline.divergence import DivergenceError
from pipeline.engine import Engine, World
from pipeline.evaluate import Result, evaluate
from pipeline.loader import Loader, MicroBatch, default_threads, evaluation_requests, training_requests
from pipeline.monitor import Monitor
from pipeline.prepared import Prepared
from pipeline.reader import Reader
from pipeline.readers import evaluation_reader, reads_in_sequence, training_reader
from pipeline.record import RunRecord
from pipeline.samples import SampleWriter
from pipeline.saver import Saver
from pipeline.sums import StepSums, Window, over_ranks
from pipeline.tally import Tally
from pipeline.watch import Watch
from shards.files import exclusive, write_whole


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
        self.watch = world.watch
        self.folder = plan.config.run_folder
        self.classes = len(prepared.train_split.classes)
        self.samples, self.step = (saved.samples, saved.step) if saved is not None else (0, 0)
        self.decoder = make_decoder(recipe.transform, recipe.seed, recipe.loader.decoder)
        self.threads = recipe.loader.threads or default_threads(world.local_size)
        self.monitor: Monitor | None = None
        self.saver: Saver | None = None
        self._open = contextlib.ExitStack()
        self.train_split, self.validation_split = prepared.train_split, prepared.validation_split
        # on the CPU and before the engine has the model; only rank 0 prints the page
        model_lines = None
        if world.rank == 0:
            model_lines = model.describe(
                prepared.network,
                weight_decay=plan.config.blocks.optimizer.params.get("weight_decay", 0),
                images=plan.batch.physical,
                size=max(recipe.transform.sizes),
                precision=plan.config.precision,
                averaged=recipe.model.ema is not None,
                vectors_decay=not plan.config.layer_wise,
            )
            model_lines += transfer.describe(prepared.network, prepared.start, recipe.transform)
        self.engine = Engine(prepared.network, plan, world)
        if prepared.state is not None:
            self.engine.restore(prepared.state, samples=self.samples, step=self.step)
        if world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(exclusive(self.folder, "training"))
            resolved = {**plan.config.resolved(), **plan.batch.deepspeed()}
            write_whole(self.folder / config.RESOLVED_FILE, (json.dumps(resolved, indent=2) + "\n").encode())
            page = plan.page(ranks=_where(world), model_lines=model_lines)
            self.monitor = self._open.enter_context(contextlib.closing(Monitor(plan, self.engine, page, saved)))
            for warning in prepared.warnings:
                self.monitor.warn("checkpoint", warning)
            self.saver = self._open.enter_context(Saver(plan, self.classes, self.monitor.checkpoint))
            self.watch.settle = self.saver.settle
        self._training_reader: Reader | None = None
        self._saved_at = self.step if saved is not None else 0  # nothing is lost where nothing is done
        self.watch.describe = self._describe_samples
        self.watch.stop.resume_at(self.step)
        self.watch.at("setting up", self.step, self.samples)
        self._seconds_in_steps = 0.0
        self._timed_until = 0.0
        self._skipped = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def train(self) -> bool:
        """Train to the end of the configured epochs, evaluate, save, export.

        Returns:
            False where somebody wanted the training to stop before: it is saved after the same update on all ranks.

        Raises:
            DivergenceError: it has come apart, on all ranks alike, and the record says so.
        """
        try:
            self._train()
            if self.step < self.plan.steps:
                self._stop()
                return False
        except DivergenceError as error:
            if error.is_result and self.monitor is not None:
                self.monitor.diverged(step=self.step, samples=self.samples, why=error.headline)
            raise
        self._finish()
        return True

    def _train(self) -> None:
        recipe = self.plan.config.recipe
        plan, world = self.plan, self.world
        requests = training_requests(plan.order, plan.batch, recipe.transform, world.rank, self.step, plan.steps)
        reader = self._training_reader = training_reader(
            self.train_split,
            recipe,
            plan.order,
            plan.batch,
            rank=world.rank,
            local_ranks=world.local_ranks,
            position=self.samples,
        )
        record = None
        if recipe.logging.record_samples:
            record = SampleWriter(self.folder, self.step, self.world.rank, self.world.size)
        recent, whole_epoch = StepSums(self.world.device), StepSums(self.world.device)
        self._timed_until = time.perf_counter()
        with contextlib.closing(reader), self._loader(reader, requests) as loader:
            batches = _Waiting(loader, self.watch)
            while self.step < self.plan.steps and self.watch.stop.may_begin(self.step):
                self.watch.at("updating", self.step, self.samples)
                sums, ids = self.engine.update(batches, self.samples)
                if record is not None:
                    record.write(self.step, self.engine.lr_used, ids)
                before = self.samples
                self.step += 1
                self.samples += self.plan.batch.train
                if self.saver is not None:
                    self.saver.poll()
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
                    self._report_decoding(self.train_split.name, loader.take_tally())
                    self._end_epoch(whole_epoch, before, ended)
                    whole_epoch = StepSums(self.world.device)
                elif self._save_due(before):
                    self._save()
                    self._timed_until = time.perf_counter()
        if record is not None:
            record.close()

    def _stop(self) -> None:
        """Save what is not saved yet, and say so."""
        if self.step > self._saved_at:
            self._save()
        if self.monitor is not None and self.saver is not None:
            self.saver.wait()
            self.monitor.stopped(step=self.step, samples=self.samples, why=self.watch.stop.why)

    def _describe_samples(self) -> list[str]:
        """Which samples this rank's present update takes, for whoever looks for what it hangs at."""
        plan = self.plan
        lines = [f"update {self.step + 1:,} begins at {self.samples:,} samples; this rank's part of it:"]
        transform = plan.config.recipe.transform
        for request in training_requests(plan.order, plan.batch, transform, self.world.rank, self.step, self.step + 1):
            ids = " ".join(map(str, request.ids))
            lines.append(f"positions {request.first:,} to {request.last:,}: samples {ids}")
        return lines

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
        recent.window.communicated = self.engine.take_communicated()
        whole_epoch.communicated += recent.window.communicated
        self._seconds_in_steps += recent.window.seconds
        self._timed_until = now
        overflows = self.engine.take_overflows()  # the same on all ranks
        skipped = overflows.withheld - self._skipped
        self._skipped = overflows.withheld
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
        most = self.plan.config.recipe.watchdog.withheld_updates
        if most and overflows.longest >= most:
            scale = self.engine.loss_scale
            assert scale is not None  # what withheld them
            raise divergence.overflowed(
                self.plan,
                overflows.longest,
                step=self.step,
                samples=self.samples,
                none_applied=overflows.withheld == self.step,
                loss_scale=scale,
            )
        if self.plan.config.precision != "float16" and not math.isfinite(loss):
            raise divergence.not_finite(self.plan, f"the loss is {loss} at update {self.step:,}", self.samples)

    def _report_decoding(self, split: str, tally: Tally) -> None:
        """Record who decoded the images since the last report, over all ranks; every rank calls it."""
        total = Tally(over_ranks(tally.counts, self.world.device))
        if self.monitor is not None:
            self.monitor.decoding(samples=self.samples, split=split, tally=total)

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
            result, average = self._evaluate()
            if self.monitor is not None:
                parts.append(self.monitor.evaluation(samples=self.samples, result=result, average=average))
        if self.monitor is not None:
            self.monitor.line(*parts)
        if last or self._save_due(before):
            self._save()
        self._timed_until = time.perf_counter()

    def _evaluate(self) -> tuple[Result, Result | None]:
        """Measure what the recipe says, and beside it the average of the weights if that is to be measured too."""
        ema = self.plan.config.recipe.model.ema
        if ema is None:
            return self._measure(), None
        own = self._measure() if ema.evaluate == "beside" else None
        with self.engine.averaged_weights():
            average = self._measure()
        return (average, None) if own is None else (own, average)

    def _measure(self) -> Result:
        """Measure the weights that the engine's model has now; every rank calls it."""
        recipe = self.plan.config.recipe
        split, world = self.validation_split, self.world
        images = len(split)
        micro = recipe.evaluation.micro_batch_size or self.plan.batch.physical
        seconds = self._recompute_statistics()
        self.watch.at("evaluating")
        average_statistics(self.engine.model)
        self.engine.evaluation_mode()
        requests = evaluation_requests(
            images, micro, recipe.transform.size, world.rank, world.size, contiguous=reads_in_sequence(split)
        )
        reader = evaluation_reader(
            split, recipe, rank=world.rank, world_size=world.size, training=self._training_reader
        )
        with contextlib.closing(reader), self._loader(reader, requests) as batches:
            result = evaluate(
                self.engine.forward,
                _Waiting(batches, self.watch, "evaluating"),
                images=images,
                device=world.device,
            )
            self._report_decoding(split.name, batches.take_tally())
        return replace(result, statistics_seconds=seconds)

    def _recompute_statistics(self) -> float | None:
        """Have BN's statistics be those of the present weights, if the recipe asks for it; returns how long it took.

        Over the images of the last updates, as these saw them: any number of ranks, and a resumed process, sees the
        same ones, and of remote shards they are those that are there.
        """
        plan, recipe, updates = self.plan, self.plan.config.recipe, self.plan.precise_updates
        if not updates:
            return None
        doing = "recomputing BN's statistics"
        self.watch.at(doing)
        began = time.perf_counter()
        first = max(0, self.step - updates)
        requests = training_requests(plan.order, plan.batch, recipe.transform, self.world.rank, first, first + updates)
        reader = training_reader(
            self.train_split,
            recipe,
            plan.order,
            plan.batch,
            rank=self.world.rank,
            local_ranks=self.world.local_ranks,
            position=first * plan.batch.train,
        )
        with contextlib.closing(reader), self._loader(reader, requests) as batches:
            self.engine.recompute_statistics(_Waiting(batches, self.watch, doing))
        return time.perf_counter() - began

    def _save(self) -> None:
        """Save a checkpoint; every rank calls it, rank 0 writes."""
        self.watch.at("saving", self.step, self.samples)
        self._saved_at = self.step
        self.engine.average_statistics()
        # the loss of the last update was finite, but it was measured before its weights were changed
        broken = model.first_not_finite(self.engine.model)
        if broken is not None:
            what = f"{broken} is not finite after update {self.step:,}"
            raise divergence.not_finite(self.plan, what, self.samples)
        if self.saver is not None:
            self.saver.save(self.engine.model, self.engine.state(), samples=self.samples, step=self.step)

    def _finish(self) -> None:
        """Export the weights, write down that the run is complete, and make the report."""
        self.watch.at("finishing", self.step, self.samples)
        if self.monitor is None or self.saver is None:
            return
        self.saver.wait()
        recipe = self.plan.config.recipe
        ema = recipe.model.ema
        if ema is None or ema.evaluate == "beside":
            model.export(self.engine.model, self.folder / checkpoint.WEIGHTS_FILE, recipe.model, self.classes)
        if self.engine.average is not None and ema is not None:
            name = checkpoint.AVERAGE_FILE if ema.evaluate == "beside" else checkpoint.WEIGHTS_FILE
            model.export(self.engine.average.model, self.folder / name, recipe.model, self.classes)
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
            **{key: final[key] for key in ("ema_top1", "ema_top5") if key in final},
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

    def _loader(self, reader: Reader, requests: Iterator) -> Loader:
        return Loader(
            reader,
            self.decoder,
            requests,
            threads=self.threads,
            prefetch=self.plan.config.recipe.loader.prefetch,
            copied_on=self.engine.copied_on,
        )


def _where(world: World) -> str:
    """Where the ranks are, for the plan's page; empty for one host."""
    hosts = world.size // world.local_size
    return f"{hosts} hosts × {world.local_size}" if hosts > 1 and hosts * world.local_size == world.size else ""


class _Waiting:
    """An iterator that measures how long its consumer waits, and tells the watch when it does.

    Args:
        batches: what is waited for.
        watch: this rank's.
        working: what the consumer does with a batch, in the watch's words.
    """

    def __init__(self, batches: Iterator[MicroBatch], watch: Watch, working: str = "updating") -> None:
        self._batches = batches
        self._watch = watch
        self._working = working
        self._waited = 0.0

    def __iter__(self) -> _Waiting:
        return self

    def __next__(self) -> MicroBatch:
        self._watch.at(f"waiting for data ({self._working})")
        began = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - began
        self._watch.at(self._working)
        return batch

    def take_waited(self) -> float:
        """Seconds waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited
