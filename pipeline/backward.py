"""When in the backward pass of a model each gradient is ready, by the arithmetic that comes before it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pipeline.scaling import Gradient


@dataclass(frozen=True)
class BackwardPass:
    """The backward pass of a model.

    Attributes:
        gradients: of the parameters that are trained, in the model's order.
        share: of the floating-point operations of forward and backward together (0 … 1).
    """

    gradients: tuple[Gradient, ...]
    share: float


def trace(model: nn.Module, size: int) -> BackwardPass:
    """Run a copy of the model forward and backward, without arithmetic where it can be run so.

    Time is taken to go with floating-point operations of convolutions and matrix products. On a GPU the early layers
    of a convolutional network take longer than that, as memory limits them: gradients are ready later than said here.

    Args:
        model: as `model.create` makes it; it stays as it is.
        size: of the images, in pixels.
    """
    try:
        return _trace(deepcopy(model).to("meta"), size)
    except Exception:  # the model's own, or an operation that does not exist without values
        return _trace(deepcopy(model), size)


def _trace(model: nn.Module, size: int) -> BackwardPass:
    model.train()
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: dict[int, int] = {}
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        for index, parameter in enumerate(trained):
            parameter.register_post_accumulate_grad_hook(
                lambda _, index=index: made.__setitem__(index, counter.get_total_flops())
            )
        answer = model(torch.zeros(2, 3, size, size, device=device))
        forward = counter.get_total_flops()
        answer.sum().backward()
        total = counter.get_total_flops()
    gradients = (
        # what has no gradient, as it takes no part, is sent with the last
        Gradient(parameter.numel() * parameter.element_size(), (made.get(index, total) - forward) / (total - forward))
        for index, parameter in enumerate(trained)
    )
    return BackwardPass(tuple(gradients), (total - forward) / total)


def _convolution_backward(
    gradient: Any,
    images: Any,
    weights: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    **_: Any,
) -> int:
    """Each of both gradients takes what the convolution took. torch's own count is wrong for grouped convolutions."""
    return conv_flop_count(images, weights, gradient, transposed) * sum(wanted[:2])
