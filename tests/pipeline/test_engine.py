"""Updates under DeepSpeed against plain arithmetic: averaging, clipping, momentum, precision, overflow."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.batch_norm import average_statistics
from pipeline.engine import Engine, World, deepspeed_config
from pipeline.mixing import KeyedMixup
from pipeline.plan import Plan
from tests.conftest import fork_ranks
from tests.updates import CLASSES, N_MICRO, K, make_plan, micro_batch, network, physical_batches

UPDATES = 4


def train_rank(
    world: World,
    path: Path,
    batch_norm: bool,
    changes: dict[str, Any],
    updates: int = UPDATES,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """Some updates on this rank's share of the logical workers."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    model = network(batch_norm=batch_norm)
    model.num_classes = CLASSES  # as timm's models have it
    if dropout:
        model.insert(len(model) - 1, nn.Dropout(dropout))
    torch.manual_seed(world.rank)  # what the generators held before must not matter
    engine = Engine(model, resolved, world)
    lrs, losses, correct = [], [], []
    for update in range(updates):
        batches = physical_batches(update, world.rank, resolved.batch)
        sums, ids = engine.update(iter(batches), update * resolved.batch.train)
        assert [len(worker) for worker in ids] == [N_MICRO] * resolved.batch.accumulation
        lrs.append(engine.lr_used)
        losses.append(sums[0].item())
        correct.append(sums[1].item())
    average_statistics(engine.model)
    state = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    return {
        "state": state,
        "lrs": lrs,
        "losses": losses,
        "correct": correct,
        "skipped": engine.skipped_steps,
        "scale": engine.loss_scale,
    }


