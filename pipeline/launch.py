"""`onehour train`: everything that can be checked is checked, then the `deepspeed` launcher starts the ranks.

The launcher is DeepSpeed's own and its options pass through; its traps are closed here: a hostfile that is not there
would train locally, and a launcher that is killed can end with exit code 0. A run succeeded when the trainer wrote
down that it finished, and only then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from pipeline import batch, config, hosts, resume
from pipeline.config import Config
from pipeline.experiment import add_config_arguments, open_run, overrides_of
from pipeline.metrics import FILE_NAME, read_metrics
from pipeline.record import RunRecord
from shards.errors import UserError

DEFAULT_CPU_RANKS = 2


@dataclass(frozen=True)
class Ranks:
    """Where the ranks of a launch will be.

    Attributes:
        world_size: their number.
        options: the launcher's options that bring them about.
        where: for people, e.g. "4 hosts × 8".
    """

    world_size: int
    options: list[str]
    where: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour train`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start anew; an earlier run in the folder is kept beside it, renamed"
    )
    add_rank_arguments(parser)


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that decide where the ranks are; they are the launcher's own, and `--ranks`."""
    group = parser.add_argument_group("ranks (further options go to the deepspeed launcher as they are)")
    group.add_argument("--ranks", type=int, help="ranks on this machine; default: its GPUs, else 2 on the CPU")
    group.add_argument("--hostfile", type=Path, help="one line per host: worker-0 slots=8")
    group.add_argument("--include", default="", help="hosts and slots to use: worker-0@worker-1:0,2")
    group.add_argument("--exclude", default="", help="hosts and slots not to use")


def ranks_of(args: argparse.Namespace, experiment: Config) -> Ranks:
    """Count the ranks that the launcher will start.

    Where neither `--ranks` nor a hostfile says it: as many of this machine's GPUs as divide the configuration's
    logical workers, else two ranks on the CPU.

    Raises:
        UserError: the hostfile or a filter cannot be used, or options contradict each other.
    """
    if args.hostfile is None:
        if args.include or args.exclude:
            raise UserError("--include and --exclude filter a hostfile; give one with --hostfile")
        available = hosts.local_accelerators()
        count = args.ranks
        if count is None:
            count = batch.largest_world_size(experiment, available or DEFAULT_CPU_RANKS)
        if count < 1:
            raise UserError(f"--ranks {count}: at least one rank is needed")
        if available and count > available:
            raise UserError(f"--ranks {count}: this machine has {available} GPUs")
        where = f"{count} of this machine's {available} GPUs" if available > count else ""
        # a hostfile in its default place would win over the number, and a run beside this one hold the default port
        options = ["--hostfile", os.devnull, "--num_accelerators", str(count), "--master_port", str(hosts.free_port())]
        return Ranks(count, options, where)
    if args.ranks is not None:
        raise UserError("--ranks is for this machine alone; with --hostfile the slots are the ranks")
    chosen = hosts.select(hosts.read_hostfile(args.hostfile), args.include, args.exclude)
    options = ["--hostfile", str(args.hostfile)]
    for name in ("include", "exclude"):
        if getattr(args, name):
            options += [f"--{name}", getattr(args, name)]
    if len(chosen) == 1:
        options.append("--force_multi")  # else the launcher runs locally under the remote host's address, and hangs
    slots = {len(numbers) for numbers in chosen.values()}
    world_size = sum(len(numbers) for numbers in chosen.values())
    each = f" × {slots.pop()}" if len(slots) == 1 else ""
    return Ranks(world_size, options, f"{len(chosen)} host{'s' * (len(chosen) != 1)}{each}")


