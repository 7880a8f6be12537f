"""An exponential moving average of the weights, kept on the device beside them; timm does the averaging.

It is of everything in the model's state: weights, BN's running statistics, and of counts the present ones. Running
statistics are each rank's own until they are averaged over the ranks, and so are their averages; both are linear, so
the order of averaging does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.options_schema import Ema


class WeightAverage:
    """The average of one model's weights; it begins with those that the model has when this is made.

    Args:
        model: on its device, before anything that a copy must not have is attached to it.
        section: of the recipe.
    """

    def __init__(self, model: nn.Module, section: Ema) -> None:
        self._average = ModelEmaV3(model, decay=section.decay, use_warmup=section.warmup)
        self._warmup = section.warmup

    @property
    def model(self) -> nn.Module:
        """A model with the averages, in evaluation mode."""
        return self._average.module

    def update(self, model: nn.Module, update: int) -> None:
        """Take in the weights after an update. Nothing is waited for.

        Args:
            model: the one that is trained.
            update: its number, counted from 1, on which the decay depends while it warms up.
        """
        self._average.update(model, step=update if self._warmup else None)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Around what shall see the averages in `model`. Its own weights are back afterwards, to the last bit.

        What changes in it meanwhile, as recomputed statistics do, changes in the averages.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on from an average that was saved."""
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for ours, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
