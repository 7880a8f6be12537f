"""Loading a configuration: the file, the overrides of the command line, and strict validation of both.

`load` answers with a `Config`, which is checked but does not yet know how many ranks will run it; `batch` and
`plan` bring those together. Every mistake is a `UserError` that names the file and the JSON path.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import hjson
from pydantic import BaseModel, ValidationError

from pipeline import schema
from shards.errors import UserError

Validated = TypeVar("Validated", bound=BaseModel)


@dataclass(frozen=True)
class Config:
    """One experiment, validated.

    Attributes:
        path: the file as the user named it.
        raw: the JSON object with the overrides applied; DeepSpeed can load it as it is.
        blocks: the DeepSpeed keys that decide training, typed.
        recipe: the `recipe` section, typed, defaults filled in.
        overrides: the `--set` arguments as given.
    """

    path: Path
    raw: dict[str, Any]
    blocks: schema.DeepSpeedBlocks
    recipe: schema.Recipe
    overrides: tuple[str, ...] = ()

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
        path: a DeepSpeed JSON file with a `recipe` section. As in DeepSpeed, comments and trailing commas are
            fine and duplicate keys are not.
        overrides: `path.to.key=value` each; the value is JSON, or a string if it is not.

    Raises:
        UserError: anything that would make DeepSpeed or the recipe do something other than what is written.
    """
    path = Path(path)
    raw = _read(path)
    for override in overrides:
        _apply_override(raw, override)
    place = str(path)
    _check_top_level(place, raw)
    _check_deepspeed_values(place, raw)
    blocks = _validate(place, schema.DeepSpeedBlocks, {k: v for k, v in raw.items() if k != "recipe"}, "")
    _check_optimizer(place, blocks.optimizer)
    if sum((blocks.fp16.enabled, blocks.bf16.enabled, blocks.torch_autocast.enabled)) > 1:
        raise UserError(
            f"{place}: more than one of fp16, bf16 and torch_autocast is enabled",
            "Enable one of them; leave all out for fp32.",
        )
    recipe = _validate(place, schema.Recipe, raw["recipe"], "recipe")
    return Config(path=path, raw=raw, blocks=blocks, recipe=recipe, overrides=tuple(overrides))


