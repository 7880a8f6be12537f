"""All ranks through the real launcher: how fast gradients are summed, and which two hosts are slowest together.

The launching side calls `measure`; every rank runs `main`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.doctor.facts import MARK, heard, say

SECONDS = 2.0
"""That the all-reduce is measured for."""

BYTES = 100 << 20
"""The gradients of a ResNet-50 in fp32; less where a single sum of them would take longer than a second."""

PAIR_BYTES = 8 << 20
MOST_ROUNDS = 16
"""Rounds of pairs: up to 16 hosts every pair is measured, beyond that each host with about 16 others."""

LAUNCH_SECONDS = 180
STOP_SECONDS = 15


def measure(launcher_options: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Start all ranks and have them measure.

    Args:
        launcher_options: hostfile, filters, address and port.
        environment: variables to set for the launcher.

    Returns:
        {"ranks", "bytes", "seconds" of one sum, "bus": bytes per second, "pairs": [[bytes per second, host, host]
        …], slowest first}, or {"error": what the launcher said last}.
    """
    script = Path(sys.executable).parent / "deepspeed"
    launcher = [sys.executable, str(script)] if script.exists() else [shutil.which("deepspeed") or "deepspeed"]
    command = [*launcher, *launcher_options, "--quiet", "--module", "pipeline.doctor.allreduce"]
    variables = {**os.environ, **environment}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    root = str(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    timed_out = False
    try:
        stdout, stderr = process.communicate(timeout=LAUNCH_SECONDS)
    except subprocess.TimeoutExpired:
        timed_out = True
        process.terminate()  # at which it stops its ranks on every host
        try:
            stdout, stderr = process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
    except BaseException:
        process.terminate()
        raise
    result = heard(stdout)
    if result is not None:
        return result
    said = [line.strip() for line in stderr.splitlines() if line.strip() and MARK not in line]
    telling = [line for line in said if "Error" in line or "onehour:" in line] or said
    last = telling[-1] if telling else f"exit code {process.returncode}"
    return {"error": f"no answer within {LAUNCH_SECONDS} s; {last}" if timed_out else last}


def rounds_of_pairs(number: int, most: int = MOST_ROUNDS) -> list[list[tuple[int, int]]]:
    """Disjoint pairs of 0 … number − 1 in rounds, each pair at most once: a round-robin tournament's schedule.

    All pairs come up if there are at most `most` rounds, else each member meets about `most` others.
    """
    members = list(range(number + number % 2))  # with an odd number, who meets the last one rests
    rounds = []
    for _ in range(min(len(members) - 1, most)):
        half = len(members) // 2
        pairs = zip(members[:half], reversed(members[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < number])
        members = [members[0], members[-1], *members[1:-1]]
    return rounds


def main() -> int:
    """One rank: sum for a while, then exchange with the other hosts."""
    import torch
    import torch.distributed as dist

    from pipeline import engine

    world = engine.join()

    def synchronise() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sums(buffer: torch.Tensor, count: int) -> float:
        """Seconds of one sum, of the slowest rank."""
        dist.barrier()
        start = synchronise()
        for _ in range(count):
            dist.all_reduce(buffer)
        seconds = torch.tensor([(synchronise() - start) / count], dtype=torch.float64, device=world.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    small = torch.zeros(1 << 18, device=world.device)
    sums(small, 2)  # connections are made
    per_byte = sums(small, 3) / (4 << 18)  # the same on every rank, as is all that follows from it
    size = int(min(BYTES, 1 / per_byte)) // 4
    buffer = torch.zeros(size, device=world.device)
    count = max(1, min(200, int(SECONDS / (per_byte * 4 * size))))
    seconds = sums(buffer, count)

    places: list[Any] = [None] * world.size
    dist.all_gather_object(places, (world.rank - world.local_rank, socket.gethostname()))
    firsts = sorted({first for first, _ in places})
    exchanged: list[tuple[float, str, str]] = []
    pair_size = max(1, min(PAIR_BYTES // 4, size))
    for pairs in rounds_of_pairs(len(firsts)):
        dist.barrier()
        for one, other in ((firsts[a], firsts[b]) for a, b in pairs):
            if world.rank not in (one, other):
                continue
            start = synchronise()
            for sender, receiver in ((one, other), (other, one)):
                if world.rank == sender:
                    dist.send(buffer[:pair_size], receiver)
                else:
                    dist.recv(buffer[:pair_size], sender)
            if world.rank == one:
                rate = 2 * 4 * pair_size / (synchronise() - start)
                exchanged.append((rate, places[one][1], places[other][1]))
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, exchanged)
    if world.rank == 0:
        say(
            {
                "ranks": world.size,
                "bytes": 4 * size,
                "seconds": seconds,
                "bus": 2 * (world.size - 1) / world.size * 4 * size / seconds,
                "pairs": sorted(pair for pairs in every for pair in pairs),
            }
        )
    engine.leave(world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
