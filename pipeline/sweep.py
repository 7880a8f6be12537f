"""`onehour sweep FILE`: every arm of a sweep with every seed, each a run of `onehour train`, until all have finished.

All of them are resolved against their data and ranks before the first is started. What has finished or diverged, by its
own record and as the file has it, is not trained again; what has begun goes on; one run's failure does not end the
others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from pipeline import config, launch, sweep_file
from pipeline import plan as plans
from pipeline.dataset import AnySplit, cache_folder
from pipeline.experiment import check_monitors, open_splits, overrides_of, plan_run
from pipeline.fault import FINISHED
from pipeline.metrics import FILE_NAME, MetricsWriter
from pipeline.plan import Plan
from pipeline.sweep_file import Sweep, SweepRun
from pipeline.sweep_jobs import Job, Jobs
from pipeline.sweep_machine import Machine
from pipeline.sweep_screen import Teller, print_list
from pipeline.sweep_state import LOG_FILE, Resolved, State, state_of
from shards.errors import UserError
from shards.files import exclusive

WRITER = "sweep"
"""What holds the lock of a sweep's folder."""


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
        print_list(console, sweep, folder, runs, states, at_once=at_once)
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
            done, diverged = kept.count("finished"), kept.count("diverged")
            teller = Teller(console, record, planned, done=done, diverged=diverged, total=len(runs))
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
