"""Launcher and rank 0 know of each other by two files: whatever is killed, set back, torn or full."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import lease as leases
from pipeline.lease import ENDED, LAUNCHER_FILE, RANKS_FILE, Lease, LeaseView
from shards.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.lease import Lease
with Lease(Path(sys.argv[1])) as lease:
    print(lease.token, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A launcher in a process of its own that holds the lease of `tmp_path`, and its token."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


@pytest.fixture
def elsewhere(monkeypatch):
    """This process as one that the lease's holder cannot be seen from: another host, or another container."""
    places = iter(range(10**6))
    monkeypatch.setattr(leases, "_place", lambda: f"place {next(places)}")


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of rank 0's side, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    return now


def rewrite(path: Path, **changes: object) -> None:
    content, _ = leases._read(path)
    leases._write(path, content | changes, time.time_ns())


# ---------------------------------------------------------------- on one machine


def test_a_launcher_that_is_killed_is_missed_at_once(tmp_path, holder):
    process, token = holder
    view = LeaseView(tmp_path, token, seconds=10**6)
    assert view.order() == ("train", "")
    process.kill()
    deadline = time.monotonic() + 5
    while view.order()[0] == "train" and time.monotonic() < deadline:  # until the kernel is done with it
        time.sleep(0.005)
    assert process.returncode is None, "it is not reaped: a zombie runs no more than nothing"
    assert view.order() == ("stop", "its launcher was killed")
    process.wait()
    assert view.order() == ("stop", "its launcher was killed")


