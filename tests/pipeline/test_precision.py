"""Every precision trains the same network: what is in fp32 stays there, and 300 updates end alike."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from pipeline import assess, cli, config, model
from pipeline.engine import Engine, World, deepspeed_config
from pipeline.evaluate import Result, evaluate
from pipeline.float32 import allow_tf32
from pipeline.metrics import Event, read_metrics
from shards.cli import main as shards_main
from tests.conftest import fork_ranks
from tests.pipeline.test_engine import first_update
from tests.training import ENVIRONMENT
from tests.updates import make_plan, micro_batch, network

FLOAT16 = {"fp16.enabled": True}
PRECISIONS = {
    "fp32": {},
    "fp16": FLOAT16,
    "bf16": {"bf16.enabled": True},
    "autocast-float16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "autocast-bfloat16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def make_engine(world: World, path: Path, changes: dict[str, Any]) -> Engine:
    path.mkdir(parents=True, exist_ok=True)
    return Engine(network(batch_norm=True), make_plan(path / "c.json", world.size, **changes), world)


def run_updates(engine: Engine, first: int, end: int) -> None:
    accumulation = engine.plan.batch.accumulation
    for number in range(first, end):
        workers = range(engine.world.rank * accumulation, (engine.world.rank + 1) * accumulation)
        engine.update(iter([micro_batch(number, worker) for worker in workers]), number * engine.plan.batch.train)


# ---------------------------------------------------------------- what stays in fp32


def dtypes(world: World, path: Path, changes: dict[str, Any]) -> dict[str, set[torch.dtype]]:
    """The types of what an update computes and keeps."""
    seen: dict[str, set[torch.dtype]] = {"convolution": set(), "loss": set(), "gradients": set()}
    cross_entropy = F.cross_entropy

    def watched(logits: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = cross_entropy(logits, *arguments, **options)
        seen["loss"] |= {logits.dtype, loss.dtype}
        return loss

    F.cross_entropy = watched
    engine = make_engine(world, path, changes)
    for module in engine.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen["convolution"].add(output.dtype))
    engine.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen["gradients"].update(
            parameter.grad.dtype for group in optimizer.param_groups for parameter in group["params"]
        )
    )
    run_updates(engine, 0, 2)
    seen["model"] = {tensor.dtype for name, tensor in engine.model.state_dict().items() if "num_" not in name}
    seen["optimizer"] = {tensor.dtype for state in engine.optimizer.state.values() for tensor in state.values()}
    return seen


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_statistics_loss_gradients_and_momentum_are_in_fp32(tmp_path, precision):
    [seen] = fork_ranks(dtypes, 1, tmp_path, PRECISIONS[precision])
    halves = {"fp32": torch.float32, "fp16": torch.float16, "autocast-float16": torch.float16}
    assert seen.pop("convolution") == {halves.get(precision, torch.bfloat16)}
    assert seen == {key: {torch.float32} for key in ("loss", "gradients", "model", "optimizer")}


# ---------------------------------------------------------------- weight decay after unscaling (paper §3, remark 1)

LARGE_DECAY = {"optimizer.params.weight_decay": 3.0}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("scale", [1.0, 128.0, 65536.0])
def test_the_loss_scale_scales_neither_the_gradient_nor_the_decay(tmp_path, scale, fused):
    """The first update at any loss scale is fp32's, by far the most of it decay."""
    changes = {**FLOAT16, "fp16.loss_scale": scale, "optimizer.params.fused": fused}
    [single] = fork_ranks(first_update, 1, tmp_path / "fp32", LARGE_DECAY)
    [half] = fork_ranks(first_update, 1, tmp_path / "half", {**changes, **LARGE_DECAY})
    [undecayed] = fork_ranks(first_update, 1, tmp_path / "none", {**changes, "optimizer.params.weight_decay": 0.0})
    assert half["skipped"] == undecayed["skipped"] == 0 and half["scale"] == scale
    weights = dict(network(batch_norm=True).named_parameters())
    lr = make_plan(tmp_path / "c.json", 1).schedule.lr(0)
    for name, delta in single["delta"].items():
        assert (half["delta"][name] - delta).norm() < 0.03 * delta.norm(), name
        if name.startswith(("1.", "4.")):
            assert torch.equal(half["delta"][name], undecayed["delta"][name]), f"{name} is BN's, and does not decay"
        else:
            decay = -lr * 1.9 * 3.0 * weights[name].detach()  # Nesterov's first step is 1 + momentum long
            torch.testing.assert_close(half["delta"][name] - undecayed["delta"][name], decay, rtol=1e-4, atol=1e-6)
            assert decay.norm() > 3 * undecayed["delta"][name].norm(), "a decay that is scaled would show"


