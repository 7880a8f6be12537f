"""How fast a training step is on this machine's GPU, and what of it is lost on the way: one command, one table.

    python benchmarks/gpu.py [--images IMAGES] [--only SECTION,…] [--budget SECONDS] [--json FILE] [--gate]
    python benchmarks/gpu.py --smoke [--compile]               # the same code on a CPU, with tiny sizes: does it run?

The step without an engine, ours and timm's are timed in turns on the same images, eager and compiled, with BN over 32
and 256 images and over 32 of 256 at once; the loader alone, and before the engine; and whether all of these are the
same training. Every section is a process of its own with a time limit, every result a line that is written at once into
the work folder: what fails, or takes too long, is in the table and ends nothing else. What the time does not suffice
for is measured by the next call with --only; compiled kernels and data are kept in the work folder.

IMAGES is a folder with one folder of JPEGs per class, or a zip of one; without it JPEGs of ImageNet's size are made.
With --gate the exit status is 1 unless all that is required was measured, and met. Where the engine is slower than it
should be, a profile of it is written and its path printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_machine import Clocks
from gpu_points import ASIDE, NEEDS, SECTIONS, TIMED, Settings
from gpu_report import print_report
from gpu_required import BEST, Gate, Record, broken, gates

from shards.pool import usable_cores

CHILD = Path(__file__).with_name("gpu_measure.py")

BUDGET = 470
"""Seconds for everything: less than eight minutes."""

ASIDE_SHARE = 0.3
"""Of it, for the sections that time nothing. What is not compiled by then is compiled where it is used."""

PROFILE_SECONDS = 30
"""Kept back, for profiles; if all is well they are not needed."""

LEAST_SECONDS = 5
"""A section with less is not begun."""

MOST_PROFILES = 2
CORES_PER_COMPILER, MOST_COMPILERS = 4, 4
"""Each compiles in processes of its own, and has a batch of the large points in the GPU's memory."""


class Results:
    """All that the sections said, kept here and in a file as it comes.

    Args:
        path: of the file: a line of JSON each.
    """

    def __init__(self, path: Path) -> None:
        self.records: list[Record] = []
        self._file = path.open("w")
        self._lock = threading.Lock()

    def add(self, section: str, **result: Any) -> None:
        """From any thread."""
        with self._lock:
            record = {"section": section, **result}
            self.records.append(record)
            print(json.dumps(record), file=self._file, flush=True)

    def failed(self) -> list[str]:
        """The sections of which something failed."""
        return sorted({record["section"] for record in self.records if "failed" in record or record.get("without")})


class Runner:
    """Runs sections, each in a process of its own.

    Args:
        settings: of all of them.
        results: where their results go.
        deadline: on the monotonic clock; nothing runs longer.
    """

    def __init__(self, settings: Settings, results: Results, deadline: float) -> None:
        self._settings = settings
        self._results = results
        self._deadline = deadline
        self._children: set[subprocess.Popen] = set()
        self._over = False
        self._environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # as the launcher has it
            "TORCHINDUCTOR_CACHE_DIR": str(settings.folder / "compiled"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, usable_cores() // compilers())),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        }
        if settings.smoke:
            self._environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, section: str, until: float, what: dict[str, Any] | None = None) -> None:
        """Run a section; whatever happens to it becomes a result."""
        seconds = min(until, self._deadline) - time.monotonic()
        about = {"point": what["point"]} if what else {}
        if seconds < LEAST_SECONDS or self._over:
            self._results.add(section, **about, failed="not begun: no time was left")
            return
        progress(f"{section}, at most {seconds:.0f} s")
        said = self._settings.folder / f"said-by-{section}-{time.time_ns()}.txt"
        command = [sys.executable, str(CHILD), section, self._settings.to_json()]
        with said.open("w") as errors:
            child = subprocess.Popen(
                [*command, json.dumps(what)] if what else command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment,
                start_new_session=True,
            )
        self._children.add(child)
        reader = threading.Thread(target=self._read, args=(section, child), daemon=True)
        reader.start()
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(seconds)
        finally:
            end(child)
        reader.join(10)
        self._children.discard(child)
        if self._over:
            self._results.add(section, **about, failed="ended with the benchmark")
        elif code is None:
            self._results.add(section, **about, failed=f"cut off after {seconds:.0f} s; what it said: {said}")
        elif code < 0:
            name = signal.Signals(-code).name
            self._results.add(section, **about, failed=f"ended by {name}; what it said: {said}")
        elif code:
            self._results.add(section, **about, failed=f"exit status {code}; what it said: {said}")

    def _read(self, section: str, child: subprocess.Popen) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                self._results.add(section, **json.loads(line))

    def stop(self) -> None:
        """End all that runs, and begin nothing more."""
        self._over = True
        for child in list(self._children):
            end(child)


