"""Steps on data that is on the device already: the bare loop, the engine and timm's, timed in turns at the same points.

All three get uint8 images in channels_last memory, and normalise them on the device. Each has weights of its own.

- The bare loop is what the engine is compared with: the same network, autocast, loss scaler and fused SGD, and none of
  DeepSpeed, statistics of workers, learning rates and sums.
- timm's is `train.py`'s, eager or compiled as the point is: `create_optimizer_v2`, autocast, `NativeScaler` for fp16,
  channels_last, the prefetcher's normalisation. Its logging, which asks the device for the loss, is left out. Where
  several workers go through our model at once, it has them one after the other, in eager mode: it knows no such thing.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from gpu_points import BARE, ENGINE, FLAT_COPIES, FOREACH, TIMER, TIMM, Point, Say, Settings, brief
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import nn

from pipeline import config, engine, plan, schema
from pipeline.batch_norm import make_ghosts
from pipeline.engine import Engine, World
from pipeline.feed import Normalise
from pipeline.loader import MicroBatch
from pipeline.model import create, parameter_groups
from pipeline.schema import IMAGENET_MEAN, IMAGENET_STD, Watchdog

CLASSES, SAMPLES = 1000, 1_281_167  # ImageNet's
SGD = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
RESIDENT_BATCHES = 4
LEAST_UPDATES, MOST_UPDATES = 3, 500
"""In a turn."""


@functools.cache
def world() -> World:
    """This process as a group of one, on the device."""
    joined = engine.join(1)
    joined.watch.be_patient(Watchdog(silent_seconds=0, stuck_seconds=0))  # gpu.py ends what hangs
    torch.backends.cudnn.benchmark = True  # as pipeline.train does
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = (
            True  # it would go on in eager mode otherwise, and say nothing
        )
    return joined


def synchronise() -> None:
    """Wait for the device."""
    if world().device.type == "cuda":
        torch.cuda.synchronize()


def allow_tf32(allowed: bool) -> None:
    """In convolutions and matrix products of float32: torch's defaults differ between the two."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """Autocast to the half precision that is asked for, or none."""
    half = HALF.get(dtype)
    return torch.autocast(world().device.type, half, enabled=half is not None)


def resident(images: int, size: int) -> Iterator[MicroBatch]:
    """Batches of noise on the device, the same ones again and again."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(RESIDENT_BATCHES):
        pixels = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, CLASSES, (images,), generator=generator)
        batches.append(
            MicroBatch(
                images=pixels.to(world().device).permute(0, 3, 1, 2),
                labels=labels.to(world().device),
                weights=torch.ones(images),
                ids=np.arange(images),
            )
        )
    return itertools.cycle(batches)


# ---------------------------------------------------------------- the contenders


@dataclass(frozen=True)
class Contender:
    """A way to compute updates.

    Attributes:
        update: computes one, and does not wait for it.
        images: in an update.
    """

    update: Callable[[], Any]
    images: int


def network(settings: Settings) -> nn.Module:
    """The model with the paper's initialisation, on the CPU: the same weights each time."""
    return create(schema.Model(name=settings.model, args=settings.model_args), CLASSES, seed=0)


