"""Gradients averaged while others are computed, against DeepSpeed's own averaging: the same weights, sooner."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline import engine as engine_module
from pipeline.engine import Engine, World
from pipeline.overlap import GradientAverager
from tests.conftest import fork_ranks
from tests.updates import make_plan, network, physical_batches

UPDATES = 6
SMALL = 600
"""Bytes: most parameters of the network are in a bucket of their own."""


def weights_after(world: World, path: Path, changes: dict[str, Any], batch_norm: bool = True) -> dict[str, Any]:
    """What some updates make of the network, and how many buckets were sent."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    engine_module.GradientAverager = partial(GradientAverager, bucket_bytes=SMALL)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    engine = Engine(network(batch_norm=batch_norm), resolved, world)
    for update in range(UPDATES):
        batches = physical_batches(update, world.rank, resolved.batch)
        engine.update(iter(batches), update * resolved.batch.train)
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    return {"weights": weights, "buckets": len(engine._averager.buckets) if engine._averager else None}


@pytest.mark.parametrize("kn", [16, 32], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"fp16.enabled": True, "optimizer.params.fused": True}, {"gradient_clipping": 0.1}],
    ids=["fp32", "fp16", "clipped"],
)
def test_two_ranks_have_exactly_the_weights_that_deepspeed_gives_them(tmp_path, kn, changes):
    changes = {**changes, "train_batch_size": kn, "optimizer.params.lr": 0.5}
    ours = fork_ranks(weights_after, 2, tmp_path / "ours", changes)
    theirs = fork_ranks(weights_after, 2, tmp_path / "theirs", {**changes, "recipe.step.overlap": False})
    assert ours[0]["buckets"] > 3 and theirs[0]["buckets"] is None
    for name, weight in theirs[0]["weights"].items():
        assert torch.equal(ours[0]["weights"][name], weight) and torch.equal(ours[1]["weights"][name], weight), name


@pytest.mark.parametrize("kn", [32, 64], ids=["one-pass", "two-passes"])
def test_four_ranks_have_them_but_for_the_order_of_four_summands(tmp_path, kn):
    """gloo adds up each quarter of a buffer beginning with another rank, so its rounding depends on the buffer.

    Without BN, which amplifies rounding.
    """
    changes = {"train_batch_size": kn}
    ours = fork_ranks(weights_after, 4, tmp_path / "ours", changes, False)
    theirs = fork_ranks(weights_after, 4, tmp_path / "theirs", {**changes, "recipe.step.overlap": False}, False)
    for name, weight in theirs[0]["weights"].items():
        assert all(torch.equal(answer["weights"][name], ours[0]["weights"][name]) for answer in ours), name
        assert torch.allclose(ours[0]["weights"][name], weight, rtol=0, atol=1e-7), name


