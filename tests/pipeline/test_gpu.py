"""What a CPU cannot show: updates on a CUDA device. Skipped where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.metrics import read_metrics
from tests.conftest import VISIBLE_DEVICES, tiny_config

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
if VISIBLE_DEVICES is not None:
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = VISIBLE_DEVICES


def devices() -> int:
    if VISIBLE_DEVICES == "" or shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return listing.count("GPU ")


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(devices() == 0, reason="no CUDA device")]


def train(data: Path, folder: Path, name: str, environment: dict[str, str], **changes: object) -> list[dict]:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tiny_config(data, folder / name, **changes)))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(path), "--ranks", "1"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(folder / name / "metrics.jsonl")


def losses(events: list[dict]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "train"]


def test_fp32_on_the_gpu_is_fp32_on_the_cpu(tiny_shards, tmp_path):
    changes = {"recipe.epochs": 1, "recipe.logging.every_steps": 1}
    on_cpu = train(tiny_shards, tmp_path, "cpu", {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}, **changes)
    on_gpu = train(tiny_shards, tmp_path, "gpu", {**ENVIRONMENT, "NVIDIA_TF32_OVERRIDE": "0"}, **changes)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=2e-3)
    assert "CPU" not in on_gpu[0]["device"]


@pytest.mark.parametrize("block", ["fp16", "bf16"])
def test_half_precision_trains_and_evaluates_every_image(tiny_shards, tmp_path, block):
    events = train(tiny_shards, tmp_path, block, ENVIRONMENT, **{f"{block}.enabled": True})
    assert losses(events)[-1] < losses(events)[0]
    assert events[-1]["event"] == "finished" and events[-1]["images"] == 35


def test_a_fused_optimizer_survives_an_overflow_on_its_first_step(tiny_shards, tmp_path):
    changes = {"fp16.enabled": True, "fp16.initial_scale_power": 32, "optimizer.params.fused": True}
    events = train(tiny_shards, tmp_path, "fused", ENVIRONMENT, **changes)
    assert any(event["event"] == "skip" for event in events)
    assert all(loss < 100 for loss in losses(events))


KEPT_UNTIL_COPIED = """
import torch
from pipeline.feed import Copier
from pipeline.slabs import SlabRing

copy = Copier(torch.device("cuda"))
shape = (4, 256, 256, 3)
for then in (shape, (4, 128, 128, 3)):  # the same slab again, and its memory for slabs of another size
    ring, copies = SlabRing(most=1, copied_on=copy.stream), []
    for value in range(8):
        slab = ring.take(shape)
        slab.pixels[...] = value
        tensor = ring.hand_out(slab)
        with torch.cuda.stream(copy.stream):
            torch.cuda._sleep(20_000_000)  # the copy is late
        copies.append(copy(tensor) + 0)  # read on the stream that computes, which waits for it
        torch.cuda._sleep(20_000_000)  # and that is busy, which no slab waits for
        del slab, tensor
        ring.take(then).pixels[...] = 255
        if then != shape:
            torch.empty(shape, dtype=torch.uint8, pin_memory=True).fill_(254)
    for value, copy in enumerate(copies):
        assert bool((copy == value).all()), (then, value, copy.unique())
"""


def test_pixels_are_not_overwritten_before_they_have_been_copied():
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KEPT_UNTIL_COPIED]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_compiled_step_with_ghost_batches_is_the_same_training(tiny_shards, tmp_path):
    plain = train(tiny_shards, tmp_path, "plain", ENVIRONMENT)
    changes = {"recipe.step.compile": True, "recipe.step.ghost_batches": 4}
    compiled = train(tiny_shards, tmp_path, "compiled", ENVIRONMENT, **changes)
    assert losses(compiled) == pytest.approx(losses(plain), rel=2e-2)
    assert compiled[-1]["event"] == "finished" and compiled[-1]["images"] == 35


UNWAITED = """
import json, sys
from pathlib import Path
import torch
from pipeline import engine
from pipeline.engine import Engine
from tests.updates import make_plan, network, physical_batches

world = engine.join()
plan = make_plan(Path(sys.argv[1]), 1, **json.loads(sys.argv[2]))
trained = Engine(network(batch_norm=True), plan, world)
for update in range(8):
    if update == 4:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda.synchronize = lambda *arguments: sys.exit("the update waits for the device")
    trained.update(iter(physical_batches(update, 0, plan.batch)), update * plan.batch.train)
"""


@pytest.mark.parametrize(
    "changes", [{}, {"fp16.enabled": True, "optimizer.params.fused": True}, {"bf16.enabled": True}], ids=str
)
def test_an_update_does_not_wait_for_the_device(tmp_path, changes):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", UNWAITED, str(tmp_path / "c.json"), json.dumps(changes)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
