"""Commands that train, several at once on one machine, each on its share of the GPUs and cores, with its own log.

None of them outlives this process unseen: told to stop, it tells them, and they save; killed, the kernel tells them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Protocol

from pipeline.sweep_machine import Share
from shards.errors import UserError
from shards.files import exclusive

POLL_SECONDS = 0.2
FOLDER_SECONDS = 180.0
"""How long the run folder of a training that is being stopped is waited for."""

LAST_LINES = 8
"""Of the log of a run that failed."""

_TOLD_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before a fork
_HEADER = "== "


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        name: for people.
        command: starts it.
        folder: the run folder; it is not started while another process trains there.
        log: what it prints is added to this file.
        parts: how many parts of the machine it takes.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    log: Path
    parts: int = 1


class Watcher(Protocol):
    """Who is told what happens."""

    def started(self, job: Job) -> None:
        """A training was started."""

    def waiting(self, job: Job, why: str) -> None:
        """It cannot be started yet; told once."""

    def ended(self, job: Job, code: int, seconds: float, *, stopping: bool) -> None:
        """It ended: with an exit code, −n where signal n ended it; `stopping` where it was told to stop."""

    def running(self, jobs: Sequence[Job]) -> None:
        """These run at the moment; told again and again."""

    def stopping(self, *, again: bool) -> None:
        """They were told to stop; `again`: at once, without a save."""


class Jobs:
    """Runs trainings until all have ended, or somebody wants them to stop.

    Args:
        jobs: what is to be trained, in this order.
        parts: of the machine; as many trainings at once as they are enough for.
        watcher: told of it.
    """

    def __init__(self, jobs: Sequence[Job], parts: Sequence[Share], watcher: Watcher) -> None:
        self._waiting = list(jobs)
        self._free = list(parts)
        self._watcher = watcher
        self._running: list[_Running] = []
        self._held_since: dict[Job, float] = {}
        self._signals: list[int] = []

    @property
    def stopping(self) -> bool:
        """Whether somebody wanted it to stop."""
        return bool(self._signals)

    def run(self) -> None:
        """Run them. The first SIGTERM or Ctrl-C asks them to save and to stop, a second one ends them as they are.

        Raises:
            UserError: a log cannot be written. What runs is then stopped.
        """
        stopping = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            stopping.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._note) for number in stopping}
        passed_on = 0
        try:
            while self._running or (self._waiting and not self.stopping):
                if len(self._signals) > passed_on:
                    self._watcher.stopping(again=passed_on > 0)
                    passed_on += 1  # one in each round: signals that come together are taken for one
                    self._tell_all()
                if not self.stopping:
                    self._start_what_can_be()
                self._watcher.running([running.job for running in self._running])
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            self._tell_all()  # there are any only where something went wrong here
            for running in self._running:
                running.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _tell_all(self) -> None:
        for running in self._running:
            with contextlib.suppress(ProcessLookupError):
                running.process.terminate()

    def _start_what_can_be(self) -> None:
        for job in list(self._waiting):
            if job.parts > len(self._free) or self._is_held(job):
                continue
            self._waiting.remove(job)
            taken, self._free = self._free[: job.parts], self._free[job.parts :]
            self._running.append(_Running(job, _start(job, Share.sum(taken)), taken, time.monotonic()))
            self._watcher.started(job)

    def _is_held(self, job: Job) -> bool:
        """Whether another process trains in its folder: of a sweep that was killed, ranks may still be saving."""
        if not job.folder.exists():
            return False
        try:
            with exclusive(job.folder, "training"):
                return False
        except UserError as error:
            if job not in self._held_since:
                self._held_since[job] = time.monotonic()
                self._watcher.waiting(job, error.headline)
            # after that it is started, refuses, and says why in its log
            return time.monotonic() - self._held_since[job] < FOLDER_SECONDS

    def _collect(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            if code is not None:
                self._running.remove(running)
                self._free += running.taken
                seconds = time.monotonic() - running.since
                self._watcher.ended(running.job, code, seconds, stopping=self.stopping)


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen
    taken: list[Share]
    since: float


def _start(job: Job, share: Share) -> subprocess.Popen:
    variables = dict(os.environ)
    if share.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, share.gpus))
    root = str(Path(__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))

    def in_the_child() -> None:
        if _PRCTL is not None:
            _PRCTL(_TOLD_OF_PARENTS_DEATH, signal.SIGTERM)
        if share.cores:
            os.sched_setaffinity(0, share.cores)

    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"{_HEADER}{datetime.now():%Y-%m-%d %H:%M:%S}  {shlex.join(job.command)}\n".encode())
            log.flush()
            # in a group of its own, so that Ctrl-C comes here alone and is passed on once
            return subprocess.Popen(
                job.command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=in_the_child,
            )
    except OSError as error:
        raise UserError(f"{job.log}: {job.name} cannot be started: {error.strerror or error}") from error


def last_lines(log: Path) -> list[str]:
    """The end of what the last training in a log printed, for people."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    begun = max((number for number, line in enumerate(lines) if line.startswith(_HEADER)), default=-1)
    return [line for line in lines[begun + 1 :] if line.strip()][-LAST_LINES:]
