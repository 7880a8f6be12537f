"""`onehour train` and `onehour launch`: what can be checked is checked, then the deepspeed launcher starts the ranks.

The launcher is DeepSpeed's own and its options pass through; its traps are closed here and in `launcher`,
`environment`, `reach` and `hosts`: a hostfile that is not there would train locally, a single remote host hang, most
variables stay behind, and the ranks meet at an address that not every host reaches. A run succeeded when the trainer
wrote down that it finished, and only then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from pipeline import batch, config, environment, hosts, launcher, reach, resume
from pipeline.config import Config
from pipeline.experiment import add_config_arguments, check_monitors, check_start_weights, open_run, overrides_of
from pipeline.fault import FAILED, FINISHED, STOPPED, Fault, faults_of
from pipeline.lease import Lease
from pipeline.metrics import FILE_NAME, MetricsWriter, read_metrics
from pipeline.record import RunRecord
from shards.errors import UserError
from shards.files import exclusive

DEFAULT_CPU_RANKS = 2


@dataclass(frozen=True)
class Ranks:
    """Where the ranks of a launch will be.

    Attributes:
        world_size: their number.
        options: the launcher's options that bring them about.
        where: for people, e.g. "4 hosts × 8".
        most_on_a_host: of them.
        environment: variables for the launcher that choose their devices.
        hosts: the slots used, by host of the hostfile; empty for this machine alone.
    """

    world_size: int
    options: list[str]
    where: str
    most_on_a_host: int
    environment: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
        code: the exit code, 128 + n where signal n ended it.
        finished: whether the run is complete.
        step: updates done when it ended, as far as is known.
        fault: what the ranks wrote down, if they did.
        wanted: whether somebody told this process to end it.
    """

    code: int
    finished: bool
    step: int
    fault: Fault | None = None
    wanted: bool = False


