"""When gradients are ready, against counts of operations by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pipeline import scaling
from pipeline.backward import trace
from pipeline.engine import World
from pipeline.overlap import GradientAverager
from tests.conftest import fork_ranks
from tests.pipeline.test_scaling import resnet50


def test_resnet50_is_as_its_architecture_says():
    model = timm.create_model("resnet50")
    found = trace(model, 224)
    by_hand = resnet50()
    assert sum(gradient.bytes for gradient in found.gradients) == sum(gradient.bytes for gradient in by_hand)
    assert len(found.gradients) == 161
    # the first convolution's inputs need no gradient: 2 × 4.089 G multiplications less its own 0.118
    assert found.share == pytest.approx((2 - 0.118 / 4.089) / (3 - 0.118 / 4.089), abs=1e-4)
    convolutions = [index for index, (_, parameter) in enumerate(model.named_parameters()) if parameter.dim() > 1]
    ready = [found.gradients[index].ready for index in convolutions]
    assert ready == pytest.approx([gradient.ready for gradient in by_hand], abs=1e-9)


def bytes_sent(world: World) -> list[int]:
    """Of the buckets of a model in the trainer."""
    averager = GradientAverager(timm.create_model("resnet50").parameters())
    return [bucket.memory.nbytes for bucket in averager.buckets]


def test_buckets_are_those_of_the_trainer():
    buckets = scaling.make_buckets(trace(timm.create_model("resnet50"), 64).gradients)
    [sent] = fork_ranks(bytes_sent, 1)
    assert [bucket.bytes for bucket in buckets] == sent and len(sent) > 10


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnext50_32x4d", "vit_tiny_patch16_224"])
def test_backward_is_two_thirds_of_any_model(name):
    found = trace(timm.create_model(name), 224)
    assert 0.66 < found.share < 2 / 3
    assert found.gradients[-1].ready < 0.01
    assert max(gradient.ready for gradient in found.gradients) == 1


class Branching(nn.Module):
    """Does not run without values: it looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.frozen = nn.Linear(12, 20), nn.Linear(3, 3), nn.Linear(20, 20)
        self.last = nn.Linear(20, 5)
        self.frozen.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.first(images.flatten(1))
        return self.last(self.frozen(hidden) if hidden.sum() < 1e9 else hidden)


def test_a_model_that_needs_values_gets_them_and_what_has_no_gradient_comes_last():
    model = Branching()
    random = torch.get_rng_state()
    found = trace(model, 2)
    assert [gradient.bytes for gradient in found.gradients] == [960, 80, 36, 12, 400, 20]
    # of the last layer both gradients, of the frozen one its inputs' alone, of the first one its weights' alone
    last, frozen, first = 2 * 20 * 5, 20 * 20, 12 * 20
    share = last / (last + frozen + first)
    assert [gradient.ready for gradient in found.gradients] == pytest.approx([1, 1, 1, 1, share, share])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
