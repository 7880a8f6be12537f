"""Options of the training that are not in the paper's recipe, as a configuration names them (docs/recipe.md).

Each is off unless it is asked for. Defaults are those of the library or paper that each is known from.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.section import Section


class Ema(Section):
    """An exponential moving average of the weights and of BN's running statistics (timm's ModelEmaV3)."""

    decay: float = Field(0.9999, gt=0, lt=1, description="of what was averaged before, at each update")
    warmup: bool = Field(True, description="less at first: 1 − t^(−2/3) at update t, until that is more than decay")
    evaluate: Literal["beside", "instead"] = Field("beside", description="what evaluations measure: both, or it alone")

    def decay_at(self, update: int) -> float:
        """The decay at update `update`, counted from 1."""
        return min(self.decay, 1 - update ** (-2 / 3)) if self.warmup else self.decay


class Loss(Section):
    """What training minimises; evaluation measures plain cross entropy whatever this says."""

    kind: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(
        0, ge=0, lt=1, description="share of the target that all classes get alike; with mixing, see mixing"
    )
    target_threshold: float | None = Field(
        None, ge=0, lt=1, description="targets above it are 1, others 0; binary_cross_entropy only"
    )

    @model_validator(mode="after")
    def _used(self) -> Loss:
        if self.target_threshold is not None and self.kind != "binary_cross_entropy":
            raise ValueError("target_threshold is for binary_cross_entropy: leave it out")
        return self
