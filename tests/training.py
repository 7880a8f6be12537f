"""What tests of whole runs share: starting `onehour`, and comparing its trainings on `tiny_shards` by numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline import config
from pipeline.metrics import read_metrics
from pipeline.order import Order
from pipeline.samples import audit, read_samples
from pipeline.schedule import Schedule
from shards.index import load_split
from tests.conftest import TINY_CLASSES, TINY_TRAIN, TINY_VAL

TRAIN, VAL = TINY_TRAIN * len(TINY_CLASSES), TINY_VAL * len(TINY_CLASSES)
# fp32 sums in another order differ by rounding: 8e-7 after 13 updates, 2e-4 where BN amplifies it (measured)
TOLERANCE, BN_FREE_TOLERANCE = 2e-3, 2e-5
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


def onehour(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**ENVIRONMENT, **environment},
        start_new_session=True,
    )


def output_of(process: subprocess.Popen, *, code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output
    return output


def run_of(path: Path) -> Path:
    return path.parent / "runs" / path.stem


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(run / "model.safetensors").items() if "num_batches" not in name}


def assert_close(run: Path, other: Path, tolerance: float) -> None:
    """Every weight and BN statistic within `tolerance` of the largest entry of its tensor."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-3)
        assert difference < tolerance, f"{name} differs by {difference:.1e}"


def damage_an_image(shards: Path) -> tuple[str, str]:
    """Overwrite the first training image inside its tar, sizes unchanged: only decoding can notice.

    Returns:
        The shard's name and the sample's key.
    """
    split = load_split(shards, "train")
    tar, record = split.shards[0].path, split.samples[0]
    tar.chmod(0o644)
    with tar.open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(b"not an image, not at all")
    return tar.name, split.key(0)


def assert_the_run_is_exact(run: Path, path: Path, samples: int = TRAIN) -> None:
    """Sample ids and rates of every update are the order's and the schedule's, of so many training images."""
    experiment = config.load(path)
    kn, epochs = experiment.blocks.train_batch_size, int(experiment.recipe.epochs)
    order = Order(samples, experiment.recipe.seed)
    schedule = Schedule.build(
        experiment.blocks.scheduler.params,
        lr=experiment.lr,
        reference_batch=experiment.recipe.reference_batch,
        train_batch_size=kn,
        samples_per_epoch=samples,
        epochs=experiment.recipe.epochs,
    )
    updates = read_samples(run)
    assert list(updates) == list(range(-(-epochs * samples // kn)))
    for number, update in updates.items():
        np.testing.assert_array_equal(update.ids, order.ids(number * kn, (number + 1) * kn))
        assert update.lr == schedule.lr(number * kn)
    for row in audit(run, samples)[:epochs]:
        assert row["used"] == samples and row["missing"] == 0 and row["repeated"] == 0


def assert_the_same_training(paths: Sequence[Path], tolerance: float) -> None:
    """Every configuration's run is exact, and ends with the first one's weights and accuracies."""
    accuracies = []
    for path in paths:
        assert_the_run_is_exact(run_of(path), path)
        assert_close(run_of(path), run_of(paths[0]), tolerance)
        events = read_metrics(run_of(path) / "metrics.jsonl")
        accuracies.append([event["top1"] for event in events if event["event"] == "evaluation"])
    assert np.ptp(np.asarray(accuracies), axis=0).max() <= 100 / VAL + 1e-9  # one image may sit on the edge
