"""Updates of a small network under the engine: its plan, and the images that each logical worker has in each update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import config, plan
from pipeline.batch import Batch
from pipeline.loader import MicroBatch
from pipeline.plan import Plan
from tests.conftest import tiny_config

K, N_MICRO = 4, 8
CLASSES = 5


def make_plan(path: Path, world_size: int, **changes: Any) -> Plan:
    path.write_text(json.dumps(tiny_config(Path("data"), path.parent / "run", **changes)))
    return plan.resolve(config.load(path), world_size, samples=130)


def network(*, batch_norm: bool) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=not batch_norm),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=not batch_norm),
        nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, CLASSES),
    )


def micro_batch(update: int, worker: int) -> MicroBatch:
    """The images of one logical worker: the same whichever rank runs it."""
    generator = np.random.default_rng([update, worker])
    images = generator.integers(0, 256, size=(N_MICRO, 16, 16, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, size=N_MICRO)
    return MicroBatch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        labels=torch.from_numpy(labels),
        weights=torch.ones(N_MICRO),
        ids=np.arange(N_MICRO),
    )


def physical_batches(update: int, rank: int, sizes: Batch) -> list[MicroBatch]:
    """What the loader gives a rank: the images of as many workers as go through the model at once."""
    workers = range(rank * sizes.accumulation, (rank + 1) * sizes.accumulation)
    batches = [micro_batch(update, worker) for worker in workers]
    groups = [batches[first : first + sizes.together] for first in range(0, len(batches), sizes.together)]
    return [
        MicroBatch(
            torch.cat([batch.images for batch in group]),
            torch.cat([batch.labels for batch in group]),
            torch.cat([batch.weights for batch in group]),
            np.concatenate([batch.ids for batch in group]),
        )
        for group in groups
    ]
