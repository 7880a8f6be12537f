"""What a person sees of `onehour sweep`: the list of its runs, a line for whatever happens to one, the last screen."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.fault import FAILED, FINISHED, STOPPED
from pipeline.metrics import FILE_NAME, Event, MetricsWriter
from pipeline.record import RunRecord
from pipeline.report import text
from pipeline.sweep_file import Sweep
from pipeline.sweep_jobs import Job, last_lines
from pipeline.sweep_state import ENDED, STARTED, Resolved, State, state_of
from shards.errors import UserError

LOOK_SECONDS = 1.0
TAIL_BYTES = 8192
"""Of a run's record, in which the last updates are."""


def print_list(
    console: Console, sweep: Sweep, folder: Path, runs: Sequence[Resolved], states: Sequence[State], *, at_once: int
) -> None:
    """Every run of a sweep, what it trains and how far it is; and how many go at once."""
    arms = len({resolved.run.arm.name for resolved in runs})
    seeds = len(sweep.sections.seeds)
    console.print(
        f"{sweep.sections.title}   {sweep.path} · {arms} arm{'s' * (arms != 1)} × {seeds} seed{'s' * (seeds != 1)} "
        f"→ {folder}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("arm", no_wrap=True)
    for name in ("seed", "kn", "peak LR", "updates", "ranks"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for (run, plan), state in zip(runs, states, strict=True):
        table.add_row(
            Text(run.arm.name),
            str(run.seed),
            f"{plan.batch.train:,}",
            f"{float(plan.schedule.peak_lr):.5g}",
            f"{plan.steps:,}",
            str(plan.batch.world_size),
            Text(state.text),
        )
    console.print()
    wide = Console(highlight=False, width=None if console.is_terminal else 160)
    wide.print(table)
    console.print()
    kinds = [state.kind for state in states]
    words = {
        "finished": "finished",
        "diverged": "diverged",
        "begun": "to go on",
        "missing": "missing",
        "differs": "of another training",
    }
    counts = ", ".join(f"{kinds.count(kind)} {word}" for kind, word in words.items() if kind in kinds)
    several = f" · up to {at_once} at once" if at_once > 1 else ""
    console.print(f"{len(runs)} run{'s' * (len(runs) != 1)}: {counts}{several}")


class Teller:
    """Says and records what happens to runs, a line for each event.

    Args:
        console: where it is said.
        record: the sweep's.
        planned: the runs that are started, by name.
        done: how many had finished before.
        diverged: how many had diverged before, and are not started again.
        total: runs in all.
    """

    def __init__(
        self,
        console: Console,
        record: MetricsWriter,
        planned: dict[str, Resolved],
        *,
        done: int,
        diverged: int,
        total: int,
    ) -> None:
        self._console = console
        self._record = record
        self._planned = planned
        self._done = done
        self._diverged = diverged
        self._total = total
        self._width = max(map(len, planned), default=0)
        self._failed: list[tuple[Job, int]] = []
        self._before = {name: _divergence(resolved.run.folder) for name, resolved in planned.items()}
        self._status = console.status("") if console.is_terminal else None
        self._look_at = 0.0

    def started(self, job: Job) -> None:
        """See `sweep_jobs.Watcher`."""
        self._record.write(STARTED, run=job.name, log=job.log, command=list(job.command))
        self._say("started", job, f"log: {job.log}")

    def waiting(self, job: Job, why: str) -> None:
        """See `sweep_jobs.Watcher`."""
        self._say("waiting", job, why)

    def running(self, jobs: Sequence[Job]) -> None:
        """See `sweep_jobs.Watcher`: on a terminal, one live line."""
        if self._status is None or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._status.update(Text(" · ".join(f"{job.name} {_progress(job.folder)}".rstrip() for job in jobs)))
        self._status.start()

    def stopping(self, *, again: bool) -> None:
        """See `sweep_jobs.Watcher`."""
        how = "the runs end as they are" if again else "the runs save after the update that they are in; again: at once"
        self._console.print(f"stopping: {how}")

    def close(self) -> None:
        """Take the live line off the screen."""
        if self._status is not None:
            self._status.stop()

    def ended(self, job: Job, code: int, seconds: float, *, stopping: bool) -> None:
        """See `sweep_jobs.Watcher`."""
        state = state_of(job.folder, self._planned[job.name].plan)
        took = text.duration(seconds)
        if state.kind == "finished":
            self._done += 1
            median = RunRecord.read(job.folder).median_error()
            top1 = f"top-1 {median.accuracy:.2f} %   " if median is not None else ""
            self._note("finished", job, code, seconds)
            self._say("finished", job, f"{top1}{took}   {self._ended} of {self._total} runs")
        elif state.kind == "diverged" and _divergence(job.folder) != self._before[job.name]:
            self._diverged += 1
            self._note("diverged", job, code, seconds)
            self._say(
                "diverged",
                job,
                f"{state.text.removeprefix('diverged ')}   {took}   {self._ended} of {self._total} runs",
            )
        elif stopping or code == STOPPED:
            self._note("stopped", job, code, seconds)
            self._say("stopped", job, f"{state.text}   after {took}")
        else:
            self._failed.append((job, code))
            self._note("failed", job, code, seconds, last=last_lines(job.log))
            self._say("FAILED", job, f"exit code {code} after {took}", style="bold red")

    def conclude(self, stopped: bool, args: argparse.Namespace) -> int:
        """The last screen. Returns the exit code."""
        console = self._console
        console.print()
        for job, code in self._failed:
            console.print(f"{job.name} failed with exit code {code}. The end of {job.log}:", markup=False)
            for line in last_lines(job.log):
                console.print(f"  | {line}", markup=False)
            console.print()
        diverged = f", {self._diverged} {'has' if self._diverged == 1 else 'have'} diverged" if self._diverged else ""
        console.print(f"{self._done} of {self._total} runs have finished{diverged}")
        # which would begin anew what has diverged
        same = "the same command without --restart" if args.restart else "the same command"
        if stopped:
            console.print(f"stopped: {same} goes on where the runs were saved")
        elif self._failed:
            console.print(f"{same} tries again what failed")
        if self._diverged:
            console.print("to diverge is an ending: only --restart trains such a run anew")
        out = f" --runs {args.out}" if args.out else ""
        console.print(f"next:  onehour report {args.file}{out}     the table and the figures", markup=False)
        return FAILED if self._failed else STOPPED if stopped or self._ended < self._total else FINISHED

    @property
    def _ended(self) -> int:
        """Runs that there is nothing left to do for."""
        return self._done + self._diverged

    def _note(self, how: str, job: Job, code: int, seconds: float, **more: object) -> None:
        self._record.write(ENDED, run=job.name, log=job.log, how=how, code=code, seconds=round(seconds, 1), **more)

    def _say(self, what: str, job: Job, more: str, style: str | None = None) -> None:
        self._console.print(Text.assemble((f"{what:<9}", style or ""), f"{job.name:<{self._width}}   {more}"))


def _divergence(folder: Path) -> Event | None:
    """What a run's record says of its divergence; that of a run which is to be replaced is no news."""
    try:
        return RunRecord.read(folder).diverged
    except UserError:  # there is none, or it cannot be read
        return None


def _progress(folder: Path) -> str:
    """Where a run is, by the end of its record."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            file.seek(max(0, (folder / FILE_NAME).stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            return f"epoch {json.loads(line)['epoch']:.2f}"
        except (ValueError, KeyError, TypeError):  # cut off, or of another event
            continue
    return ""
