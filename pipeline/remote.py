"""Commands on many hosts at once over ssh: each host's answer within a time that no other host can draw out.

ssh is the user's own, with the user's own `~/.ssh/config`; it never asks anything. What a host prints is returned as
it came: login scripts may print too, so who wants one line of it should mark that line.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 8
AT_ONCE = 128
"""Hosts that are talked to at the same time; each takes three of this process's files."""

SSH_FAILED = 255
"""The exit code of ssh itself; a command that ends with it cannot be told from that."""

QUIET_SECONDS = 5  # after so long without a sign of life, twice, a connection is given up


@dataclass(frozen=True)
class Answer:
    """What came of a command on one host.

    Attributes:
        host: as it was named.
        code: its exit code, 255 where ssh itself failed, or None where it did not end in time.
        stdout, stderr: what it printed.
        began: when ssh was started, in seconds since 1970 by this machine's clock.
        seconds: that it took, connecting included.
    """

    host: str
    code: int | None
    stdout: str
    stderr: str
    began: float
    seconds: float

    @property
    def problem(self) -> str | None:
        """Why the command did not succeed, as one line; None if it did."""
        if self.code == 0:
            return None
        if self.code is None:
            return f"no answer within {self.seconds:.0f} s"
        said = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return said[-1] if said else f"exit code {self.code}"


def shell_command(
    command: Sequence[str] | str, *, cwd: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """A command as one line for a remote shell, which takes it apart into exactly these words.

    Args:
        command: words, or a line for the shell as it is.
        cwd: the folder to run it in; the command does not run where there is no such folder.
        environment: variables to set for it. Not with a line for the shell, which can set its own.
    """
    line = command if isinstance(command, str) else shlex.join(command)
    if environment:
        assert not isinstance(command, str)
        line = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items())]) + f" {line}"
    return line if cwd is None else f"cd {shlex.quote(str(cwd))} && {line}"


def ssh_command(host: str, line: str, *, port: int | None = None, connect_seconds: int = CONNECT_SECONDS) -> list[str]:
    """The ssh command that has a host's shell run a line, and asks nothing."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": connect_seconds,
        "ServerAliveInterval": QUIET_SECONDS,
        "ServerAliveCountMax": 2,
        "ControlMaster": "no",  # a connection there already is used; a new one to share would outlive the command
        "LogLevel": "ERROR",  # no banners among the errors
    }
    words = ["ssh", "-T", *(f"-o{name}={value}" for name, value in options.items())]
    if port is not None:
        words += ["-p", str(port)]
    return [*words, "--", host, line]  # a host that begins with a dash is no option


def run_everywhere(
    hosts: Sequence[str],
    command: Sequence[str] | str,
    *,
    cwd: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 60,
    port: int | None = None,
    connect_seconds: int = CONNECT_SECONDS,
) -> dict[str, Answer]:
    """Run a command on every host at the same time.

    A command that does not end in time loses its connection; what then becomes of it on its host is its own affair
    (most end when they next write).

    Args:
        hosts: names that ssh knows.
        command, cwd, environment: see `shell_command`.
        stdin: text for the command.
        timeout: seconds for each host, connecting included.
        port: of their sshd; default: ssh's own.
        connect_seconds: after which a host that does not answer is given up.

    Returns:
        The answers by host, in the order of `hosts`.

    Raises:
        FileNotFoundError: there is no ssh on this machine.
    """
    line = shell_command(command, cwd=cwd, environment=environment)
    running: list[subprocess.Popen[str]] = []

    def run_one(host: str) -> Answer:
        began, start = time.time(), time.monotonic()
        process = _start(ssh_command(host, line, port=port, connect_seconds=connect_seconds))
        running.append(process)
        try:
            stdout, stderr = process.communicate(stdin, timeout)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            _kill(process)
            stdout, stderr = process.communicate()
            code = None
        return Answer(host, code, stdout, stderr, began, time.monotonic() - start)

    with ThreadPoolExecutor(max(1, min(len(hosts), AT_ONCE))) as pool:
        try:
            return {answer.host: answer for answer in pool.map(run_one, hosts)}
        except BaseException:  # Ctrl-C among them: nobody waits for hosts that nobody asks any more
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                _kill(process)
            raise


@contextlib.contextmanager
def started(
    host: str,
    command: Sequence[str] | str,
    *,
    cwd: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A command that runs on one host while the block does; see `shell_command` for the arguments.

    Its input and output are pipes. At the end of the block its input ends, which is its sign to stop, and a moment
    later its connection does.
    """
    line = shell_command(command, cwd=cwd, environment=environment)
    process = _start(ssh_command(host, line, port=port))
    assert process.stdin is not None
    try:
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        _kill(process)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def _start(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # nothing of it can ask at the terminal, and all of it can be killed
    )


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
