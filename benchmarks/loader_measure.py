"""The child process of loader.py: measures one row, in a process of its own, and prints one line of JSON.

    python benchmarks/loader_measure.py ROW SETTINGS

CPU time is that of the process, of its children that live, and of those that have ended and were waited for, so that
neither workers that come and go nor those that stay are lost.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from loader_data import Data, SkipError

WARM_UP = 8
"""Batches."""

KERNELS = "kernels"
"""The row that measures several at once."""

LIBJPEG_FUSED, NATIVE_INDEXED, NATIVE = "libjpeg-turbo crop, resize, flip", "C extension, indexed", "C extension, plain"
"""The kernels whose ratio is required."""

PROJECTS = {
    "timm-wds": ("timm", "webdataset"),
    "timm-folder": ("timm",),
    "torchvision-v2": ("torchvision",),
    "webdataset": ("webdataset",),
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    "ffcv": ("ffcv",),
    "mosaicml": ("mosaicml-streaming",),
    "litdata": ("litdata",),
    "spdl": ("spdl",),
}
"""The distributions of each peer."""

OURS = ("native-indexed", "native", "native-indexed-float32", "simplejpeg", "pillow", "pillow-float32")
REFERENCES = ("bare-decode", "entropy-floor")
PEERS = tuple(PROJECTS)
ROWS = (*OURS, *REFERENCES, *PEERS, KERNELS)


@dataclass(frozen=True)
class Settings:
    """What a row is measured with.

    Attributes:
        data: the folder of `loader_data.Data`.
        threads: decoding threads, or worker processes.
        batch: images per batch.
        images: to measure, at least; after the warm-up.
        seed: of what is shuffled.
    """

    data: str
    threads: int
    batch: int
    images: int
    seed: int

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def opener(row: str) -> Callable[[Data, int, int], Iterator[Any]]:
    """The function that yields a row's batches: that of its name."""
    if row in PROJECTS:
        import loader_peers as module
    else:
        import loader_ours as module  # type: ignore[no-redef]
    return getattr(module, row.replace("-", "_"))


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of the process and its descendants, living or waited for."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(usage.ru_utime + usage.ru_stime for usage in own)
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory(process: psutil.Process) -> int:
    """Peak resident set of the process, and what its children now have for themselves; bytes."""
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for child in process.children(recursive=True):
        try:
            total += child.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def contract(batch: Any, size: int) -> str:
    """What a loader delivers: type and memory order of a batch's pixels.

    Raises:
        ValueError: not `size` images of 224 × 224.
    """
    if isinstance(batch, int):
        return "nothing"
    shape = tuple(batch.shape)
    if sorted(shape) != sorted((size, 3, 224, 224)):
        raise ValueError(f"a batch of shape {shape}")
    strides = batch.stride() if callable(getattr(batch, "stride", None)) else batch.strides
    channel = shape.index(3, 1)
    order = "NHWC" if strides[channel] == min(strides) else "NCHW"
    return f"{str(batch.dtype).removeprefix('torch.')} {order}"


def measure_loader(row: str, settings: Settings) -> dict[str, object]:
    """CPU-µs and seconds per image of one loader, after a warm-up."""
    open_row = opener(row)
    batches = open_row(Data(Path(settings.data)), settings.threads, settings.batch)
    for _ in range(WARM_UP):
        first = next(batches)
    delivers = contract(first, settings.batch)
    del first
    process = psutil.Process()
    count = -(-settings.images // settings.batch)
    cpu, started = cpu_seconds(process), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, cpu = time.perf_counter() - started, cpu_seconds(process) - cpu
    images = count * settings.batch
    return {
        "cpu_us": cpu / images * 1e6,
        "images_per_second": images / seconds,
        "megabytes": memory(process) / 1e6,
        "delivers": delivers,
        "how": (open_row.__doc__ or "").strip().partition("\n")[0].rstrip("."),
        "images": images,
        "versions": versions(row),
    }


def versions(row: str) -> dict[str, str]:
    """Of the row's own distributions."""
    found = {}
    for name in PROJECTS.get(row, ()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    row, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    # some loaders print: what they say goes to stderr, so that stdout has one line
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    try:
        if row == KERNELS:
            from loader_kernels import measure

            result = measure(Data(Path(settings.data)), settings.images, settings.seed)
        else:
            result = measure_loader(row, settings)
    except SkipError as reason:
        result = {"skip": str(reason)}
    except ImportError as error:
        if row not in PROJECTS:
            raise
        result = {"skip": f"not installed: {error}"}
    print(json.dumps(result), file=answer, flush=True)
    # loaders may have threads that never end, and workers that outlive a process that ends so
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