def end(child: subprocess.Popen) -> None:
    """Kill a child and whatever it left: it has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def progress(text: str) -> None:
    """Say what is being done, in one line that is written over; on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def run_aside(runner: Runner, chosen: list[str], settings: Settings, until: float) -> None:
    """The sections that time nothing, beside each other; the kernels of the most important points first."""
    graphs = [
        {"point": asdict(point), "ours": ours}
        for point in settings.compiled
        for ours in ((True,) if point.groups > 1 else (True, False))
    ]
    if "compile" not in chosen:
        graphs = []
    with ThreadPoolExecutor(compilers()) as compiling, ThreadPoolExecutor(2) as others:
        running = [
            compiling.submit(runner.run, "compile", until, graph)
            for graph in (graphs if settings.compile else graphs[:1])
        ]
        running += [
            others.submit(runner.run, section, until) for section in ASIDE if section in chosen and section != "compile"
        ]
        try:
            for future in running:
                future.result()
        except BaseException:
            runner.stop()  # leaving the pools waits for their threads
            raise


def compilers() -> int:
    """Points that are compiled at once."""
    return max(1, min(MOST_COMPILERS, usable_cores() // CORES_PER_COMPILER))


def run_timed(runner: Runner, results: Results, chosen: list[str], settings: Settings, deadline: float) -> None:
    """The sections that have the machine to themselves: each has its share of what the ones before have left."""
    left = {section: share for section, share in TIMED.items() if section in chosen}
    while left:
        now = time.monotonic()
        section, share = next(iter(left.items()))
        until = now + (deadline - now) * share / sum(left.values())
        del left[section]
        with Clocks(settings.folder / f"clocks-{section}.csv") as clocks:
            runner.run(section, until)
        if seen := clocks.seen():
            results.add(section, clocks=seen)


def run_profiles(runner: Runner, found: list[Gate], settings: Settings, deadline: float) -> None:
    """Where the engine is slower than it should be; in a smoke run at one point, whatever it is."""
    if settings.smoke:
        points = settings.eager[:1]
    else:
        order = sorted(found, key=lambda gate: gate.required.name == BEST)
        points = list(dict.fromkeys(point for gate in order for point in gate.failing))
    for point in points[:MOST_PROFILES]:
        runner.run("profile", deadline, {"point": asdict(point)})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of class folders of JPEGs, or a zip of one")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION,…", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET}")
    default = Path(tempfile.gettempdir()) / "onehour-gpu-benchmark"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help=f"what is made (default: {default})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results and requirements")
    parser.add_argument("--gate", action="store_true", help="exit status 1 unless all requirements are met")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--compile", action="store_true", help="with --smoke: compile as well, which takes minutes")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := sorted(set(arguments.only) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if arguments.images is not None and not arguments.images.exists():
        parser.error(f"{arguments.images}: not there")
    if arguments.compile and not arguments.smoke:
        parser.error("--compile is for --smoke: a run on a GPU compiles")
    if not arguments.smoke:
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --smoke runs the same code on a CPU")
    return arguments


def interrupt(number: int, frame: FrameType | None) -> None:
    """The children have sessions of their own, and must not outlive this process."""
    raise KeyboardInterrupt


def main() -> None:
    began = time.monotonic()
    arguments = parse()
    work = arguments.work.resolve() / ("smoke" if arguments.smoke else "gpu")
    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("said-by-*"):
        old.unlink()
    images = str(arguments.images.resolve()) if arguments.images else None
    if arguments.smoke:
        settings = Settings.for_smoke(str(work), images=images, compile=arguments.compile)
    else:
        settings = Settings(str(work), images=images)
    chosen = list(dict.fromkeys(each for name in arguments.only for each in (*NEEDS.get(name, ()), name)))
    deadline = began + arguments.budget
    results = Results(work / "results.jsonl")
    runner = Runner(settings, results, deadline)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run_aside(runner, chosen, settings, began + ASIDE_SHARE * arguments.budget)
        run_timed(runner, results, chosen, settings, deadline - PROFILE_SECONDS)
        run_profiles(runner, gates(results.records, settings), settings, deadline)
    except KeyboardInterrupt:
        runner.stop()
    progress("")
    found = print_report(results.records, settings, time.monotonic() - began)
    if arguments.json is not None:
        summary = [
            {
                "required": gate.required.name,
                "bound": gate.required.bound,
                "met": gate.met,
                "values": {str(point): values for point, values in gate.values.items()},
                "missing": list(map(str, gate.missing)),
            }
            for gate in found
        ]
        content = {"settings": asdict(settings), "records": results.records, "required": summary}
        arguments.json.write_text(json.dumps(content, indent=1))
    failed = results.failed()
    if failed:
        print(f"of these sections something failed, or was cut off: {', '.join(failed)}")
    good = all(gate.met for gate in found) and not broken(results.records)
    sys.exit(1 if failed or (arguments.gate and not good) else 0)


if __name__ == "__main__":
    main()
