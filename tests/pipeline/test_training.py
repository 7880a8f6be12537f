"""Whole runs through the real `deepspeed` launcher: any number of ranks, killed and resumed, is the same training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline import config, model
from pipeline.checkpoint import load_weights
from pipeline.hosts import free_port
from pipeline.metrics import read_metrics
from pipeline.order import Order
from pipeline.rungs import RUNGS
from pipeline.samples import read_samples
from shards.cli import main as shards_main
from shards.files import exclusive
from tests.conftest import kill_everything, tiny_config
from tests.training import (
    BN_FREE_TOLERANCE,
    ENVIRONMENT,
    TOLERANCE,
    TRAIN,
    VAL,
    assert_close,
    assert_the_run_is_exact,
    assert_the_same_training,
    damage_an_image,
    onehour,
    output_of,
    run_of,
)

pytestmark = pytest.mark.launcher

KN, EPOCHS = 32, 3  # of tiny_config
STEPS = -(-EPOCHS * TRAIN // KN)
SAVE_OFTEN = {"recipe.checkpoint.every_epochs": 0.45}
BN_FREE = {
    "recipe.model.name": "vit_tiny_patch16_224",
    "recipe.model.args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "optimizer.params.lr": 0.005,
}


def train(path: Path, ranks: int, *more: str) -> str:
    return output_of(onehour("train", path, "--ranks", str(ranks), *more))


def train_on_one_two_and_four_ranks(data: Path, folder: Path, changes: dict) -> dict[int, Path]:
    """The same configuration on 1, 2 and 4 ranks: the configurations' paths by ranks, trained."""
    paths = {}
    launches = []
    for ranks in (1, 2, 4):  # side by side: most of a launch is single-threaded imports
        paths[ranks] = folder / f"ranks-{ranks}.json"
        paths[ranks].write_text(json.dumps(tiny_config(data, folder / "runs" / f"ranks-{ranks}", **changes)))
        launches.append(onehour("train", paths[ranks], "--ranks", str(ranks)))
    for launch in launches:
        assert f"{VAL} images each" in output_of(launch)
    return paths


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A network with BN, by ranks."""
    folder = tmp_path_factory.mktemp("runs")
    monitors = {
        "tensorboard": {"enabled": True, "output_path": str(folder / "monitors")},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "monitors"), "job_name": "csv"},
    }
    return train_on_one_two_and_four_ranks(tiny_shards, folder, {**SAVE_OFTEN, **monitors})


def test_what_decoded_is_on_record_for_all_ranks_together(runs: dict[int, Path]):
    for path in runs.values():
        events = [event for event in read_metrics(run_of(path) / "metrics.jsonl") if event["event"] == "decode"]
        training = [event for event in events if event["split"] == "train"]
        assert [event["samples"] for event in training] == [update * KN for update in (5, 9, STEPS)]
        assert sum(event["images"] for event in training) == STEPS * KN
        (live,) = {rung for event in events for rung in RUNGS if rung in event}
        assert all(event[live] == event["images"] for event in events), "nothing fell through"
        assert sum(event["split"] == "val" for event in events) == EPOCHS


def test_one_two_and_four_ranks_are_the_same_training(runs):
    assert_the_same_training(list(runs.values()), TOLERANCE)


@pytest.mark.slow  # test_engine compares such networks' updates on as many ranks, without the launcher
def test_one_two_and_four_ranks_are_the_same_training_without_bn(tiny_shards, tmp_path):
    paths = train_on_one_two_and_four_ranks(tiny_shards, tmp_path, BN_FREE)
    assert_the_same_training(list(paths.values()), BN_FREE_TOLERANCE)


def test_a_run_leaves_everything_it_promises(runs):
    path = runs[2]
    run = run_of(path)
    for name in ("report.html", "metrics.jsonl", "config.resolved.json", "model.safetensors", "validation-error.png"):
        assert (run / name).stat().st_size > 0, name
    again = config.load(run / "config.resolved.json")
    assert again.blocks.gradient_accumulation_steps == 2 and again.recipe.epochs == EPOCHS
    assert len(list((run / "checkpoints").glob("step-*"))) == again.recipe.checkpoint.keep
    monitors = path.parent / "monitors"
    assert list(monitors.rglob("events.out.tfevents*")) and list(monitors.rglob("*.csv"))
    # the exported weights are timm's, and evaluate to what training said
    evaluation = [event for event in read_metrics(run / "metrics.jsonl") if event["event"] == "evaluation"][-1]
    answer = json.loads(output_of(onehour("evaluate", run, "--json")).splitlines()[-1])
    assert answer["images"] == evaluation["images"] == VAL
    assert answer["top1"] == pytest.approx(evaluation["top1"], abs=1e-9)
    assert answer["loss"] == pytest.approx(evaluation["loss"], rel=1e-4)
    recipe = again.recipe
    images = torch.randn(4, 3, 32, 32)
    ours = model.create(recipe.model, 5, seed=1)
    load_weights(run / "model.safetensors", ours)
    timms = timm.create_model(
        recipe.model.name, num_classes=5, **recipe.model.args, checkpoint_path=run / "model.safetensors"
    )
    assert torch.equal(ours.eval()(images), timms.eval()(images))
    # finished: nothing to do, and no rank is started
    began = time.monotonic()
    assert "is finished" in train(path, 2)
    assert time.monotonic() - began < 15


def test_a_run_killed_in_mid_epoch_goes_on_with_other_ranks_as_if_nothing_had_been(runs, write_config):
    killed = write_config("killed", SAVE_OFTEN)
    launch = onehour("train", killed, "--ranks", "4", ONEHOUR_TEST=str(killed))
    # some updates into the second epoch, and after the checkpoint of epoch 0.9
    samples = run_of(killed) / "samples" / "from-0-rank-3-of-4.jsonl"
    deadline = time.monotonic() + 150
    while not samples.exists() or samples.read_text().count("\n") < 6:
        assert launch.poll() is None and time.monotonic() < deadline, launch.communicate()[0]
        time.sleep(0.002)
    kill_everything(f"ONEHOUR_TEST={killed}")
    assert launch.wait(10) != 0
    done = samples.read_text().count("\n")
    assert done < STEPS, "the run was over before it was killed"

    assert "ranks 4 → 1, accumulation 1 → 4 · batch 32, rates" in train(killed, 1)
    events = read_metrics(run_of(killed) / "metrics.jsonl")
    [resumed] = [event for event in events if event["event"] == "resume"]
    assert 0 < resumed["samples"] <= done * KN
    assert resumed["samples"] % TRAIN, "from within an epoch"
    assert_the_run_is_exact(run_of(killed), killed)
    assert_close(run_of(killed), run_of(runs[2]), TOLERANCE)


@pytest.mark.slow  # test_loader shows that the loader names it
def test_a_corrupt_image_ends_the_run_and_is_named(write_config: Callable[..., Path], tiny_shards, tmp_path):
    shards = tmp_path / "damaged"
    shutil.copytree(tiny_shards, shards)
    tar, key = damage_an_image(shards)
    began = time.monotonic()
    output = output_of(onehour("train", write_config("damaged", {"recipe.data": str(shards)}), "--ranks", "2"), code=1)
    assert tar in output and key in output and "cannot be decoded" in output
    assert "did not finish" in output and "Traceback" not in output
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_torchrun_runs_the_same_module(write_config: Callable[..., Path]):
    path = write_config("torchrun", {"recipe.epochs": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "pipeline.train", str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    order = Order(TRAIN, 0)
    for number, update in read_samples(run_of(path)).items():
        np.testing.assert_array_equal(update.ids, order.ids(number * KN, (number + 1) * KN))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"recipe.checkpoint.every_epochs": 0.2}, "is not finite after update"),
        pytest.param({"recipe.checkpoint.every_epochs": 1000}, "the loss is nan at update", marks=pytest.mark.slow),
        pytest.param(
            {"recipe.checkpoint.every_epochs": 1000, "fp16.enabled": True},
            "updates in a row overflowed",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["at-a-save", "at-a-report", "fp16"],
)
def test_a_run_that_diverges_stops_saves_nothing_of_it_and_says_what_to_try(write_config, changes, what):
    """A rate that blows the weights up within the first epoch."""
    path = write_config("diverging", {"optimizer.params.lr": 1e12, "recipe.epochs": 60, **changes})
    command = [sys.executable, "-m", "pipeline.train", str(path)]  # a launcher is not needed for one rank
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=200, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert what in done.stderr and "Lower optimizer.params.lr" in done.stderr
    assert "Traceback" not in done.stderr
    *_, reported, end = read_metrics(run_of(path) / "metrics.jsonl")
    assert end["event"] == "diverged" and what in end["why"], "its record says how it ended"
    assert (end["step"], end["samples"]) == (reported["step"], reported["step"] * KN)
    assert end["epoch"] == pytest.approx(end["samples"] / TRAIN)
    for weights_file in run_of(path).glob("checkpoints/step-*/model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(weights_file).values())


@pytest.mark.slow  # test_bad_input shows that `onehour train` refuses it; this is the rank's own check
def test_two_trainings_in_one_folder_are_refused(write_config: Callable[..., Path]):
    path = write_config("shared")
    run_of(path).mkdir(parents=True)
    with exclusive(run_of(path), "training"):
        command = [sys.executable, "-m", "pipeline.train", str(path)]
        done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=100, check=False)
    assert done.returncode == 1 and "another training is writing here" in done.stderr
    assert not (run_of(path) / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("block", ["bf16", "fp32"])
def test_the_demo_reaches_its_accuracy(tmp_path, block):
    """The shipped configuration on the shipped data: at least 97 % of all 360 held-out digits, also in bf16."""
    assert shards_main(["prepare", "demo", str(tmp_path / "demo")]) == 0
    path = Path(__file__).parents[2] / "ds_configs" / "demo.json"
    arguments = ["train", path, "--ranks", "2", "--data", tmp_path / "demo", "--run", tmp_path / "run"]
    output_of(onehour(*arguments, *(["--set", "bf16.enabled=true"] if block == "bf16" else [])))
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert events[0]["precision"] == ("bfloat16" if block == "bf16" else "fp32")
    assert events[-1]["images"] == events[0]["val_samples"] == 360
    assert events[-1]["median_top1"] >= 97
