"""When one rank cannot go on, all end, soon and with the same words: real processes, killed, stopped and hanging.

What each of them does is mostly waiting, so the trainings of all tests run at the same time: `@training` functions.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import watch as watches
from pipeline.fault import FAILED, MISTAKE, Fault, faults_of
from pipeline.hosts import free_port
from pipeline.lease import ENDED, Lease
from pipeline.meeting import connect, meet
from pipeline.rendezvous import Rendezvous
from pipeline.schema import Watchdog
from pipeline.watch import Watch

LAUNCH, HOST = "a-launch", socket.gethostname()
SILENT = 2.0
FORK = multiprocessing.get_context("fork")
PATIENT = Watchdog(silent_seconds=60, stuck_seconds=0)
WORDS = re.compile(
    r"rank (\d) on (\S+) \(process (\d+|\?)\) is gone after update ([\d,]+): (.*); it was last seen (.*)\n"
)
TORCH = re.compile(r"^(\[W.* TCPStore|Exception raised from |frame #|<omitting python|$).*\n", re.MULTILINE)


@dataclass(frozen=True)
class Training:
    """What every rank of a group does, and how long the others have patience with it."""

    body: Callable[[Watch], None]
    watchdog: Watchdog
    size: int = 3
    together: bool = True  # it begins when all ranks of all tests have met and beaten


TRAININGS: dict[str, Training] = {}


def training(silent: float = 60, stuck: float = 0, **options: Any) -> Callable:
    def add(body: Callable[[Watch], None]) -> Callable[[Watch], None]:
        TRAININGS[body.__name__] = Training(body, Watchdog(silent_seconds=silent, stuck_seconds=stuck), **options)
        return body

    return add


class Ranks:
    """The ranks of a training as processes; each that comes to its end leaves in good order.

    Args:
        folder: what they print is in `rank-N.err` there, and their run folder in `run`.
        what: they do.
        go: what they wait for before.
        token: of the launch.
    """

    def __init__(self, folder: Path, what: Training, go: Any, token: str = LAUNCH) -> None:
        self.folder, self.run = folder, folder / "run"
        self.ready = FORK.Semaphore(0)
        port = free_port()
        self.processes = [
            FORK.Process(target=self._main, args=(rank, port, what, go, token)) for rank in range(what.size)
        ]
        for process in self.processes:
            process.start()

    def _main(self, rank: int, port: int, what: Training, go: Any, token: str) -> None:
        errors = os.open(self.folder / f"rank-{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's own is a file in memory
        code = 0
        try:
            place = Rendezvous(rank, what.size, rank, what.size, "127.0.0.1", port, "deepspeed")
            store = meet(place)  # rank 0 keeps it open
            watch = Watch(connect(place), rank, what.size, rank, watchdog=PATIENT, parent=None)
            watch.describe = lambda: [f"samples of rank {rank}"]
            if what.together:
                watch.configure(self.run, PATIENT, token)
                watch.at("updating", 1234, 9999)
                while watch._beats < 2:
                    time.sleep(0.05)
                self.ready.release()
                go.wait(60)
                watch.be_patient(what.watchdog)
            else:
                self.ready.release()
                watch.configure(self.run, what.watchdog, token)
            what.body(watch)
            store.add("come so far", 1)
            while store.add("come so far", 0) < what.size:  # with less to go wrong than a barrier of gloo
                time.sleep(0.01)
            watch.close()
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)

    def wait_until_ready(self) -> None:
        for _ in self.processes:
            assert self.ready.acquire(timeout=60), self.said()

    def end(self, seconds: float) -> None:
        """Wait until all have ended, and kill those that do not."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.01, deadline - time.monotonic()))
        self.codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def said(self, rank: int | None = None) -> str:
        ranks = range(len(self.processes)) if rank is None else [rank]
        text = "".join((self.folder / f"rank-{number}.err").read_text() for number in ranks)
        return TORCH.sub("", text)  # ours are told to leave that out before torch is loaded

    def fault(self, rank: int) -> Fault:
        return Fault.read((self.run / "faults" / LAUNCH / f"rank-{rank}.json").read_text())

    def stacks(self, rank: int) -> str:
        return (self.run / "faults" / LAUNCH / f"rank-{rank}.txt").read_text()


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Five beats a second, in all ranks that are forked here."""
    gc.collect()  # a store that an earlier test left would wait in a rank for its thread, which is not there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watches, "BEAT_SECONDS", 0.2)
        patch.setattr(watches, "SUSPICIOUS_SECONDS", 1.0)
        patch.setattr(watches, "VERDICT_SECONDS", 4.0)
        yield


@pytest.fixture(scope="module")
def ended(fast: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """The ranks of all trainings, which have ended."""
    go = FORK.Event()
    groups = {name: Ranks(tmp_path_factory.mktemp(name), what, go) for name, what in TRAININGS.items()}
    try:
        for ranks in groups.values():
            ranks.wait_until_ready()
        go.set()
        suspended = [process for process in groups["suspended"].processes if process.pid]
        suspend_and_resume([psutil.Process(process.pid) for process in suspended])
    finally:
        deadline = time.monotonic() + 20
        for ranks in groups.values():
            ranks.end(deadline - time.monotonic())
    return groups


def suspend_and_resume(ranks: list[psutil.Process]) -> None:
    """As Slurm does it with all processes of a job, their guardians among them."""
    job = [*ranks, *(guardian for rank in ranks for guardian in rank.children())]
    assert len(job) == 2 * len(ranks)
    for process in job:
        process.suspend()
    time.sleep(SILENT + 1)
    for process in job:
        time.sleep(0.02)
        process.resume()


# ---------------------------------------------------------------- a rank is gone


@training(silent=SILENT)
def one_is_killed(watch: Watch) -> None:
    if watch.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    in_an_update()


def in_an_update() -> None:
    time.sleep(60)  # for ever, as far as the tests are concerned


def test_a_killed_rank_ends_the_others_and_is_named(ended):
    ranks = ended["one_is_killed"]
    assert ranks.codes == [FAILED, -signal.SIGKILL, FAILED], ranks.said()
    words = WORDS.search(ranks.said(0))
    assert words is not None, ranks.said()
    assert words.groups()[:5] == ("1", HOST, str(ranks.pid(1)), "1,234", "no sign of life for 2 s")
    assert words[6].startswith("updating, in wait (") and "_main (test_watch.py:" in ranks.stacks(0), "its last beat"
    assert f"Stacks of all ranks: {ranks.run}/faults/{LAUNCH}" in ranks.said(0)
    assert ranks.said(2) == "", "one says it"
    for rank in (0, 2):
        fault = ranks.fault(rank)
        assert (fault.kind, fault.rank, fault.step, fault.code) == ("silent", 1, 1234, FAILED)
        assert f"rank {rank} on" in ranks.stacks(rank) and "in in_an_update" in ranks.stacks(rank)
        assert f"samples of rank {rank}" in ranks.stacks(rank)
    assert '"step": 1234' in ranks.stacks(0).partition("last heard of rank 1")[2], "the last beat of who left no stacks"
    [said] = {fault.what for fault in faults_of(ranks.run, LAUNCH)}
    assert f"onehour: {said}\n" in ranks.said(0)


@training()
def rank_0_is_killed(watch: Watch) -> None:
    if watch.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    in_an_update()


def test_rank_0_killed_is_told_of_by_another(ended):
    """The store that they meet at goes with it, which is soon noticed."""
    ranks = ended["rank_0_is_killed"]
    assert ranks.codes == [-signal.SIGKILL, FAILED, FAILED], ranks.said()
    words = WORDS.search(ranks.said(1))
    assert words is not None, ranks.said()
    assert words.groups()[:5] == ("0", HOST, str(ranks.pid(0)), "1,234", "it has closed its connections")
    assert ranks.said(2) == ""
    for rank in (1, 2):
        assert (ranks.fault(rank).kind, ranks.fault(rank).rank) == ("first", 0)
        assert f"samples of rank {rank}" in ranks.stacks(rank)


@training()
def one_loses_a_connection(watch: Watch) -> None:
    if watch.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    watch.wait_for_verdict(RuntimeError("Connection closed by peer"))
    print("nothing was found out", file=sys.stderr)


def test_who_lost_a_connection_need_not_wait_for_long(ended):
    """gloo notices at once, and says only that a peer is gone: the watch says which, before `silent_seconds`."""
    ranks = ended["one_loses_a_connection"]
    assert ranks.codes == [FAILED, FAILED, -signal.SIGKILL], ranks.said()
    words = WORDS.search(ranks.said(0))
    assert words is not None and words[1] == "2" and "found out" not in ranks.said()
    assert "RuntimeError: Connection closed by peer" in ranks.stacks(1)


@training(silent=SILENT + 1, together=False)
def one_is_killed_before_its_first_beat(watch: Watch) -> None:
    if watch.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    in_an_update()


@training(silent=SILENT + 1, together=False)
def rank_0_is_killed_before_its_first_beat(watch: Watch) -> None:
    if watch.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    in_an_update()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_before_its_first_beat(ended, killed):
    """It has met the others, so they know its host."""
    ranks = ended["one_is_killed_before_its_first_beat" if killed else "rank_0_is_killed_before_its_first_beat"]
    codes = list(ranks.codes)
    assert codes.pop(killed) == -signal.SIGKILL and codes == [FAILED] * 2, ranks.said()
    words = WORDS.search(ranks.said(1 - killed))
    assert words is not None and words.groups()[:2] == (str(killed), HOST), ranks.said()


@training(silent=SILENT)
def one_is_stopped(watch: Watch) -> None:
    if watch.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    in_an_update()


def test_a_stopped_rank_is_ended_by_its_guardian_and_the_others_with_it(ended):
    ranks = ended["one_is_stopped"]
    assert ranks.codes == [FAILED, FAILED, -signal.SIGKILL], ranks.said()
    assert ranks.fault(0).rank == 2
    assert "state T (stopped)" in ranks.said(2) and "it was last seen updating after update 1,234" in ranks.said(2)


@training(silent=SILENT)
def rank_0_holds_the_interpreters_lock(watch: Watch) -> None:
    if watch.rank == 0:  # the most that can be lost: all threads of the watch's own rank
        ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
    in_an_update()


def test_a_rank_that_hangs_with_the_interpreters_lock(ended):
    ranks = ended["rank_0_holds_the_interpreters_lock"]
    assert ranks.codes == [-signal.SIGKILL, FAILED, FAILED], ranks.said()
    assert "has not run for 2 s" in ranks.said(0)
    assert "in rank_0_holds_the_interpreters_lock" in ranks.said(0), "its stacks"
    assert ranks.fault(1).kind == "first"


@training(silent=SILENT - 1, stuck=SILENT)
def suspended(watch: Watch) -> None:
    for _ in range(25):
        watch.at("updating")
        time.sleep(0.1)


def test_a_whole_job_that_is_stopped_and_goes_on_goes_on(ended):
    """Nobody was silent, as nobody was there to hear it."""
    ranks = ended["suspended"]
    assert ranks.codes == [0, 0, 0], ranks.said()
    assert ranks.said() == ""


# ---------------------------------------------------------------- none gets any further


@training(stuck=SILENT)
def one_waits_for_data(watch: Watch) -> None:
    for step in range(1235, 1240):
        watch.at("updating", step, step)
        time.sleep(0.05)
    if watch.rank == 1:
        watch.at("waiting for data (updating)")
    in_an_update()


def test_who_waits_for_data_while_the_others_wait_for_it_is_named(ended):
    ranks = ended["one_waits_for_data"]
    assert ranks.codes == [FAILED] * 3, ranks.said()
    for rank in range(3):
        fault = ranks.fault(rank)
        assert (fault.kind, fault.rank, fault.step) == ("stuck", 1, 1239)
        assert "in in_an_update" in ranks.stacks(rank) and f"samples of rank {rank}" in ranks.stacks(rank)
    assert f"no rank has got any further for 2 s: rank 1 on {HOST} after update 1,239: it was" in ranks.said(0)
    assert "waiting for data (updating)" in ranks.said(0) and "rank 2 on" not in ranks.said(0)


@training(stuck=4)
def one_is_slow(watch: Watch) -> None:
    for _ in range(60):
        if watch.rank == 2:
            watch.at("waiting for data (updating)")
        time.sleep(0.1)


def test_one_rank_that_gets_further_keeps_all_alive(ended):
    """It reads a cold disk: the others wait for it, and nothing is wrong."""
    ranks = ended["one_is_slow"]
    assert ranks.codes == [0, 0, 0] and ranks.said() == "", ranks.said()


@training(stuck=60)
def a_limit_comes_late(watch: Watch) -> None:
    time.sleep(5)
    watch.be_patient(Watchdog(stuck_seconds=4))
    time.sleep(0.6)  # some beats


def test_a_new_limit_counts_from_when_it_is_set(ended):
    """A configuration that was long in the reading is not held against the ranks."""
    ranks = ended["a_limit_comes_late"]
    assert ranks.codes == [0, 0, 0] and ranks.said() == "", ranks.said()


@training(stuck=1, size=1)
def the_only_rank_hangs(watch: Watch) -> None:
    in_an_update()


def test_a_group_of_one_that_hangs_is_ended(ended):
    ranks = ended["the_only_rank_hangs"]
    assert ranks.codes == [FAILED]
    assert ranks.fault(0).kind == "stuck" and "rank 0 on" in ranks.said(0)


# ---------------------------------------------------------------- a rank says that it fails


@training()
def rank_0_fails(watch: Watch) -> None:
    if watch.rank == 0:
        fail(watch)
    in_an_update()


@training()
def rank_2_fails(watch: Watch) -> None:
    if watch.rank == 2:
        fail(watch)
    in_an_update()


def fail(watch: Watch) -> None:
    print("the message of the one", file=sys.stderr)
    watch.fail("shard-3.tar: the image is damaged", MISTAKE)
    os._exit(MISTAKE)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_says_so_and_the_others_end_quietly_with_its_code(ended, failing):
    ranks = ended[f"rank_{failing}_fails"]
    assert ranks.codes == [MISTAKE] * 3, ranks.said()
    assert ranks.said() == "the message of the one\n"
    assert ranks.fault(failing).kind == "error" and ranks.fault(failing).rank == failing
    assert faults_of(ranks.run, LAUNCH)[0].what == "shard-3.tar: the image is damaged"
    assert not list((ranks.run / "faults" / LAUNCH).glob("*.txt")), "no stacks of a mistake"


@training()
def two_fail(watch: Watch) -> None:
    if watch.rank:
        time.sleep(watch.rank - 1)
        watch.fail(f"of rank {watch.rank}", 4 + watch.rank)
    in_an_update()


def test_of_two_that_fail_the_first_is_everybodys(ended):
    ranks = ended["two_fail"]
    assert ranks.codes == [5, 5, 5], "and who failed but does not end is ended"
    assert [ranks.fault(rank).what for rank in (0, 1)] == ["of rank 1"] * 2


# ---------------------------------------------------------------- in good order, and without a launcher


@training(silent=SILENT, stuck=5)
def all_leave(watch: Watch) -> None:
    guardian = psutil.Process(watch._guardian.pid)
    close = watch.close

    def closing() -> None:
        time.sleep(0.7 * watch.rank)  # rank 0 comes first, and its store must not go first
        close()
        assert guardian.is_running(), "the end may hang as well"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch")]

    watch.close = closing  # type: ignore[method-assign]


def test_leaving_in_good_order_leaves_nothing(ended):
    ranks = ended["all_leave"]
    assert ranks.codes == [0, 0, 0] and ranks.said() == "", ranks.said()
    assert not (ranks.run / "faults").exists()


def test_the_launcher_of_a_host_that_is_gone_ends_its_ranks(tmp_path):
    """Of one rank here, whose parent is killed: nobody else would end it."""
    port, reader, writer = free_port(), *FORK.Pipe(duplex=False)

    def rank() -> None:
        parent = os.getppid()
        os.dup2(os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        place = Rendezvous(0, 1, 0, 1, "127.0.0.1", port, "deepspeed")
        store = meet(place)
        watch = Watch(connect(place), 0, 1, 0, watchdog=PATIENT, parent=parent)
        watch.configure(tmp_path, PATIENT, LAUNCH)
        writer.send((os.getpid(), watch._guardian.pid))
        time.sleep(60)
        store.add("never", 1)

    def launcher() -> None:
        FORK.Process(target=rank).start()
        time.sleep(60)

    process = FORK.Process(target=launcher)
    process.start()
    pid, guardian = (psutil.Process(number) for number in reader.recv())
    process.kill()
    gone, alive = psutil.wait_procs([pid, guardian], timeout=8)
    for left in alive:
        left.kill()
    assert len(gone) == 2
    assert (tmp_path / "err").read_text() == (
        f"onehour: the launcher of this host is gone\n  Stacks of all ranks: {tmp_path}/faults/{LAUNCH}\n"
    )
    assert faults_of(tmp_path, LAUNCH)[0].kind == "launcher"


def test_the_launchers_lease_is_rank_0s_to_look_at(tmp_path):
    """It stops all ranks after the same update, and knows where they are and that they ended."""

    def body(watch: Watch) -> None:
        step = 0
        while watch.stop.may_begin(step):
            step += 1
            watch.at("updating", step, 32 * step)
            time.sleep(0.02)
        print(step, watch.stop.why, file=sys.stderr)

    with Lease(tmp_path / "run") as lease:
        ranks = Ranks(tmp_path, Training(body, PATIENT, together=False), None, lease.token)
        deadline = time.monotonic() + 20
        while (state := lease.ranks()) is None or state.step < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lease.order_stop()
        ranks.end(20)
        assert ranks.codes == [0, 0, 0], ranks.said()
        state = lease.ranks()
    said = {ranks.said(rank) for rank in range(3)}
    assert len(said) == 1
    step, _, why = said.pop().strip().partition(" ")
    assert why == "its launcher was told to stop"
    assert state is not None and (state.step, state.samples, state.phase) == (int(step), 32 * int(step), ENDED)


def test_what_is_written_of_a_fault_is_read_again(tmp_path):
    folder = tmp_path / "faults" / LAUNCH
    folder.mkdir(parents=True)
    kinds = ["launcher", "first", "stuck", "silent", "error", "of a later version"]
    for rank, kind in enumerate(kinds):
        (folder / f"rank-{rank}.json").write_text(Fault(kind, rank, "worker-1", 7, f"é {kind}", 3).text())
    (folder / "rank-8.json").write_text("{")
    (folder / "rank-9.json").write_text(json.dumps({"kind": "error"}))
    (folder / "rank-10.json").write_text("[]")
    found = faults_of(tmp_path, LAUNCH)
    assert [fault.kind for fault in found] == ["error", "silent", "stuck", "first", "launcher", "of a later version"]
    assert found[0] == Fault("error", 4, "worker-1", 7, "é error", 3)
    assert faults_of(tmp_path, "another") == [] == faults_of(tmp_path / "no folder", LAUNCH)
