"""What a data set is made of and with: the plan, recorded in index.json, that its bytes depend on.

A run goes on where an earlier one stopped if, and only if, both have the same plan.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shards.catalog import Catalog
from shards.errors import UserError
from shards.files import read_file
from shards.manifest import INDEX_NAME, PREPARE_FOLDER, parse_manifest, read_manifest, to_json
from shards.reencode import Reencoding
from shards.select import Selection
from shards.sources.base import Source
from shards.tally import IMAGES_KEY

FORMAT = 1
"""Version of everything that decides the bytes of a shard; part of the plan."""

SAMPLES_PER_SHARD = 1252
"""Default; it cuts ImageNet's 1,281,167 images into 1,024 shards of about 138 MB."""

FEWEST_SHARDS = 8
"""Of the training split by default, so that small sets can still be divided over workers and ranks."""

PLAN_NAME = "plan.json"
"""Of an unfinished data set, in its state folder."""

REPLACED_NAME = "replaced.json"
"""In the state folder: the index of a data set that is being removed."""

_MEND = "Choose another folder, or have it replaced with --overwrite."

_MOST_DIFFERENCES = 20


def check_counts(**counts: int | None) -> None:
    """Check the numbers given as options.

    Raises:
        UserError: naming the option.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} {count}: must be at least 1")
    if counts["shards"] is not None and counts["samples_per_shard"] is not None:
        raise UserError("--shards and --samples-per-shard: give one of the two, the other follows")


def cut(catalogs: list[Catalog], shards: int | None, samples_per_shard: int | None) -> dict[str, list[int]]:
    """Bounds of the shards of each split: n + 1 positions for n shards, whose sizes differ by at most one.

    Args:
        catalogs: of the splits, that for training first.
        shards: number of shards of the first split; the others get shards of the same size.
        samples_per_shard: upper bound, instead of `shards`.

    Raises:
        UserError: if more shards are asked for than there are images.
    """
    first = catalogs[0].count
    if shards is not None and shards > first:
        raise UserError(
            f"--shards {shards:,}: more than the {first:,} images of split {catalogs[0].split!r}",
            f"Choose at most {first:,}.",
        )
    if shards is not None:
        largest = -(-first // shards)
    else:
        largest = samples_per_shard or min(SAMPLES_PER_SHARD, -(-first // FEWEST_SHARDS))
    ranges = {}
    for catalog in catalogs:
        number = shards if shards and catalog is catalogs[0] else -(-catalog.count // largest)
        ranges[catalog.split] = [catalog.count * i // number for i in range(number + 1)]
    return ranges


def describe_plan(
    source: Source,
    selection: Selection,
    reencoding: Reencoding,
    catalogs: list[Catalog],
    ranges: dict[str, list[int]],
    seed: int,
) -> dict[str, Any]:
    """Everything the result depends on, as it is recorded in index.json."""
    return {
        "format": FORMAT,
        "source": source.name,
        "options": source.options() | selection.record | reencoding.record(),
        "seed": seed,
        "classes": len(selection.classes),
        "classes_sha256": hashlib.sha256(to_json(selection.classes)).hexdigest(),
        "splits": {
            catalog.split: {
                "samples": catalog.count,
                "shards": len(ranges[catalog.split]) - 1,
                "listing_sha256": catalog.sha256,
            }
            for catalog in catalogs
        },
    }


def plan_digest(plan: dict[str, Any]) -> str:
    """SHA-256 of a plan, in hexadecimal."""
    return hashlib.sha256(to_json(plan)).hexdigest()


def read_plan(out: Path) -> dict[str, Any] | None:
    """The plan of the data set that is in `out`, complete or not; None if there is none.

    Raises:
        UserError: if there are shards that this command did not write.
    """
    if (out / INDEX_NAME).exists():
        record = read_manifest(out).record
        if "splits" not in record:
            raise UserError(f"{out}: holds shards that shards prepare did not write", _MEND)
        return {key: value for key, value in record.items() if key != IMAGES_KEY}
    try:
        return json.loads(read_file(out / PREPARE_FOLDER / PLAN_NAME))
    except (FileNotFoundError, ValueError, RecursionError):
        pass
    for path in out.glob("*.tar"):
        known = (out / PREPARE_FOLDER / REPLACED_NAME).exists()
        raise UserError(
            f"{path}: is there already, and no {INDEX_NAME} says what made it",
            _MEND if known else "Choose another folder, or remove it.",
        )
    return None


def replaceable(out: Path) -> list[Path]:
    """The tars of the data set in `out`, complete or not, that --overwrite replaces: those that its own lists name.

    Raises:
        UserError: if there is another tar; it may be anybody's, and beside the new shards it would be taken for one.
    """
    tars: set[Path] = set()
    for path in (out / INDEX_NAME, out / PREPARE_FOLDER / REPLACED_NAME):
        try:
            manifest = parse_manifest(json.loads(read_file(path)), out, str(path), "")
        except (OSError, ValueError, RecursionError, UserError):
            continue  # lists nothing
        tars |= {shard.path for shards in manifest.splits.values() for shard in shards if shard.url is None}
    try:
        splits = json.loads(read_file(out / PREPARE_FOLDER / PLAN_NAME))["splits"]
        for path in out.glob("*.tar"):
            split, _, number = path.stem.rpartition("-")
            if split in splits and number.isdigit() and int(number) < splits[split]["shards"]:
                tars.add(path)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass  # no plan
    for path in sorted({*out.glob("*.tar")} - tars):
        raise UserError(
            f"{path}: no {INDEX_NAME} or interrupted run here lists it, so --overwrite does not remove it",
            "Choose another folder, or remove it.",
        )
    return sorted(tars)


def other_plan(out: Path, earlier: dict[str, Any], plan: dict[str, Any]) -> UserError:
    """The refusal to mix two plans in one folder, naming every difference."""
    before, now = _flatten(earlier), _flatten(plan)
    differences = [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} asked for"
        for key in now | before
        if before.get(key, "absent") != now.get(key, "absent")
    ]
    if len(differences) > _MOST_DIFFERENCES:
        more = len(differences) - _MOST_DIFFERENCES
        differences = [*differences[:_MOST_DIFFERENCES], f"… and {more:,} more"]
    kind = "a data set" if (out / INDEX_NAME).exists() else "an interrupted data set"
    return UserError(
        f"{out}: holds {kind} made from other data or with other options",
        *differences,
        _MEND,
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat
