"""`onehour train`: everything that can be checked is checked, then the `deepspeed` launcher starts the ranks.

The launcher is DeepSpeed's own and its options pass through; its traps are closed here: a hostfile that is not there
would train locally, a launcher that is stopped leaves its ranks training, and one that is killed can end with exit
code 0. A run succeeded when the trainer wrote down that it finished, and only then.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from pipeline import batch, config, hosts, resume
from pipeline.config import Config
from pipeline.experiment import add_config_arguments, check_monitors, open_run, overrides_of
from pipeline.metrics import FILE_NAME, read_metrics
from pipeline.record import RunRecord
from shards.errors import UserError
from shards.files import exclusive

DEFAULT_CPU_RANKS = 2
STOP_SECONDS = 5  # ranks that are still there so long after they were told to stop are killed


@dataclass(frozen=True)
class Ranks:
    """Where the ranks of a launch will be.

    Attributes:
        world_size: their number.
        options: the launcher's options that bring them about.
        where: for people, e.g. "4 hosts × 8".
        most_on_a_host: of them.
        environment: variables for the launcher that choose their devices.
    """

    world_size: int
    options: list[str]
    where: str
    most_on_a_host: int
    environment: dict[str, str] = field(default_factory=dict)


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
        return _local_ranks(args.ranks, experiment)
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
    where = f"{len(chosen)} host{'s' * (len(chosen) != 1)}{each}"
    return Ranks(world_size, options, where, max(map(len, chosen.values())))


def _local_ranks(count: int | None, experiment: Config) -> Ranks:
    gpus = hosts.local_gpus()
    if count is None:
        count = batch.largest_world_size(experiment, len(gpus) or DEFAULT_CPU_RANKS)
    if count < 1:
        raise UserError(f"--ranks {count}: at least one rank is needed")
    # a hostfile in its default place would win over the number, and a run beside this one hold the default port
    options = ["--hostfile", os.devnull, "--master_port", str(hosts.free_port())]
    number = ["--num_accelerators", str(count)]
    if not gpus:
        accelerator = os.environ.get("DS_ACCELERATOR", "cpu")
        return Ranks(count, options + number, "", count, {"DS_ACCELERATOR": accelerator, "CUDA_VISIBLE_DEVICES": ""})
    named = "CUDA_VISIBLE_DEVICES" in os.environ
    if count > len(gpus):
        raise UserError(
            f"--ranks {count}: this machine has {len(gpus)} GPUs" + " in CUDA_VISIBLE_DEVICES" * named,
            "For ranks on the CPU: DS_ACCELERATOR=cpu",
        )
    where = f"{count} of this machine's {len(gpus)} GPUs" if len(gpus) > count else ""
    if named:  # the launcher goes by the variable only where it is given no number
        return Ranks(count, options, where, count, {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus[:count]))})
    return Ranks(count, options + number, where, count)


def run(args: argparse.Namespace, launcher_options: Sequence[str]) -> int:
    """Check, launch, and tell how it ended. Returns the exit code: 128 + n where signal n ended it."""
    console = Console(highlight=False, soft_wrap=True)
    given = hosts.read_launcher_options(launcher_options)
    experiment = config.load(args.config, overrides_of(args))
    ranks = ranks_of(args, experiment)
    launcher = given.get("--launcher", "pdsh").lower()
    remote = (args.hostfile is not None or "--force_multi" in given) and "--no_ssh" not in given
    if remote:
        hosts.check_remote(launcher, experiment.path)
    check_monitors(experiment)
    plan, _, _ = open_run(experiment, ranks.world_size, range(ranks.most_on_a_host))
    folder = experiment.run_folder
    if folder.exists():
        with exclusive(folder, "training"):
            pass  # rank 0 holds it while it trains: a second training must not touch the first one's folder
    if args.fresh:
        _set_aside(folder, console)
    saved = resume.find_latest(folder, lambda damage: console.print(f"[bold red]WARNING[/]   {escape(damage)}"))
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
    if not {"--log_level", "--quiet", "-q"} & given.keys():
        launcher_options = [*launcher_options, "--quiet"]  # its dozen lines would precede the plan
    command = _command(experiment, ranks, launcher_options)
    code = _launch(command, ranks.environment, stops_its_ranks=remote and launcher == "pdsh")
    if _finished(folder, after=events_before):
        print_summary(folder, console)
    else:
        print(_not_finished(folder, code, several_hosts=args.hostfile is not None), file=sys.stderr)
        code = code or 1
    return 128 - code if code < 0 else code


def print_summary(folder: Path, console: Console) -> None:
    """The last screen: accuracy over how many images, where everything is, what to try next."""
    record = RunRecord.read(folder)
    finished, median = record.finished, record.median_error()
    if finished is None or median is None:
        raise UserError(f"{folder}: the run is not finished")
    last = median.epochs
    epochs = f"epochs {last[0]:.0f}–{last[-1]:.0f}" if len(last) > 1 else f"epoch {last[0]:.2g}"
    seconds = round(record.seconds)
    console.print()
    console.print(
        f"[bold]top-1 {median.accuracy:.2f} %[/]   median of {epochs}, {finished['images']:,} images each   "
        f"(last: {finished['top1']:.2f} % top-1, {finished['top5']:.2f} % top-5)   "
        f"{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02} total, "
        f"{100 * finished['steps_share']:.0f} % in steps"
    )
    names = ("report.html", "metrics.jsonl", "config.resolved.json", "model.safetensors")
    present = "  ".join(name for name in names if (folder / name).exists())
    console.print(f"{folder}/  {present}", markup=False)
    console.print(
        f"next:  onehour report {folder} OTHER_RUN …     compare runs, as in the paper's Figure 3", markup=False
    )


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


def _not_finished(folder: Path, code: int, *, several_hosts: bool) -> str:
    how = f"stopped by {signal.Signals(-code).name}" if code < 0 else f"the launcher's exit code was {code}"
    lines = [f"onehour: the training did not finish ({how})."]
    if (folder / FILE_NAME).exists():
        lines.append(f"What happened is above and in {folder / FILE_NAME}.")
        lines.append("The same command continues from the last checkpoint.")
    elif several_hosts and code == 0:
        lines.append(f"{folder / FILE_NAME} is not there, though the launcher saw no failure.")
        lines.append("The run folder must be on a file system that this host shares with the first host.")
    else:
        lines.append("What happened is above.")
    return "\n  ".join(lines)


def _command(experiment: Config, ranks: Ranks, launcher_options: Sequence[str]) -> list[str]:
    arguments = [str(experiment.path), "--expect-world-size", str(ranks.world_size)]
    if experiment.overrides:
        # with pdsh a shell on every host takes arguments apart again, and quotes, braces and $ do not survive it
        overrides = base64.urlsafe_b64encode(json.dumps(experiment.overrides).encode()).decode()
        arguments += ["--overrides-base64", overrides]
    script = Path(sys.executable).parent / "deepspeed"
    launcher = [sys.executable, str(script)] if script.exists() else [shutil.which("deepspeed") or "deepspeed"]
    return [*launcher, *ranks.options, *launcher_options, "--module", "pipeline.train", *arguments]


def _launch(command: list[str], environment: Mapping[str, str], *, stops_its_ranks: bool) -> int:
    """Run the launcher until it ends, and stop it and its ranks where this process is told to stop.

    Args:
        command: the launcher's command line.
        environment: variables to set for it.
        stops_its_ranks: whether the launcher itself stops its ranks on SIGTERM, which it does with pdsh only.

    Returns:
        The launcher's exit code, or -n where signal n ended it or was sent to this process.
    """
    variables = {**os.environ, **environment}
    # where it is set, thousands of modules would be compiled again by every rank
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    variables.setdefault("OMP_NUM_THREADS", "1")  # the ranks set their own share of the cores
    root = str(Path(__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    process: subprocess.Popen | None = None
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None and stops_its_ranks:
            process.terminate()
        elif process is not None:
            _signal_group(process.pid, signal.SIGTERM)

    stopping = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        stopping.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in stopping}
    try:
        # ranks outlive a launcher that is killed, but not their process group. With pdsh it stays in the terminal's:
        # ssh may have to ask, and another group may not read there
        if stops_its_ranks:
            process = subprocess.Popen(command, env=variables)
        else:
            # without the terminal's input: what asks there from the background would be stopped, and the ranks hang
            process = subprocess.Popen(command, env=variables, process_group=0, stdin=subprocess.DEVNULL)
        if received:  # meanwhile
            stop(received.pop(), None)
        code = process.wait()
        if not stops_its_ranks and _signal_group(process.pid, signal.SIGTERM):
            _end_group(process.pid)  # a launcher that is killed leaves its ranks behind, and may end with 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return -received[0] if received else code


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group. Returns whether there is anyone in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


def _end_group(group: int) -> None:
    """Wait until a process group that was told to stop is gone, and kill what is not in time."""
    deadline = time.monotonic() + STOP_SECONDS
    while _signal_group(group, 0):
        if time.monotonic() > deadline:
            _signal_group(group, signal.SIGKILL)
            return
        time.sleep(0.05)
