"""What makes two configurations the same training: everything but where it is written, how it is fed, and the seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shards.fetch import mask

NOT_TRAINING = (
    "recipe.seed",
    "recipe.run",
    "recipe.cache.folder",  # and not its size, which the order may depend on
    "recipe.loader",
    "recipe.logging",
    "recipe.checkpoint",
    "recipe.watchdog",
    "gradient_accumulation_steps",
    "steps_per_print",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
    "comms_logger",
    "flops_profiler",
    "timers",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "disable_python_gc",
)
"""Paths of a configuration that leave the training the same but for its seed."""

ABSENT = object()


def changes_training(path: str) -> bool:
    """Whether the value at a path of a configuration has a part in what is learned, beside the seed."""
    return not any(path == other or path.startswith(other + ".") for other in NOT_TRAINING)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects with their dotted paths."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In what a training differs from the one that is wanted, a sentence for each value; empty where they are the same.

    The seed counts here. The place of the data does not: shards that were moved are the same shards.

    Args:
        found, wanted: resolved configurations, with all defaults.
    """
    ours, theirs = dict(leaves(dict(found))), dict(leaves(dict(wanted)))
    # in the order of the file; what only one of them has comes last
    paths = dict.fromkeys((*theirs, *ours))
    return [
        f"{path} is {_shown(ours.get(path, ABSENT))}, not {_shown(theirs.get(path, ABSENT))}"
        for path in paths
        if (changes_training(path) or path == "recipe.seed")
        and path != "recipe.data"
        and ours.get(path, ABSENT) != theirs.get(path, ABSENT)
    ]


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    if isinstance(value, str):
        return mask(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
