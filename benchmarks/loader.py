"""Our loader beside others: the same images, the same transform, CPU time per image.

Measures the training loader on each rung of its decoder, timm, torchvision, webdataset, DALI, FFCV, MosaicML Streaming,
litdata and spdl, and what libjpeg-turbo takes by itself. A row is one process per round, the order of the rows is
shuffled in each round, ratios are formed within a round and their median is taken. What is not installed is listed
with SKIP and the reason.

    benchmarks/peers.sh DIR                           # once: the other loaders, in an environment of their own
    DIR/bin/python benchmarks/loader.py IMAGES [--rounds N] [--only ROW,…] [--threads N] [--gate] [--json FILE]
    DIR/bin/python benchmarks/loader.py IMAGES --light --gate                       # a few rows, for CI

IMAGES is a folder with one folder of JPEGs per class, or a zip of one. Shards and the others' formats are made from it
once, in the work folder. CPU time is the figure to compare: on a machine that is busy otherwise, images per second say
little. Where a loader normalises to float32 on the CPU, its ratio to ours that does so too is given beside. With --gate
the exit status is 1 unless every required ratio was measured in every round, and met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loader_data import SkipError, collect
from loader_machine import cpu_model, library_versions
from loader_measure import KERNELS, ROWS, WARM_UP, Settings
from loader_report import check_gate, print_kernels, print_loaders, print_sweep

from shards.bench import parse_threads
from shards.pool import usable_cores

CHILD = Path(__file__).with_name("loader_measure.py")
LONGEST = 1800
"""Seconds for one row, the making of its data included."""

SWEPT = ("native-indexed", "native", "simplejpeg", "pillow", "bare-decode", "timm-wds")
ONE_THREAD_EACH = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
"""Variables of libraries that would otherwise split an operation among threads beside the loader's own."""

LIGHT = {
    "only": "native-indexed,native,simplejpeg,bare-decode,timm-wds,kernels",
    "images": 640,
    "rounds": 2,
    "sweep": "0",
}
"""Other defaults, for CI."""


@dataclass(frozen=True)
class Measurement:
    """One row in one round; `load` is the load average when it began, `result` what loader_measure.py printed."""

    round: int
    row: str
    threads: int
    load: float
    result: dict[str, Any]


@dataclass
class Findings:
    """All that was measured, in how many rounds, and why the rest was not."""

    rounds: int
    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(row: str, settings: Settings) -> dict[str, Any]:
    """Measure one row in a process of its own: the line that it prints, or {"failed": why}."""
    environment = os.environ | dict.fromkeys(ONE_THREAD_EACH, "1") | {"NUMBA_NUM_THREADS": str(settings.threads)}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, CHILD, row, settings.to_json()],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            answer, _ = child.communicate(timeout=LONGEST)
            return json.loads(answer)
        except subprocess.TimeoutExpired:
            return {"failed": f"still running after {LONGEST} s"}
        except json.JSONDecodeError:
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()]
            return {"failed": lines[-1].strip() if lines else f"exit status {child.returncode}"}
        finally:
            if child.poll() is None:  # it has a session of its own, so that its workers end with it
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()


def measure(findings: Findings, rows: list[str], sweep: list[int], settings: Settings) -> None:
    """Try every row with one batch, then measure those that run, in shuffled rounds."""
    for row in rows:
        progress(f"trying {row}")
        result = run(row, Settings(**asdict(settings) | {"images": settings.batch}))
        for reason, kind in (("skip", findings.skipped), ("failed", findings.failed)):
            if reason in result:
                kind[row] = result[reason]
    able = [row for row in rows if row not in findings.skipped and row not in findings.failed]
    jobs = [(row, settings.threads) for row in able]
    jobs += [(row, threads) for row in able if row in SWEPT for threads in sweep if threads != settings.threads]
    for number in range(findings.rounds):
        seed = settings.seed + number
        for row, threads in random.Random(seed).sample(jobs, len(jobs)):
            progress(f"round {number + 1} of {findings.rounds}: {row}, {threads} threads")
            load = os.getloadavg()[0]
            result = run(row, Settings(**asdict(settings) | {"threads": threads, "seed": seed}))
            if "failed" in result or "skip" in result:
                findings.failed[row] = f"in round {number + 1}: {result.get('failed') or result['skip']}"
            else:
                findings.measurements.append(Measurement(number, row, threads, load, result))
    progress("")


