"""Batch normalisation of logical workers: in turn, at once, and averaged over ranks, against workers by themselves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.batch_norm import (
    LogicalWorkerStatistics,
    average_statistics,
    batch_norms,
    check_ghosts,
    make_ghosts,
    without_ghost,
)
from shards.errors import UserError
from tests.conftest import fork_ranks

N = 6


def test_accumulated_statistics_are_those_of_the_workers_averaged():
    """One layer that runs 4 micro-batches in turn, against 4 layers that run one each and are averaged."""
    torch.manual_seed(0)
    single = nn.BatchNorm2d(3).double()
    workers = [nn.BatchNorm2d(3).double() for _ in range(4)]
    statistics = LogicalWorkerStatistics(single, accumulation=4)
    for _ in range(3):
        batches = torch.randn(4, 8, 3, 5, 5, dtype=torch.float64) * 3 + 1
        with statistics.update():
            for index in range(4):
                statistics.micro_step(index)
                single(batches[index])
                workers[index](batches[index])
        assert single.momentum == 0.1
    for name in ("running_mean", "running_var"):
        expected = torch.stack([getattr(worker, name) for worker in workers]).mean(dim=0)
        assert torch.allclose(getattr(single, name), expected, rtol=0, atol=1e-14)


def averaged(world) -> dict[str, torch.Tensor]:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    network[1].running_mean.fill_(world.rank)
    network[1].running_var.copy_(torch.arange(4) * 10.0**world.rank)
    average_statistics(network)
    return {"mean": network[1].running_mean, "var": network[1].running_var}


def test_statistics_are_averaged_over_the_ranks():
    for answer in fork_ranks(averaged, 3):
        assert torch.equal(answer["mean"], torch.ones(4))
        assert torch.allclose(answer["var"], torch.arange(4) * 37.0)


# ---------------------------------------------------------------- ghost batches


def network() -> nn.Module:
    """A residual network of timm's with a BN of timm's own, in float64, γ and β of its own in every layer."""
    torch.manual_seed(1)
    resnet = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[4, 4, 8, 8], num_classes=5)
    resnet.bn1 = BatchNormAct2d(resnet.bn1.num_features)
    resnet.act1 = nn.Identity()
    for layer in batch_norms(resnet):
        nn.init.normal_(layer.weight, 1, 0.2)
        nn.init.normal_(layer.bias, 0, 0.2)
    return resnet.double().to(memory_format=torch.channels_last)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, passes: int) -> dict[str, torch.Tensor]:
    """The gradients of one update in so many passes."""
    statistics = LogicalWorkerStatistics(model.train(), passes)
    model.zero_grad()
    with statistics.update():
        for index, part in enumerate(zip(images.chunk(passes), labels.chunk(passes), strict=True)):
            statistics.micro_step(index)
            (nn.functional.cross_entropy(model(part[0]), part[1]) / passes).backward()
    return gradients(model)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ghost_batches_are_separate_micro_batches(groups):
    """Four logical workers in 4, 2, or 1 passes, for three updates: gradients, and statistics of workers averaged."""
    in_turn, at_once = network(), network()
    workers = [network() for _ in range(4)]
    make_ghosts(at_once, groups)
    assert list(in_turn.state_dict()) == list(at_once.state_dict())
    for update in range(3):
        generator = torch.Generator().manual_seed(update)
        images = torch.randn(4 * N, 3, 48, 48, dtype=torch.float64, generator=generator) * 2 + 1
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(5, (4 * N,), generator=generator)
        expected = train(in_turn, images, labels, 4)
        found = train(at_once, images, labels, 4 // groups)
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-12 * max(1, gradient.abs().max()), name
        for worker, part in zip(workers, images.chunk(4), strict=True):
            worker.train()(part)
    layers = [batch_norms(model) for model in (at_once, *workers)]
    for at_once_layer, *worker_layers in zip(*layers, strict=True):
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(layer, name) for layer in worker_layers]).mean(dim=0)
            assert (getattr(at_once_layer, name) - mean).abs().max() <= 1e-12
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    in_turn.load_state_dict(at_once.state_dict())
    assert torch.equal(at_once.eval()(images), in_turn.eval()(images)), "evaluation is torch's own"


def test_one_group_is_torchs_own_layer():
    ours, theirs = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    make_ghosts(ours, 1)
    images = torch.randn(8, 5, 7, 7).to(memory_format=torch.channels_last)
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var) and torch.allclose(
        ours.running_mean, theirs.running_mean
    )
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_float32(dtype):
    """A mean of 100 beside a deviation of 3: a variance summed up in bfloat16 would be noise."""
    layer = nn.BatchNorm2d(4)
    make_ghosts(layer, 2)
    images = (torch.randn(16, 4, 9, 9) * 3 + 100).to(dtype).to(memory_format=torch.channels_last)
    out = layer(images)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    groups = images.float().view(2, 8, 4, 9, 9)
    expected = (groups - groups.mean((1, 3, 4), keepdim=True)) / groups.var(
        (1, 3, 4), correction=0, keepdim=True
    ).sqrt()
    assert (out.float().view_as(expected) - expected).abs().max() < 0.02
    assert layer.running_var.dtype == torch.float32
    assert torch.allclose(layer.running_mean, 0.1 * groups.mean((0, 1, 3, 4)), rtol=1e-5)


def test_an_overflow_in_one_channel_leaves_the_running_statistics_alone_and_no_others():
    """float16 activations may overflow; the update is withheld, and its statistics must not stay as NaN."""
    layer, whole = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    make_ghosts(layer, 2)
    make_ghosts(whole, 2)
    images = torch.randn(8, 3, 5, 5)
    whole(images)
    images[1, 2, 0, 0] = torch.inf
    with LogicalWorkerStatistics(layer, 1, keep_finite=True).update():
        layer(images)
    assert torch.equal(layer.running_mean[:2], whole.running_mean[:2])
    assert torch.equal(layer.running_var[:2], whole.running_var[:2])
    assert (layer.running_mean[2], layer.running_var[2]) == (0, 1), "as they were"


class KeepsStatistics(nn.Module):
    """Not one of torch's BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.running_var += 0.1 * (images.var((0, 2, 3)) - self.running_var)
        return images


