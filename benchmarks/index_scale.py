"""Indexing and opening a set of ImageNet's size: time and peak memory of each step, each in a process of its own.

Writes 1,281,167 samples with tiny images as 1,024 tars (2.6 GB), then measures `shards index`, opening the training
split without a cached table, and opening it with one. Nothing is asserted: a table is printed.

    python benchmarks/index_scale.py [FOLDER] [--samples N] [--shards N] [--workers N] [--rounds N]

FOLDER (a temporary one by default) gets a new folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shards.pool import usable_cores
from shards.tar import BLOCK, RECORD

CLASSES = 1000
SAMPLE = 4 * BLOCK  # two members of a header and one block of data each

OPEN = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from shards.index import load_split
imported = time.perf_counter()
split = load_split(Path(sys.argv[1]), "train", workers=int(sys.argv[2]))
loaded = time.perf_counter()
print(len(split), imported - started, loaded - imported)
"""


@dataclass
class Step:
    """What one process took: wall-clock and CPU seconds, largest resident set in bytes of it and its children."""

    seconds: float
    cpu: float
    peak: int
    said: str


def write_shards(folder: Path, samples: int, shards: int) -> int:
    """Tars of samples ``s0000000.cls`` + ``s0000000.jpg``, made from a template; returns the bytes written."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "JPEG", quality=10)
    image = buffer.getvalue()
    assert len(image) <= BLOCK
    template = np.zeros(SAMPLE, np.uint8)
    for start, name, data in ((0, "s0000000.cls", b"000"), (2 * BLOCK, "s0000000.jpg", image)):
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o444
        member = header.tobuf(tarfile.USTAR_FORMAT) + data
        template[start : start + len(member)] = np.frombuffer(member, np.uint8)
    total = 0
    for shard in range(shards):
        numbers = np.arange(samples * shard // shards, samples * (shard + 1) // shards)
        rows = np.tile(template, (len(numbers), 1))
        rows[:, BLOCK : BLOCK + 3] = digits(numbers % CLASSES, 3)
        for start in (0, 2 * BLOCK):
            rows[:, start + 1 : start + 8] = digits(numbers, 7)
            rows[:, start + 148 : start + 156] = ord(" ")
            checksums = rows[:, start : start + BLOCK].sum(axis=1, dtype=np.int64)
            rows[:, start + 148 : start + 154] = digits(checksums, 6, base=8)
            rows[:, start + 154] = 0
        end = rows.size + 2 * BLOCK
        path = folder / f"train-{shard:05d}.tar"
        path.write_bytes(rows.tobytes() + bytes(2 * BLOCK + -end % RECORD))
        total += path.stat().st_size
    return total


def digits(numbers: np.ndarray, width: int, base: int = 10) -> np.ndarray:
    """The numbers as ASCII digits: uint8 [n, width]."""
    powers = base ** np.arange(width - 1, -1, -1)
    return (numbers[:, None] // powers % base + ord("0")).astype(np.uint8)


def measure(*command: str) -> Step:
    """Run a command to its end in a process of its own.

    Linux counts the largest resident set of a child as that of any one process below it.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command[:4])} … failed")
    return Step(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3, help="of opening the split (default: 3)")
    arguments = parser.parse_args()
    needed = arguments.samples * SAMPLE * 1.2
    free = shutil.disk_usage(arguments.folder).free
    if free < needed:
        sys.exit(f"{arguments.folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    root = Path(tempfile.mkdtemp(prefix="index-scale-", dir=arguments.folder))
    try:
        report(root, arguments)
    finally:
        shutil.rmtree(root)


def report(root: Path, arguments: argparse.Namespace) -> None:
    """Write the shards, run every step, print the table."""
    data = root / "data"
    data.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")  # nothing of an earlier run is found there
    started = time.perf_counter()
    size = write_shards(data, arguments.samples, arguments.shards)
    print(
        f"{arguments.samples:,} samples in {arguments.shards:,} tars, {size / 1e9:.2f} GB, "
        f"written in {time.perf_counter() - started:.1f} s"
    )
    print(f"{usable_cores()} cores, load average {os.getloadavg()[0]:.1f} at the start\n")
    print(f"{'':32}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}")
    workers = str(arguments.workers)
    row(
        f"shards index, {workers} workers",
        [measure(sys.executable, "-m", "shards.cli", "index", str(data), "--workers", workers)],
    )
    cold, parallel, cached = [], [], []
    for _ in range(arguments.rounds):
        for steps, processes in ((cold, "1"), (parallel, workers)):
            shutil.rmtree(data / ".cache")
            steps.append(measure(sys.executable, "-c", OPEN, str(data), processes))
        cached.append(measure(sys.executable, "-c", OPEN, str(data), "1"))
    row("open, no cached table, 1 process", cold)
    row(f"open, no cached table, {workers} workers", parallel)
    row(f"open, cached table (n = {len(cached)})", cached)
    loads = [float(step.said.split()[2]) for step in cached]
    said = ", ".join(f"{seconds:.3f}" for seconds in loads)
    print(f"\nload_split itself, cached: median {statistics.median(loads):.3f} s of {said}")
    print(f"load average {os.getloadavg()[0]:.1f} at the end; peak: largest single process, shared pages included")


def row(name: str, steps: list[Step]) -> None:
    """One line of medians."""
    seconds, cpu = (statistics.median(values) for values in zip(*((s.seconds, s.cpu) for s in steps), strict=True))
    print(f"{name:32}{seconds:9.2f}{cpu:9.2f}{max(step.peak for step in steps) / 1e6:9.0f}", flush=True)


if __name__ == "__main__":
    main()
