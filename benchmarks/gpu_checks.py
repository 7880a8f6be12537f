"""Whether the ways to compute an update that gpu.py times are one training, and whether the engine waits for a GPU."""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_contenders import CLASSES, allow_tf32, bare, forget, make_engine, network, ours, resident, world
from gpu_points import Point, Say, Settings
from gpu_steps import timed
from torch import nn

from pipeline.batch_norm import LogicalWorkerStatistics, batch_norms, make_ghosts
from pipeline.engine import get_accelerator
from pipeline.loader import MicroBatch

GROUPS = 4
UPDATES = 3
"""In which synchronisations are counted."""
COMPARED_UPDATES = 10

MOST_IN_FLOAT64 = 1e-12
"""Relative, of ghost batches from workers in turn: they differ in the order of sums alone. A CPU's are at 7e-15."""
MOST_COMPILED = 1e-2
"""Relative, of gradients in float32 from those in float64. Inductor's on a CPU are at 3e-3 with torch's own BN, too."""
MOST_AFTER = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative, of the loss after some updates: they are the same but for the order of sums, which training amplifies."""


# ---------------------------------------------------------------- correctness


def correctness(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """Ghost batches against the loop over workers, compiled against eager, the engine against the bare loop."""
    device = world().device
    allow_tf32(False)
    small = replace(settings, size=settings.checked_size)
    images, labels = noise(settings.checked * GROUPS, small.size, torch.float64)
    model = network(small).to(device, torch.float64, memory_format=torch.channels_last).train()
    ghosts = deepcopy(model)
    make_ghosts(ghosts, GROUPS)
    loop(model, images, labels)
    backward(ghosts, images, labels)
    for name, of in (("gradients", gradients), ("BN's running statistics", statistics)):
        apart = distance(of(ghosts), of(model))
        say(what=f"ghost batches / {GROUPS} workers in turn: {name}, float64", value=apart, most=MOST_IN_FLOAT64)
    exact = gradients(ghosts)
    found = {}
    for name in ("eager", "compiled"):
        other = network(small).to(device, memory_format=torch.channels_last).train()
        make_ghosts(other, GROUPS)
        if name == "compiled":
            other.compile(dynamic=False)
        backward(other, images.float(), labels)
        found[name] = distance([gradient.double() for gradient in gradients(other)], exact)
        forget()
    say(
        what="compiled ghost batches: gradients in float32 / float64",
        value=found["compiled"],
        most=MOST_COMPILED,
        beside=found["eager"],
    )
    for dtype, most in MOST_AFTER.items():
        point = Point(dtype, settings.checked * GROUPS)
        losses = after_updates(point, small)
        say(
            what=f"engine / bare loop: loss of update {COMPARED_UPDATES}, {dtype}",
            value=abs(losses[0] - losses[1]) / losses[1],
            most=most,
        )
        forget()


def noise(images: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images in channels_last memory, and labels, on the device."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    device = world().device
    return pixels.to(device, dtype).to(memory_format=torch.channels_last), labels.to(device)


def backward(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, share: float = 1.0) -> None:
    """Add to the gradients."""
    (F.cross_entropy(model(images), labels) * share).backward()


def loop(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """The workers one after the other, and what the trainer does to BN's statistics meanwhile."""
    workers = LogicalWorkerStatistics(model, GROUPS)
    with workers.update():
        parts = zip(images.chunk(GROUPS), labels.chunk(GROUPS), strict=True)
        for number, (part, targets) in enumerate(parts):
            workers.micro_step(number)
            backward(model, part, targets, 1 / GROUPS)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for layer in batch_norms(model) for buffer in (layer.running_mean, layer.running_var)]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of all tensors together: the norm of the difference, divided by their norm."""
    assert len(ours) == len(theirs) > 0
    apart = torch.stack([(one - other).norm() for one, other in zip(ours, theirs, strict=True)]).norm()
    return (apart / torch.stack([other.norm() for other in theirs]).norm()).item()


def after_updates(point: Point, settings: Settings) -> tuple[float, float]:
    """The loss of the engine's and of the bare loop's last update, from the same weights on the same images."""
    trained = ours(make_engine(point, settings), resident(point.images, settings.size))
    allow_tf32(False)
    reference = bare(point, settings, resident(point.images, settings.size))
    for _ in range(COMPARED_UPDATES):
        sums, loss = trained.update(), reference.update()
    return (sums[0] / sums[2]).item(), loss.item()


# ---------------------------------------------------------------- synchronisations


def synchronisations(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """How often the engine waits for the device in some updates on images in pinned memory, as the loader gives them.

    torch names operations that wait, and where it can, raises at the first; explicit calls are counted by themselves.
    DeepSpeed's throughput timer, which waits twice per micro-batch, shows that the count counts.
    """
    point = Point("bf16", settings.small)
    trials: list[tuple[str, Point, dict[str, Any]]] = [
        (str(point), point, {}),
        (str(replace(point, dtype="fp16")), replace(point, dtype="fp16"), {}),
        (str(settings.compiled[0]), settings.compiled[0], {}),
        (f"{point}, throughput timer on", point, {"timers.throughput.enabled": True}),
    ]
    on_cuda = world().device.type == "cuda"
    for name, trial, changes in trials:
        contender = ours(make_engine(trial, settings, changes), pinned(trial.images, settings.size, pin=on_cuda))
        allow_tf32(False)
        timed(contender, settings.warm_up)

        def updates(contender=contender) -> None:
            for _ in range(UPDATES):
                contender.update()

        with counted_waits() as explicit:
            places = waits_that_torch_names(updates) if on_cuda else None
            if not on_cuda:
                updates()
        say(
            what=name,
            updates=UPDATES,
            timer=bool(changes),
            explicit=explicit[0],
            named=places,
            raised=raised(updates) if on_cuda else None,
        )
        forget()


def pinned(images: int, size: int, *, pin: bool) -> Iterator[MicroBatch]:
    """Batches as a loader gives them: images in pinned memory, labels in ordinary one."""
    for batch in itertools.islice(resident(images, size), 1):
        pixels = batch.images.permute(0, 2, 3, 1).cpu()
        pixels = pixels.pin_memory() if pin else pixels
        waiting = replace(batch, images=pixels.permute(0, 3, 1, 2), labels=batch.labels.cpu())
    return itertools.repeat(waiting)


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """Counts calls that wait for the whole device; the list's one entry is their number."""
    # on a GPU the accelerator's calls torch's
    owner: Any = torch.cuda if world().device.type == "cuda" else get_accelerator()
    waits, count = owner.synchronize, [0]

    def counting(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        return waits(*arguments, **keywords)

    owner.synchronize = counting
    try:
        yield count
    finally:
        owner.synchronize = waits


def waits_that_torch_names(act: Callable[[], None]) -> dict[str, int]:
    """How often torch warns of an operation that waits for the device, by file and line."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchronizing" in str(warning.message)]
    return dict(Counter(f"{warning.filename}:{warning.lineno}" for warning in found))


def raised(act: Callable[[], None]) -> str | None:
    """Where torch raises if no operation may wait, or None if nothing does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        act()
    except RuntimeError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{place.filename}:{place.lineno}: {str(error).partition(chr(10))[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
