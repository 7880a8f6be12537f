"""The base of every section of a configuration file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A strictly typed section: unknown keys, and numbers written as strings, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def lists_to_tuples(values: object) -> object:
    """For validators: JSON has no tuples, and strict mode takes nothing else for one."""
    if isinstance(values, dict):
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return values


def check_rectangles(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """For validators: the ranges that random rectangles of an image are drawn from.

    Raises:
        ValueError: they are no ranges, or of something that no rectangle is.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError("scale must be two shares of the image's area, 0 < low ≤ high ≤ 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError("ratio must be two aspect ratios (width / height), 0 < low ≤ high")
