"""`onehour launch --restarts N --min-nodes M`: launch again after a failure, on the hosts that still answer.

What can be trained on other hosts without any change of the training is a matter of arithmetic: their ranks must divide
the logical workers. A host that comes back is taken in again: the ranks save, and a launch with all of them goes on. A
failure that repeats after the same update on the same hosts is not the hosts', and is not tried a third time.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline import reach
from pipeline.fault import FAILED, MISTAKE, STOPPED
from pipeline.metrics import FILE_NAME, MetricsWriter
from shards.errors import UserError
from shards.files import exclusive

if TYPE_CHECKING:
    from pipeline.launch import Launch, Outcome

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds before a launch after a failure; doubled from one failure to the next."""

ASKING_SECONDS = 30.0
"""How often hosts that did not answer are asked again."""

LOCK_SECONDS = 180.0
"""How long a launch waits for the run folder of the one before it."""

WAITING_SECONDS = 900.0
"""How long too few hosts are waited for."""


def choose(slots: Mapping[str, Sequence[int]], answering: Sequence[str], workers: int, least: int) -> list[str]:
    """The hosts to train on: those with the most ranks that divide the workers, the first of them in the hostfile.

    Args:
        slots: of each host, in the hostfile's order.
        answering: the hosts that can be used.
        workers: k, the logical workers of the configuration.
        least: hosts.

    Returns:
        Their names in the hostfile's order; empty where at least `least` hosts cannot be had.
    """
    alike: dict[int, list[str]] = {}
    for host in slots:
        if host in answering:
            alike.setdefault(len(slots[host]), []).append(host)
    best: tuple[int, int, tuple[int, ...]] = (0, 0, (0,) * len(alike))  # ranks, hosts, and hosts of each kind
    for counts in itertools.product(*(range(len(hosts) + 1) for hosts in alike.values())):
        ranks = sum(size * count for size, count in zip(alike, counts, strict=True))
        if ranks and workers % ranks == 0 and sum(counts) >= least:
            best = max(best, (ranks, sum(counts), counts))
    chosen = {host for hosts, count in zip(alike.values(), best[2], strict=True) for host in hosts[:count]}
    return [host for host in slots if host in chosen]