def bare(point: Point, settings: Settings, batches: Iterator[MicroBatch], ghosts: int | None = None) -> Contender:
    """A step as one would write it without an engine; `update` returns the loss.

    Args:
        ghosts: BN over so many groups of images by our layers; None for torch's own layers where there is one group.
    """
    device = world().device
    model = network(settings).to(device, memory_format=torch.channels_last).train()
    if ghosts or point.groups > 1:
        make_ghosts(model, ghosts or point.groups)
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD).to(device)
    optimizer = torch.optim.SGD(parameter_groups(model), **SGD, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=point.dtype == "fp16")
    for group in optimizer.param_groups:
        for parameter in group["params"]:  # the kernel leaves it undefined if the first update overflows
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if point.compiled:
        model.compile(dynamic=False)
        normalise.compile(dynamic=False)

    def update() -> torch.Tensor:
        batch = next(batches)
        with autocast(point.dtype):
            logits = model(normalise(batch.images))
        loss = F.cross_entropy(logits.float(), batch.labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(update, point.images)


def configuration(point: Point, settings: Settings, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON of a training at this point, without TF32 (`allow_tf32`); `changes` are values by dotted path."""
    content: dict[str, Any] = {
        "train_batch_size": point.images,
        "train_micro_batch_size_per_gpu": point.n,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {**SGD, "fused": True}},
        "scheduler": {"type": "GradualWarmupLR", "params": {"warmup": "none"}},
        **({point.dtype: {"enabled": True}} if point.dtype in HALF else {}),
        "recipe": {
            "data": "none",
            "model": {"name": settings.model, "args": settings.model_args},
            "epochs": 90,
            "reference_batch": point.images,  # the rate is that of the bare loop
            "transform": {"size": settings.size, "evaluation_resize": max(256, settings.size)},
            "step": {"compile": point.compiled, "ghost_batches": point.groups},
        },
    }
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        section = functools.reduce(lambda inner, name: inner.setdefault(name, {}), parents, content)
        section[last] = value
        if value is None:
            del section[last]
    return content


def make_engine(point: Point, settings: Settings, changes: dict[str, Any] | None = None) -> Engine:
    """The trainer's engine, from a JSON."""
    folder = settings.folder / "configurations"
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(configuration(point, settings, changes))
    name = f"{point}-{'-'.join(changes or ())}-{time.time_ns()}".replace(" ", "-").replace(",", "")
    path = folder / f"{name}.json"
    path.write_text(content)
    resolved = plan.resolve(config.load(Path(path)), 1, samples=SAMPLES)
    return Engine(network(settings), resolved, world())


def ours(trained: Engine, batches: Iterator[MicroBatch]) -> Contender:
    """The engine's update, at the positions of a training; `update` returns its sums."""
    train = trained.plan.batch.train
    positions = itertools.count(0, train)
    return Contender(lambda: trained.update(batches, next(positions) % SAMPLES)[0], train)


def timms(point: Point, settings: Settings, batches: Iterator[MicroBatch]) -> Contender:
    """The step of timm's train.py; see the module."""
    device = world().device
    model: nn.Module = timm.create_model(settings.model, num_classes=CLASSES, **settings.model_args)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=SGD["lr"], momentum=SGD["momentum"], weight_decay=SGD["weight_decay"]
    )
    if point.compiled and point.groups == 1:
        model = torch.compile(model, backend="inductor")
    scaler = NativeScaler(device=device.type) if point.dtype == "fp16" else None
    criterion = nn.CrossEntropyLoss()
    mean, std = (
        torch.tensor([255 * value for value in values], device=device).view(1, 3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def update() -> None:
        batch = next(batches)
        images = batch.images.float().sub_(mean).div_(std)
        parts = list(zip(images.split(point.n), batch.labels.split(point.n), strict=True))
        for number, (part, labels) in enumerate(parts):
            with autocast(point.dtype):
                loss = criterion(model(part), labels)
            if len(parts) > 1:
                loss = loss / len(parts)
            last = number == len(parts) - 1
            if scaler is not None:
                scaler(loss, optimizer, parameters=model.parameters(), need_update=last)
            else:
                loss.backward()
                if last:
                    optimizer.step()
        optimizer.zero_grad()

    return Contender(update, point.images)


# ---------------------------------------------------------------- timing


def timed(contender: Contender, updates: int) -> float:
    """Seconds of so many updates, waited for at both ends."""
    synchronise()
    began = time.perf_counter()
    for _ in range(updates):
        contender.update()
    synchronise()
    return time.perf_counter() - began


def updates_of(contender: Contender, seconds: float) -> int:
    """How many updates take about so long."""
    one = timed(contender, LEAST_UPDATES) / LEAST_UPDATES
    return max(LEAST_UPDATES, min(MOST_UPDATES, round(seconds / one)))


def in_turns(contenders: dict[str, Contender], rounds: int, seconds: float) -> list[dict[str, float]]:
    """Images per second of each contender in each round.

    The order is turned round with every round, so that a drift falls on all of them alike.
    """
    updates = {name: updates_of(contender, seconds) for name, contender in contenders.items()}
    measured = []
    for number in range(rounds):
        names = list(contenders)[:: -1 if number % 2 else 1]
        measured.append(
            {name: updates[name] * contenders[name].images / timed(contenders[name], updates[name]) for name in names}
        )
    return measured


def measure(point: Point, settings: Settings, contenders: dict[str, Callable[[], Contender]]) -> dict[str, Any]:
    """Build, warm up and time the contenders at a point; one that fails is left out, and the others go on."""
    on_cuda = world().device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    first, built, without = {}, {}, {}
    for name, make in contenders.items():
        try:
            contender = make()
            allow_tf32(point.dtype == "tf32")  # making an engine sets it
            first[name] = timed(contender, 1)
            timed(contender, settings.warm_up)
            built[name] = contender
        except Exception as error:
            traceback.print_exc()
            without[name] = brief(error)
    measured = in_turns(built, settings.rounds, settings.block_seconds)
    return {
        "point": vars(point),
        "rounds": measured,
        "first": first,
        "without": without,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if on_cuda else None,
    }


def forget() -> None:
    """Free what the last point had: the memory of the device, and what Dynamo compiled."""
    torch._dynamo.reset()
    gc.collect()
    if world().device.type == "cuda":
        torch.cuda.empty_cache()


def contenders_at(point: Point, settings: Settings) -> dict[str, Callable[[], Contender]]:
    """The three; at an eager point of bf16 also the engine with one thing changed."""
    batches = resident(point.images, settings.size)

    def changed(**changes: Any) -> Callable[[], Contender]:
        by_path = {name.replace("__", "."): value for name, value in changes.items()}
        return lambda: ours(make_engine(point, settings, by_path), batches)

    found = {
        BARE: lambda: bare(point, settings, batches),
        ENGINE: changed(),
        TIMM: lambda: timms(point, settings, batches),
    }
    if point.dtype == "bf16" and not point.compiled:
        found |= {
            FOREACH: changed(optimizer__params__fused=None, optimizer__params__foreach=True),
            FLAT_COPIES: changed(recipe__step__overlap=False),
            TIMER: changed(timers__throughput__enabled=True),
        }
    return found


def _measure_all(points: Sequence[Point], settings: Settings, say: Say) -> None:
    for point in points:
        try:
            say(**measure(point, settings, contenders_at(point, settings)))
        except Exception as error:  # the other points may do
            traceback.print_exc()
            say(point=vars(point), failed=brief(error))
        forget()


def eager(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """The section eager."""
    _measure_all(settings.eager, settings, say)


def compiled(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """The section compiled."""
    _measure_all(settings.compiled, settings, say)


def compile(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """Compile the step of a point into the cache that all sections share; nothing is timed but this.

    Args:
        what: the `point`, and whether BN's layers are `ours`; else torch's, which look at one group only.
    """
    from torch._dynamo.utils import counters

    point = Point(**what["point"])
    allow_tf32(False)
    world()
    torch.backends.cudnn.benchmark = False  # others compile beside it: it need not be fast, and there is less memory
    contender = bare(point, settings, resident(point.images, settings.size), point.groups if what["ours"] else None)
    seconds = timed(contender, 1)
    found = counters["inductor"]
    say(**what, seconds=seconds, from_cache=found["fxgraph_cache_hit"], anew=found["fxgraph_cache_miss"])
