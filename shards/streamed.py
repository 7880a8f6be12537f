"""Data sets whose shards can only be read from end to end: what they hold is known, where in them it lies is not.

The number and the lengths of the shards come from `index.json`, or from timm's `_info.json` where there is none. No
shard is opened here: training opens one after the other, and checks that it holds what was announced.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.fetch import is_remote, join_url, mask, read_small
from shards.labels import Labels
from shards.manifest import CLASSES_NAME, INDEX_NAME, INFO_NAME, RECORD_SECTION, Shard, class_names
from shards.table import split_digest

PLACEHOLDER = "{}"

_PLAIN_NAME = re.compile(r"(?!\.+(/|$))[\w.][\w.=+@-]*(/(?!\.+(/|$))[\w.][\w.=+@-]*)*", re.ASCII)
"""A name that is one word to any shell, and stays below the place it is put into."""


@dataclass(frozen=True, eq=False)
class StreamSplit:
    """One split of such a data set."""

    root: str
    """Folder or URL of the index."""
    name: str
    urls: tuple[str, ...]
    """What opens each shard; may be a command (``pipe:…``)."""
    counts: tuple[int, ...]
    """Samples of each shard."""
    classes: tuple[str, ...]
    """Names in label order."""
    labels: Labels
    """Where the label of a sample stands."""
    digest: str
    """Equal to `index.Split.digest` of the same shards where `index.json` names their digests."""

    def __len__(self) -> int:
        return sum(self.counts)


def open_stream(location: str, name: str, pattern: str) -> StreamSplit:
    """Plan the reading of one split from the index alone.

    Args:
        location: folder or URL that holds `classes.json`, and `index.json` or `_info.json`.
        name: of the split.
        pattern: opens a shard once `{}` is replaced by its name, e.g. ``"pipe:aws s3 cp s3://bucket/{} -"``.

    Raises:
        UserError: if one of the files is missing or not what it should be, the split is not there, or a shard has a
            name that a shell could take for more than a name.
    """
    classes = _read_classes(_file(location, CLASSES_NAME))
    source = mask(_file(location, INDEX_NAME))
    record: dict[str, Any] = {}
    document = _read_json(_file(location, INDEX_NAME))
    if document is not None:
        splits = _parse(source, _wids_splits, document)
        record = document.get(RECORD_SECTION) or {}
    else:
        source = mask(_file(location, INFO_NAME))
        document = _read_json(_file(location, INFO_NAME))
        if document is None:
            raise UserError(
                f"{mask(location)}: neither {INDEX_NAME} nor {INFO_NAME} there",
                "Reading shards from end to end needs to know how many samples each of them holds.",
            )
        splits = _parse(source, _timm_splits, document)
    if not splits.get(name):
        raise UserError(f"{source}: has no split {name!r}", f"Splits there: {', '.join(splits) or 'none'}.")
    shards = splits[name]
    for shard in shards:
        _check(source, shard)
    return StreamSplit(
        root=location,
        name=name,
        urls=tuple(pattern.replace(PLACEHOLDER, str(shard.path)) for shard in shards),
        counts=tuple(shard.samples for shard in shards),
        classes=classes,
        labels=Labels.from_record(mask(location), record, classes),
        digest=split_digest(shards, record),
    )


def _file(location: str, name: str) -> str:
    return join_url(location, name) if is_remote(location) else f"{location.rstrip('/')}/{name}"


def _check(source: str, shard: Shard) -> None:
    if shard.url is not None:
        raise UserError(
            f"{source}: lists its shards by their URLs: {mask(shard.url)}",
            "They need no recipe.stream: leave it out.",
        )
    if not _PLAIN_NAME.fullmatch(str(shard.path)):
        raise UserError(
            f"{source}: shard name {str(shard.path)!r} has characters other than letters, digits and . _ - = + @ /",
            "It would become part of a command or URL (recipe.stream). Rename the shard.",
        )
    if not isinstance(shard.samples, int) or isinstance(shard.samples, bool) or shard.samples < 1:
        raise UserError(f"{source}: shard {shard.path}: {shard.samples!r} is no number of samples")


def _wids_splits(document: Any) -> dict[str, list[Shard]]:
    return {
        dataset["name"]: [
            Shard(
                Path(shard["url"]),
                shard["nsamples"],
                0,
                str(shard.get("sha256", shard["url"])),  # without a digest the name has to do
                url=shard["url"] if is_remote(shard["url"]) else None,
            )
            for shard in dataset["shardlist"]
        ]
        for dataset in document["datasets"]
    }


def _timm_splits(document: Any) -> dict[str, list[Shard]]:
    return {
        name: [
            Shard(Path(shard), count, 0, shard)  # no digest: the name has to do
            for shard, count in zip(split["filenames"], split["shard_lengths"], strict=True)
        ]
        for name, split in document["splits"].items()
    }


def _parse(place: str, parse: Any, document: Any) -> dict[str, list[Shard]]:
    try:
        return parse(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: not an index of shards: {error!r}") from error


def _read_json(place: str) -> Any:
    """The document, or None if there is no such file."""
    try:
        data = read_small(place) if is_remote(place) else Path(place).read_bytes()
        return json.loads(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{mask(place)}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{mask(place)}: no valid JSON: {error}") from error


def _read_classes(place: str) -> tuple[str, ...]:
    document = _read_json(place)
    if document is None:
        raise UserError(f"{mask(place)}: no such file", "It lists the names of the classes in label order.")
    return class_names(document, mask(place), "It must list the names of the classes in label order.")