class Supervisor:
    """Launches of one run until it is finished.

    Args:
        launch: what is launched.
        slots: of each host that may be used, in the hostfile's order.
        restarts: launches after a failure, at most.
        least: hosts without which nothing is launched.

    Raises:
        UserError: the options contradict each other or the configuration.
    """

    def __init__(self, launch: Launch, slots: Mapping[str, list[int]], restarts: int, least: int | None) -> None:
        if not slots or not launch.remote or launch.launcher != "pdsh":
            raise UserError(
                "--restarts is for several hosts that are started over ssh: give a hostfile with --hostfile"
            )
        blocks = launch.experiment.blocks
        if blocks.train_batch_size is None or blocks.train_micro_batch_size_per_gpu is None:
            raise UserError(
                f"{launch.experiment.path}: --restarts needs train_batch_size and train_micro_batch_size_per_gpu",
                "Else the minibatch would grow and shrink with the hosts, and the training be another one.",
            )
        self._launch = launch
        self._slots = slots
        self._restarts = restarts
        self._least = least if least is not None else len(slots)
        self._workers = blocks.train_batch_size // blocks.train_micro_batch_size_per_gpu
        self._port = int(launch.given["--ssh_port"]) if "--ssh_port" in launch.given else None
        if not 1 <= self._least <= len(slots):
            raise UserError(f"--min-nodes {self._least}: the hostfile gives 1 to {len(slots)} hosts")
        if not choose(slots, list(slots), self._workers, self._least):
            raise UserError(
                f"no {self._least} or more of the hosts have ranks that divide the {self._workers} logical workers",
                "onehour plan CONFIG --world-size W says which numbers of ranks do.",
            )

    def run(self) -> int:
        """Launch until the run is finished, or cannot be. Returns the exit code of the last launch."""
        try:
            return self._run()
        except KeyboardInterrupt:  # between two launches
            return 128 + signal.SIGINT

    def _run(self) -> int:
        failures = 0
        pause = FIRST_PAUSE
        last: tuple[int, list[str]] | None = None
        while True:
            chosen, silent = self._hosts()
            if not chosen:
                self._say(f"gave up: for {WAITING_SECONDS:g} s fewer hosts than --min-nodes {self._least} answered")
                return FAILED
            outcome = self._launch_on(chosen, silent)
            if outcome.finished or outcome.wanted or outcome.code == MISTAKE:
                return outcome.code
            if outcome.code == STOPPED and self._returned.is_set():
                self._note("hosts answer again: they are taken in", chosen, outcome)
                continue
            failures += 1
            what = "its ranks were told to stop" if outcome.code == STOPPED else f"exit code {outcome.code}"
            self._note(outcome.fault.what if outcome.fault is not None else what, chosen, outcome)
            if failures > self._restarts:
                self._say(f"gave up after {self._restarts} restart{'s' * (self._restarts != 1)}")
                return outcome.code
            if last == (outcome.step, chosen) and not self._leaves_out(outcome):
                self._say(f"gave up: it failed after update {outcome.step:,} on the same hosts twice")
                return outcome.code
            last = (outcome.step, chosen)
            self._say(f"restart {failures} of {self._restarts} in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _leaves_out(self, outcome: Outcome) -> bool:
        """Do without the host at fault from here on, where the others are enough: it answers, and yet fails."""
        host = outcome.fault.host if outcome.fault is not None else None
        others = {name: slots for name, slots in self._slots.items() if name != host}
        if host not in self._slots or not choose(others, list(others), self._workers, self._least):
            return False
        self._say(f"going on without {host}: it failed after update {outcome.step:,} twice")
        self._slots = others
        return True

    def _hosts(self) -> tuple[list[str], dict[str, str]]:
        """The hosts to train on, waiting for enough of them, and the reasons of those that do not answer."""
        deadline = time.monotonic() + WAITING_SECONDS
        while True:
            answering, silent = reach.answering(list(self._slots), self._port)
            for host, reason in silent.items():
                self._say(f"{host} does not answer: {reason}")
            chosen = choose(self._slots, answering, self._workers, self._least)
            if chosen or time.monotonic() > deadline:
                return chosen, silent
            self._say(f"{len(answering)} hosts answer, --min-nodes is {self._least}: waiting")
            time.sleep(ASKING_SECONDS)

    def _launch_on(self, chosen: list[str], silent: Mapping[str, str]) -> Outcome:
        from pipeline.launch import ranks_on

        ranks = ranks_on(self._launch.args.hostfile, {host: self._slots[host] for host in chosen})
        each = self._workers // ranks.world_size
        self._say(f"launching {ranks.world_size} ranks × {each} accumulation on {', '.join(chosen)}")
        self._returned = threading.Event()
        over = threading.Event()
        asking = threading.Thread(target=self._ask_for_more, args=(chosen, over), daemon=True)
        if silent:
            asking.start()
        self._wait_for_the_folder()
        try:
            return self._launch.run(ranks, self._returned)
        except UserError as error:
            # a host that went away since it was asked is no mistake; another launch asks again
            if reach.answering(chosen, self._port)[1]:
                return _failed(error)
            raise
        finally:
            over.set()

    def _wait_for_the_folder(self) -> None:
        """A file server keeps the lock of a host that has lost its power, until it takes it for gone."""
        deadline = time.monotonic() + LOCK_SECONDS
        while self._launch.folder.exists() and time.monotonic() < deadline:
            try:
                with exclusive(self._launch.folder, "training"):
                    return
            except UserError as error:
                self._say(f"waiting: {error.headline}")
                time.sleep(FIRST_PAUSE)

    def _ask_for_more(self, chosen: list[str], over: threading.Event) -> None:
        """Set `_returned` when a launch now would have more ranks than this one."""
        while not over.wait(ASKING_SECONDS):
            answering, _ = reach.answering(list(self._slots), self._port)
            more = choose(self._slots, answering, self._workers, self._least)
            if self._ranks(more) > self._ranks(chosen) and not over.is_set():
                back = ", ".join(host for host in more if host not in chosen)
                self._say(f"{back} answers again: saving to go on there")
                self._returned.set()
                return

    def _ranks(self, hosts: Sequence[str]) -> int:
        return sum(len(self._slots[host]) for host in hosts)

    def _note(self, what: str, chosen: list[str], outcome: Outcome) -> None:
        """What became of a launch, on the screen and in the run's record, which nobody writes at the moment."""
        self._say(f"the launch on {', '.join(chosen)} ended after update {outcome.step:,}: {what}")
        path = self._launch.folder / FILE_NAME
        if not path.exists():
            return
        try:
            with exclusive(self._launch.folder, "training"), MetricsWriter(path) as writer:
                writer.write("launch", hosts=chosen, step=outcome.step, code=outcome.code, message=what)
        except (UserError, OSError) as error:
            self._say(f"not written down: {error}")

    @staticmethod
    def _say(text: str) -> None:
        print(f"supervisor   {datetime.now():%H:%M:%S}   {text}", file=sys.stderr, flush=True)


def _failed(error: UserError) -> Outcome:
    from pipeline.launch import Outcome

    print(f"onehour: {error}", file=sys.stderr)
    return Outcome(FAILED, False, 0)