# ---------------------------------------------------------------- TF32, fused optimizers


def tf32(world: World, path: Path, changes: dict[str, Any]) -> tuple[bool, bool]:
    """Whether matrix products and convolutions may use TF32, where they were told otherwise before."""
    wanted = changes.get("recipe.step", {}).get("tf32", False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not wanted
    make_engine(world, path, changes)
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({}, False), ({"recipe.step": {"tf32": False}}, False), ({"recipe.step": {"tf32": True}}, True), (FLOAT16, False)],
    ids=["default", "off", "on", "fp16"],
)
def test_tf32_is_for_both_or_for_neither(tmp_path, changes, allowed):
    assert fork_ranks(tf32, 1, tmp_path, changes) == [(allowed, allowed)]


def test_onehour_evaluate_computes_in_full_fp32(write_config, tmp_path, monkeypatch, capsys):
    seen = []

    def watched(*arguments: Any, **options: Any) -> Result:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return evaluate(*arguments, **options)

    monkeypatch.setattr(assess, "evaluate", watched)
    path = write_config("tiny")
    recipe = config.load(path).recipe.model
    model.export(model.create(recipe, 5, seed=0), tmp_path / "w.safetensors", recipe, 5)
    allow_tf32(True)
    assert cli.main(["evaluate", str(tmp_path / "w.safetensors"), "--config", str(path)]) == 0
    assert seen == [(False, False)] and "35 images of val" in capsys.readouterr().out


ADAM = {"type": "Adam", "params": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("changes", "on_cuda"),
    [
        ({}, True),
        ({"optimizer.params.fused": False}, False),
        ({"optimizer.params.fused": None}, None),
        ({"optimizer.params.foreach": True}, "absent"),
        ({"optimizer.params.foreach": None}, "absent"),
        ({"optimizer.params.nesterov": False, "optimizer.params.dampening": 0.1}, "absent"),
        ({"optimizer": ADAM}, True),
        ({"optimizer": {**ADAM, "type": "AdamW"}}, True),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": False}}}, "absent"),
        ({"optimizer": {**ADAM, "type": "RMSprop"}}, "absent"),
    ],
)
def test_what_torch_can_fuse_is_fused_on_cuda_unless_the_json_chooses(tmp_path, changes, on_cuda):
    plan = make_plan(tmp_path / "c.json", 1, **changes)
    assert deepspeed_config(plan, "cuda")["optimizer"]["params"].get("fused", "absent") == on_cuda
    given = plan.config.raw["optimizer"]["params"].get("fused", "absent")
    assert deepspeed_config(plan)["optimizer"]["params"].get("fused", "absent") == given, "and left alone on a CPU"


