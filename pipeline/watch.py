"""The watch over the ranks: who lives, where each one is, and that all of them end together when one cannot go on.

Collectives wait for whoever is missing, for ever or until a timeout that says nothing. So every rank tells the others
once a second where it is, in the store that they met at, and rank 0 looks at all of it, as the others look at rank 0:

- a rank that gives no sign of life for `silent_seconds` was killed, stopped, or cut off;
- if no rank gets any further for `stuck_seconds`, something that they wait for hangs: storage, or the network;
- a rank that fails says so, and nobody waits for it.

Then each rank writes its stacks and its samples into the run folder, rank 0 (or who is left) says which rank on which
host was at which update, and all end. What hangs inside a rank cannot hold this up: threads that only talk and count
do it, and where not even those run, the guardian, a process beside the rank (`pipeline.guardian`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pipeline import guardian
from pipeline.fault import FAULTS_FOLDER, Fault
from pipeline.lease import ENDED, LeaseView
from pipeline.meeting import hosts_of
from pipeline.schema import Watchdog
from pipeline.stop import Stop
from pipeline.verdict import Beat, silent, stuck

BEAT_SECONDS = 1.0
RANKS_PER_BEAT_SECOND = 1000
"""With more ranks they beat less often: rank 0's store answers all of them."""

SUSPICIOUS_SECONDS = 4.0
"""A rank is taken for dead after so much silence where another has already lost its connection."""

VERDICT_SECONDS = 15.0
"""How long a rank that lost its connection waits to hear whose fault it is, and one that failed may take to end."""

WRITING_SECONDS = 5.0
"""How long the end of a rank is held up by writing its stacks: the disk may be what hangs."""

ENDING_SECONDS = 120
"""How long a rank that has left the others may take to end."""

PARTING_SECONDS = 10.0
"""How long rank 0, whose store all others need, waits for them to leave."""

SETTLING_SECONDS = 15.0
"""How long it is held up by a save in flight, which is of before the fault."""

CALLS_PER_BEAT = 6

ABORT, SUSPICION, LEFT, LAUNCH = "abort", "suspicion", "left", "launch"


@dataclass
class Place:
    """Where a rank is: replaced as a whole by the training, read by the watch."""

    phase: str = "joining"
    step: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Heard:
    """The last beat of a rank that this one listens to, and since when there was no other (seconds lived)."""

    beat: Beat
    since: float


