"""Options of the training that are not in the paper's recipe, as a configuration names them (docs/recipe.md).

Each is off unless it is asked for. Defaults are those of the library or paper that each is known from.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.section import Section


class Ema(Section):
    """An exponential moving average of the weights and of BN's running statistics (timm's ModelEmaV3)."""

    decay: float = Field(0.9999, gt=0, lt=1, description="of what was averaged before, at each update")
    warmup: bool = Field(True, description="less at first: 1 − t^(−2/3) at update t, until that is more than decay")
    evaluate: Literal["beside", "instead"] = Field("beside", description="what evaluations measure: both, or it alone")

    def decay_at(self, update: int) -> float:
        """The decay at update `update`, counted from 1."""
        return min(self.decay, 1 - update ** (-2 / 3)) if self.warmup else self.decay
