"""A rank that does not run any more is ended by its guardian, and no other is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

# a rank as far as the guardian is concerned: a line into its input twenty times a second
RANK = """
import ctypes, faulthandler, os, signal, subprocess, sys, threading, time
from pipeline import guardian
faulthandler.register(signal.SIGUSR2, all_threads=True)
beside = subprocess.Popen(
    [sys.executable, "-S", "-c", "from pipeline import guardian; guardian.DUMP_SECONDS = 0.3; guardian.main()",
     str(os.getpid()), "rank 3 on worker-1", sys.argv[1]],
    stdin=subprocess.PIPE, start_new_session=True,
)
def tell():
    while True:
        beside.stdin.write(b"it was last seen updating after update 41\\n")
        beside.stdin.flush()
        time.sleep(0.05)
threading.Thread(target=tell, daemon=True).start()
print(beside.pid, flush=True)
def holds_the_lock():
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)  # nobody ever writes there
def holds_the_lock_until_a_signal():
    ctypes.PyDLL(None).sleep(60)
for line in sys.stdin:
    exec(line)
"""


class Rank:
    """A process with a guardian; `do` has it run a line of Python."""

    def __init__(self, patience: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(patience)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.guardian = psutil.Process(int(self.process.stdout.readline()))
        while "guardian" not in " ".join(self.guardian.cmdline()):
            time.sleep(0.005)
        time.sleep(0.2)  # its handlers are set and a line has come

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[int, str]:
        """Its exit code and what it and its guardian printed."""
        assert self.process.stderr is not None
        code = self.process.wait(10)
        return code, self.process.stderr.read()

    def guardian_ends(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.guardian.is_running() and self.guardian.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
                    continue
            return True
        return False


@pytest.fixture
def start() -> Iterator[Callable[[float], Rank]]:
    ranks: list[Rank] = []

    def make(patience: float) -> Rank:
        ranks.append(Rank(patience))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate()
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.guardian.kill()


def test_a_rank_that_was_stopped_is_killed_and_named(start):
    rank = start(0.5)
    began = time.monotonic()
    rank.process.send_signal(signal.SIGSTOP)
    code, said = rank.ended()
    assert code == -signal.SIGKILL and 0.4 < time.monotonic() - began < 3
    assert "onehour: rank 3 on worker-1 has not run for 0.5 s (state T (stopped)" in said
    assert "  it was last seen updating after update 41\n" in said
    assert rank.guardian_ends(2)


def test_one_that_holds_the_interpreters_lock_shows_where_and_is_killed(start):
    """No thread of it runs, Python's signal handlers least of all; its stacks are written all the same."""
    rank = start(0.3)
    rank.do("holds_the_lock()")
    code, said = rank.ended()
    assert code == -signal.SIGKILL
    assert "has not run for 0.3 s (state S (sleeping)" in said
    assert "in holds_the_lock" in said and "in tell" in said, "all threads"
    assert said.index("has not run") < said.index("in holds_the_lock")


def test_one_that_comes_back_while_its_stacks_are_written_is_killed_all_the_same(start):
    """It was said to be killed, and the others may have given it up."""
    rank = start(0.3)
    rank.do("holds_the_lock_until_a_signal()")
    code, said = rank.ended()
    assert code == -signal.SIGKILL and "has not run" in said


def test_a_whole_job_that_was_stopped_and_goes_on_is_left_alone(start):
    """As Slurm suspends jobs; the guardian wakes up first, and nothing was written meanwhile."""
    rank = start(0.5)
    for process in (rank.process, rank.guardian):
        process.send_signal(signal.SIGSTOP)
    time.sleep(0.6)
    rank.guardian.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    rank.process.send_signal(signal.SIGCONT)
    assert not rank.guardian_ends(0.6) and rank.process.poll() is None


def test_one_that_lives_is_left_alone(start):
    rank = start(0.5)
    rank.do("time.sleep(0.2)")
    time.sleep(0.8)
    rank.do("sys.exit(7)")
    assert rank.ended() == (7, "")
    assert rank.guardian_ends(2)


@pytest.mark.parametrize("how", ["sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_with_its_rank(start, how):
    rank = start(0)
    rank.do(how)
    code, said = rank.ended()
    assert code in (3, -signal.SIGKILL) and said == ""
    assert rank.guardian_ends(2)


def test_it_outlives_what_stops_the_ranks_processes(start):
    """Launchers send these to a rank's children too, before the rank has saved."""
    rank = start(0.5)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        rank.guardian.send_signal(number)
    assert os.getpgid(rank.guardian.pid) != os.getpgid(rank.process.pid)
    assert not rank.guardian_ends(0.2)
    rank.process.send_signal(signal.SIGSTOP)
    assert rank.ended()[0] == -signal.SIGKILL


def test_patience_can_be_changed_and_without_end(start):
    rank = start(0)
    rank.process.send_signal(signal.SIGSTOP)
    assert not rank.guardian_ends(0.4) and rank.process.poll() is None, "0 is never"
    rank.process.send_signal(signal.SIGCONT)
    rank.do("beside.stdin.write(b'patience 0.3\\n')")
    time.sleep(0.3)
    rank.process.send_signal(signal.SIGSTOP)
    code, said = rank.ended()
    assert code == -signal.SIGKILL and "has not run for 0.3 s" in said


def test_it_costs_next_to_nothing(start):
    rank = start(5)
    before = rank.guardian.cpu_times()
    time.sleep(0.5)
    after = rank.guardian.cpu_times()
    assert sum(after[:2]) - sum(before[:2]) <= 0.02
    assert rank.guardian.memory_info().rss < 32 << 20