def reference(resolved: Plan, *, batch_norm: bool) -> dict[str, torch.Tensor]:
    """The paper's update by hand, in float64: the mean gradient over kn, eq. (9) momentum, no clipping."""
    model = network(batch_norm=batch_norm).double()
    transform = resolved.config.recipe.transform
    mean = torch.tensor(transform.mean).view(1, 3, 1, 1).double() * 255
    std = torch.tensor(transform.std).view(1, 3, 1, 1).double() * 255
    parameters = dict(model.named_parameters())
    spared = {f"{index}.{name}" for index in (1, 4) for name in ("weight", "bias")} if batch_norm else set()
    buffers = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for update in range(UPDATES):
        gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for worker in range(K):
            batch = micro_batch(update, worker)
            loss = F.cross_entropy(model((batch.images.double() - mean) / std), batch.labels, reduction="sum")
            for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                gradient[name] += g / (K * N_MICRO)
        lr = resolved.schedule.lr(update * resolved.batch.train)
        with torch.no_grad():
            for name, parameter in parameters.items():
                g = gradient[name] + (0 if name in spared else 1e-4) * parameter
                buffers[name] = 0.9 * buffers[name] + g
                parameter -= lr * (g + 0.9 * buffers[name])
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("batch_norm", [False, True], ids=["bn-free", "bn"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_update_is_the_average_over_the_minibatch_on_any_number_of_ranks(tmp_path, world_size, batch_norm):
    # lr 0.5: gradients of norm > 1 would show clipping, and rates that change every update momentum correction
    changes = {"optimizer.params.lr": 0.5}
    answers = fork_ranks(train_rank, world_size, tmp_path, batch_norm, changes)
    resolved = make_plan(tmp_path / "reference.json", world_size, **changes)
    expected = reference(resolved, batch_norm=batch_norm)
    for answer in answers:
        assert answer["lrs"] == [resolved.schedule.lr(update * 32) for update in range(UPDATES)]
        assert len(set(answer["lrs"])) == UPDATES
        for name, weight in expected.items():
            assert torch.allclose(answer["state"][name].double(), weight, rtol=2e-4, atol=2e-5), name


def test_the_reference_gradient_is_large_enough_to_show_clipping(tmp_path):
    """Without this the test above could not fail for DeepSpeed's default clipping at norm 1."""
    clipped = {"optimizer.params.lr": 0.5, "gradient_clipping": 1.0}
    [answer] = fork_ranks(train_rank, 1, tmp_path, False, clipped)
    expected = reference(make_plan(tmp_path / "reference.json", 1, **clipped), batch_norm=False)
    assert any(not torch.allclose(answer["state"][n].double(), w, rtol=2e-4, atol=2e-5) for n, w in expected.items())


def test_running_statistics_do_not_depend_on_the_ranks(tmp_path):
    by_world = {w: fork_ranks(train_rank, w, tmp_path, True, {})[0]["state"] for w in (1, 2, 4)}
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        for world_size in (2, 4):
            assert torch.allclose(by_world[1][name], by_world[world_size][name], rtol=1e-4, atol=1e-5), name


def test_dropout_masks_do_not_depend_on_the_ranks_and_differ_between_workers(tmp_path):
    by_world = {w: fork_ranks(train_rank, w, tmp_path, False, {}, UPDATES, 0.5) for w in (1, 2, 4)}
    for world_size in (2, 4):
        for name, tensor in by_world[1][0]["state"].items():
            assert torch.allclose(by_world[world_size][0]["state"][name], tensor, rtol=1e-4, atol=1e-6), name
    losses = [[answer["losses"][0] for answer in by_world[4]], [by_world[1][0]["losses"][0]]]
    assert sum(losses[0]) == pytest.approx(sum(losses[1]), rel=1e-5)
    assert len(set(losses[0])) == 4
    from pipeline.stochastic import seed_worker

    draws = set()
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        seed_worker(*key)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4


def first_update(world: World, path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """One update of a fresh network; the change of every parameter, and the types inside."""
    path.mkdir(parents=True, exist_ok=True)
    resolved = make_plan(path / "c.json", world.size, **changes)
    model = network(batch_norm=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = Engine(model, resolved, world)
    accumulation = resolved.batch.accumulation
    engine.update(iter([micro_batch(0, worker) for worker in range(accumulation)]), 0)
    return {
        "delta": {name: p.detach().float() - before[name] for name, p in engine.model.named_parameters()},
        "dtypes": {name: tensor.dtype for name, tensor in engine.model.state_dict().items() if "num_" not in name},
        "skipped": engine.skipped_steps,
        "scale": engine.loss_scale,
    }


@pytest.mark.parametrize(
    ("block", "tolerance"),
    [
        ({"fp16.enabled": True}, 0.03),
        ({"fp16.enabled": True, "fp16.loss_scale": 128.0}, 0.03),
        ({"bf16.enabled": True}, 0.12),
        ({"torch_autocast.enabled": True, "torch_autocast.dtype": "float16"}, 0.03),
    ],
    ids=["fp16", "fp16-fixed-scale", "bf16", "autocast"],
)
def test_the_first_update_in_half_precision_is_that_of_fp32(tmp_path, block, tolerance):
    [single] = fork_ranks(first_update, 1, tmp_path / "fp32", {})
    [half] = fork_ranks(first_update, 1, tmp_path / "half", block)
    assert half["skipped"] == 0
    assert set(half["dtypes"].values()) == {torch.float32}, "weights, BN and its statistics stay in fp32"
    for name, delta in single["delta"].items():
        difference = (half["delta"][name] - delta).norm() / delta.norm()
        # the convolutions' biases before BN have gradients that are zero up to rounding
        if delta.norm() > 1e-6:
            assert difference < tolerance, f"{name}: the update differs by {100 * difference:.1f} %"


def upstream_first_update(world: World, block: dict[str, Any]) -> float:
    """The change of one weight by DeepSpeed's own fp16 block at stage 0, where gradient and rate are 1."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    type(accelerator).is_fp16_supported = lambda self: True  # the CPU can, slowly; DeepSpeed refuses
    accelerator._supported_dtypes = None
    type(accelerator).supported_dtypes = lambda self: [torch.float32, torch.float16, torch.bfloat16]
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            **block,
        },
    )
    loss = engine(torch.ones(1, 1, dtype=torch.float16)).float().sum()
    engine.backward(loss)
    engine.step()
    return model.weight.item()


def test_deepspeeds_own_fp16_block_still_does_not_train(tmp_path):
    """Why the block is resolved into autocast. If this fails, DeepSpeed has changed: look at `engine` again."""
    [change] = fork_ranks(upstream_first_update, 1, {"fp16": {"enabled": True}})
    assert abs(change) < 1e-3, f"the weight moved by {change}; the right update is -1"


def test_what_deepspeed_gets_has_no_half_precision_block(tmp_path):
    for block in ("fp16", "bf16"):
        resolved = deepspeed_config(make_plan(tmp_path / "c.json", 2, **{f"{block}.enabled": True}))
        assert "fp16" not in resolved and "bf16" not in resolved
        assert resolved["torch_autocast"]["enabled"] is True
        assert resolved["gradient_clipping"] == 0.0
        assert resolved["timers"]["throughput"]["enabled"] is False
        assert "recipe" not in resolved


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_overflow_is_counted_and_leaves_weights_and_rate_alone(tmp_path, fused):
    changes = {"fp16.enabled": True, "fp16.initial_scale_power": 32}
    if fused:
        changes["optimizer.params.fused"] = True
    [answer] = fork_ranks(first_update, 1, tmp_path / "overflow", changes)
    assert answer["skipped"] == 1
    assert answer["scale"] == 2.0**31
    assert all((delta == 0).all() for delta in answer["delta"].values())
    [answer] = fork_ranks(train_rank, 1, tmp_path / "train", True, changes)
    assert answer["skipped"] == UPDATES
    assert all(np.isfinite(tensor.float().numpy()).all() for tensor in answer["state"].values())


def test_the_rate_follows_the_samples_through_an_overflow(tmp_path):
    """The scale overflows at first and then fits: later updates run at their own position's rate."""
    updates = 16
    changes = {"fp16.enabled": True, "fp16.initial_scale_power": 24}
    [answer] = fork_ranks(train_rank, 1, tmp_path, True, changes, updates)
    assert 0 < answer["skipped"] < updates
    schedule = make_plan(tmp_path / "c.json", 1).schedule
    assert answer["lrs"] == [schedule.lr(update * 32) for update in range(updates)]


def test_a_fixed_loss_scale_stays(tmp_path):
    changes = {"fp16.enabled": True, "fp16.loss_scale": 64.0}
    [answer] = fork_ranks(train_rank, 1, tmp_path, True, changes)
    assert answer["scale"] == 64.0
    changes["fp16.loss_scale"] = 2.0**32
    [answer] = fork_ranks(train_rank, 1, tmp_path / "overflowing", True, changes)
    assert answer["scale"] == 2.0**32
    assert answer["skipped"] == UPDATES


def test_mixing_is_the_same_on_any_number_of_ranks(tmp_path):
    mixing = {"recipe.mixing": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "label_smoothing": 0.1}}
    results = [fork_ranks(train_rank, size, tmp_path / str(size), False, mixing)[0]["state"] for size in (1, 2, 4)]
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    plain = fork_ranks(train_rank, 1, tmp_path / "plain", False, {})[0]["state"]
    assert not torch.allclose(plain["7.weight"], results[0]["7.weight"], rtol=1e-2)


def correct(world: World, path: Path, share: float | None) -> float:
    """Images that are correct in the first update; the rest of a share is said to be of the image opposite."""

    def mix(
        self: KeyedMixup, images: torch.Tensor, labels: torch.Tensor, update: int, worker: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images, share * F.one_hot(labels, CLASSES) + (1 - share) * F.one_hot(labels.flip(0), CLASSES)

    changes = {"recipe.mixing": {"mixup_alpha": 1.0}} if share is not None else {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(KeyedMixup, "__call__", mix)
        return train_rank(world, path, False, changes, updates=1)["correct"][0]


def test_a_mixed_image_is_correct_as_the_class_with_the_larger_share(tmp_path):
    plain, larger, smaller = (fork_ranks(correct, 1, tmp_path / str(share), share)[0] for share in (None, 0.6, 0.4))
    assert larger == plain and smaller != plain


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "extra", [{}, {"recipe.mixing": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}], ids=["plain", "mixed"]
)
def test_workers_that_go_through_the_model_at_once_are_the_same_training(tmp_path, world_size, extra):
    [in_turn] = fork_ranks(train_rank, 1, tmp_path / "in-turn", True, extra)
    at_once = fork_ranks(train_rank, world_size, tmp_path / "at-once", True, {"recipe.step.ghost_batches": 2, **extra})
    assert sum(answer["losses"][0] for answer in at_once) == pytest.approx(in_turn["losses"][0], rel=1e-5)
    for name, tensor in in_turn["state"].items():
        if "num_batches" not in name:
            assert torch.allclose(at_once[0]["state"][name], tensor, rtol=2e-4, atol=2e-5), name


class Synchronisations(TorchDispatchMode):
    """Counts what a CUDA device would have to be waited for: values that Python or the shape of a result needs."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique2", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def synchronisations(world: World, path: Path, changes: dict[str, Any]) -> list[str]:
    """What is waited for in the fourth update: the first ones warm up."""
    folder = path / str(world.rank)
    folder.mkdir(parents=True)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    model = network(batch_norm=True)
    model.num_classes = CLASSES
    engine = Engine(model, resolved, world)
    counted = Synchronisations()
    for update in range(4):
        batches = iter(physical_batches(update, world.rank, resolved.batch))
        with counted if update == 3 else contextlib.nullcontext():
            engine.update(batches, update * resolved.batch.train)
    return counted.found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fp16.enabled": True, "optimizer.params.fused": True},
        {"bf16.enabled": True, "recipe.step.ghost_batches": 2},
        {"recipe.mixing": {"mixup_alpha": 0.4}},
    ],
    ids=["fp32", "fp16", "bf16-ghosts", "mixup"],
)
def test_an_update_waits_for_nothing(tmp_path, world_size, changes):
    for found in fork_ranks(synchronisations, world_size, tmp_path, changes):
        assert found == []


def test_what_waits_is_counted(tmp_path):
    """Or the test above could not fail: the loss scaler asks an unfused optimizer's gradients at every update."""
    [found] = fork_ranks(synchronisations, 1, tmp_path, {"fp16.enabled": True})
    assert found == ["_local_scalar_dense"]


def compiled_and_not(world: World, path: Path, backend: str) -> dict[str, Any]:
    """Losses of three updates, in two passes each, and the graphs that were compiled by then and later."""
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend=backend)
    changes: dict[str, Any] = {"recipe.step.ghost_batches": 2}
    eager = train_rank(world, path / "eager", True, changes, 3)["losses"]
    counters.clear()
    folder = path / f"compiled-{world.rank}"
    folder.mkdir()
    resolved = make_plan(folder / "c.json", world.size, **changes, **{"recipe.step.compile": True})
    engine = Engine(network(batch_norm=True), resolved, world)
    graphs, losses = [], []
    for update in range(5):
        batches = physical_batches(update, world.rank, resolved.batch)
        losses.append(engine.update(iter(batches), update * resolved.batch.train)[0][0].item())
        if update >= 2:
            engine.evaluation_mode()
            with torch.no_grad():
                engine.forward(batches[0].images)
        graphs.append(counters["stats"]["unique_graphs"])
    return {"eager": eager, "compiled": losses, "graphs": graphs}


@pytest.mark.parametrize(
    ("world_size", "backend"),
    # Inductor takes minutes where it has compiled nothing yet; what is compiled when, it does not decide
    [
        (1, "aot_eager"),
        (2, "aot_eager"),
        pytest.param(1, "inductor", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_a_compiled_step_is_the_same_training_and_compiled_once(tmp_path, world_size, backend):
    """Model and normalisation, in training and in evaluation; whatever the pass, and after an evaluation."""
    for found in fork_ranks(compiled_and_not, world_size, tmp_path, backend, timeout=580):
        assert found["compiled"][:3] == pytest.approx(found["eager"], rel=1e-3)
        trained, also, evaluated, *later = found["graphs"]
        assert trained == also == 2 and evaluated > trained and set(later) == {evaluated}


def without_a_part(world: World, path: Path, overlap: bool) -> torch.Tensor:
    """What updates make of a weight that no loss depends on, but that decays."""
    folder = path / f"{world.size}-{world.rank}-{overlap}"
    folder.mkdir(parents=True)
    changes = {"recipe.step.overlap": overlap, "optimizer.params.weight_decay": 0.1}
    resolved = make_plan(folder / "c.json", world.size, **changes)
    model = network(batch_norm=False)
    model.idle = nn.Linear(2, 2)
    nn.init.ones_(model.idle.weight)
    model.forward = lambda images: nn.Sequential(*list(model)[:-1])(images)
    engine = Engine(model, resolved, world)
    for update in range(2):
        engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * resolved.batch.train)
    return engine.model.idle.weight.detach().clone()


def test_a_weight_without_a_part_in_the_loss_decays_whatever_the_ranks_and_whoever_averages(tmp_path):
    weights = [
        fork_ranks(without_a_part, world_size, tmp_path, overlap)[0]
        for world_size in (1, 2)
        for overlap in (True, False)
    ]
    assert (weights[0] < 0.999).all()
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def late_rank(world: World, path: Path, late: float) -> tuple[float, float, float]:
    """Updates to which rank 1 comes late: the seconds that they communicated for, and those that are left to take."""
    resolved = make_plan(path / f"{world.rank}.json", world.size)
    engine = Engine(network(batch_norm=False), resolved, world)
    taken = []
    for update in range(3):
        if update == 2 and world.rank == 1:
            time.sleep(late)
        engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * resolved.batch.train)
        if update:
            taken.append(engine.take_communicated())
    return taken[0], taken[1], engine.take_communicated()


def test_waiting_for_another_ranks_gradients_is_communication_of_the_one_that_waits(tmp_path):
    (_, waited, rest), (sent, after_sleep, _) = fork_ranks(late_rank, 2, tmp_path, 1.0)
    assert 0.8 < waited < 30
    assert 0 < after_sleep < waited / 2 and sent > 0
    assert rest == 0  # each second is taken once