def _read(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f'{path}: the key "{key}" appears twice in one object', "Remove one of them.")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.stem, known, n=1)
        mend = [f"Did you mean {path.parent / near[0]}.json?"] if near else []
        raise UserError(f"{path}: there is no such configuration file", *mend) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error}") from None
    try:
        raw = hjson.loads(text, object_pairs_hook=no_duplicates)
    except (hjson.HjsonDecodeError, OverflowError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a configuration is a JSON object, this is a {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key_path, separator, text = override.partition("=")
    if not separator or not key_path:
        raise UserError(
            f"--set {override}: not of the form path.to.key=value", "Example: --set optimizer.params.lr=0.4"
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = key_path.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f'--set {override}: "{parent}" is a value, not a section')
    section[last] = value


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def _check_top_level(place: str, raw: dict[str, Any]) -> None:
    known = schema.DEEPSPEED_KEYS | {"recipe"}
    for key in raw:
        if key in schema.REFUSED_KEYS:
            raise UserError(f'{place}: the key "{key}" is not used here', schema.REFUSED_KEYS[key])
        if key not in known:
            recipe_keys = schema.Recipe.model_fields
            mend = (
                [f'It belongs inside "recipe": recipe.{key}']
                if key in recipe_keys
                else ["DeepSpeed would ignore it without a word, and train something else than is written."]
            )
            raise UserError(f'{place}: unknown top-level key "{key}"{_did_you_mean(key, known)}', *mend)
    if "recipe" not in raw:
        raise UserError(
            f'{place}: there is no "recipe" section',
            "It names what DeepSpeed has no key for: data, model, epochs. "
            "ds_configs/demo.json is the smallest example.",
        )
    if "gradient_clipping" not in raw:
        raise UserError(
            f"{place}: gradient_clipping is missing",
            "DeepSpeed clips gradients at norm 1.0 where the key is absent, which the paper does not.",
            'Write "gradient_clipping": 0.0 for none.',
        )
    if "optimizer" not in raw:
        raise UserError(
            f"{place}: optimizer is missing",
            'Example: "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": true}}',
        )
    _check_scheduler_type(place, raw.get("scheduler"))


def _check_scheduler_type(place: str, scheduler: Any) -> None:
    example = (
        'Example: "scheduler": {"type": "GradualWarmupLR", "params": {"warmup": "gradual", "warmup_epochs": 5, '
        '"milestones": [30, 60, 80]}}'
    )
    if scheduler is None:
        raise UserError(f"{place}: scheduler is missing", example)
    kind = scheduler.get("type") if isinstance(scheduler, dict) else scheduler
    if kind == "GradualWarmupLR":
        return
    why = [
        "The recipe's schedule is in epochs and follows the samples consumed, so that it is the same at any "
        "batch size, number of ranks and after any resume; this one counts optimizer steps."
    ]
    if kind in schema.STEP_COUNTING_SCHEDULES and str(kind).startswith("Warmup"):
        why.append(
            "DeepSpeed's warmups also apply the first rate twice, reach the peak one step late, and are "
            "logarithmic unless told otherwise."
        )
    raise UserError(f"{place}: scheduler.type: {kind!r} cannot be used; the schedule is GradualWarmupLR", *why, example)


def _check_deepspeed_values(place: str, raw: dict[str, Any]) -> None:
    zero = raw.get("zero_optimization")
    # DeepSpeed still reads a bare true as stage 1
    stage = zero.get("stage", 0) if isinstance(zero, dict) else int(bool(zero))
    if stage != 0:
        raise UserError(
            f"{place}: zero_optimization.stage {stage} is not supported",
            "ZeRO ties checkpoints to the number of ranks, so a run could not resume on another; a model of "
            "ImageNet size gains nothing from it. Use stage 0, or leave the section out.",
        )
    if raw.get("gradient_allreduce_op", "mean") != "mean":
        raise UserError(
            f"{place}: gradient_allreduce_op {raw['gradient_allreduce_op']!r} multiplies the update by the ranks",
            'The gradient is the average over the minibatch (paper §2.1): write "mean", or leave it out.',
        )
    if raw.get("steps_per_print", 1) == 0:
        raise UserError(f"{place}: steps_per_print 0 makes DeepSpeed divide by zero", "Leave it out.")
    if raw.get("managed_gradient_accumulation", True) is not True:
        raise UserError(
            f"{place}: managed_gradient_accumulation must stay true",
            "The trainer accumulates as many micro-batches as the batch sizes say.",
        )
    data_types = raw.get("data_types")
    if data_types:
        raise UserError(
            f"{place}: data_types would keep BN or its statistics in half precision",
            "Leave it out: weights, BN and the optimizer stay in fp32 in every precision.",
        )


def _check_optimizer(place: str, optimizer: schema.OptimizerBlock) -> None:
    name, params = optimizer.type, optimizer.params
    names = {known.lower(): known for known in (*schema.OPTIMIZER_PARAMS, *schema.OTHER_OPTIMIZERS)}
    if name not in names.values():
        near = difflib.get_close_matches(name.lower(), names, n=1)
        meant = f'; did you mean "{names[near[0]]}"?' if near else ""
        raise UserError(f'{place}: optimizer.type: unknown optimizer "{name}"{meant}')
    if name in schema.OPTIMIZER_PARAMS:
        known = schema.OPTIMIZER_PARAMS[name].split()
        for key in params:
            if key not in known:
                raise UserError(
                    f'{place}: optimizer.params: unknown key "{key}"{_did_you_mean(key, known)}',
                    f"{name} takes {', '.join(known)}.",
                )
    for key, value in params.items():
        if key in schema.OPTIMIZER_SWITCHES and not isinstance(value, bool):
            raise UserError(f"{place}: optimizer.params.{key} must be true or false, not {json.dumps(value)}")
        if key in schema.OPTIMIZER_NUMBERS and not _is_number(value):
            raise UserError(f"{place}: optimizer.params.{key} must be a number, not {json.dumps(value)}")
    lr = params.get("lr")
    if not _is_number(lr) or lr <= 0:
        raise UserError(
            f"{place}: optimizer.params.lr must be a positive number, not {json.dumps(lr)}",
            "It is the rate at recipe.reference_batch; the linear scaling rule makes the rate used from it.",
        )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _validate(place: str, model: type[Validated], values: Any, prefix: str) -> Validated:
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
            lines.append(f'{section}: unknown key "{location[-1]}"{_did_you_mean(location[-1], known)}')
        elif error["type"] == "missing":
            lines.append(f"{path} is missing")
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
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else None
    return list(getattr(current, "model_fields", {}))