def resumed(world: World, path: Path, kind: str, saved_fused: bool, fused: bool, storm: bool) -> dict[str, Any]:
    """Two updates, saved and continued by two more; the implementation of the optimizer may change in between."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    optimizer = {"type": kind, "params": {"lr": 0.02, "weight_decay": 0.1}}
    if kind == "SGD":
        optimizer["params"]["momentum"] = 0.9
    changes = {**FLOAT16, "optimizer": optimizer, **({"fp16.initial_scale_power": 32} if storm else {})}
    engine = make_engine(world, path / "saved", {**changes, "optimizer.params.fused": saved_fused})
    run_updates(engine, 0, 2)
    again = make_engine(world, path / "resumed", {**changes, "optimizer.params.fused": fused})
    again.model.load_state_dict(engine.model.state_dict())
    again.restore(deepcopy(engine.state()), samples=64, step=2)
    if storm:
        assert engine.skipped_steps == 2
        run_updates(again, 2, 20)
        assert 0 < again.skipped_steps < 18
    else:
        run_updates(again, 2, 4)
        run_updates(engine, 2, 4)
    return {
        "fused": [group["fused"] for group in again.optimizer.param_groups],
        "resumed": again.model.state_dict(),
        "went on": engine.model.state_dict(),
        "optimizer": [tensor for state in again.optimizer.state.values() for tensor in state.values()],
    }


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize(("saved", "live"), [(False, True), (True, False), (True, True)])
def test_a_resume_keeps_the_optimizers_live_implementation(tmp_path, kind, saved, live):
    [answer] = fork_ranks(resumed, 1, tmp_path, kind, saved, live, False)
    assert answer["fused"] == [live, live]
    for name, tensor in answer["went on"].items():
        torch.testing.assert_close(answer["resumed"][name], tensor, rtol=1e-4, atol=1e-5)


def test_momentum_is_not_garbage_after_a_resume_from_before_the_first_applied_update(tmp_path):
    """An unfused optimizer has nothing to save then, and a fused one goes on from that."""
    [answer] = fork_ranks(resumed, 1, tmp_path, "SGD", False, True, True)
    assert answer["optimizer"] and all(tensor.isfinite().all() for tensor in answer["optimizer"])
    assert all(tensor.isfinite().all() for tensor in answer["resumed"].values())


# ---------------------------------------------------------------- what is refused, as DeepSpeed still does it


def upstream(world: World, stage: int, zero: dict[str, Any]) -> list[tuple[float, float]]:
    """DeepSpeed's own torch_autocast in float16: (a weight, the loss scale) after each of 24 updates.

    The gradient overflows at first, in the part of it that is rank 0's alone.
    """
    import deepspeed

    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "torch_autocast": {"enabled": True, "dtype": "float16"},
            "zero_optimization": {"stage": stage, **zero},
            "zero_allow_untested_optimizer": True,
        },
    )
    scaler = engine.torch_autocast_z0_gradscaler or optimizer.torch_autocast_gradscaler
    answers = []
    for _ in range(24):
        engine.backward(engine(torch.tensor([[8.0, 8.0, 0.01, 0.01]])).float().sum() / 2)
        engine.step()
        answers.append((model.weight[0, 0].item(), scaler.get_scale()))
    return answers


def test_at_stage_0_the_scale_falls_and_updates_are_applied():
    first, second = fork_ranks(upstream, 2, 0, {})
    assert first == second
    withheld = sum(weight == 0 for weight, _ in first)
    assert 0 < withheld < 10
    assert first[-1] == (-4.0 * (24 - withheld), 2.0 ** (16 - withheld))


@pytest.mark.parametrize("stage", [1, 2])
def test_float16_with_zero_still_never_steps(stage):
    """Why it is refused. If this fails, DeepSpeed has changed: look at `deepspeed_keys.FLOAT16_WITH_ZERO` again."""
    for answer in fork_ranks(upstream, 2, stage, {}):
        assert answer == [(0.0, 65536.0)] * 24


@pytest.mark.parametrize("stage", [1, 2])
def test_float16_with_zero_still_has_scales_that_differ_between_ranks(stage):
    first, second = fork_ranks(upstream, 2, stage, {"compute_grad_norm": False})
    assert first[-1][1] != second[-1][1]


# ---------------------------------------------------------------- 300 updates on real images

DEMO = Path(__file__).resolve().parents[2] / "ds_configs" / "demo.json"
LONG_UPDATES, WINDOW = 300, 30
LONG = [
    "train_batch_size=32",
    "train_micro_batch_size_per_gpu=16",
    "scheduler.params.milestones=[4, 6]",
    "recipe.epochs=6.68",
    "recipe.logging.every_steps=1",
]
ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv.pop(1))})
from pipeline.train import main
sys.exit(main())
"""
SEEDS = (0, 1, 2)
LONG_RUNS = {  # the slowest first, of which as many run side by side as there are cores
    "fp16": ["fp16.enabled=true"],
    "autocast-float16": ["torch_autocast.enabled=true", "torch_autocast.dtype=float16"],
    "bf16": ["bf16.enabled=true"],
    **{f"fp32, seed {seed}": [f"recipe.seed={seed}"] for seed in SEEDS},
}