class Launched(NamedTuple):
    """A launch that has ended.

    Attributes:
        ended: how its launcher did.
        token: that its ranks knew it by.
        step: updates done; None where no rank trained.
    """

    ended: launcher.Ended
    token: str
    step: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour train`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start anew; an earlier run in the folder is kept beside it, renamed"
    )
    add_rank_arguments(parser)


def add_supervisor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour launch` that `onehour train` has not."""
    group = parser.add_argument_group("after a failure")
    group.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="launch again, at most so often (default: 0)"
    )
    group.add_argument(
        "--min-nodes",
        type=int,
        metavar="M",
        help="go on without hosts that do not answer, with M at least (default: all)",
    )


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
    return ranks_on(args.hostfile, hosts.select(hosts.read_hostfile(args.hostfile), args.include, args.exclude))


def ranks_on(hostfile: Path, chosen: Mapping[str, list[int]]) -> Ranks:
    """The ranks on some slots of a hostfile's hosts.

    Raises:
        UserError: the hostfile cannot be used.
    """
    options = ["--hostfile", str(hostfile)]
    if chosen != hosts.select(hosts.read_hostfile(hostfile)):
        options += ["--include", hosts.include_option(chosen)]
    if len(chosen) == 1:
        options.append("--force_multi")  # else the launcher runs locally under the remote host's address, and hangs
    slots = {len(numbers) for numbers in chosen.values()}
    world_size = sum(len(numbers) for numbers in chosen.values())
    each = f" × {slots.pop()}" if len(slots) == 1 else ""
    where = f"{len(chosen)} host{'s' * (len(chosen) != 1)}{each}"
    return Ranks(world_size, options, where, max(map(len, chosen.values())), hosts=dict(chosen))


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
    """Check, launch, and tell how it ended. Returns the exit code, see `pipeline.fault`."""
    launch = Launch(args, launcher_options)
    ranks = ranks_of(args, launch.experiment)
    if getattr(args, "restarts", 0):
        from pipeline.supervisor import Supervisor

        return Supervisor(launch, ranks.hosts, args.restarts, args.min_nodes).run()
    return launch.run(ranks).code


class Launch:
    """What stays the same over the launches of one run.

    Args:
        args: of the command line.
        launcher_options: what goes to the deepspeed launcher as it is.

    Raises:
        UserError: a mistake in the configuration or the options.
    """

    def __init__(self, args: argparse.Namespace, launcher_options: Sequence[str]) -> None:
        self.args = args
        self.console = Console(highlight=False, soft_wrap=True)
        self.experiment = config.load(args.config, overrides_of(args))
        self.folder = self.experiment.run_folder
        self.given = hosts.read_launcher_options(launcher_options)
        self._options = list(launcher_options)
        if not {"--log_level", "--quiet", "-q"} & self.given.keys():
            # a dozen lines would precede the plan, and the exit code of a rank be told with all of its arguments
            self._options += ["--log_level", "critical"]
        self.launcher = self.given.get("--launcher", "pdsh").lower()
        self.remote = (args.hostfile is not None or "--force_multi" in self.given) and "--no_ssh" not in self.given
        self.fresh = args.fresh
        if self.remote:
            hosts.check_remote(self.launcher, self.experiment.path)
        check_monitors(self.experiment)

    def run(self, ranks: Ranks, interrupt: threading.Event | None = None) -> Outcome:
        """Launch once on these ranks, from the last checkpoint if there is one.

        Args:
            ranks: where.
            interrupt: once set, the ranks are asked to save and to stop.

        Raises:
            UserError: a mistake that was found before anything was launched.
        """
        plan, _, _ = open_run(self.experiment, ranks.world_size, range(ranks.most_on_a_host))
        if self.folder.exists():
            with exclusive(self.folder, "training"):
                pass  # rank 0 holds it while it trains: a second training must not touch the first one's folder
        prepared = self.prepare_hosts(ranks)
        if self.fresh:
            check_start_weights(self.experiment)
            _set_aside(self.folder, self.console)
            self.fresh = False
        saved = resume.find_latest(
            self.folder, lambda damage: self.console.print(f"[bold red]WARNING[/]   {escape(damage)}")
        )
        if saved is not None:
            resume.check(saved, plan)
            if saved.step >= plan.steps and _ended_as("finished", self.folder):
                self.console.print(
                    f"{self.folder} is finished: all {plan.steps:,} updates are done. Train anew with --fresh.",
                    markup=False,
                )
                print_summary(self.folder, self.console)
                return Outcome(FINISHED, True, saved.step)
        elif (self.folder / FILE_NAME).exists():
            # nothing to resume from: the record of the attempt is kept, but it is not this run's
            _set_aside(self.folder, self.console)
        if saved is None:
            check_start_weights(self.experiment)
        events_before = len(read_metrics(self.folder / FILE_NAME)) if (self.folder / FILE_NAME).exists() else 0
        ended, token, reached = self.start(ranks, prepared, interrupt=interrupt)
        step = reached if reached is not None else saved.step if saved is not None else 0
        if _ended_as("finished", self.folder, events_before):
            print_summary(self.folder, self.console)
            return Outcome(ended.code, True, step)
        fault = next(iter(faults_of(self.folder, token)), None)
        self._note_fault(fault, token)
        if ended.code == STOPPED:
            return Outcome(STOPPED, False, step, wanted=ended.wanted)
        several_hosts = self.args.hostfile is not None
        print(_not_finished(self.folder, events_before, ended, fault, several_hosts=several_hosts), file=sys.stderr)
        step = fault.step if fault is not None else step
        return Outcome(ended.code or FAILED, False, step, fault, ended.wanted)

    def start(
        self,
        ranks: Ranks,
        prepared: tuple[list[str], dict[str, str]],
        more: Sequence[str] = (),
        interrupt: threading.Event | None = None,
    ) -> Launched:
        """Start the launcher and wait for its end.

        Args:
            ranks: where.
            prepared: what `prepare_hosts` answered for them.
            more: arguments for each rank.
            interrupt: once set, the ranks are asked to stop.
        """
        options, variables = prepared
        with Lease(self.folder) as lease, environment.travelling(variables, self.launcher) as file:
            ended = launcher.run_launcher(
                launcher.command_line(
                    self.experiment,
                    ranks.world_size,
                    [*ranks.options, *options, *self._options],
                    lease.token,
                    more=more,
                ),
                {**ranks.environment, **file},
                lease,
                pdsh=self.remote and self.launcher == "pdsh",
                interrupt=interrupt,
            )
            at = lease.ranks()
        return Launched(ended, lease.token, at.step if at is not None else None)

    def prepare_hosts(self, ranks: Ranks) -> tuple[list[str], dict[str, str]]:
        """Further options and travelling variables for a launch on other hosts, which are asked before."""
        if not self.remote:
            return [], {}
        variables = environment.for_hosts({**os.environ, **ranks.environment})
        environment.file_text(variables, self.launcher)  # a mistake in them is found before any host is asked
        options = []
        if self.launcher == "pdsh" and "--no_ssh_check" not in self.given:
            port = int(self.given["--ssh_port"]) if "--ssh_port" in self.given else None
            meeting = reach.meeting_place(list(ranks.hosts), port, self.given)
            options = ["--master_addr", meeting.address, "--master_port", str(meeting.port), "--no_ssh_check"]
        return options, variables

    def _note_fault(self, fault: Fault | None, launch: str) -> None:
        """Into the run's record, which nobody writes any more."""
        path = self.folder / FILE_NAME
        if fault is None or not path.exists():
            return
        with contextlib.suppress(UserError, OSError), exclusive(self.folder, "training"), MetricsWriter(path) as writer:
            said = {"rank": fault.rank, "host": fault.host, "step": fault.step, "launch": launch}
            writer.write("fault", kind=fault.kind, message=fault.what, **said)


