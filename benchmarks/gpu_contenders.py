"""Three ways to compute an update, on the same images: the bare loop, the engine, and timm's step.

All three get uint8 images in channels_last memory, and normalise them on the device. Each has weights of its own.

- The bare loop is what the engine is compared with: the same network, autocast, loss scaler and fused SGD, and none of
  DeepSpeed, statistics of workers, learning rates and sums.
- timm's is `train.py`'s, eager or compiled as the point is: `create_optimizer_v2`, autocast, `NativeScaler` for fp16,
  channels_last, the prefetcher's normalisation. Its logging, which asks the device for the loss, is left out. Where
  several workers go through our model at once, it has them one after the other: it knows no such thing.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from gpu_points import Point, Settings
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


@functools.cache
def world() -> World:
    """This process as a group of one, on the device."""
    joined = engine.join(1)
    joined.watch.be_patient(Watchdog(silent_seconds=0, stuck_seconds=0))  # gpu.py ends what hangs
    torch.backends.cudnn.benchmark = True  # as pipeline.train does
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        # it would go on in eager mode otherwise, and say nothing
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    return joined


def synchronise() -> None:
    """Wait for the device."""
    if world().device.type == "cuda":
        torch.cuda.synchronize()


def forget() -> None:
    """Free what the last point had: the memory of the device, and what Dynamo compiled."""
    torch._dynamo.reset()
    gc.collect()
    if world().device.type == "cuda":
        torch.cuda.empty_cache()


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
    resolved = plan.resolve(config.load(path), 1, samples=SAMPLES)
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
    if point.compiled:
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
