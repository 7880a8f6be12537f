"""What weak_scaling.py measures with: shards, and the processes that train some updates when they are told to."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from loader_data import tool
from PIL import Image

IMAGES, CLASSES = 256, 8
PARTS = ("compute", "communication", "data_wait")


def make_shards(folder: Path) -> Path:
    """Prepared shards of smooth noise, the images as large as ImageNet's are on average."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        split = "val" if number < 2 * CLASSES else "train"
        path = folder / "images" / split / f"class-{number % CLASSES}" / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
    tool("prepare", "imagefolder", folder / "images", folder / "shards", "--shards", 2)
    return folder / "shards"


def write_config(folder: Path, data: Path, *, model: str, images: int, size: int) -> Path:
    """A configuration whose minibatch grows with the ranks."""
    path = folder / "weak_scaling.json"
    content = {
        "train_micro_batch_size_per_gpu": images,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4}},
        "scheduler": {"type": "GradualWarmupLR", "params": {}},
        "recipe": {
            "data": str(data.resolve()),
            "model": {"name": model},
            "epochs": 10_000,
            "run": str(folder / "run"),
            "transform": {"size": size, "evaluation_resize": size},
            "loader": {"threads": 1},
        },
    }
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------- one rank


def rank_main(pipe: Connection, core: int, rank: int, world_size: int, port: int, config_path: Path) -> None:
    """One rank on one core: trains as many updates as it is asked to, times them, and answers."""
    os.sched_setaffinity(0, {core})
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    import torch

    from pipeline import engine
    from pipeline.decode import make_decoder
    from pipeline.loader import Loader, training_requests
    from pipeline.prepared import prepare
    from pipeline.readers import training_reader

    torch.set_num_threads(1)
    world = engine.join(world_size)
    prepared = prepare(str(config_path), [], world)
    plan = prepared.plan
    recipe = plan.config.recipe
    trainer = engine.Engine(prepared.network, plan, world)
    reader = training_reader(
        prepared.train_split, recipe, plan.order, plan.batch, rank=rank, local_ranks=world.local_ranks, position=0
    )
    requests = training_requests(plan.order, plan.batch, recipe.transform, rank, 0, plan.steps)
    decoder = make_decoder(recipe.transform, recipe.seed, recipe.loader.decoder)
    samples = 0
    with Loader(reader, decoder, requests, threads=1, prefetch=recipe.loader.prefetch) as loader:
        batches = Waiting(loader)
        pipe.send(sum(parameter.numel() for parameter in trainer.model.parameters()) * 4)
        while updates := pipe.recv():
            for number in range(updates + 1):
                if number == 1:  # the first is not timed
                    batches.waited = 0.0
                    trainer.take_communicated()
                    began = time.perf_counter()
                world.watch.at("updating", samples // plan.batch.train, samples)
                trainer.update(batches, samples)
                samples += plan.batch.train
            seconds = time.perf_counter() - began
            pipe.send({"seconds": seconds, "communication": trainer.take_communicated(), "data_wait": batches.waited})
    reader.close()
    engine.leave(world)


class Waiting:
    """Batches, and the seconds that their consumer has `waited` for them."""

    def __init__(self, batches: Iterator) -> None:
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> Waiting:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        return batch


# ---------------------------------------------------------------- turns


@dataclass(frozen=True)
class Turn:
    """Some updates of one arm.

    Attributes:
        rate: images per second of all its ranks.
        seconds: per update, of the slower rank.
        parts: seconds per update of each of `PARTS`, means over ranks.
        others: share of the cores that other processes took meanwhile.
    """

    rate: float
    seconds: float
    parts: dict[str, float]
    others: float


class Ranks:
    """The processes: a training of one rank on either core, and one of two ranks."""

    def __init__(self, cores: list[int], config_path: Path) -> None:
        from pipeline.hosts import free_port

        self.cores = cores
        self._context = multiprocessing.get_context("spawn")
        self._pipes: dict[tuple[str, int], Connection] = {}
        self._processes: list[Any] = []
        for name, rank, size, core, port in (
            ("first", 0, 1, cores[0], free_port()),
            ("second", 0, 1, cores[1], free_port()),
            *(("both", rank, 2, core, port) for port in [free_port()] for rank, core in enumerate(cores)),
        ):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=rank_main, args=(theirs, core, rank, size, port, config_path), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes[name, rank] = ours
            self._processes.append(process)
        self.gradient_bytes: int = max(self._answer(pipe) for pipe in self._pipes.values())  # all say the same
        self._known = [psutil.Process(process.pid) for process in self._processes]

    def turn(self, arm: str, updates: int, images: int) -> Turn:
        """Train some updates in one arm and wait for them."""
        names = {"one": ["first"], "control": ["first", "second"], "two": ["both"]}[arm]
        pipes = [pipe for (name, _), pipe in self._pipes.items() if name in names]
        began, busy, ours = time.perf_counter(), _busy(self.cores), self._ours()
        for pipe in pipes:
            pipe.send(updates)
        answers = [self._answer(pipe) for pipe in pipes]
        elapsed = time.perf_counter() - began
        others = (_busy(self.cores) - busy - (self._ours() - ours)) / (elapsed * len(self.cores))
        seconds = [answer["seconds"] / updates for answer in answers]
        # independent trainings each have their own end, ranks of one a common one
        rate = sum(images / s for s in seconds) if arm == "control" else images * len(answers) / max(seconds)
        parts = {name: statistics.fmean(answer[name] for answer in answers) / updates for name in PARTS[1:]}
        parts["compute"] = statistics.fmean(seconds) - sum(parts.values())
        return Turn(rate, max(seconds), parts, max(0.0, others))

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes.values():
            pipe.send(0)
        for process in self._processes:
            process.join(60)
            process.kill()

    def _answer(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except EOFError:
            sys.exit("a rank has ended; what it said is above")

    def _ours(self) -> float:
        times = [process.cpu_times() for process in [psutil.Process(), *self._known]]
        return sum(time.user + time.system for time in times)


def _busy(cores: list[int]) -> float:
    times = psutil.cpu_times(percpu=True)
    return sum(sum(times[core]) - times[core].idle - times[core].iowait for core in cores)