def test_a_launcher_that_is_stopped_for_a_while_is_not(tmp_path, holder):
    process, token = holder
    view = LeaseView(tmp_path, token, seconds=0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    assert view.order() == ("train", "")


def test_another_process_with_the_number_of_the_launcher_is_not_the_launcher(tmp_path):
    with Lease(tmp_path) as lease:
        view = LeaseView(tmp_path, lease.token)
        assert view.order() == ("train", "")
        began = leases._began(os.getpid())
        assert began is not None
        rewrite(tmp_path / LAUNCHER_FILE, began=began - 1)
        assert view.order() == ("stop", "its launcher was killed")
        rewrite(tmp_path / LAUNCHER_FILE, began=began)
        assert view.order() == ("train", ""), "the number and the beginning of one process"


# ---------------------------------------------------------------- across hosts


def looks(view: LeaseView, clock: list[float], count: int) -> list[tuple[str, str]]:
    """What as many looks find, a second apart."""
    orders = []
    for _ in range(count):
        clock[0] += 1
        orders.append(view.order())
    return orders


def test_a_folder_that_hangs_or_cannot_be_read_does_not_count_against_the_launcher(tmp_path, elsewhere, clock):
    lease = Lease(tmp_path)
    lease._write("train")
    view = LeaseView(tmp_path, lease.token, seconds=60)
    assert view.order() == ("train", "")
    clock[0] += 3600  # one look took an hour, and the launcher could not renew it meanwhile
    assert view.order() == ("train", "")
    assert looks(view, clock, 50)[-1] == ("train", "")
    content = (tmp_path / LAUNCHER_FILE).read_bytes()
    (tmp_path / LAUNCHER_FILE).write_bytes(b"")
    assert view.order() == ("train", "")
    (tmp_path / LAUNCHER_FILE).write_bytes(content)
    os.utime(tmp_path / LAUNCHER_FILE, ns=(5, 5))
    assert looks(view, clock, 60)[-1] == ("train", "")


def test_on_another_host_a_lease_lives_while_it_changes(tmp_path, elsewhere, clock):
    lease = Lease(tmp_path)
    lease._write("train")
    view = LeaseView(tmp_path, lease.token, seconds=60)
    for stamp in range(1, 6):
        os.utime(tmp_path / LAUNCHER_FILE, ns=(stamp, stamp))
        assert looks(view, clock, 60) == [("train", "")] * 60, "59 s after it changed"
    assert looks(view, clock, 1) == [("train", "")], "60 s, and not longer"
    assert looks(view, clock, 1) == [("stop", "its launcher has given no sign of life for 60 s")]
    os.utime(tmp_path / LAUNCHER_FILE, ns=(9, 9))
    assert view.order() == ("train", "")


def test_the_holder_renews_it(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.02)
    with Lease(tmp_path) as lease:
        view = LeaseView(tmp_path, lease.token, seconds=0.5)
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert view.order() == ("train", "")
            time.sleep(0.02)


def test_wall_clocks_that_jump_by_days_change_nothing(tmp_path, elsewhere, clock, monkeypatch):
    """Of the launcher's host, of rank 0's, and of the file server, which stamps what is written."""
    lease = Lease(tmp_path)
    lease._write("train")
    view = LeaseView(tmp_path, lease.token, seconds=60)
    for day in (3, -7, 30, -1):
        monkeypatch.setattr(leases.time, "time", lambda day=day: 1.8e9 + 86_400 * day)
        stamp = (2_000_000_000 + 86_400 * day) * 10**9
        os.utime(tmp_path / LAUNCHER_FILE, ns=(stamp, stamp))
        clock[0] += 1
        assert view.order() == ("train", "")
    assert looks(view, clock, 61)[-1][0] == "stop", "a stamp of tomorrow keeps nobody alive"


# ---------------------------------------------------------------- orders


def test_an_order_to_stop_is_heard_here_and_elsewhere(tmp_path, monkeypatch):
    with Lease(tmp_path) as lease:
        here = LeaseView(tmp_path, lease.token)
        assert here.order() == ("train", "")
        lease.order_stop()
        assert here.order() == ("stop", "its launcher was told to stop")
        monkeypatch.setattr(leases, "_place", lambda: "another")
        assert LeaseView(tmp_path, lease.token).order() == ("stop", "its launcher was told to stop")


def test_a_lease_that_goes_away_or_to_another_launcher_stops_the_training(tmp_path):
    with Lease(tmp_path) as lease:
        removed, taken = LeaseView(tmp_path, lease.token), LeaseView(tmp_path, lease.token)
        for view in (removed, taken):
            assert view.order() == ("train", "")
        with Lease(tmp_path):
            found = [taken.order() for _ in range(3)]
            assert found == [("train", "")] * 2 + [("stop", "another launcher has taken over")]
        found = [removed.order() for _ in range(3)]
        assert found == [("train", "")] * 2 + [("stop", "its launcher is gone")], "one look says nothing"


def test_a_lease_that_was_never_here_says_nothing(tmp_path):
    """The launcher's host then has the folder somewhere else; or it holds what an earlier launch left."""
    view = LeaseView(tmp_path / "not", "token", seconds=0)
    assert view.order() == ("train", "")
    with Lease(tmp_path):
        assert LeaseView(tmp_path, "another token", seconds=0).order() == ("train", "")


TORN = [b"", b"{", b'{"token": "t', b"\0" * 512, b"\xff\xfe", b"{}", b"[]", b"null", b'{"token": "t", "checksum": 1}']


@pytest.mark.parametrize("content", TORN)
def test_a_torn_lease_says_nothing(tmp_path, content):
    with Lease(tmp_path) as lease:
        fresh, knowing = LeaseView(tmp_path, lease.token), LeaseView(tmp_path, lease.token)
        assert knowing.order() == ("train", "")
        whole = (tmp_path / LAUNCHER_FILE).read_bytes()
        (tmp_path / LAUNCHER_FILE).write_bytes(content)
        assert fresh.order() == ("train", "")
        assert knowing.order() == ("train", "")
        (tmp_path / LAUNCHER_FILE).write_bytes(whole)
        assert knowing.order() == ("train", "")
        lease.order_stop()
        assert fresh.order()[0] == knowing.order()[0] == "stop"


# ---------------------------------------------------------------- what the ranks say


def test_the_launcher_knows_where_the_ranks_are_and_whether_they_go_on(tmp_path):
    with Lease(tmp_path) as lease:
        assert lease.ranks() is None
        LeaseView(tmp_path, "an earlier launch's").report(7, 700, "updating")
        assert lease.ranks() is None
        view = LeaseView(tmp_path, lease.token)
        for step, phase in ((1000, "waiting for data (updating)"), (1, "x"), (1, "x"), (12, ENDED)):
            view.report(step, 32 * step, phase)
            state = lease.ranks()
            assert state is not None
            assert (state.step, state.samples, state.phase, state.changed) == (step, 32 * step, phase, True)
            state = lease.ranks()
            assert state is not None and not state.changed


@pytest.mark.parametrize("content", TORN)
def test_a_torn_report_is_none(tmp_path, content):
    with Lease(tmp_path) as lease:
        (tmp_path / RANKS_FILE).write_bytes(content)
        assert lease.ranks() is None


def test_a_reader_never_sees_half_of_a_report(tmp_path):
    """They are of different lengths, written in place, and read all the while; a read can see a part of a write."""
    code = f"""
from pathlib import Path
from pipeline.lease import LeaseView
view = LeaseView(Path({str(tmp_path)!r}), "token")
for count in range(20000):
    view.report(count, count * 10 ** (count % 9), "x" * (count % 60))
"""
    lease = Lease(tmp_path)
    lease.token = "token"
    writing = subprocess.Popen([sys.executable, "-c", code])
    seen = 0
    while writing.poll() is None:
        state = lease.ranks()
        if state is not None:
            seen += 1
            assert state.samples == state.step * 10 ** (state.step % 9) and len(state.phase) == state.step % 60
    assert writing.returncode == 0 and seen > 100


# ---------------------------------------------------------------- full disks, and the folder


FULL = """
import resource, signal, sys, time
from pathlib import Path
from pipeline import lease
lease.RENEWAL_SECONDS = 0.02
folder = Path(sys.argv[1])
with lease.Lease(folder) as held:
    view = lease.LeaseView(folder, held.token)
    view.report(1, 32, "updating")
    fill(folder)
    before = (folder / lease.LAUNCHER_FILE).stat().st_mtime_ns
    view.report(123456789, 987654321000, "waiting for data (updating)")
    state = held.ranks()
    assert (state.step, state.samples, state.changed) == (123456789, 987654321000, True), state
    time.sleep(0.2)
    assert (folder / lease.LAUNCHER_FILE).stat().st_mtime_ns != before
    assert view.order() == ("train", "")
    held.order_stop()
    print(view.order()[0])
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for a disk of its own")
def test_on_a_full_disk_both_sides_live_and_hear_each_other(tmp_path):
    code = (
        "def fill(folder):\n"
        "    try:\n"
        "        with open(folder / 'filling', 'wb', buffering=0) as file:\n"
        "            while file.write(bytes(1024)): pass\n"
        "    except OSError as error: assert error.errno == 28\n" + FULL
    )
    inside = f'mount -t tmpfs -o size=64k none "$1" && exec {sys.executable} -c "$0" "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout) == (0, "stop\n"), done.stderr


def test_a_run_folder_that_nothing_was_written_to_is_not_left_behind(tmp_path):
    folder = tmp_path / "runs" / "a"
    with Lease(folder) as lease:
        LeaseView(folder, lease.token).report(0, 0, "setting up")
        assert sorted(path.name for path in folder.iterdir()) == [LAUNCHER_FILE, RANKS_FILE]
    assert not folder.exists() and (tmp_path / "runs").exists()
    with Lease(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_run_folder_that_is_removed_while_it_trains_is_an_order_to_stop(tmp_path):
    folder = tmp_path / "run"
    with Lease(folder) as lease:
        view = LeaseView(folder, lease.token)
        assert view.order() == ("train", "")
        shutil.rmtree(folder)
        lease.order_stop()
        view.report(1, 32, "updating")
        assert lease.ranks() is None
        assert [view.order() for _ in range(3)][-1] == ("stop", "its launcher is gone")
    assert not folder.exists()


def test_a_run_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: the run folder cannot be written to: Not a directory\n.*--run DIR"):
        Lease(tmp_path / "file" / "run").__enter__()


def test_a_lease_of_a_file_limit_is_given_up_quietly(tmp_path):
    """A rank whose quota is used up trains on: only the launcher knows less."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Lease(tmp_path) as lease:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
            LeaseView(tmp_path, lease.token).report(1, 32, "updating")
            assert lease.ranks() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
