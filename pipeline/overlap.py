"""Gradients averaged over the ranks while others are still computed, as the paper does it (§4).

DeepSpeed at ZeRO stage 0 begins when the backward pass is over: it copies all gradients into one buffer, has it summed,
and copies them back. Here gradients are written where they are summed: a bucket is a piece of memory that the
gradients of some parameters are views of, and it is on its way as soon as the last of them is there. The sum and its
division by the ranks are DeepSpeed's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from pipeline.buckets import BUCKET_BYTES, divide


class _Bucket:
    """Memory of the gradients of some parameters of one type on one device.

    Args:
        parameters: in the order in which their gradients are expected.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.memory = torch.zeros(
            sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self.missing = 0
        self.work: dist.Work | None = None
        parts = self.memory.split([parameter.numel() for parameter in parameters])
        self._gradients = [_shaped_as(parameter, part) for parameter, part in zip(parameters, parts, strict=True)]

    def attach(self) -> None:
        """Make the gradients of an update that begins, all zero."""
        self.memory.zero_()
        self.missing = len(self.parameters)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient


class GradientAverager:
    """Averages the gradients of a model over all ranks, in the background.

    In an update: `begin`, the passes but the last, `last_pass`, the last pass, `finish`. All ranks must do the same.

    Args:
        parameters: of the model, in its order: gradients come in the reverse one, more or less.
        bucket_bytes: of a bucket; one that a single parameter fills is larger.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world_size = dist.get_world_size()
        trained = [parameter for parameter in parameters if parameter.requires_grad and parameter.numel()]
        parts = divide(
            trained[::-1],
            bucket_bytes,
            size=lambda parameter: parameter.numel() * parameter.element_size(),
            kind=lambda parameter: (parameter.dtype, parameter.device),
        )
        self.buckets = [_Bucket(part) for part in parts]
        self._next = len(self.buckets)  # to be sent: in one order on all ranks, whatever is ready first
        self._waiting = _Stopwatch(trained[0].device if trained else torch.device("cpu"))
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(_counter(self, bucket))

    def begin(self) -> None:
        """Before the first backward pass of an update."""
        for bucket in self.buckets:
            bucket.attach()

    def last_pass(self) -> None:
        """Before the last: from now on every gradient that comes is complete."""
        self._next = 0

    def finish(self) -> None:
        """After the last: when this returns, or on a GPU when its stream is so far, the gradients are the averages."""
        self._send(all_of_them=True)  # of parameters that had no part in the loss there was no sign
        with self._waiting:
            for bucket in self.buckets:
                assert bucket.work is not None
                bucket.work.wait()
                bucket.work = None
        torch._foreach_mul_([bucket.memory for bucket in self.buckets], 1.0 / self._world_size)

    def take_waited(self) -> float:
        """Seconds since the last call in which the computation stood still for gradients under way.

        On a GPU, whose work must be waited for before.
        """
        return self._waiting.take()

    def _count(self, bucket: _Bucket) -> None:
        """A gradient of the bucket has come."""
        if self._next < len(self.buckets):
            bucket.missing -= 1
            self._send()

    def _send(self, *, all_of_them: bool = False) -> None:
        while self._next < len(self.buckets) and (all_of_them or self.buckets[self._next].missing == 0):
            bucket = self.buckets[self._next]
            bucket.work = dist.all_reduce(bucket.memory, async_op=True)
            self._next += 1


class _Stopwatch:
    """Around what waits for gradients: on a GPU it is the stream that waits, and the time is known later.

    Args:
        device: that the gradients are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        if self._cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._events.append((self._event, ended))
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since the last call. The work of a GPU must have been waited for."""
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def _counter(averager: GradientAverager, bucket: _Bucket):
    return lambda parameter: averager._count(bucket)


def _shaped_as(parameter: nn.Parameter, memory: torch.Tensor) -> torch.Tensor:
    """A view of flat memory with the shape of a parameter, and with its strides where these are without gaps."""
    dense = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True)) + 1
    if dense == parameter.numel():  # channels_last is: the gradient comes in the same order, and need not be turned
        return memory.as_strided(parameter.shape, parameter.stride())
    return memory.view(parameter.shape)