def progress(text: str) -> None:
    """Say what is being done, in one line that is written over; on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="IMAGES", help="folder of class folders of JPEGs, or a zip of one")
    default = Path(tempfile.gettempdir()) / "onehour-loader-benchmark"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help=f"what is made (default: {default})")
    parser.add_argument("--dataset", type=int, default=2048, metavar="N", help="images of an epoch (default: 2048)")
    parser.add_argument("--images", type=int, default=2560, metavar="N", help="to measure, each time (default: 2560)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="or worker processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--only", default=",".join(ROWS), metavar="ROW,…", help=f"rows to measure, of {', '.join(ROWS)}"
    )
    powers = [2**i for i in range(usable_cores().bit_length()) if 2**i <= usable_cores()]
    text = ",".join(map(str, powers))
    parser.add_argument("--sweep", default=text, metavar="N,…", help=f"threads to compare; 0: none (default: {text})")
    parser.add_argument(
        "--gate", type=float, nargs="?", const=1.0, metavar="FACTOR", help="check the required ratios, times FACTOR"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all measurements")
    parser.add_argument("--seed", type=int, default=0, help="of the orders (default: 0)")
    light = " ".join(f"--{name} {value}" for name, value in LIGHT.items())
    parser.add_argument("--light", action="store_true", help=f"other defaults: {light}")
    if parser.parse_known_args()[0].light:
        parser.set_defaults(**LIGHT)
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := sorted(set(arguments.only) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    arguments.sweep = [] if arguments.sweep == "0" else parse_threads(arguments.sweep)
    if min(arguments.images, arguments.rounds, arguments.batch, arguments.threads) < 1:
        parser.error("--images, --rounds, --batch and --threads are at least 1")
    if not arguments.source.exists():
        parser.error(f"{arguments.source}: not there")
    return arguments


def ends(epoch: int, settings: Settings) -> int:
    """How many epochs end between the first and the last image that is measured."""
    first = WARM_UP * settings.batch
    return (first + settings.images - 1) // epoch - first // epoch


def main() -> None:
    began = time.monotonic()
    arguments = parse()
    data = collect(arguments.source, arguments.work, arguments.dataset)
    try:
        data.make_shards()
    except SkipError as error:
        sys.exit(str(error))
    settings = Settings(str(data.root), arguments.threads, arguments.batch, arguments.images, arguments.seed)
    load = os.getloadavg()
    images = data.images()
    size = sum(path.stat().st_size for path in images)
    print(f"{len(images):,} images, {size / len(images) / 1e3:.1f} kB each; {data.root}")
    print(
        f"batches of {settings.batch}, {settings.threads} threads or workers, RandomResizedCrop 224 and flip;", end=" "
    )
    print(f"{settings.images:,} images after the warm-up, {arguments.rounds} shuffled rounds")
    print(f"epochs of {len(images):,} images, of which {ends(len(images), settings)} end while a row is measured")
    print(f"{cpu_model()}, {usable_cores()} cores; load average {load[0]:.1f} at the start")
    print(", ".join(f"{name} {version}" for name, version in library_versions().items()), flush=True)
    findings = Findings(arguments.rounds)
    rows = [row for row in ROWS if row in arguments.only]
    measure(findings, rows, arguments.sweep, settings)
    print_loaders(findings, [row for row in rows if row != KERNELS], settings.threads)
    if KERNELS in rows:
        print_kernels(findings)
    print_sweep(findings, settings.threads)
    loads = [each.load for each in findings.measurements] or [load[0]]
    print(f"\nload average {min(loads):.1f} to {max(loads):.1f}; {time.monotonic() - began:,.0f} s elapsed")
    if arguments.json is not None:
        facts = {"cpu": cpu_model(), "cores": usable_cores(), "load": load, "versions": library_versions()}
        arguments.json.write_text(json.dumps(facts | asdict(settings) | asdict(findings), indent=1))
    if arguments.gate is not None and not check_gate(findings, rows, settings.threads, arguments.gate):
        sys.exit(1)


if __name__ == "__main__":
    main()
