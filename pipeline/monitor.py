"""What a run says and writes down: the screen of rank 0, the record, and the JSON's own monitors."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from pipeline import resume, rungs
from pipeline.engine import Engine
from pipeline.evaluate import Result
from pipeline.metrics import FILE_NAME, MetricsWriter
from pipeline.plan import Plan, format_page
from pipeline.saver import Saved
from pipeline.sums import Window
from pipeline.tally import Tally
from pipeline.versions import versions


class _Console(Console):
    """Goes on where nobody reads any more: a training that has lost its launcher still has to be saved."""

    def on_broken_pipe(self) -> None:
        """Print to nowhere from here on; rich itself would end the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Monitor:
    """Reports one run. Only rank 0 has one.

    Args:
        plan: the resolved run.
        engine: receives the scalars for the JSON's own monitors.
        page: the plan's page, printed first.
        resumed: the checkpoint that this process goes on from, or None for a new run.
    """

    def __init__(
        self, plan: Plan, engine: Engine, page: list[tuple[str, str]], resumed: resume.Checkpoint | None
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.console = _Console(highlight=False, soft_wrap=True)
        self._metrics = MetricsWriter(plan.config.run_folder / FILE_NAME)
        self._epochs = plan.config.recipe.epochs
        self._began = time.perf_counter()
        self._seen: set[str] = set()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]:g}"),
            BarColumn(bar_width=36),
            TextColumn("{task.percentage:>3.0f} %   {task.fields[figures]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=plan.train_samples, epoch=1, epochs=self._epochs, figures="")
        text = format_page(page)
        self.console.print(text, markup=False)
        self.console.print()
        summary = plan.summary()
        del summary["deepspeed"], summary["lr_updates"], summary["milestones"]
        self._metrics.write(
            "start",
            **summary,
            device=_device_name(engine),
            host=socket.gethostname(),
            plan=text,
            versions=versions(),
            resumed_from=resumed.samples if resumed is not None else None,
        )
        if resumed is not None:
            self._metrics.write(
                "resume",
                samples=resumed.samples,
                path=str(plan.config.run_folder),
                world_size=plan.batch.world_size,
                saved_world_size=resumed.world_size,
            )
            self.line(f"resumed   {resume.describe(resumed, plan)}")
        self._progress.start()

    def steps(
        self, *, step: int, samples: int, loss: float, top1: float, lr: float, skipped: int, window: Window
    ) -> None:
        """Report the updates since the last report.

        `loss` and `top1` (percent) are means over them, `skipped` counts withheld updates since this process began.
        """
        rate, shares = window.rate(), window.shares()
        epoch = self.plan.epoch(samples)
        remaining = float(self.plan.total_samples) - samples
        figures = f"loss {loss:.3f}   lr {lr:.4g}   {rate:,.0f} img/s   data wait {100 * shares.data_wait:.1f} %"
        if skipped:
            figures += f"   {skipped} withheld"
        if rate:
            figures += f"   eta {_duration(max(0, remaining) / rate)}"
        self._progress.update(
            self._task,
            completed=samples % self.plan.train_samples,
            epoch=min(int(epoch) + 1, int(-(-self._epochs // 1))),
            figures=figures,
        )
        if not self.console.is_terminal:
            self.console.print(f"epoch {epoch:.2f}/{self._epochs:g}   update {step:,}   {figures}")
        self._metrics.write(
            "train",
            step=step,
            samples=samples,
            epoch=epoch,
            loss=loss,
            top1=top1,
            lr=lr,
            images_per_second=rate,
            **shares._asdict(),
            skipped_steps=skipped,
            step_seconds=window.seconds / max(1, window.steps),
        )
        self.engine.write_events(
            {"Train/loss": loss, "Train/top1": top1, "Train/lr_used": lr, "Train/images_per_second": rate}, samples
        )

    def skips(self, *, step: int, skipped: int, loss_scale: float | None) -> None:
        """Report updates that an overflow withheld since the last report."""
        self._metrics.write("skip", step=step, skipped=skipped, loss_scale=loss_scale)
        self._say_once(
            "overflow",
            f"{skipped} update{'s' * (skipped != 1)} withheld by an overflow near update {step:,}; "
            f"the loss scale is {loss_scale:g} now. A few are normal while the scale settles.",
        )

    def epoch(self, *, epoch: int, samples: int, loss: float, top1: float, window: Window) -> str:
        """Record a finished epoch; returns the beginning of its line on the screen."""
        self._metrics.write(
            "epoch",
            epoch=epoch,
            samples=samples,
            images=window.images,  # fewer than an epoch's where a resumed process began within it
            loss=loss,
            top1=top1,
            seconds=window.seconds,
            images_per_second=window.rate(),
            **window.shares()._asdict(),
        )
        return f"epoch {epoch:>2}  train loss {loss:.3f}  top-1 {top1:.2f} %   {window.seconds:.1f} s"

    def evaluation(self, *, samples: int, result: Result, average: Result | None = None) -> str:
        """Record an evaluation; returns its part of the epoch's line.

        Args:
            samples: consumed.
            result: of the weights that count.
            average: of their average, where it is measured beside them.
        """
        more: dict[str, Any] = {}
        ema = self.plan.config.recipe.model.ema
        if average is not None:
            measured = {"top1": average.top1, "top5": average.top5, "loss": average.loss, "seconds": average.seconds}
            more |= {f"ema_{key}": value for key, value in measured.items()}
        elif ema is not None:
            more["weights"] = "ema"
        if result.statistics_seconds is not None:
            images = self.plan.precise_updates * self.plan.batch.train
            more |= {"precise_bn": images, "precise_bn_seconds": result.statistics_seconds}
        self._metrics.write(
            "evaluation",
            epoch=self.plan.epoch(samples),
            samples=samples,
            top1=result.top1,
            top5=result.top5,
            loss=result.loss,
            images=result.images,
            seconds=result.seconds,
            **more,
        )
        scalars = {"Validation/top1": result.top1, "Validation/top5": result.top5}
        beside = ""
        if average is not None:
            scalars["Validation/ema_top1"] = average.top1
            beside = f"   average {average.top1:.2f} %"
        self.engine.write_events(scalars, samples)
        return f"val {result.top1:.2f} % top-1  {result.top5:.2f} % top-5  ({result.images:,} images){beside}"

    def decoding(self, *, samples: int, split: str, tally: Tally) -> None:
        """Record who decoded the images of an epoch, or of an evaluation, of all ranks; warn of what was not normal."""
        self._metrics.write("decode", samples=samples, split=split, images=tally.images, **tally.figures())
        fallen = tally.fallen(self.plan.rungs or rungs.RUNGS)
        if fallen:
            self._warn_once("decode", f"{split}: {fallen}")
        if tally["stale"]:
            self._warn_once(
                "crop index",
                f"{split}: {tally['stale']:,} images have a crop index record that is damaged or another image's; they "
                "were decoded from the top. Check the shards: shards verify DIR",
            )
        is_local = self.plan.crop_indexes is not None
        unindexed = tally["native"] and not tally["indexed"] and not tally["stale"]
        if is_local and unindexed:
            self._warn_once(
                "no crop index",
                f"{split}: no image was decoded from a crop index, so each was decoded from its top. "
                f"Make one: shards index {self.plan.config.recipe.data} --decode",
            )

    def checkpoint(self, saved: Saved) -> None:
        """Record and print that a save is on disk."""
        self._metrics.write(
            "checkpoint", samples=saved.samples, path=saved.folder, seconds=saved.seconds, held=saved.held
        )
        self.line(
            f"saved {self.plan.config.run_folder}/…/{saved.folder.name}",
            f"{saved.seconds:.1f} s, the training held for {saved.held:.2f} s",
        )

    def line(self, *parts: str) -> None:
        """Print one line, of a finished epoch or of a save."""
        self.console.print("   ".join(part for part in parts if part), markup=False)

    def warn(self, kind: str, message: str) -> None:
        """Record a warning, and print the first of its kind."""
        self._metrics.write("warning", kind=kind, message=message)
        self._say_once(kind, message)

    def _warn_once(self, kind: str, message: str) -> None:
        """Record and print the first warning of a kind alone: the figures that follow repeat the rest."""
        if kind not in self._seen:
            self.warn(kind, message)

    def _say_once(self, kind: str, message: str) -> None:
        if kind not in self._seen:
            self._seen.add(kind)
            self.console.print(f"[yellow]warning[/]   {escape(message)}")

    def stopped(self, *, step: int, samples: int, why: str) -> None:
        """Record and say that the training stopped before its end, because somebody wanted it to."""
        self._metrics.write("stopped", step=step, samples=samples, why=why)
        self.line(
            f"stopped   after update {step:,}, epoch {self.plan.epoch(samples):.2f}: {why}",
            "the same command continues",
        )

    def diverged(self, *, step: int, samples: int, why: str) -> None:
        """Record that the training came apart, and ends there."""
        self._metrics.write("diverged", step=step, samples=samples, epoch=self.plan.epoch(samples), why=why)

    def finish(self, **figures: Any) -> None:
        """Record that the run is complete; only a run with this event succeeded."""
        self._metrics.write("finished", **figures)

    def seconds(self) -> float:
        """Since this process began to report."""
        return time.perf_counter() - self._began

    def close(self) -> None:
        """Take the live line off the screen and close the record."""
        self._progress.stop()
        self._metrics.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _device_name(engine: Engine) -> str:
    import torch

    world = engine.world
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "CPU"
    return f"{world.size} × {name}"
