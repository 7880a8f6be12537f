"""From the command line to a plan: the arguments that every command shares, and opening a configuration's data."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from pipeline import plan as plans
from pipeline.config import Config
from pipeline.dataset import AnySplit, check_capacity, open_split
from pipeline.plan import Plan
from shards.errors import UserError

MONITOR_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", '"comet_ml>=3.41.0"'),
}
"""Section of the configuration → the module that it needs, and what pip calls it."""


def add_config_arguments(parser: argparse.ArgumentParser, *, positional: bool = True, required: bool = True) -> None:
    """Add CONFIG, `--set`, `--data` and `--run`."""
    if positional:
        number = None if required else "?"
        parser.add_argument(
            "config", nargs=number, help="a DeepSpeed JSON file with a recipe section, e.g. ds_configs/demo.json"
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override any value by its path, e.g. --set optimizer.params.lr=0.4 (repeatable)",
    )
    parser.add_argument("--data", help="folder or URL of shards; the same as --set recipe.data=DIR")
    parser.add_argument("--run", help="run folder; the same as --set recipe.run=DIR")


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The overrides as `config.load` takes them; folders are quoted so that a name like `1` stays a name."""
    named = [(key, getattr(args, key)) for key in ("data", "run")]
    return args.set + [f"recipe.{key}={json.dumps(value)}" for key, value in named if value is not None]


def open_run(config: Config, world_size: int, local_ranks: range | None = None) -> tuple[Plan, AnySplit, AnySplit]:
    """Open both splits and resolve the plan.

    Args:
        config: the validated file.
        world_size: W.
        local_ranks: the ranks that share this host's cache, where that is known.

    Raises:
        UserError: shards missing, empty or not matching their index; batch sizes that do not divide; a cache that
            is too small for the order.
    """
    splits = open_splits(config)
    return plan_run(config, world_size, splits, local_ranks), *splits


def open_splits(config: Config) -> tuple[AnySplit, AnySplit]:
    """The training and the validation split. Raises UserError: they are missing, or not as their index says."""
    recipe = config.recipe
    return open_split(recipe, "train"), open_split(recipe, recipe.evaluation.split)


def plan_run(
    config: Config, world_size: int, splits: tuple[AnySplit, AnySplit], local_ranks: range | None = None
) -> Plan:
    """Resolve the plan for splits that are open; arguments and errors are `open_run`'s."""
    train, validation = splits
    plan = plans.resolve(config, world_size, train=train, validation=validation)
    ranks = local_ranks or range(1)  # a host runs one at least
    workers = range(ranks.start * plan.batch.accumulation, ranks.stop * plan.batch.accumulation)
    check_capacity(config, plan.order, train, validation, workers, len(ranks))
    return plan


def check_start_weights(config: Config) -> None:
    """Refuse a file of weights to start from that is not there; what is in it, only the ranks look at.

    For a run that begins: one that goes on does not read it.

    Raises:
        UserError: there is no such file.
    """
    source = config.recipe.model.start_from
    if source in (None, "timm"):
        return
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        inside = path / "model.safetensors"
        raise UserError(
            f"{config.path}: recipe.model.start_from: {path}: {what}",
            *([f"The weights that the run exported: {inside}"] if inside.is_file() else []),
        )


def check_monitors(config: Config) -> None:
    """Refuse an enabled monitor whose package is not installed; DeepSpeed would find out in the ranks.

    For whoever is about to train: a plan needs no monitor, so `open_run` does not check this.

    Raises:
        UserError: the package is missing; it says how to install it.
    """
    for section, (module, package) in MONITOR_PACKAGES.items():
        if getattr(config.blocks, section).enabled and importlib.util.find_spec(module) is None:
            raise UserError(
                f"{config.path}: {section} is enabled, and the package {module} is not installed",
                f"Install it with: python -m pip install {package}",
                f'Or train without it: "{section}": {{"enabled": false}}',
            )