def run(args: argparse.Namespace, launcher_options: Sequence[str]) -> int:
    """Check, launch, and tell how it ended. Returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    experiment = config.load(args.config, overrides_of(args))
    ranks = ranks_of(args, experiment)
    plan, _, _ = open_run(experiment, ranks.world_size)
    folder = experiment.run_folder
    if args.fresh:
        _set_aside(folder, console)
    saved = resume.find_latest(folder)
    if saved is not None:
        resume.check(saved, plan)
        if saved.step >= plan.steps and _finished(folder):
            console.print(
                f"{folder} is finished: all {plan.steps:,} updates are done. Train anew with --fresh.", markup=False
            )
            print_summary(folder, console)
            return 0
    elif (folder / FILE_NAME).exists():
        # nothing to resume from: the record of the attempt is kept, but it is not this run's
        _set_aside(folder, console)
    events_before = len(read_metrics(folder / FILE_NAME)) if (folder / FILE_NAME).exists() else 0
    code = _launch(_command(experiment, ranks, launcher_options), local=args.hostfile is None)
    finished = _finished(folder, after=events_before)
    if not finished:
        code = code or 1
        print(
            f"onehour: the training did not finish (the launcher's exit code was {code}).\n"
            f"  What happened is above and in {folder / FILE_NAME}.\n"
            "  The same command continues from the last checkpoint.",
            file=sys.stderr,
        )
        return code
    print_summary(folder, console)
    return code


def print_summary(folder: Path, console: Console) -> None:
    """The last screen: accuracy over how many images, where everything is, what to try next."""
    record = RunRecord.read(folder)
    finished, median = record.finished, record.median_error()
    if finished is None or median is None:
        raise UserError(f"{folder}: the run is not finished")
    last = median.epochs
    epochs = f"epochs {last[0]:.0f}–{last[-1]:.0f}" if len(last) > 1 else f"epoch {last[0]:.0f}"
    seconds = round(record.seconds)
    console.print()
    console.print(
        f"[bold]top-1 {median.accuracy:.2f} %[/]   median of {epochs}, {finished['images']:,} images each   "
        f"(last: {finished['top1']:.2f} % top-1, {finished['top5']:.2f} % top-5)   "
        f"{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02} total"
    )
    console.print(f"{folder}/  report.html  metrics.jsonl  config.resolved.json  model.safetensors", markup=False)


def _set_aside(folder: Path, console: Console) -> None:
    if not folder.exists():
        return
    aside = folder.with_name(f"{folder.name}-until-{datetime.now():%Y%m%d-%H%M%S}")
    folder.rename(aside)
    console.print(f"the earlier run is kept as {aside}", markup=False)


def _finished(folder: Path, after: int = 0) -> bool:
    """Whether the record says that the run finished, in an event beyond the first `after`."""
    path = folder / FILE_NAME
    if not path.exists():
        return False
    events = [event["event"] for event in read_metrics(path)[after:]]
    return "finished" in events and "start" not in events[events.index("finished") :]


def _command(experiment: Config, ranks: Ranks, launcher_options: Sequence[str]) -> list[str]:
    arguments = [str(experiment.path), "--expect-world-size", str(ranks.world_size)]
    for override in experiment.overrides:
        arguments += ["--set", override]
    script = Path(sys.executable).parent / "deepspeed"
    launcher = [sys.executable, str(script)] if script.exists() else [shutil.which("deepspeed") or "deepspeed"]
    if not any(option.split("=")[0] in ("--log_level", "--quiet", "-q") for option in launcher_options):
        ranks = replace(ranks, options=[*ranks.options, "--quiet"])  # its dozen lines would precede the plan
    return [*launcher, *ranks.options, *launcher_options, "--module", "pipeline.train", *arguments]


def _launch(command: list[str], *, local: bool) -> int:
    """Run the launcher in the foreground; returns its exit code, 128 + n where signal n ended it."""
    environment = dict(os.environ)
    # where it is set, thousands of modules would be compiled again by every rank
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.setdefault("OMP_NUM_THREADS", "1")  # the ranks set their own share of the cores
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    if local and not hosts.local_accelerators():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    process = subprocess.Popen(command, env=environment)

    def end(number: int, frame: FrameType | None) -> None:
        # a Ctrl-C reaches the launcher from the terminal; a SIGTERM is sent to this process alone
        if number == signal.SIGTERM:
            process.terminate()

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
