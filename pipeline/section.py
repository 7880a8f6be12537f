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
