"""What the tests of several folders share: small real shards, configurations, and real ranks."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import rungs

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # a peer that is gone is no C++ frames; read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked ranks must not inherit a pool of threads
VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")  # for the tests marked gpu, in processes of their own
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the others are the same on every machine, and fork

TINY_CLASSES = ("ant", "bee", "cat", "dog", "elk")
TINY_TRAIN, TINY_VAL = 26, 7  # images per class: 130 and 35, which no batch size below divides


def write_images(root: Path, per_class: int, seed: int) -> None:
    """Class folders of JPEGs whose class shows: a bright bar at a height of its own, on noise."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(TINY_CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 120, size=(16 + number % 5, 20, 3), dtype=np.uint8)
            pixels[3 * label : 3 * label + 3] = 255
            Image.fromarray(pixels).save(root / name / f"{number:03}.jpg", quality=90)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set: 5 classes, 130 training and 35 validation JPEGs in 4 + 2 shards."""
    from shards.cli import main

    images = tmp_path_factory.mktemp("tiny-images")
    write_images(images / "train", TINY_TRAIN, seed=1)
    write_images(images / "val", TINY_VAL, seed=2)
    out = tmp_path_factory.mktemp("tiny") / "shards"
    assert main(["prepare", "imagefolder", str(images), str(out), "--samples-per-shard", "33", "--workers", "1"]) == 0
    return out


def tiny_config(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """A configuration that trains a small network on `tiny_shards`; `changes` are values by dotted path."""
    config: dict[str, Any] = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "SGD",
            "params": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        },
        "scheduler": {
            "type": "GradualWarmupLR",
            "params": {"warmup": "gradual", "warmup_epochs": 1, "milestones": [2], "gamma": 0.1},
        },
        "recipe": {
            "data": str(data),
            "model": {"name": "resnet18", "args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16]}},
            "epochs": 3,
            "reference_batch": 16,
            "run": str(run),
            "transform": {"size": 32, "scale": [0.5, 1.0], "evaluation_resize": 32},
            "logging": {"every_steps": 5, "record_samples": True},
        },
    }
    for path, value in changes.items():
        section = config
        *parents, last = path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return config


@pytest.fixture
def write_config(tmp_path: Path, tiny_shards: Path) -> Callable[..., Path]:
    """Writes a configuration over `tiny_shards` and returns its path; keyword arguments as `changes` of it."""

    def write(name: str = "tiny", changes: dict[str, Any] | None = None) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(tiny_config(tiny_shards, tmp_path / "runs" / name, **(changes or {}))))
        return path

    return write


def require_rung(rung: str) -> str:
    """The rung; skips the test where it cannot be used."""
    reason = rungs.missing(rung)
    if reason is not None:
        pytest.skip(f"the {rungs.NAMES[rung]} {reason}")
    return rung


def fork_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Run `function(world, *arguments)` in W real processes joined by gloo; returns what each rank returned.

    The ranks are forked after torch and deepspeed are imported, which saves the ten seconds that a launcher takes.
    """
    import torch

    import pipeline.engine  # noqa: F401  once, before the fork
    from pipeline.hosts import free_port

    torch.set_num_threads(1)
    gc.collect()  # a store that an earlier test left would wait in a rank for its thread, which is not there
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(function, rank, world_size, port, sender, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
            ok, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            assert ok, f"rank {rank} failed:\n{value}"
            answers.append(value)
        return answers
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _rank_main(function: Callable, rank: int, world_size: int, port: int, sender: Any, arguments: tuple) -> None:
    import torch

    from pipeline import engine

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        answer = (True, function(engine.join(world_size), *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    # by value: a pickled tensor would be a handle to memory of a process that is about to end
    content = io.BytesIO()
    torch.save(answer, content)
    sender.send_bytes(content.getvalue())
    os._exit(0)


def processes_with(variable: str) -> list[int]:
    """Living processes whose environment has NAME=VALUE, whoever their parents are."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            inherited = variable.encode() in (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if inherited and state != "Z":
            found.append(int(folder.name))
    return found


def kill_everything(variable: str) -> None:
    """SIGKILL to the launcher and all ranks, until none is left."""
    deadline = time.monotonic() + 20
    while living := processes_with(variable):
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline
        time.sleep(0.05)