class Order:
    """When what happened in a backward pass, in one rank."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def note(self, event: str) -> None:
        self.events.append(event)


def what_is_sent_when(world: World) -> list[str]:
    """Layers of equal size, a bucket each: when gradients come, and when they are sent."""
    order = Order()
    layers = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(4)])
    averager = GradientAverager(layers.parameters(), bucket_bytes=4 * 20 * 20)
    for number, layer in enumerate(layers):
        layer.weight.register_hook(lambda gradient, number=number: order.note(f"gradient {number}"))
    send = dist.all_reduce

    def noted(memory: torch.Tensor, async_op: bool) -> Any:
        [number] = [index for index, bucket in enumerate(averager.buckets) if bucket.memory is memory]
        order.note(f"sent {3 - number}")
        return send(memory, async_op=async_op)

    dist.all_reduce = noted
    images = torch.full((2, 20), world.rank + 1.0)
    averager.begin()
    layers(images).sum().backward()
    assert not [event for event in order.events if "sent" in event], "before the last pass nothing is complete"
    averager.last_pass()
    order.events.clear()
    layers(images).sum().backward()
    averager.finish()
    return order.events


def test_a_gradient_is_on_its_way_while_the_next_is_computed():
    for events in fork_ranks(what_is_sent_when, 2):
        assert events == [f"{what} {layer}" for layer in (3, 2, 1, 0) for what in ("gradient", "sent")]


class _Slow(torch.autograd.Function):
    """The identity, whose backward takes its time without a processor: as on a GPU, the network has it meanwhile."""

    @staticmethod
    def forward(context: Any, images: torch.Tensor) -> torch.Tensor:
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.15)
        return gradient.clone()


def seconds_waited(world: World) -> tuple[float, float]:
    """Waiting for the gradients of large layers: sent one after the other between slow layers, and all at the end."""
    torch.manual_seed(0)
    large = [nn.Parameter(torch.randn(4_000_000)) for _ in range(3)]
    averager = GradientAverager(large, bucket_bytes=16_000_000)
    waited = []
    for overlapped in (True, True, False):  # the first warms up
        averager.begin()
        if overlapped:
            averager.last_pass()
        value = torch.ones((), requires_grad=True)
        for parameter in large:
            value = _Slow.apply(value * parameter.mean())
        value.backward()
        dist.barrier()
        if not overlapped:
            averager.last_pass()
        averager.finish()
        waited.append(averager.take_waited())
    return waited[1], waited[2]


def test_little_is_waited_for_what_was_sent_early():
    """Three buckets of 16 MB, of which two have 0.15 s or more to travel in."""
    for overlapped, at_the_end in fork_ranks(seconds_waited, 2):
        assert overlapped < 0.8 * at_the_end


def without_a_part(world: World) -> dict[str, Any]:
    """One of two layers has no part in the loss of rank 1."""
    used, unused = nn.Linear(3, 1), nn.Linear(3, 1)
    nn.init.ones_(used.weight)
    averager = GradientAverager([*used.parameters(), *unused.parameters()], bucket_bytes=4)
    images = torch.ones(1, 3)
    for _ in range(2):
        averager.begin()
        averager.last_pass()
        value = used(images) + unused(images) if world.rank == 0 else used(images)
        value.sum().backward()
        averager.finish()
    return {"used": used.weight.grad.clone(), "unused": unused.weight.grad.clone()}


def test_a_layer_without_a_part_in_a_rank_is_averaged_all_the_same():
    for answer in fork_ranks(without_a_part, 2):
        assert torch.equal(answer["used"], torch.ones(1, 3)) and torch.equal(answer["unused"], torch.full((1, 3), 0.5))


def buckets_of(world: World) -> list[tuple[int, int]]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(10, 10), nn.Linear(10, 10).double())
    model = model.to(memory_format=torch.channels_last)
    model[2].weight.requires_grad = False
    parameters = list(model.parameters())
    averager = GradientAverager(parameters, bucket_bytes=2000)
    averager.begin()
    for bucket in averager.buckets:
        start, end = bucket.memory.data_ptr(), bucket.memory.data_ptr() + bucket.memory.nbytes
        for parameter in bucket.parameters:
            assert parameter.grad.shape == parameter.shape and parameter.grad.stride() == parameter.stride()
            assert start <= parameter.grad.data_ptr() < end
    assert parameters[4].grad is None
    return [(len(bucket.parameters), bucket.memory.nbytes) for bucket in averager.buckets]


def test_gradients_lie_in_their_buckets_in_the_order_of_the_weights():
    """From the last parameter to the first: of one type, and 2,000 bytes unless one alone is larger."""
    [found] = fork_ranks(buckets_of, 1)
    assert found == [(2, 880), (2, 104), (1, 4608), (2, 896)]


def alone(world: World, path: Path) -> int:
    """Updates of a rank that has nobody to talk to."""

    def sent(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a rank alone has sent something")

    resolved = make_plan(path / "c.json", 1)
    engine = Engine(network(batch_norm=True), resolved, world)
    dist.all_reduce = sent
    engine._engine.allreduce_gradients = sent
    for update in range(2):
        engine.update(iter(physical_batches(update, 0, resolved.batch)), update * resolved.batch.train)
    return engine._engine.global_steps


def test_one_rank_sends_nothing(tmp_path):
    assert fork_ranks(alone, 1, tmp_path) == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"communication_data_type": "fp16"},
        {"gradient_predivide_factor": 2.0},
        {"prescale_gradients": True},
        {"comms_logger": {"enabled": True}},
        {"recipe.step.overlap": False},
    ],
)
def test_what_is_asked_of_deepspeed_is_left_to_it_and_said(tmp_path, changes):
    resolved = make_plan(tmp_path / "c.json", 2, **changes)
    assert not resolved.averages_gradients
    assert ("step", "gradients averaged by DeepSpeed, after the backward pass") in resolved.page()
    plain = make_plan(tmp_path / "c.json", 2, communication_data_type="fp32")
    assert plain.averages_gradients and "step" not in dict(plain.page())
