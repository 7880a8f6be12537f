"""Batch normalisation over the n images of one logical worker, whatever a rank computes at once, and its statistics.

The paper's loss is defined by n (§2.3): BN normalises each worker's images by themselves. A rank that holds several
workers can run them one after the other (gradient accumulation), or send the images of g of them through the model
together while BN looks at groups of n (ghost batches). The gradient is the same; the second needs fewer and larger
kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shards.errors import UserError

HALF = (torch.float16, torch.bfloat16)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BN layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


class LogicalWorkerStatistics:
    """Makes the running statistics of accumulated micro-batches those of as many workers, averaged.

    k workers update their statistics once per update, r ← (1 − m)·r + m·s_j, and are averaged. One rank that runs g
    of them in turn would update g times. With momentum m_i = m / (g − (g − i)·m) in micro-step i of g, its result is
    (1 − m)·r + m·mean(s): what the g workers would have averaged to. So the statistics, like the weights, do not
    depend on how many ranks share the k workers, nor on how many of them go through the model at once.

    Args:
        model: its BN layers; a layer without momentum (a cumulative average) is left alone.
        accumulation: g, forward passes per update.
        keep_finite: put back what an update leaves that is not finite, as where a float16 activation overflowed; the
            optimizer is kept from such an update.
    """

    def __init__(self, model: nn.Module, accumulation: int, *, keep_finite: bool = False) -> None:
        self._kept_finite = _running_statistics(model) if keep_finite else []
        self._layers: list[tuple[_BatchNorm, float]] = []
        shares: dict[int, tuple[torch.Tensor, float]] = {}
        for layer in batch_norms(model):
            if isinstance(layer, _GroupNormaliser) and layer.momentum is not None:
                shares[id(layer.share)] = layer.share, layer.momentum
            elif layer.momentum is not None:
                self._layers.append((layer, layer.momentum))
        self._shares = list(shares.values())
        self._accumulation = accumulation

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around one update: call `micro_step` before each forward pass; the layers' momentum is put back after."""
        try:
            with _kept_finite(self._kept_finite):
                yield
        finally:
            for layer, momentum in self._layers:
                layer.momentum = momentum

    @contextmanager
    def single_passes(self) -> Iterator[None]:
        """Around forward passes after each of which the running statistics shall be those of that pass alone."""
        try:
            for layer, _ in self._layers:
                layer.momentum = 1.0
            for share, _ in self._shares:
                share.fill_(1.0)
            yield
        finally:
            for layer, momentum in self._layers:
                layer.momentum = momentum
            for share, momentum in self._shares:
                share.fill_(momentum)

    def micro_step(self, index: int) -> None:
        """Prepare the layers for micro-step `index` (0-based)."""
        if self._accumulation == 1:
            return
        g, i = self._accumulation, index + 1
        for layer, momentum in self._layers:
            layer.momentum = momentum / (g - (g - i) * momentum)
        for share, momentum in self._shares:
            share.fill_(momentum / (g - (g - i) * momentum))


@contextmanager
def _kept_finite(statistics: list[torch.Tensor]) -> Iterator[None]:
    """Around forward passes: a statistic that is not finite after them is put back, and no other. Waits for nothing.

    Args:
        statistics: which the passes change in place; all on one device.
    """
    if not statistics:
        yield
        return
    before = torch.cat([each.flatten() for each in statistics])
    yield
    with torch.no_grad():  # in a few kernels, however many layers there are
        after = torch.cat([each.flatten() for each in statistics])
        kept = torch.where(torch.isfinite(after), after, before).split([each.numel() for each in statistics])
        torch._foreach_copy_(statistics, [part.view_as(each) for part, each in zip(kept, statistics, strict=True)])


def _running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Those that are moved by every pass, finite or not: of BN layers, and of others that keep some."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.startswith("running_")
    ]


