"""The machine of gpu.py: what it is, how fast its parts are by themselves, and what its clocks do meanwhile."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu_points import Say, Settings
from loader_machine import cpu_model, library_versions

from shards.pool import usable_cores

QUERIED = ("clocks.sm", "power.draw", "temperature.gpu")
LOWERED = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Why clocks are lower than they could be: the name of today, and that of older drivers."""

EVERY_MILLISECONDS = 500

REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's bits of why a clock is lower than it could be; idle and what a person has set are none of them."""

REPETITIONS, WARM_UP = 7, 3
BUFFERS = 3
"""That are copied to the device in turn."""


def machine(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """Names, versions, clocks, and which batch normalisation torch chooses."""
    import torch

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "versions": library_versions() | _versions(),
        "gpu": None,
        "batch_norm": batch_norm_backends("cuda" if torch.cuda.is_available() else "cpu"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gigabytes": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit"),
        }
    say(**facts)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("deepspeed", "timm", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def batch_norm_backends(device: str) -> list[dict[str, str]] | None:
    """What torch would call for NHWC images and weights of each type, in training; None where torch does not say."""
    import torch

    if not hasattr(torch._C, "_select_batch_norm_backend"):
        return None
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    found = []
    for images_type in types:
        images = torch.zeros(8, 16, 4, 4, dtype=types[images_type], device=device)
        images = images.to(memory_format=torch.channels_last)
        for weights_type in ("fp32", images_type) if images_type != "fp32" else ("fp32",):
            weight, bias = (torch.ones(16, dtype=types[weights_type], device=device) for _ in range(2))
            mean, variance = (torch.ones(16, device=device) for _ in range(2))
            try:
                answer = str(torch._C._select_batch_norm_backend(images, weight, bias, mean, variance, True, 1e-5))
            except (RuntimeError, TypeError) as error:
                answer = f"not said: {str(error).partition(chr(10))[0]}"
            found.append({"images": images_type, "weights": weights_type, "backend": answer.rpartition(".")[2]})
    return found


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """What the tool says of the first GPU, or None where it says nothing."""
    try:
        answer = subprocess.run(_query(fields), capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in answer.split(",")), strict=False))


def _query(fields: Sequence[str]) -> list[str]:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"  # a number or a UUID
    return ["nvidia-smi", f"--id={first}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


# ---------------------------------------------------------------- ceilings


def ceilings(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """What no step can exceed: a matrix product in bf16, a copy on the device, and one to it from pinned memory."""
    import torch

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")

    def rates(amount: float, act: Callable[[], object]) -> list[float]:
        """Of `amount` per call, in each repetition; the first calls are not counted."""
        found = []
        for number in range(WARM_UP + REPETITIONS):
            if on_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            act()
            if on_cuda:
                torch.cuda.synchronize()
            if number >= WARM_UP:
                found.append(amount / (time.perf_counter() - began))
        return found

    side = settings.elements
    # not zeros: what is multiplied decides the power, and that the clock
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    calls = 10

    def multiply() -> None:
        for _ in range(calls):
            torch.matmul(left, right, out=product)

    values = rates(calls * 2 * side**3 / 1e12, multiply)
    say(what=f"matrix product of bf16, {side:,} × {side:,}", unit="TFLOP/s", values=values)
    source = torch.randint(0, 256, (settings.copied // 2,), dtype=torch.uint8, device=device)
    values = rates(settings.copied / 1e9, functools.partial(torch.empty_like(source).copy_, source))
    say(what="copy on the device, read + written", unit="GB/s", values=values)
    del source
    if not on_cuda:
        say(what="copy from pinned memory to the device", unit="GB/s", values=None)
        return
    batch = settings.copied // 16
    pinned = [torch.zeros(batch, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
    there = torch.empty(batch, dtype=torch.uint8, device=device)

    def send() -> None:
        for buffer in pinned:
            there.copy_(buffer, non_blocking=True)

    say(what="copy from pinned memory to the device", unit="GB/s", values=rates(BUFFERS * batch / 1e9, send))


# ---------------------------------------------------------------- clocks


class Clocks:
    """Watches the first GPU from outside while a section is measured; a context manager.

    Args:
        path: where nvidia-smi writes what it sees.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tool: subprocess.Popen | None = None

    def __enter__(self) -> Clocks:
        lowered = next((name for name in LOWERED if nvidia_smi(name) is not None), None)
        if lowered is not None:
            command = [*_query([*QUERIED, lowered]), f"--loop-ms={EVERY_MILLISECONDS}"]
            with self._path.open("w") as file:
                self._tool = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tool is not None:
            self._tool.terminate()
            self._tool.wait()

    def seen(self) -> dict[str, Any] | None:
        """Megahertz, watts and degrees, and the reasons of lower clocks; None where nothing was seen."""
        return summary(self._path.read_text()) if self._tool is not None and self._path.exists() else None


def summary(text: str) -> dict[str, Any] | None:
    """What lines of nvidia-smi (`QUERIED`, and the reasons) say; a value that it does not know is left out."""
    columns: dict[str, list[float]] = {name: [] for name in QUERIED}
    reasons = 0
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERIED) + 1:
            continue
        for name, cell in zip(columns, cells, strict=False):
            with contextlib.suppress(ValueError):
                columns[name].append(float(cell))
        with contextlib.suppress(ValueError):
            reasons |= int(cells[-1], 16)
    if not any(columns.values()):
        return None
    return {
        name: {"least": min(values), "median": statistics.median(values), "most": max(values)}
        for name, values in columns.items()
        if values
    } | {"reasons": [name for bit, name in REASONS.items() if reasons & bit]}
