"""How fast `shards prepare imagefolder` is, against what the storage can do.

Repeats a folder of images to at least 10,000 with hard links, and writes them as shards with 1, 2, 4 … workers, up to
the number of cores. The storage's own rates are measured in the same rounds: one file of the same size, written
sequentially and synced, and read back with the page cache emptied. Nothing is asserted: a table is printed.

    python benchmarks/prepare_rate.py IMAGES [FOLDER] [--images N] [--workers 1,2] [--rounds N]

IMAGES holds one folder per class. FOLDER (that of IMAGES by default, since hard links stay on one file system) gets a
new folder that is removed at the end. After the first round the source images come out of the page cache.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shards.bench import parse_threads
from shards.images import IMAGE_EXTENSIONS
from shards.pagecache import Residence, drop, resident_share
from shards.pool import usable_cores

CHUNK = 1 << 20


def repeat_images(source: Path, target: Path, least: int) -> tuple[int, int]:
    """Hard links to all images below `source`, as often as it takes: (number, bytes) of the images."""
    images = [path for path in sorted(source.rglob("*")) if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    if not images:
        sys.exit(f"{source}: no images")
    copies = -(-least // len(images))
    for path in images:
        folder = target / path.relative_to(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            try:
                (folder / f"{path.stem}_copy{copy}{path.suffix}").hardlink_to(path)
            except OSError as error:
                sys.exit(f"{folder}: {error.strerror}: FOLDER must be on the file system of IMAGES")
    return copies * len(images), copies * sum(path.stat().st_size for path in images)


def write_rate(path: Path, size: int) -> float:
    """Bytes per second of writing one file from end to end, until it is on disk."""
    data = os.urandom(CHUNK)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // CHUNK):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size // CHUNK * CHUNK / (time.perf_counter() - started)


def read_rate(path: Path) -> tuple[float, float]:
    """Bytes per second of reading a file from end to end, and the share that was in memory before."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        drop([file.fileno()])
        share = resident_share([Residence(file.fileno(), 0, size)])
        started = time.perf_counter()
        while file.read(CHUNK):
            pass
        return size / (time.perf_counter() - started), share


def prepare(images: Path, out: Path, workers: int) -> float:
    """Seconds that the command takes, start of the processes and listing included, until all is on disk."""
    command = [sys.executable, "-m", "shards.cli", "prepare", "imagefolder", images, out, "--workers", str(workers)]
    started = time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - started
    assert re.search(r"^done ", said, re.MULTILINE)
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, help="folder of class folders")
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: beside IMAGES)")
    parser.add_argument("--images", type=int, default=10_000, dest="least", metavar="N", help="at least so many")
    powers = [2**i for i in range(usable_cores().bit_length()) if 2**i < usable_cores()]
    default = ",".join(map(str, [*powers, usable_cores()]))
    parser.add_argument("--workers", default=default, metavar="N,…", help=f"numbers of processes (default: {default})")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="prepare-rate-", dir=arguments.folder or arguments.images.resolve().parent))
    try:
        report(root, arguments)
    finally:
        shutil.rmtree(root)


def report(root: Path, arguments: argparse.Namespace) -> None:
    """Measure in rounds, print the table."""
    count, size = repeat_images(arguments.images, root / "images", arguments.least)
    free = shutil.disk_usage(root).free
    if free < 1.2 * size:
        sys.exit(f"{root}: {1.2 * size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    print(f"{count:,} images, {size / 1e6:,.0f} MB, {size / count / 1e3:.1f} kB each; {usable_cores()} cores")
    print(f"load average {os.getloadavg()[0]:.1f} at the start; {arguments.rounds} interleaved rounds\n")
    numbers = parse_threads(arguments.workers)
    seconds: dict[int, list[float]] = {workers: [] for workers in numbers}
    written, read, shares = [], [], []
    for _ in range(arguments.rounds):
        written.append(write_rate(root / "file", size))
        rate, share = read_rate(root / "file")
        read.append(rate)
        shares.append(share)
        (root / "file").unlink()
        for workers in numbers:
            seconds[workers].append(prepare(root / "images", root / "out", workers))
    write = statistics.median(written)
    print(f"{'':32}{'images/s':>10}{'per worker':>12}{'MB/s':>8}{'of write':>10}   n = {arguments.rounds}, MB/s each")
    for name, rates in (("sequential write, synced", written), ("sequential read, cold", read)):
        line(name, statistics.median(rates), size / count, 1, write, rates)
    for workers, times in seconds.items():
        rates = [size / value for value in times]
        line(f"shards prepare, {workers} workers", statistics.median(rates), size / count, workers, write, rates)
    print(f"\nat most {max(shares):.1%} of the file was in the page cache before it was read")
    print(f"load average {os.getloadavg()[0]:.1f} at the end")


def line(name: str, rate: float, image: float, workers: int, write: float, rates: list[float]) -> None:
    """One row; rates in bytes per second, `image` in bytes."""
    per_worker = f"{rate / image / workers:,.0f}" if name.startswith("shards") else ""
    each = " ".join(f"{value / 1e6:,.0f}" for value in rates)
    print(f"{name:32}{rate / image:10,.0f}{per_worker:>12}{rate / 1e6:8,.0f}{rate / write:10.2f}   {each}")


if __name__ == "__main__":
    main()