@pytest.mark.parametrize("overflowing", [None, 0, 1, 2])
@pytest.mark.parametrize("keep_finite", [True, False])
def test_stock_layers_get_back_what_an_overflow_made_of_their_statistics_and_keep_the_rest(keep_finite, overflowing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), KeepsStatistics(), nn.BatchNorm2d(3))
    first, second = torch.randn(2, 3, 8, 3, 5, 5)

    def update(model: nn.Module, statistics: LogicalWorkerStatistics, passes: torch.Tensor) -> dict[str, torch.Tensor]:
        with statistics.update():
            for index, images in enumerate(passes):
                statistics.micro_step(index)
                model(images)
        return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}

    plain = deepcopy(model)
    unguarded = LogicalWorkerStatistics(plain, 3)
    update(plain, unguarded, first)
    expected = update(plain, unguarded, second)
    guarded = LogicalWorkerStatistics(model, 3, keep_finite=keep_finite)
    before = update(model, guarded, first)
    if overflowing is not None:
        second[overflowing, 1, 1, 0, 0] = torch.inf  # an image of one pass, in channel 1
    after = update(model, guarded, second)
    assert len(after) == 7
    for name, found in after.items():
        assert torch.equal(found[::2], expected[name][::2]), name
        if overflowing is None:
            assert torch.equal(found, expected[name]), name
        else:
            assert torch.equal(found[1], before[name][1]) if keep_finite else not found[1].isfinite(), name


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 7)])
def test_layers_of_vectors_are_normalised_in_groups_too(shape):
    torch.manual_seed(0)
    images = torch.randn(shape, dtype=torch.float64)
    images += torch.arange(12).view(-1, *[1] * (len(shape) - 1))
    ours, theirs = nn.BatchNorm1d(5).double(), nn.BatchNorm1d(5).double()
    make_ghosts(ours, 3)
    out = ours(images)
    assert torch.allclose(out, torch.cat([nn.BatchNorm1d(5).double()(part) for part in images.chunk(3)]), atol=1e-12)
    statistics = LogicalWorkerStatistics(theirs, 3)
    with statistics.update():
        for index, part in enumerate(images.chunk(3)):
            statistics.micro_step(index)
            theirs(part)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-12)


def test_it_compiles_as_one_graph_once_whatever_the_pass():
    """A float momentum would be compiled in, and every pass of an update would be compiled by itself."""
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), BatchNormAct2d(4))
    plain = deepcopy(model)
    make_ghosts(model, 2)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    statistics = LogicalWorkerStatistics(model, 3)
    by_hand = LogicalWorkerStatistics(plain, 6)
    images = torch.randn(3, 8, 3, 16, 16)
    with statistics.update(), by_hand.update():
        for index in range(3):
            statistics.micro_step(index)
            compiled(images[index]).sum().backward()
            for half in range(2):
                by_hand.micro_step(2 * index + half)
                plain(images[index, 4 * half : 4 * half + 4])
    assert counter.frame_count == 1
    for ghost, layer in zip(batch_norms(model), batch_norms(plain), strict=True):
        assert torch.allclose(ghost.running_mean, layer.running_mean, atol=1e-5)
        assert torch.allclose(ghost.running_var, layer.running_var, atol=1e-5)


def test_a_single_value_is_refused_as_torch_does():
    layer = nn.BatchNorm2d(3)
    make_ghosts(layer, 2)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.randn(2, 3, 1, 1))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm3d(3), "BatchNorm3d"),
        (nn.SyncBatchNorm(3), "SyncBatchNorm"),
        (nn.BatchNorm2d(3, momentum=None), "BatchNorm2d"),
        (nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm2d"),
        (EvoNorm2dB0(3), "EvoNorm2dB0"),
    ],
)
def test_what_looks_at_the_whole_batch_is_refused(layer, name):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    assert without_ghost(model) == [name]
    check_ghosts(model, 1, stochastic=True)
    with pytest.raises(UserError, match=f"{name} normalises the whole batch") as told:
        check_ghosts(model, 4, stochastic=False)
    assert "recipe.step.ghost_batches=1" in str(told.value)


def test_what_looks_at_one_image_is_not():
    model = nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), BatchNormAct2d(3))
    check_ghosts(model, 4, stochastic=False)
    with pytest.raises(UserError, match="dropout"):
        check_ghosts(model, 4, stochastic=True)