def print_summary(folder: Path, console: Console) -> None:
    """The last screen: accuracy over how many images, where everything is, what to try next."""
    record = RunRecord.read(folder)
    finished, median = record.finished, record.median_error()
    if finished is None or median is None:
        raise UserError(f"{folder}: the run is not finished")
    last = median.epochs
    epochs = f"epochs {last[0]:.0f}–{last[-1]:.0f}" if len(last) > 1 else f"epoch {last[0]:.2g}"
    seconds = round(record.seconds)
    averaged = f"; the average of its weights {finished['ema_top1']:.2f} %" if "ema_top1" in finished else ""
    console.print()
    console.print(
        f"[bold]top-1 {median.accuracy:.2f} %[/]   median of {epochs}, {finished['images']:,} images each   "
        f"(last: {finished['top1']:.2f} % top-1, {finished['top5']:.2f} % top-5{averaged})   "
        f"{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02} total, "
        f"{100 * finished['steps_share']:.0f} % in steps"
    )
    names = ("report.html", "metrics.jsonl", "config.resolved.json", "model.safetensors", "model_ema.safetensors")
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


def _ended_as(ending: str, folder: Path, after: int = 0) -> bool:
    """Whether the record has such an event beyond the first `after`, and no start of a process since."""
    path = folder / FILE_NAME
    if not path.exists():
        return False
    kinds = [event["event"] for event in reversed(read_metrics(path)[after:])]  # the last first
    return ending in kinds and "start" not in kinds[: kinds.index(ending)]


def _not_finished(
    folder: Path, events_before: int, ended: launcher.Ended, fault: Fault | None, *, several_hosts: bool
) -> str:
    how = f"the launcher's exit code was {ended.code}"
    if ended.wanted and ended.code > 128:
        how = f"stopped by {signal.Signals(ended.code - 128).name}"
    lines = [f"onehour: the training did not finish ({how})."]
    if fault is not None:
        lines.append(fault.what)
    if (folder / FILE_NAME).exists():
        lines.append(f"What happened is above and in {folder / FILE_NAME}.")
        if not _ended_as("diverged", folder, events_before):  # else it would come apart once more
            lines.append("The same command continues from the last checkpoint.")
    elif several_hosts and ended.code == 0:
        lines.append(f"{folder / FILE_NAME} is not there, though the launcher saw no failure.")
        lines.append("The run folder must be on a file system that this host shares with the first host.")
    else:
        lines.append("What happened is above.")
    return "\n  ".join(lines)