def average_statistics(model: nn.Module) -> None:
    """Replace every rank's running statistics by their mean over all ranks (in float64).

    DeepSpeed never synchronises buffers, so each rank's differ. The update is linear in the statistics: averaging
    once before an evaluation or a save gives what averaging after every step would.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    pairs = [(layer.running_mean, layer.running_var) for layer in batch_norms(model)]
    buffers = [buffer for pair in pairs for buffer in pair if buffer is not None]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


# ---------------------------------------------------------------- ghost batches


class _GroupNormaliser(_BatchNorm):
    """BN over groups of consecutive images.

    Attributes:
        groups: in a batch.
        share: what this pass's statistics weigh in the running ones: a scalar on the layer's device, shared by layers,
            which a compiled step reads where the float `momentum` would be compiled in.
    """

    groups: int
    share: torch.Tensor

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(g·n, C, …) → the same, each n images normalised by themselves; statistics and arithmetic in float32.

        The running statistics move once, by the mean of the groups': what g workers would have averaged to.
        """
        # splitting the images is a view in any memory format, and arithmetic keeps the order of the axes
        grouped = images.unflatten(0, (self.groups, -1))
        count = grouped[0, :, 0].numel()
        if count == 1:
            raise ValueError(f"one value per channel cannot be normalised: shape {tuple(images.shape)}")
        wide = grouped.float() if images.dtype in HALF else grouped
        places = range(3, wide.dim())
        variance, mean = torch.var_mean(wide, dim=(1, *places), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight.view(-1, *(1 for _ in places))
        result = (wide - mean) * scale
        if self.affine:
            result = result + self.bias.view(-1, *(1 for _ in places))
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = variance.mean(dim=0).flatten() * (count / (count - 1))
                for running, found in ((self.running_mean, mean.mean(dim=0).flatten()), (self.running_var, unbiased)):
                    running += self.share * (found - running)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        return result.to(images.dtype).flatten(0, 1)


class GhostBatchNorm1d(_GroupNormaliser, nn.BatchNorm1d):
    """torch's BatchNorm1d over groups of images; in evaluation it is torch's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As torch's."""
        return self._normalise(images) if self.training else nn.BatchNorm1d.forward(self, images)


class GhostBatchNorm2d(_GroupNormaliser, nn.BatchNorm2d):
    """torch's BatchNorm2d over groups of images; in evaluation it is torch's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As torch's."""
        return self._normalise(images) if self.training else nn.BatchNorm2d.forward(self, images)


class GhostBatchNormAct2d(_GroupNormaliser, BatchNormAct2d):
    """timm's BatchNormAct2d over groups of images; in evaluation it is timm's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As timm's."""
        return self.act(self.drop(self._normalise(images))) if self.training else BatchNormAct2d.forward(self, images)


GHOSTS: dict[type[nn.Module], type[_GroupNormaliser]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    BatchNormAct2d: GhostBatchNormAct2d,
}


def without_ghost(model: nn.Module) -> list[str]:
    """The types of the model's layers whose statistics cannot be those of groups, by name; empty if all can.

    Whatever keeps running statistics looks at the whole batch in training.
    """
    kinds = set()
    for module in model.modules():
        running = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
        can = running and type(module) in GHOSTS and module.momentum is not None
        if (running or isinstance(module, _BatchNorm)) and not can:
            kinds.add(type(module).__name__)
    return sorted(kinds)


def check_ghosts(model: nn.Module, groups: int, *, stochastic: bool) -> None:
    """That several logical workers may go through this model at once, and it is still the same training.

    Args:
        model: on any device.
        groups: of them.
        stochastic: whether the model draws random numbers, which a worker must draw for itself.

    Raises:
        UserError: they may not.
    """
    mend = "Send them through one after the other: --set recipe.step.ghost_batches=1"
    if groups == 1:
        return
    if stochastic:
        raise UserError(
            f"recipe.step.ghost_batches: {groups} logical workers cannot go through this model at once: its dropout "
            "draws the same numbers for a worker wherever it runs, and would not",
            mend,
        )
    if kinds := without_ghost(model):
        raise UserError(
            f"recipe.step.ghost_batches: {groups} logical workers cannot go through this model at once: "
            f"{', '.join(kinds)} normalises the whole batch",
            mend,
        )


def make_ghosts(model: nn.Module, groups: int) -> None:
    """Have every BN layer that can normalise groups of consecutive images, in place; parameters and names stay.

    Args:
        model: on its device.
        groups: in a batch; a batch must be a multiple of it.
    """
    shares: dict[tuple[float, torch.device, torch.dtype], torch.Tensor] = {}
    for layer in batch_norms(model):
        if type(layer) not in GHOSTS or layer.momentum is None or layer.running_mean is None:
            continue
        statistics = layer.running_mean
        key = layer.momentum, statistics.device, statistics.dtype
        layer.__class__ = GHOSTS[type(layer)]
        assert isinstance(layer, _GroupNormaliser)
        layer.groups = groups
        layer.share = shares.setdefault(key, statistics.new_tensor(layer.momentum))
