"""A training across hosts as a test has it: started on one of them, looked at while it runs, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.lease import RANKS_FILE
from tests.cluster.hosts import Cluster, Host
from tests.conftest import tiny_config
from tests.training import run_of

ROOT = Path(__file__).parents[2]
# k = 12 logical workers of n = 8: one, two and three hosts of two ranks divide them. With n = 4 the network's last BN
# has 4 values to normalise, and one and two ranks on one machine end 0.7 apart for rounding alone; with n = 8, 2e-6
TWELVE_WORKERS = {"train_batch_size": 96, "recipe.reference_batch": 48}
KN = TWELVE_WORKERS["train_batch_size"]
ONEHOUR_TRAIN = (sys.executable, "-m", "pipeline.cli", "train")
START_SECONDS = 300
"""For hosts to train, on a machine that has other things to do."""


def configure(data: Path, folder: Path, name: str, changes: dict[str, Any] | None = None) -> Path:
    """Write the tiny configuration for twelve logical workers, and return its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tiny_config(data, folder / "runs" / name, **TWELVE_WORKERS, **(changes or {}))))
    return path


class Launched:
    """`onehour train` or another launcher, as a person starts it who is logged in on a host.

    Attributes:
        process: the launcher itself.
        run: the run's folder.

    Args:
        host: where it is started.
        path: the configuration; its folder is the working folder.
        arguments: further ones.
        command: another launcher's command line, up to the configuration.
    """

    def __init__(self, host: Host, path: Path, *arguments: str | Path, command: Sequence[str] = ONEHOUR_TRAIN) -> None:
        self.run = run_of(path)
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as this object
        self.process = host.start(
            [*command, path, *arguments],
            env={"PYTHONPATH": str(ROOT)},
            cwd=path.parent,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def step(self) -> int:
        """Updates that rank 0 says are done, -1 before it trains."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.run / RANKS_FILE).read_text())
            return -1 if state["phase"] == "setting up" else state["step"]
        return -1

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS, pause: float = 0.02) -> None:
        """Wait for a condition while it runs, looking every `pause` seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(pause)

    def wait_for_step(self, step: int) -> None:
        """Wait until so many updates are done."""
        self.wait_until(lambda: self.step() >= step)

    def code(self, seconds: float = 200) -> int:
        """The exit code, when it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s:\n{self.output}") from None

    def output_of(self, code: int = 0, seconds: float = 200) -> str:
        """What it printed, when it has ended with this exit code."""
        assert self.code(seconds) == code, self.output
        return self.output


def program_processes(hosts: Sequence[Host]) -> list[str]:
    """Command lines of this program's processes on the hosts: ranks, their guardians and launchers."""
    found = []
    for host in hosts:
        for pid in host.pids():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if "pipeline" in line or "deepspeed" in line:
                    found.append(f"{host.name}: {pid} {line[:120]}")
    return found


def wait_until_nothing_is_left(hosts: Sequence[Host], seconds: float) -> float:
    """Wait until no process of the program is left on any host. Returns the seconds it took."""
    began = time.monotonic()
    while left := program_processes(hosts):
        assert time.monotonic() - began < seconds, left
        time.sleep(0.05)
    return time.monotonic() - began


@contextlib.contextmanager
def tidy(cluster: Cluster) -> Iterator[None]:
    """Whatever a test leaves running on the hosts is gone for the next one."""
    try:
        yield
    finally:
        for host in cluster.hosts:
            host.connect()
            for pid in host.pids():
                with contextlib.suppress(OSError):
                    if b"pipeline" in (line := Path(f"/proc/{pid}/cmdline").read_bytes()) or b"deepspeed" in line:
                        os.kill(pid, signal.SIGKILL)
