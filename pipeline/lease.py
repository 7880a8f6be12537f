"""Between the launcher and rank 0: two small files in the run folder, under any launcher and over any network.

The launcher holds a lease, `RUN/.launcher`, and renews it; when it is killed, or asks for it, rank 0 sees that the
training is to stop, and no rank trains on without anybody knowing. Rank 0 writes where the training is into
`RUN/.ranks`, so that the launcher knows whether there is something to save, and at which update a launch ended.

Neither clock is compared with the other: a file is alive while it changes, by the reader's own monotonic clock.
Neither renewing nor writing needs space on the disk, so that a full one ends neither side: files are written in place,
and a reader that finds one half written takes it for no news.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError

RENEWAL_SECONDS = 2.0
LEASE_SECONDS = 60.0
"""A lease that has not changed for so long has no holder any more."""

MISSED_LOOKS = 3
"""A lease that is not found so often is not there."""

LAUNCHER_FILE, RANKS_FILE = ".launcher", ".ranks"
ENDED = "ended"
"""The phase of ranks that left in good order, or after a fault that they have written down."""

_FILE_BYTES = 512

Order = Literal["train", "stop"]


@dataclass(frozen=True)
class RanksState:
    """What rank 0 wrote last.

    Attributes:
        step: updates done.
        samples: training images behind them.
        phase: what the rank was doing, or `ENDED`.
        changed: whether the file has changed since the reader looked before.
    """

    step: int
    samples: int
    phase: str
    changed: bool


class Lease:
    """The launcher's side; a context manager that renews the lease in a thread.

    Attributes:
        ranks_may_come: set where ranks may still be starting when it ends: the order to stop then stays for them.

    Args:
        run_folder: made where it is missing, and removed again if nothing was written there.

    Raises:
        UserError: nothing can be written there; on entering.
    """

    def __init__(self, run_folder: Path) -> None:
        self.token = secrets.token_hex(8)
        self.ranks_may_come = False
        self._folder = run_folder
        self._file = run_folder / LAUNCHER_FILE
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._ranks_seen: Any = None

    def __enter__(self) -> Lease:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write("train")
        except OSError as error:
            raise UserError(
                f"{self._folder}: the run folder cannot be written to: {error.strerror}",
                "Another one: --run DIR, or recipe.run in the configuration.",
            ) from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(RENEWAL_SECONDS)  # the folder may hang
        with contextlib.suppress(OSError):
            (self._folder / RANKS_FILE).unlink(missing_ok=True)
            if self.ranks_may_come:
                self._write("stop")
            else:
                (self._folder / LAUNCHER_FILE).unlink(missing_ok=True)
                self._folder.rmdir()

    @property
    def ended(self) -> bool:
        """Whether it is held no longer."""
        return self._closing.is_set()

    def order_stop(self) -> None:
        """Ask the ranks to save at the next update and to end."""
        with contextlib.suppress(OSError):  # a folder that is gone is an order as well
            self._write("stop")

    def ranks(self) -> RanksState | None:
        """Where the ranks of this launch are, or None before they train."""
        try:
            state, stamp = _read(self._folder / RANKS_FILE)
        except (OSError, ValueError):
            return None
        if state["token"] != self.token:
            return None
        changed = self._ranks_seen != (state, stamp)
        self._ranks_seen = state, stamp
        return RanksState(state["step"], state["samples"], state["phase"], changed)

    def _write(self, order: Order) -> None:
        pid = os.getpid()
        content = {"token": self.token, "order": order, "place": _place(), "pid": pid, "began": _began(pid)}
        _write(self._file, content, time.time_ns())

    def _renew(self) -> None:
        count = 1
        while not self._closing.wait(RENEWAL_SECONDS):
            count += 1
            with contextlib.suppress(OSError):
                os.utime(self._file, ns=(count * 10**9, count * 10**9))


class LeaseView:
    """Rank 0's side.

    Args:
        run_folder: the run's, as this host sees it.
        token: of the launch that started this rank.
        seconds: see `LEASE_SECONDS`.
    """

    def __init__(self, run_folder: Path, token: str, seconds: float = LEASE_SECONDS) -> None:
        self._token = token
        self._seconds = seconds
        self._file = run_folder / LAUNCHER_FILE
        self._ranks_file = run_folder / RANKS_FILE
        self._last_stamp: int | None = None
        self._looked_at: float | None = None
        self._silence = 0.0
        self._missed = 0
        self._was_seen = False
        self._count = 0

    def order(self) -> tuple[Order, str]:
        """What the launcher wants, and why: ("train", "") or ("stop", reason).

        A lease that was never here says nothing: the launcher's host then has the folder somewhere else.
        """
        try:
            lease, stamp = _read(self._file)
        except FileNotFoundError:
            return self._miss("its launcher is gone")
        except (OSError, ValueError):
            self._silence = 0.0  # the folder cannot be read, which says nothing of the launcher
            return "train", ""
        if lease["token"] != self._token:
            return self._miss("another launcher has taken over")
        self._was_seen, self._missed = True, 0
        if lease["order"] == "stop":
            return "stop", "its launcher was told to stop"
        if lease["place"] == _place():
            return ("train", "") if _began(lease["pid"]) == lease["began"] else ("stop", "its launcher was killed")
        now = time.monotonic()
        if stamp != self._last_stamp or self._looked_at is None:
            self._last_stamp, self._silence = stamp, 0.0
        else:
            # while a look took long the folder hung, for the launcher as well
            self._silence += min(now - self._looked_at, RENEWAL_SECONDS)
        self._looked_at = now
        if self._silence > self._seconds:
            return "stop", f"its launcher has given no sign of life for {self._seconds:g} s"
        return "train", ""

    def _miss(self, why: str) -> tuple[Order, str]:
        """A lease that was here is not: of a file system that comes and goes, one look says nothing."""
        self._missed += self._was_seen
        return ("stop", why) if self._missed >= MISSED_LOOKS else ("train", "")

    def report(self, step: int, samples: int, phase: str) -> None:
        """Write where the training is."""
        self._count += 1
        content = {"token": self._token, "step": step, "samples": samples, "phase": phase}
        with contextlib.suppress(OSError):
            _write(self._ranks_file, content, self._count * 10**9)


def _write(path: Path, content: dict[str, Any], stamp: int) -> None:
    text = json.dumps(content | {"checksum": _checksum(content)})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.encode().ljust(_FILE_BYTES), 0)
        os.utime(descriptor, ns=(stamp, stamp))
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """What `_write` wrote, and when the file changed (ns). Raises OSError; ValueError: it was caught half written."""
    with path.open("rb") as file:  # opened anew: a network file system then asks its server
        content = json.loads(file.read())
        stamp = os.fstat(file.fileno()).st_mtime_ns
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise ValueError(f"{path}: half written")
    return content, stamp


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _place() -> str:
    """What is the same for processes that see each other's numbers: this boot of the machine, and the container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did, which no clock can change; None where it does not run."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = content.decode(errors="replace").rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
