"""The augmentations beyond crop and flip, as a configuration names them. Each is off unless its section is there.

None of them is in the paper's recipe; they are what people train with otherwise. Defaults are those of the library
that each is known from.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.section import Section, check_rectangles, lists_to_tuples

IMAGE_AUGMENT_NAME = "image-augment-v1"
MIXING_NAME = "mixing-v1"
"""Names and versions of how images are changed and mixed; saved with checkpoints where a section is on, like
`augment.VIEWS_NAME`."""

MAGNITUDES = 31
"""Strengths that RandAugment and TrivialAugment divide each operation into."""


class ColorJitter(Section):
    """Brightness, contrast, saturation and hue changed by random factors, in random order (torchvision)."""

    brightness: float = Field(0, ge=0, description="factors from max(0, 1 - x) to 1 + x")
    contrast: float = Field(0, ge=0)
    saturation: float = Field(0, ge=0)
    hue: float = Field(0, ge=0, le=0.5, description="turns of the colour circle, from -x to x")
    probability: float = Field(1, gt=0, le=1, description="of each image")

    @model_validator(mode="after")
    def _changes_something(self) -> ColorJitter:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("changes nothing: give brightness, contrast, saturation or hue, or leave the section out")
        return self


class AutoAugment(Section):
    """Random operations: RandAugment (Cubuk et al. 2020) or TrivialAugment (Müller and Hutter 2021), torchvision's."""

    kind: Literal["rand", "trivial"]
    operations: int = Field(2, ge=1, description="one after the other; rand only")
    magnitude: int = Field(9, ge=0, lt=MAGNITUDES, description="0 to 30; rand only")

    @model_validator(mode="after")
    def _used(self) -> AutoAugment:
        defaults = type(self).model_fields
        if self.kind == "trivial" and any(
            getattr(self, key) != defaults[key].default for key in ("operations", "magnitude")
        ):
            raise ValueError('kind "trivial" has one operation of a random magnitude: leave these keys out')
        return self


class RandomErasing(Section):
    """A random rectangle of the image erased (Zhong et al. 2020)."""

    probability: float = Field(0.25, gt=0, le=1)
    scale: tuple[float, float] = Field((0.02, 0.33), description="share of the image's area")
    ratio: tuple[float, float] = Field((0.3, 3.3), description="width / height")
    fill: Literal["mean", "noise"] = Field("mean", description="the mean colour, or that and Gaussian noise around it")

    _tuples = model_validator(mode="before")(lists_to_tuples)

    @model_validator(mode="after")
    def _ordered(self) -> RandomErasing:
        check_rectangles(self.scale, self.ratio)
        return self


class Resolution(Section):
    """A training resolution and when it begins."""

    from_epoch: float = Field(ge=0)
    size: int = Field(gt=0, description="pixels; updates that begin in an earlier epoch keep the size before")


class Mixing(Section):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) within each micro-batch, timm's."""

    mixup_alpha: float = Field(0, ge=0, description="of the Beta distribution of the share; 0: no mixup")
    cutmix_alpha: float = Field(0, ge=0, description="likewise; 0: no CutMix")
    probability: float = Field(1, gt=0, le=1, description="of each micro-batch")
    switch_probability: float = Field(0.5, ge=0, le=1, description="of CutMix where both are on")
    mode: Literal["batch", "pair", "elem"] = Field("batch", description="one draw for all, for two, or for each image")
    label_smoothing: float = Field(0, ge=0, lt=1)

    @model_validator(mode="after")
    def _mixes(self) -> Mixing:
        if not (self.mixup_alpha or self.cutmix_alpha):
            raise ValueError("mixes nothing: give mixup_alpha or cutmix_alpha, or leave the section out")
        switches = self.switch_probability != type(self).model_fields["switch_probability"].default
        if switches and not (self.mixup_alpha and self.cutmix_alpha):
            raise ValueError("switch_probability is of CutMix where mixup is on too: give both alphas, or leave it out")
        return self
