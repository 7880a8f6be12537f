"""`onehour sweep FILE`: every arm of a sweep with every seed, each a run of `onehour train`, until all have finished.

All of them are resolved against their data and ranks before the first is started. What has finished or diverged, by its
own record and as the file has it, is not trained again; what has begun goes on; one run's failure does not end the
others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import config, launch, sweep_file
from pipeline import plan as plans
from pipeline.dataset import AnySplit, cache_folder
from pipeline.experiment import check_monitors, open_splits, overrides_of, plan_run
from pipeline.fault import FAILED, FINISHED, STOPPED
from pipeline.metrics import FILE_NAME, Event, MetricsWriter
from pipeline.plan import Plan
from pipeline.record import RunRecord
from pipeline.report import text
from pipeline.sweep_file import Sweep, SweepRun
from pipeline.sweep_jobs import Job, Jobs, last_lines
from pipeline.sweep_machine import Machine
from pipeline.sweep_state import ENDED, LOG_FILE, STARTED, State, state_of
from shards.errors import UserError
from shards.files import exclusive

WRITER = "sweep"
"""What holds the lock of a sweep's folder."""

LOOK_SECONDS = 1.0
TAIL_BYTES = 8192
"""Of a run's record, in which the last updates are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour sweep`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a sweep, e.g. ds_configs/sweeps/table1.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a value in every arm, e.g. --set recipe.epochs=2 (repeatable)",
    )
    parser.add_argument("--data", help="folder or URL of shards, for every arm")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs; default: runs/<name of the sweep>")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ARM", help="the runs of this arm alone (repeatable)"
    )
    parser.add_argument(
        "--jobs", type=_jobs, metavar="N", help="runs at once, or auto (default): as many as the GPUs or cores allow"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="train anew where another training is, or where one diverged; it is kept, renamed",
    )
    parser.add_argument("--dry-run", action="store_true", help="validate and list all runs, and start none")
    parser.add_argument("--world-size", type=int, metavar="W", help="with --dry-run: ranks of a run, wherever they are")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="with --dry-run: training images, when the shards are not at hand"
    )
    launch.add_rank_arguments(parser)
    parser.set_defaults(run=None)  # `--run` of the other commands: here every run has its own folder


def _jobs(words: str) -> int | None:
    """The value of `--jobs`; None is auto."""
    if words == "auto":
        return None
    try:
        jobs = int(words)
    except ValueError:
        jobs = 0
    if jobs < 1:
        raise argparse.ArgumentTypeError(f"{words} is neither a number of runs nor auto")
    return jobs


class Resolved(NamedTuple):
    """A run, and what it would train."""

    run: SweepRun
    plan: Plan


def run(args: argparse.Namespace, launcher_options: Sequence[str]) -> int:
    """Validate, list, train what is missing.

    Returns:
        The exit code: 0 all have finished or diverged, 1 one failed, 75 was stopped.
    """
    if not args.dry_run and (args.world_size is not None or args.samples is not None):
        raise UserError("--world-size and --samples are for a look at runs that are not started: add --dry-run")
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples {args.samples}: a training set has at least one image")
    sweep = sweep_file.load(args.file)
    folder = args.out or sweep.folder
    machine = Machine.of(args, launcher_options)
    runs = resolve_all(sweep, sweep.runs(folder, overrides_of(args), args.only), machine, args)
    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        if not args.dry_run:
            _make(folder)
            stack.enter_context(exclusive(folder, WRITER))
        states = [state_of(resolved.run.folder, resolved.plan) for resolved in runs]
        over = {"finished"} if args.restart else {"finished", "diverged"}
        todo = [resolved for resolved, state in zip(runs, states, strict=True) if state.kind not in over]
        world_sizes = [resolved.plan.batch.world_size for resolved in todo]
        parts, takes = machine.divide(world_sizes) if args.world_size is None else ([], [])
        at_once = min(len(parts) // min(takes, default=1), len(todo))
        _print_list(console, sweep, folder, runs, states, at_once=at_once)
        if args.dry_run:
            console.print("nothing was started: --dry-run")
            return FINISHED
        differing = [(r.run, state) for r, state in zip(runs, states, strict=True) if state.kind == "differs"]
        if differing and not args.restart:
            raise _other_trainings(sweep, differing)
        anew = {r.run.name for r, state in zip(runs, states, strict=True) if state.kind in ("differs", "diverged")}
        planned = {resolved.run.name: resolved for resolved in todo}
        commands = [
            Job(
                name,
                (*_command(resolved, machine), *(["--fresh"] * (name in anew))),
                resolved.run.folder,
                resolved.run.log,
                taken,
            )
            for (name, resolved), taken in zip(planned.items(), takes, strict=True)
        ]
        with MetricsWriter(folder / LOG_FILE) as record:
            kept = [state.kind for state in states if state.kind in over]
            diverged = kept.count("diverged")
            teller = _Teller(console, record, planned, done=len(kept) - diverged, diverged=diverged, total=len(runs))
            running = Jobs(commands, parts, teller)
            with closing(teller):
                running.run()
    return teller.conclude(running.stopping, args)


def resolve_all(sweep: Sweep, runs: Sequence[SweepRun], machine: Machine, args: argparse.Namespace) -> list[Resolved]:
    """Load every run's configuration, open its data, resolve its plan, and build its model once.

    Raises:
        UserError: all mistakes at once, each with its arms.
    """
    check = _Check(machine, args)
    resolved: list[Resolved] = []
    mistakes: dict[str, list[str]] = {}
    for run in runs:
        try:
            resolved.append(Resolved(run, check.plan(run)))
        except UserError as error:
            arms = mistakes.setdefault(str(error), [])
            if run.arm.name not in arms:
                arms.append(run.arm.name)
    if mistakes:
        number = len({run.arm.name for run in runs})
        wrong = {name for arms in mistakes.values() for name in arms}
        said = [
            f"{'all arms' if 1 < number == len(arms) else ', '.join(arms)}: {mistake}"
            for mistake, arms in mistakes.items()
        ]
        raise UserError(
            f"{sweep.path}: {len(wrong)} of {number} arm{'s' * (number != 1)} cannot be trained as they are",
            *(line for mistake in said for line in mistake.splitlines()),
        )
    return resolved


class _Check:
    """Whatever a run's ranks would check, before any run is started; what runs have in common is looked at once."""

    def __init__(self, machine: Machine, args: argparse.Namespace) -> None:
        self._machine = machine
        self._args = args
        self._splits: dict[tuple, tuple[AnySplit, AnySplit]] = {}
        self._models: set[tuple] = set()

    def plan(self, run: SweepRun) -> Plan:
        """The plan of a run. Raises UserError: it cannot be trained."""
        experiment = config.load(run.config, run.overrides)
        check_monitors(experiment)
        world_size = self._args.world_size
        if world_size is None:
            world_size = self._machine.world_size(experiment)
        if self._args.samples is not None:
            return plans.resolve(experiment, world_size, samples=self._args.samples)
        recipe = experiment.recipe
        data = (recipe.data, recipe.stream, recipe.evaluation.split, cache_folder(recipe))
        if data not in self._splits:
            self._splits[data] = open_splits(experiment)
        splits = self._splits[data]
        plan = plan_run(experiment, world_size, splits, range(self._machine.ranks_on_a_host(world_size)))
        self._check_model(plan, len(splits[0].classes))
        return plan

    def _check_model(self, plan: Plan, classes: int) -> None:
        from pipeline import batch_norm, model, stochastic  # they bring torch

        recipe = plan.config.recipe
        known = (recipe.model.model_dump_json(), recipe.transform.sizes, classes, plan.batch.together)
        if known not in self._models:
            network = model.create(recipe.model, classes, recipe.seed, recipe.transform.sizes)
            batch_norm.check_ghosts(network, plan.batch.together, stochastic=stochastic.is_stochastic(network))
            self._models.add(known)


