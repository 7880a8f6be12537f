"""Weak scaling on one machine: an update on one core, and on two ranks with a core each, taken in turns.

    python benchmarks/weak_scaling.py                # ResNet-50, 32 images of 224 × 224 per rank and update

What is timed is the trainer's own update: the loader decodes on the rank's core, the engine trains, gloo all-reduces
the gradients. Two ranks also share caches, memory and power. What that alone costs is the control: two trainings of
one rank each at the same time, which talk to nobody. The efficiency is then

    two ranks / (2 × one alone)  =  control / (2 × one alone)  ×  two ranks / control
                                    what the machine shares       what the ranks exchange

All processes live from the beginning to the end and wait in between. Every turn begins with an update that is not
timed, in which loaders catch up and ranks meet. The time of other processes on the machine is shown: it should be none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from loader_data import SkipError, tool
from loader_machine import cpu_model
from PIL import Image
from rich.console import Console
from rich.table import Table

ARMS = {"one": "1 rank, alone", "control": "2 × 1 rank, the control", "two": "2 ranks"}
IMAGES, CLASSES = 256, 8
PARTS = ("compute", "communication", "data_wait")
QUIET = 0.03
"""Of both cores: other processes that took more are pointed out."""


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


def write_config(folder: Path, data: Path, args: argparse.Namespace) -> Path:
    """A configuration whose minibatch grows with the ranks."""
    path = folder / "weak_scaling.json"
    content = {
        "train_micro_batch_size_per_gpu": args.images,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4}},
        "scheduler": {"type": "GradualWarmupLR", "params": {}},
        "recipe": {
            "data": str(data.resolve()),
            "model": {"name": args.model},
            "epochs": 10_000,
            "run": str(folder / "run"),
            "transform": {"size": args.size, "evaluation_resize": args.size},
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


# ---------------------------------------------------------------- the table


def show(turns: dict[str, list[Turn]]) -> None:
    """Print medians of all turns, efficiencies as medians over rounds, and which part costs what."""
    ratios = {arm: [t.rate / (2 * one.rate) for t, one in zip(turns[arm], turns["one"], strict=True)] for arm in turns}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("images/s", "s/update", "compute", "communication", "data wait", "efficiency", "lowest – highest"):
        table.add_column(heading, justify="right")
    for arm, name in ARMS.items():
        medians = {part: statistics.median(turn.parts[part] for turn in turns[arm]) for part in PARTS}
        table.add_row(
            name,
            f"{statistics.median(turn.rate for turn in turns[arm]):.2f}",
            f"{statistics.median(turn.seconds for turn in turns[arm]):.3f}",
            *(f"{medians[part]:.3f}" for part in PARTS),
            "1" if arm == "one" else f"{statistics.median(ratios[arm]):.3f}",
            "" if arm == "one" else f"{min(ratios[arm]):.3f} – {max(ratios[arm]):.3f}",
        )
    console = Console(width=120, highlight=False)
    console.print(table)
    efficiency, shared = (statistics.median(ratios[arm]) for arm in ("two", "control"))
    console.print(
        f"\nweak-scaling efficiency {efficiency:.3f} = {shared:.3f} that the machine shares × "
        f"{efficiency / shared:.3f} that the ranks exchange"
    )
    others = [turn.others for arm in turns.values() for turn in arm]
    console.print(f"other processes took {statistics.median(others):.1%} of both cores, at most {max(others):.1%}")
    if max(others) > QUIET:
        console.print("the machine was not quiet: look at the lowest and highest, and measure again")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prepared shards; default: some are made, of smooth noise")
    parser.add_argument("--model", default="resnet50", help="a timm model (default: resnet50)")
    parser.add_argument("--images", type=int, default=32, help="per rank and update (default: 32, the paper's)")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: 224)")
    parser.add_argument("--updates", type=int, default=2, help="timed in a turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="in which each arm has a turn (default: 9)")
    parser.add_argument("--json", action="store_true", help="every turn, for scripts")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("two cores are needed, and this process may use one")
    # inherited by the ranks, and read when they import torch
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    load = os.getloadavg()[0]
    turns: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = args.data or make_shards(Path(folder))
        except SkipError as error:
            sys.exit(str(error))
        ranks = Ranks(cores, write_config(Path(folder), data, args))
        for number in range(-1, args.rounds):  # the first allocates and warms up
            for arm in sorted(ARMS, key=list(ARMS).index, reverse=number % 2 == 1):
                turn = ranks.turn(arm, args.updates, args.images)
                if number >= 0:
                    turns[arm].append(turn)
        ranks.close()
    if args.json:
        print(json.dumps({arm: [vars(turn) for turn in found] for arm, found in turns.items()}, indent=2))
        return
    versions = f"Python {platform.python_version()}, torch {_version('torch')}, deepspeed {_version('deepspeed')}"
    print(f"{cpu_model()}, cores {cores[0]} and {cores[1]}, {versions}; load average before: {load:.2f}")
    print(
        f"{args.model}, {args.images} images of {args.size} × {args.size} per rank and update, "
        f"{ranks.gradient_bytes / 1e6:.0f} MB of gradients; seconds per update, medians of n = {args.rounds} turns of "
        f"{args.updates} updates\n"
    )
    show(turns)


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
