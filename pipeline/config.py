"""Loading a configuration: the file, what it extends, the overrides, and strict validation of all of it.

`load` answers with a `Config`, which is checked but does not yet know how many ranks will run it; `batch` and
`plan` bring those together. Every mistake is a `UserError` that names the file and the JSON path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pipeline import config_file, deepspeed_keys, schema
from pipeline.deepspeed_keys import did_you_mean
from pipeline.deepspeed_schema import DeepSpeedBlocks
from shards.errors import UserError

RESOLVED_FILE = "config.resolved.json"
"""In the run folder: the configuration with every default, which `load` accepts again."""

COMPILING_SECONDS = 3600.0
"""How long a model may take to compile; ranks of one host share its cores."""

Validated = TypeVar("Validated", bound=BaseModel)


@dataclass(frozen=True)
class Config:
    """One experiment, validated.

    Attributes:
        path: the file as the user named it.
        raw: the JSON object with the overrides applied; DeepSpeed can load it as it is.
        blocks: the DeepSpeed keys, typed, defaults filled in.
        recipe: the `recipe` section, typed, defaults filled in.
        overrides: the `--set` arguments as given.
        bases: the files that it extends, the one that extends nothing first.
    """

    path: Path
    raw: dict[str, Any]
    blocks: DeepSpeedBlocks
    recipe: schema.Recipe
    overrides: tuple[str, ...] = ()
    bases: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The experiment's name: the file's, without folder and suffix."""
        return self.path.stem

    @property
    def run_folder(self) -> Path:
        """Where the run writes: `recipe.run`, or runs/<name>."""
        return Path(self.recipe.run) if self.recipe.run else Path("runs") / self.name

    @property
    def lr(self) -> float:
        """The learning rate at `recipe.reference_batch`."""
        return self.blocks.optimizer.params["lr"]

    @property
    def watchdog(self) -> schema.Watchdog:
        """`recipe.watchdog`, with the patience that compiling needs: nothing gets any further meanwhile."""
        watchdog = self.recipe.watchdog
        if not self.recipe.step.compile or not watchdog.stuck_seconds:
            return watchdog
        return watchdog.model_copy(update={"stuck_seconds": max(watchdog.stuck_seconds, COMPILING_SECONDS)})

    @property
    def layer_wise(self) -> bool:
        """Whether layers have rates of their own, and biases do not decay (`pipeline.layer_wise`)."""
        return self.blocks.optimizer.type in deepspeed_keys.LAYER_WISE

    @property
    def precision(self) -> str:
        """`fp32`, `float16` or `bfloat16`: the type that convolutions and matrix products compute in."""
        if self.blocks.fp16.enabled:
            return "float16"
        if self.blocks.bf16.enabled:
            return "bfloat16"
        return self.blocks.torch_autocast.dtype if self.blocks.torch_autocast.enabled else "fp32"

    def resolved(self) -> dict[str, Any]:
        """The whole configuration with every default of `recipe` written out; `load` accepts it again."""
        return {**self.raw, "recipe": self.recipe.model_dump(mode="json")}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a configuration file.

    Args:
        path: a DeepSpeed JSON file with a `recipe` section, or one that extends such a file (`config_file.read`).
        overrides: `path.to.key=value` each; the value is JSON, or a string if it is not.

    Raises:
        UserError: anything that would make DeepSpeed or the recipe do something other than what is written.
    """
    path = Path(path)
    raw, files = config_file.read(path, overrides)
    try:
        return _validated(path, raw, files[:-1], tuple(overrides))
    except UserError as error:
        if len(files) == 1:
            raise
        bases = " → ".join(str(file) for file in reversed(files[:-1]))
        raise UserError(error.headline, *error.details, f"{path.name} extends {bases}.") from None


def _validated(path: Path, raw: dict[str, Any], bases: tuple[Path, ...], overrides: tuple[str, ...]) -> Config:
    place = str(path)
    deepspeed_keys.check_top_level(place, raw)
    deepspeed_keys.check_values(place, raw)
    blocks = validate(place, DeepSpeedBlocks, {k: v for k, v in raw.items() if k != "recipe"}, "")
    deepspeed_keys.check_optimizer(place, blocks.optimizer)
    if sum((blocks.fp16.enabled, blocks.bf16.enabled, blocks.torch_autocast.enabled)) > 1:
        raise UserError(
            f"{place}: more than one of fp16, bf16 and torch_autocast is enabled",
            "Enable one of them; leave all out for fp32.",
        )
    recipe = validate(place, schema.Recipe, raw["recipe"], "recipe")
    config = Config(path=path, raw=raw, blocks=blocks, recipe=recipe, overrides=overrides, bases=bases)
    deepspeed_keys.check_precision(place, config.precision, blocks.optimizer, tf32=recipe.step.tf32)
    return config


def validate(place: str, model: type[Validated], values: Any, prefix: str = "") -> Validated:
    """Values as a section.

    Args:
        place: what messages begin with: the file.
        model: the section's type.
        values: as read from the file.
        prefix: the section's path in the file.

    Raises:
        UserError: every value that is not as the section has it, with its path.
    """
    try:
        return model.model_validate(values)
    except ValidationError as failure:
        raise _user_error(place, model, failure, prefix) from None


def _user_error(place: str, model: type[BaseModel], failure: ValidationError, prefix: str) -> UserError:
    """The first of pydantic's findings in our voice, the others as further lines."""
    lines = []
    for error in failure.errors():
        location = [str(part) for part in error["loc"]]
        path = ".".join([prefix, *location] if prefix else location)
        if error["type"] == "extra_forbidden":
            section = ".".join([prefix, *location[:-1]] if prefix else location[:-1])
            known = _fields_at(model, location[:-1])
            lines.append(f'{section}: unknown key "{location[-1]}"{did_you_mean(location[-1], known)}')
        elif error["type"] == "missing":
            lines.append(f"{path} is missing")
        elif error["type"] in ("model_type", "dict_type"):
            lines.append(f"{path}: must be a section in braces, not {json.dumps(error['input'], default=str)}")
        else:
            message = error["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = error["input"]
            shown = "" if isinstance(given, dict) else f", not {json.dumps(given, default=str)}"
            lines.append(f"{path}: {message}{shown}")
    headline, *rest = lines
    return UserError(f"{place}: {headline}", *rest)


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The names of the fields of the section at `location` inside `model`."""
    current: Any = model
    for part in location:
        if part.isdigit():  # into a list of sections, whose own type has been found already
            continue
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else None
        for choice in get_args(current):  # of a section that may be absent, or of a list
            current = choice if hasattr(choice, "model_fields") else current
    return list(getattr(current, "model_fields", {}))