def _make(folder: Path) -> None:
    if (folder / FILE_NAME).exists():
        raise UserError(f"{folder}: there is a run in it, and the runs of a sweep need one of their own", "--out DIR")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the runs' folder cannot be made: {error.strerror}", "Another: --out DIR") from None


def _command(resolved: Resolved, machine: Machine) -> tuple[str, ...]:
    """`onehour train` of a run."""
    run = resolved.run
    settings = [word for override in run.overrides for word in ("--set", override)]
    # -P: a folder of the caller's that is called pipeline or shards is not ours
    python = (sys.executable, "-P", "-m", "pipeline.cli")
    return (*python, "train", str(run.config), *settings, *machine.arguments(resolved.plan.batch.world_size))


def _other_trainings(sweep: Sweep, differing: Sequence[tuple[SweepRun, State]]) -> UserError:
    lines = []
    for run, state in differing:
        lines.append(f"{run.folder}: {state.reasons[0]}")
        if len(state.reasons) > 1:
            lines.append(f"  and {len(state.reasons) - 1} more")
    return UserError(
        f"{sweep.path}: {len(differing)} run{'s' * (len(differing) != 1)} in place are not what the sweep asks for",
        *lines,
        "Train them anew with --restart, which keeps the old ones beside them, or the sweep elsewhere with --out DIR.",
    )


def _print_list(
    console: Console, sweep: Sweep, folder: Path, runs: Sequence[Resolved], states: Sequence[State], *, at_once: int
) -> None:
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


class _Teller:
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
