"""The guardian: a small process beside each rank that ends it when it has stopped running.

A rank that was stopped by a signal, or hangs inside a library that holds the interpreter's lock, cannot end itself, and
the launchers wait for it for ever. The rank's watch (`pipeline.watch`) writes a line into this process's input every
second; where none comes, this process says what it found, asks for the rank's stacks (SIGUSR2, which works inside a
library that hangs), and kills it. It ends with the rank, whose input then closes.

It runs as a script, on the standard library alone: it must cost next to nothing. Arguments: the rank's process id, what
to call it, and the seconds of its patience (0: endless); a line `patience SECONDS` changes those.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

GRACE_SECONDS = 2.0

DUMP_SECONDS = 2.0
"""How long a rank has for writing its stacks before it is killed."""


def main() -> None:
    """Watch until the rank ends or is killed."""
    pid, name, patience = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # launchers send them to the children of ranks too
    last, unread = b"", b""
    while os.getppid() == pid:
        readable, _, _ = select.select([0], [], [], patience or None)
        if not readable:
            # after all of them were frozen this process may be the first to run again
            readable, _, _ = select.select([0], [], [], GRACE_SECONDS)
        if not readable:
            _end(pid, name, patience, last.decode(errors="replace"))
            return
        received = os.read(0, 1 << 16)
        if not received:
            return
        *lines, unread = (unread + received).split(b"\n")
        for line in lines:
            if line.startswith(b"patience "):
                patience = float(line.split()[1])
            else:
                last = line


def _end(pid: int, name: str, patience: float, last: str) -> None:
    if os.getppid() != pid:
        return
    with contextlib.suppress(OSError):  # nobody may be reading any more
        state = f"\n  {last}" if last else ""
        print(f"onehour: {name} has not run for {patience:g} s ({_state(pid)}) and is killed{state}", file=sys.stderr)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(DUMP_SECONDS)
        if os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """What the kernel says of the process, e.g. "T (stopped), in do_signal_stop"."""
    state, place = "unknown", ""
    with contextlib.suppress(OSError, IndexError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        state = next(line for line in lines if line.startswith("State:")).split(maxsplit=1)[1]
    with contextlib.suppress(OSError):
        place = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8").strip()
    return f"state {state}" + (f", in {place}" if place not in ("", "0") else "")


if __name__ == "__main__":
    main()
