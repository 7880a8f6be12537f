"""The deepspeed launcher as a process: its command line, and stopping it with everything that it started.

Closed here: it passes no signal on to local ranks; killed, it leaves them training, and can end with exit code 0; and
it waits for ever for a host that does not answer any more.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pipeline.config import Config
from pipeline.environment import is_secret
from pipeline.lease import ENDED, Lease, RanksState

POLL_SECONDS = 0.1
STOP_SECONDS = 5.0  # ranks that are still there so long after they were told to stop are killed
REMOTE_STOP_SECONDS = 45.0
"""The same on other hosts, where DeepSpeed's launcher itself gives ranks half a minute."""

LINGER_SECONDS = 40.0
"""How long after its ranks have ended a launcher may take to notice."""

QUIET_SECONDS = 20.0
"""Ranks that a dead launcher left behind, and that write nothing for so long, are not waited for."""


class Ended(NamedTuple):
    """How a launcher ended.

    Attributes:
        code: its exit code, 128 + n where signal n ended it, or was sent to this process and ended it.
        wanted: whether a signal was sent to this process.
    """

    code: int
    wanted: bool = False


def command_line(
    experiment: Config,
    world_size: int,
    options: Sequence[str],
    lease: str | None,
    module: str = "pipeline.train",
    more: Sequence[str] = (),
) -> list[str]:
    """The launcher's command line.

    Args:
        experiment: what to train.
        world_size: the ranks that were planned.
        options: the launcher's own.
        lease: the token of the one that this process holds.
        module: what each rank runs.
        more: arguments for it, of plain characters: a shell on another host may take them apart.
    """
    arguments = [str(experiment.path), "--expect-world-size", str(world_size), *more]
    if lease is not None:
        arguments += ["--lease", lease]
    if experiment.overrides:
        # with pdsh a shell on every host takes arguments apart again, and quotes, braces and $ do not survive it
        overrides = base64.urlsafe_b64encode(json.dumps(experiment.overrides).encode()).decode()
        arguments += ["--overrides-base64", overrides]
    script = Path(sys.executable).parent / "deepspeed"
    launcher = [sys.executable, str(script)] if script.exists() else [shutil.which("deepspeed") or "deepspeed"]
    return [*launcher, *options, "--module", module, *arguments]


def run_launcher(
    command: Sequence[str],
    environment: Mapping[str, str],
    lease: Lease,
    *,
    pdsh: bool,
    interrupt: threading.Event | None = None,
) -> Ended:
    """Run the launcher until it ends, and stop it and its ranks where this process is told to stop.

    The first SIGTERM or Ctrl-C asks the ranks, through the lease, to save after the update that they are in; a second
    one ends them as they are, as does the first where they do not train yet.

    Args:
        command: the launcher's command line.
        environment: variables to set for it.
        lease: held by this process.
        pdsh: whether pdsh starts its ranks, on other hosts than this one.
        interrupt: once set, the ranks are asked to save and to stop.

    """
    variables = {**os.environ, **environment}
    # where it is set, thousands of modules would be compiled again by every rank
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    variables.setdefault("OMP_NUM_THREADS", "1")  # the ranks set their own share of the cores
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # whoever is gone is told of without C++ frames
    if pdsh:
        # DeepSpeed sends them without being asked to, into every host's list of processes
        for name in [name for name in variables if name.startswith("MLFLOW") and is_secret(name)]:
            del variables[name]
    root = str(Path(__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    stopping = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        stopping.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in stopping}
    try:
        # in a group of its own: ranks outlive a launcher that is killed, but not their group, and Ctrl-C comes here
        # alone. Without the terminal's input: what asks there from the background would be stopped, and the ranks hang
        process = subprocess.Popen(command, env=variables, process_group=0, stdin=subprocess.DEVNULL)
        ended = _wait(process, lease, received, pdsh=pdsh, interrupt=interrupt)
        _end_leftovers(process, lease, pdsh=pdsh)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ended


def _wait(
    process: subprocess.Popen, lease: Lease, received: list[int], *, pdsh: bool, interrupt: threading.Event | None
) -> Ended:
    watched = _Watched(lease)
    asked = told = False
    linger_until = kill_at = float("inf")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL_SECONDS)
            watched.done = True
            code = 128 - code if code < 0 else code
            if received and (told or not asked):
                return Ended(128 + received[0], wanted=True)
            return Ended(code, wanted=bool(received))
        now = time.monotonic()
        ranks = watched.latest
        if ranks is not None and ranks.phase == ENDED:
            linger_until = min(linger_until, now + LINGER_SECONDS)
        wanted = bool(received) or (interrupt is not None and interrupt.is_set())
        if wanted and ranks is not None and not asked:
            asked = True
            lease.order_stop()
            if received:
                _say("stopping after this update; again: at once")
        at_once = received and (ranks is None or len(received) > 1)
        if not told and (at_once or now > linger_until):  # it waits for a host that does not answer
            told = True
            kill_at = now + (REMOTE_STOP_SECONDS if pdsh else STOP_SECONDS)
            if pdsh:
                process.terminate()  # it has a handler, which ends the ranks on the other hosts
            else:
                _signal_group(process.pid, signal.SIGTERM)
        if now > kill_at:
            _signal_group(process.pid, signal.SIGKILL)


class _Watched:
    """Where the ranks are, looked up on a thread: the run folder may hang, and Ctrl-C must work all the same."""

    def __init__(self, lease: Lease) -> None:
        self.latest: RanksState | None = None
        self.done = False
        self._lease = lease
        threading.Thread(target=self._look, name="ranks", daemon=True).start()

    def _look(self) -> None:
        while not self.done and not self._lease.ended:
            self.latest = self._lease.ranks() or self.latest
            time.sleep(POLL_SECONDS)


def _end_leftovers(process: subprocess.Popen, lease: Lease, *, pdsh: bool) -> None:
    """Ranks of a launcher that is gone: here its group, on other hosts those that still write where they are."""
    if pdsh:
        # before what connects them with this host: they save first
        lease.order_stop()
        quiet_since = time.monotonic()
        while (ranks := lease.ranks()) is not None and ranks.phase != ENDED:
            if ranks.changed:
                quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > QUIET_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        lease.ranks_may_come = ranks is None or ranks.phase != ENDED
    if _signal_group(process.pid, signal.SIGTERM):
        _end_group(process.pid)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"onehour: {text}", file=sys.stderr, flush=True)


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