class Watch:
    """One rank's part in it; begins when the rank has met the others at the store.

    Args:
        store: a connection to the store that nobody else uses.
        rank, size, local_rank: this rank's numbers.
        watchdog: how long it waits for what.
        parent: the process that started this rank and must outlive it, or None.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        local_rank: int,
        *,
        watchdog: Watchdog,
        parent: int | None,
    ) -> None:
        self.rank, self.size = rank, size
        self.stop = Stop(rank, size)
        self.describe: Callable[[], list[str]] = list
        self.settle: Callable[[float], None] = lambda seconds: None  # finish what must not be cut off
        self._store = store
        self._host = socket.gethostname()
        self._speaks = local_rank == 0 or rank == 1  # for rank 0, when that is gone
        self._silent, self._stuck = watchdog.silent_seconds, watchdog.stuck_seconds
        self._parent = parent
        self._place = Place()
        self._moves = 0
        self._beats = 0
        self._interval = max(BEAT_SECONDS, size / RANKS_PER_BEAT_SECOND)
        self._main = threading.main_thread().ident
        self._folder: Path | None = None
        self._launch = time.strftime("%Y%m%d-%H%M%S")
        self._lease: LeaseView | None = None
        self._fault: Fault | None = None
        self._suspects = self._over = False
        self._lost = ""
        self._failed_at: float | None = None
        self._lived = 0.0  # seconds; while all of a job is stopped, as Slurm suspends it, none is silent
        self._moved = 0.0  # when, in those
        self._cut_off: str | None = None
        listens_to = range(size) if rank == 0 else [0]
        self._seen = {
            other: Heard(Beat(host=host), 0.0)
            for other, host in zip(listens_to, hosts_of(store, listens_to), strict=True)
        }
        self._last_moves: object = None
        self._closing = threading.Event()
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), self._name(), str(self._silent)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what stops the rank's process group must not stop it
        )
        self._threads: list[threading.Thread] = []
        self._start(self._talk)
        self._start(self._judge)

    # ---------------------------------------------------------------- for the training

    def configure(self, folder: Path, watchdog: Watchdog, launch: str | None) -> None:
        """What is known once the configuration is read.

        Args:
            folder: the run's, for the stacks.
            watchdog: the configuration's patience.
            launch: the token of the launcher's lease, if one holds it.
        """
        self._folder = folder
        self.be_patient(watchdog)
        # of one name, or the stacks of one fault would lie in several folders
        name = launch or self._launch
        with contextlib.suppress(RuntimeError):  # the store may be gone already, which is another thread's affair
            self._launch = self._store.compare_set(LAUNCH, "", name).decode() or name
        if launch is not None and self.rank == 0:
            self._lease = LeaseView(folder, launch)
            self._start(self._look_at_lease)

    def be_patient(self, watchdog: Watchdog) -> None:
        """Take over other limits; how long the ranks have been where they are counts from now on."""
        self._moved = self._lived
        self._silent, self._stuck = watchdog.silent_seconds, watchdog.stuck_seconds
        self._tell_guardian(f"patience {self._silent}")

    def at(self, phase: str, step: int | None = None, samples: int | None = None) -> None:
        """Say what this rank does next; every call counts as getting further."""
        place = self._place
        self._place = Place(phase, place.step if step is None else step, place.samples if samples is None else samples)
        self._moves += 1

    def fail(self, what: str, code: int) -> None:
        """Tell the others that this rank is about to end with an error, which it says itself."""
        self._failed_at = self._lived
        fault = Fault("error", self.rank, self._host, self._place.step, what, code)
        self._write(fault, stacks=False)
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self._post(fault)
        self._let_others_read()

    def wait_for_verdict(self, error: Exception) -> None:
        """Of a rank that has lost its connection to another: find out which one is gone, and end with that.

        Returns only where nothing was found out.
        """
        self._lost = "".join(traceback.format_exception(error))
        self._suspects = True
        time.sleep(VERDICT_SECONDS)

    def close(self) -> None:
        """The rank is about to leave the others in good order; all of them must have come so far.

        The guardian stays until the process has ended, which may hang as well.
        """
        self._closing.set()
        for thread in self._threads:
            thread.join(WRITING_SECONDS)  # the run folder may hang
        self._tell_guardian(f"patience {ENDING_SECONDS}")
        if self._lease is not None:
            self._lease.report(self._place.step, self._place.samples, ENDED)
        with contextlib.suppress(RuntimeError):  # a store that is gone already is missed by nobody
            left = self._store.add(LEFT, 1)
            until = time.monotonic() + PARTING_SECONDS
            while self.rank == 0 and left < self.size and time.monotonic() < until:
                time.sleep(0.01)
                left = self._store.add(LEFT, 0)

    # ---------------------------------------------------------------- talking

    def _talk(self) -> None:
        """Exchange with the others. Any call here may hang with rank 0, so nothing is decided here about rank 0."""
        while not self._closing.wait(self._interval):
            try:
                self._beat()
                if self._store.check([ABORT]):
                    self._fault = self._fault or Fault.read(self._store.get(ABORT))
                    return
                self.stop.exchange(self._store)
                if self._suspects:
                    self._store.set(SUSPICION, "")
                if self.rank == 0:
                    self._look_at_all()
                else:
                    self._hear(0, self._store.get(_beat_key(0)))
            except Exception as error:  # the store's server is gone, or a mistake here: nobody goes on unwatched
                self._cut_off = None if self._closing.is_set() else repr(error)[:200]
                return

    def _beat(self) -> None:
        self._beats += 1
        place = self._place
        beat = Beat(
            host=self._host,
            pid=os.getpid(),
            number=self._beats,
            moves=self._moves,
            phase=place.phase,
            step=place.step,
            samples=place.samples,
            stack=self._stack(),
        )
        self._store.set(_beat_key(self.rank), beat.text())

    def _stack(self) -> list[str]:
        """The innermost calls of the training's own thread: all that is known of it when it can no longer be asked."""
        frame = sys._current_frames().get(self._main or 0)
        calls: list[str] = []
        while frame is not None and len(calls) < CALLS_PER_BEAT:  # no source is read: the disk may hang
            calls.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
            frame = frame.f_back
        return calls

    def _hear(self, rank: int, message: bytes) -> None:
        """Note a rank's beat, if it is a new one."""
        beat = Beat.read(message)
        if beat.number != self._seen[rank].beat.number:
            self._seen[rank] = Heard(beat, self._lived)

    def _look_at_lease(self) -> None:
        """On a thread of its own: the run folder may hang for a while, and no rank is at fault then."""
        assert self._lease is not None
        while not self._closing.is_set() and not self._over:
            self._lease.report(self._place.step, self._place.samples, self._place.phase)
            order, why = self._lease.order()
            if order == "stop":
                self.stop.want(why)
            self._closing.wait(BEAT_SECONDS)

    def _look_at_all(self) -> None:
        ranks: Sequence[int] = range(self.size)
        if not self._store.check([_beat_key(rank) for rank in ranks]):  # asking for one that is not there would wait
            ranks = [rank for rank in ranks if self._store.check([_beat_key(rank)])]
        for rank, beat in zip(ranks, self._store.multi_get([_beat_key(rank) for rank in ranks]), strict=True):
            self._hear(rank, beat)
        silence = {rank: self._lived - heard.since for rank, heard in self._seen.items()}
        suspicious = self._store.check([SUSPICION])
        limit = min(self._silent or SUSPICIOUS_SECONDS, SUSPICIOUS_SECONDS) if suspicious else self._silent
        rank = max(silence, key=silence.__getitem__)
        if limit and silence[rank] > limit + self._interval:
            how = f"no sign of life for {silence[rank]:.0f} s"
            self._post(silent(rank, self._seen[rank].beat, self._place.step, how))
            return
        moves = [heard.beat.moves for heard in self._seen.values()]
        if moves != self._last_moves:
            self._last_moves, self._moved = moves, self._lived
        elif self._stuck and self._lived - self._moved > self._stuck:
            self._post(stuck({rank: heard.beat for rank, heard in self._seen.items()}, self._stuck))

    def _post(self, fault: Fault) -> None:
        """The first fault is everybody's."""
        self._fault = Fault.read(self._store.compare_set(ABORT, "", fault.text()) or fault.text())

    # ---------------------------------------------------------------- judging

    def _judge(self) -> None:
        """End this rank when it must; nothing here can wait for anybody."""
        looked = time.monotonic()
        while not self._closing.wait(BEAT_SECONDS):
            now = time.monotonic()
            self._lived += min(now - looked, 2 * BEAT_SECONDS)
            looked = now
            place = self._place
            self._tell_guardian(f"it was last seen {place.phase} after update {place.step:,}")
            if self._parent is not None and os.getppid() != self._parent:
                self._end(Fault("launcher", self.rank, self._host, place.step, "the launcher of this host is gone"))
            failing = self._lived - self._failed_at if self._failed_at is not None else None
            if self._fault is not None and (failing is None or failing > VERDICT_SECONDS):
                self._end(self._fault)
            if self._cut_off is not None and failing is None:
                how = "it has closed its connections" if self.rank else f"its store has failed ({self._cut_off})"
                self._end(silent(0, self._seen[0].beat, place.step, how))
            away = self._lived - self._seen[0].since
            if self.rank and self._silent and away > self._silent + self._interval:
                self._end(silent(0, self._seen[0].beat, place.step, f"no sign of life for {away:.0f} s"))

    def _end(self, fault: Fault) -> None:
        """Write the stacks, say the fault, and end; the other threads, and what they wait for, have no part in it."""
        stacks = fault.kind != "error"
        self._tell_guardian(f"patience {2 * VERDICT_SECONDS}")  # of the end, whatever that of the training is
        writing = threading.Thread(target=self._write, args=(fault,), kwargs={"stacks": stacks}, daemon=True)
        writing.start()
        writing.join(WRITING_SECONDS)
        self.settle(SETTLING_SECONDS)
        self._let_others_read()
        speaks = self.rank == 0 or (fault.kind in ("first", "launcher") and self._speaks)
        if speaks and fault.kind != "error":
            with contextlib.suppress(OSError):
                where = f"\n  Stacks of all ranks: {self._faults_folder()}" if self._folder is not None else ""
                print(f"onehour: {fault.what}{where}", file=sys.stderr, flush=True)
        os._exit(fault.code)

    def _let_others_read(self) -> None:
        """What was posted: the store ends with this process if it is rank 0's."""
        if self.rank == 0 and self.size > 1:
            time.sleep(2 * self._interval + 1)

    def _faults_folder(self) -> Path:
        assert self._folder is not None
        return self._folder / FAULTS_FOLDER / self._launch

    def _write(self, fault: Fault, *, stacks: bool) -> None:
        self._over = True
        if self._folder is None:
            if stacks:
                faulthandler.dump_traceback(all_threads=True)
            return
        with contextlib.suppress(OSError):  # the disk may be the fault
            folder = self._faults_folder()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{self.rank}.json").write_text(fault.text(), encoding="utf-8")
            if self._lease is not None:
                self._lease.report(self._place.step, self._place.samples, ENDED)
            if not stacks:
                return
            with (folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                place = self._place
                print(f"{self._name()}: {place.phase} after update {place.step:,}", fault.what, sep="\n", file=file)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                with contextlib.suppress(Exception):
                    print("", self._lost, *self.describe(), sep="\n", file=file)
                if fault.rank in self._seen and fault.rank != self.rank:
                    last = self._seen[fault.rank].beat.text(indent=1)
                    print(f"\nlast heard of rank {fault.rank}:\n{last}", file=file)

    def _start(self, function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function, name=f"watch{function.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _name(self) -> str:
        return f"rank {self.rank} on {self._host} (process {os.getpid()})"

    def _tell_guardian(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            assert self._guardian.stdin is not None
            self._guardian.stdin.write(line.encode() + b"\n")
            self._guardian.stdin.flush()


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