@dataclass
class LongRun:
    """What 300 updates left behind."""

    folder: Path
    events: list[Event]
    losses: np.ndarray

    @property
    def curve(self) -> np.ndarray:
        """Mean losses of 30 updates each."""
        return self.losses.reshape(-1, WINDOW).mean(axis=1)

    @property
    def end(self) -> float:
        """The mean loss of the last two epochs."""
        return float(self.losses[-90:].mean())


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LongRun]:
    """The demo's network on the demo's images, in every precision; one core for each run."""
    folder = tmp_path_factory.mktemp("precisions")
    assert shards_main(["prepare", "demo", str(folder / "demo")]) == 0
    cores = sorted(os.sched_getaffinity(0))
    free = list(cores)

    def train(name: str) -> LongRun:
        core, run = free.pop(), folder / name
        command = [sys.executable, "-c", ON_ONE_CORE, str(core), str(DEMO)]
        command += ["--data", str(folder / "demo"), "--run", str(run)]
        command += [argument for setting in [*LONG, *LONG_RUNS[name]] for argument in ("--set", setting)]
        done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, check=False)
        free.append(core)
        assert done.returncode == 0, done.stdout + done.stderr
        events = read_metrics(run / "metrics.jsonl")
        return LongRun(run, events, np.asarray([event["loss"] for event in events if event["event"] == "train"]))

    with ThreadPoolExecutor(len(cores)) as pool:
        return dict(zip(LONG_RUNS, pool.map(train, LONG_RUNS), strict=True))


def distance(run: LongRun, other: LongRun) -> float:
    """How far two curves of the loss are apart (root mean square)."""
    return float(np.sqrt(np.mean((run.curve - other.curve) ** 2)))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # float16 is slow on a CPU
def test_300_updates_of_every_precision_end_alike(long_runs: dict[str, LongRun], capsys: pytest.CaptureFixture):
    """The noise is how far fp32 runs of three seeds are apart; twice that is the most allowed to another precision."""
    pairs = list(itertools.combinations([long_runs[f"fp32, seed {seed}"] for seed in SEEDS], 2))
    noise = max(distance(*pair) for pair in pairs)
    noise_at_end = max(abs(one.end - other.end) for one, other in pairs)
    single = long_runs["fp32, seed 0"]
    with capsys.disabled():
        print(f"\nbetween fp32 runs of {len(SEEDS)} seeds: curve {noise:.3f}, last two epochs {noise_at_end:.3f}")
        for name, run in long_runs.items():
            print(
                f"{name:<18}loss of the last two epochs {run.end:.3f}   top-1 {run.events[-1]['top1']:.2f} %   "
                f"curve {distance(run, single):.3f} from that of fp32, seed 0"
            )
    for name, run in long_runs.items():
        assert len(run.losses) == LONG_UPDATES and np.isfinite(run.losses).all(), name
        assert run.end < 0.1 * run.losses[0] and run.events[-1]["top1"] > 96, f"{name} has not learnt"
        assert distance(run, single) <= 2 * noise, name
        assert abs(run.end - single.end) <= 2 * noise_at_end, name
    assert min(distance(long_runs[name], single) for name in ("fp16", "bf16")) > 0, "they are other precisions"
    np.testing.assert_array_equal(
        long_runs["fp16"].losses, long_runs["autocast-float16"].losses, "the block is that autocast, with its scale"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LONG_RUNS)
def test_what_300_updates_leave_is_fp32_and_finite_and_loads_into_timm(long_runs: dict[str, LongRun], name: str):
    run = long_runs[name]
    weights = load_file(run.folder / "model.safetensors")
    for key, tensor in weights.items():
        assert tensor.dtype == (torch.int64 if "num_batches" in key else torch.float32), key
        assert tensor.isfinite().all(), key
    recipe = config.load(run.folder / "config.resolved.json").recipe.model
    exported = timm.create_model(
        recipe.name, num_classes=10, checkpoint_path=run.folder / "model.safetensors", **recipe.args
    )
    assert weights.keys() == exported.state_dict().keys() and any("running_var" in key for key in weights)
    for key, tensor in exported.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    assert exported.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()
