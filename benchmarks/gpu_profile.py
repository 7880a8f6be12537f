"""Where the time of an update goes: written into a file by gpu.py where the engine is slower than it should be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_points import Point, Say, Settings

UPDATES = 5
LISTED = 40

KINDS = (
    ("communication", r"nccl|all_?reduce|allgather|broadcast_kernel"),
    ("optimizer", r"multi_tensor|fused_sgd|fusedsgd|_foreach"),
    ("BN", r"batch_?norm|bn_fw|bn_bw|var_mean|welford"),
    ("conv", r"conv|fprop|dgrad|wgrad|implicit|xmma|winograd|nhwckrsc|nchwtonhwc|nhwctonchw"),
    ("matrix products", r"gemm|gemv|cublas|addmm|\bmm\b|matmul|cutlass|nvjet"),
    ("copies", r"memcpy|memset|copy|_to_copy|\bto\b|fill|zero_"),
    ("elementwise and reductions", r"elementwise|triton|reduce|relu|add|mul|div|pool|softmax|loss|threshold|cat|clamp"),
)
"""By what is in a kernel's name; the first that fits. A fused kernel of Inductor's is named after all that it does, and
counts for the first kind of these."""


class Piece(NamedTuple):
    """A kernel, or on a CPU an operation: its name, and when it ran, in microseconds."""

    name: str
    began: float
    ended: float


def kind(name: str) -> str:
    """What a kernel is for."""
    for label, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "other"


def shares(pieces: Iterable[Piece]) -> dict[str, float]:
    """The time of each kind, and that in which nothing ran ("idle"), divided by that from first to last.

    Kernels that run beside each other count fully: the shares may then add up to more than 1.
    """
    ordered = sorted(pieces, key=lambda piece: piece.began)
    span = max(piece.ended for piece in ordered) - ordered[0].began
    times: dict[str, float] = {}
    idle, until = 0.0, ordered[0].began
    for piece in ordered:
        times[kind(piece.name)] = times.get(kind(piece.name), 0.0) + piece.ended - piece.began
        idle += max(0.0, piece.began - until)
        until = max(until, piece.ended)
    parts = sorted(times.items(), key=lambda part: -part[1])
    return {name: time / span for name, time in [*parts, ("idle", idle)]}


def most_expensive(pieces: Iterable[Piece]) -> list[tuple[str, float, int]]:
    """(name, microseconds, calls) of every kernel, the most expensive first."""
    found: dict[str, tuple[float, int]] = {}
    for piece in pieces:
        time, calls = found.get(piece.name, (0.0, 0))
        found[piece.name] = time + piece.ended - piece.began, calls + 1
    return sorted(((name, *sums) for name, sums in found.items()), key=lambda row: -row[1])


def pieces_of(profiler: Any, *, on_cuda: bool) -> list[Piece]:
    """What ran on the device, without the ranges that people and libraries mark."""
    from torch.autograd import DeviceType

    device = DeviceType.CUDA if on_cuda else DeviceType.CPU
    found = []
    for event in profiler.events():
        marked = getattr(event, "is_user_annotation", False) or re.match(r"ProfilerStep|Optimizer\.|##", event.name)
        if event.device_type == device and not marked:
            began = event.time_range.start
            # on a CPU operations call one another, and the time of those within is not an operation's own
            ended = event.time_range.end if on_cuda else began + event.self_cpu_time_total
            found.append(Piece(event.name, began, ended))
    return found


def page(point: Point, pieces: list[Piece]) -> str:
    """The file's text."""
    span = max(piece.ended for piece in pieces) - min(piece.began for piece in pieces)
    lines = [f"engine, {point}: {UPDATES} updates, {span / UPDATES / 1000:.2f} ms each while it was profiled", ""]
    lines += [f"{share:8.1%}  {name}" for name, share in shares(pieces).items()]
    lines += ["", f"{'ms':>10}{'share':>8}{'calls':>8}  kernel"]
    for name, time, calls in most_expensive(pieces)[:LISTED]:
        lines.append(f"{time / 1000:10.3f}{time / span:8.1%}{calls:8}  {name[:160]}")
    return "\n".join(lines) + "\n"


def profile(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """Profile the engine at the `point`, and write the file."""
    import torch
    from gpu_contenders import allow_tf32, make_engine, ours, resident, synchronise, world
    from gpu_steps import timed
    from torch.profiler import ProfilerActivity

    point = Point(**what["point"])
    on_cuda = world().device.type == "cuda"
    contender = ours(make_engine(point, settings), resident(point.images, settings.size))
    allow_tf32(point.dtype == "tf32")
    timed(contender, settings.warm_up)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    for _ in range(2):  # the first starts the profiler's own machinery
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(UPDATES):
                contender.update()
            synchronise()
    pieces = pieces_of(profiler, on_cuda=on_cuda)
    path = settings.folder / f"profile-{str(point).replace(' ', '-').replace(',', '')}.txt"
    Path(path).write_text(page(point, pieces))
    say(point=what["point"], path=str(path), shares=shares(pieces))
