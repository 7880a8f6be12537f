"""The list of classes that labels are counted in, for shards that come without one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from shards.errors import UserError
from shards.files import opened, read_file
from shards.idx import IndexedSample, group
from shards.labels import Labels, is_number
from shards.manifest import CLASSES_NAME, parse_classes
from shards.pool import run_tasks
from shards.tar import scan

FROM_LABELS = "from-labels"
CLASSES_HELP = (
    "class names, one a line or as classes.json, or their number; from-labels: the names that are found as labels, "
    "in sorted order"
)
"""For --help of the commands that take a list of classes."""

_NUMBER = re.compile(r"[-+]?[\d.]*")
"""What is no class number and must not pass for a name: nothing, -1, 3.5, and more digits than a number has."""

_MOST_NAMES = 100_000
"""More different labels than this are no class names but texts, one for each image."""

_MOST_CLASSES = 1 << 22
"""That ``--classes N`` may ask for; the largest sets have two million."""


def number_classes(count: int) -> tuple[str, ...]:
    """Names for classes that have none: ``("0", "1", …)``."""
    return tuple(map(str, range(count)))


def number_found_classes(
    place: str, highest: int, samples: int, mend: str = "Give the classes with --classes FILE|N."
) -> tuple[str, ...]:
    """`number_classes` up to the highest label that was found.

    Args:
        place: where that label stands, for messages.
        highest: label; -1 for none.
        samples: that labels were read of.
        mend: what to do where the labels are right, for messages.

    Raises:
        UserError: if there would be more classes than samples, and more than any such set has.
    """
    if highest >= max(_MOST_NAMES, samples):
        raise UserError(
            f"{place}: label {highest:,} is no class number: there are {samples:,} images in all",
            f"Class numbers count the classes from 0. {mend}",
        )
    return number_classes(highest + 1)


def note_first_class(names: Sequence[str], lowest: int) -> str | None:
    """What a person should know if no label is 0 and the classes have no names that could explain it.

    Args:
        names: of the classes.
        lowest: label of all splits.
    """
    if lowest == 1 and names[0] == "0":
        return "class 0 has no image; are the labels counted from 1?"
    return None


def name_classes(folder: Path, option: str | None) -> tuple[str, ...] | None:
    """The classes that ``--classes`` names, else those of the folder's `classes.json`; None if the labels must tell.

    Raises:
        UserError: if the file cannot be read or lists nothing, or a name twice.
    """
    path = folder / CLASSES_NAME
    if option is None:
        return parse_classes(path, "Repair it, or give --classes FILE|N") if path.exists() else None
    if option == FROM_LABELS:
        return None
    if is_number(option) and int(option) > 0:
        if int(option) > _MOST_CLASSES:
            raise UserError(f"--classes {option}: at most {_MOST_CLASSES:,} classes")
        return number_classes(int(option))
    path = Path(option)
    if path.suffix == ".json":
        return parse_classes(path, "Give --classes a list of names, or a number.")
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--classes {option}: neither a number nor a readable file: {error}",
            "Give the number of classes, or a file with one class name a line.",
        ) from error
    if not names:
        raise UserError(f"--classes {option}: lists no classes")
    return names


def read_titles(folder: Path) -> tuple[str, ...] | None:
    """What a person calls each class of the folder's `classes.json`, where that lists WordNet ids with names."""
    try:
        document = json.loads(read_file(folder / CLASSES_NAME))
        if isinstance(document, dict):
            document = [document[str(index)] for index in range(len(document))]
        return tuple(str(entry.get("name", "")) if "wnid" in entry else "" for entry in document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # absent, or plain names


def survey_classes(tars: Sequence[Path], labels: Labels, workers: int | None = None) -> tuple[str, ...]:
    """Find out the classes by reading every label: the names in sorted order, or numbers up to the highest.

    Sorted names are how torchvision numbers class folders, and how ImageNet's WordNet ids are numbered.

    Args:
        tars: of all splits; the shards of one might miss a class.
        labels: where the labels stand.
        workers: number of processes.

    Raises:
        UserError: if some labels are numbers and some names, or there are too many names to be classes, or
            a number is too large to be one.
    """
    names: set[str] = set()
    highest, where, samples = -1, "", 0
    for tar, (some, number, place, count) in run_tasks(partial(_survey_shard, labels), tars, workers):
        names |= some
        samples += count
        if number > highest:
            highest, where = number, place
        _check_few(tar, labels, names)
    if names and highest >= 0:
        raise UserError(
            f"{os.path.commonpath(tars)}: some labels are class numbers and some names ({labels.source})",
            f"{highest} is one of the numbers, {min(names)!r} one of the names.",
            "Give the list of classes in the order of their numbers with --classes FILE.",
        )
    return tuple(sorted(names)) if names else number_found_classes(where, highest, samples)


def _survey_shard(labels: Labels, tar: Path) -> tuple[set[str], int, str, int]:
    """Names, highest number, the sample that has it, and the count of samples."""
    names: set[str] = set()
    highest, where, count = -1, "", 0
    for place, descriptor, sample in _samples(tar):
        text = labels.text(place, descriptor, sample)
        count += 1
        if is_number(text):
            if int(text) > highest:
                highest, where = int(text), place
        elif _NUMBER.fullmatch(text):
            raise UserError(f"{place}: label {text[:80]!r} ({labels.source}) is neither a class number nor a name")
        else:
            names.add(text)
            _check_few(tar, labels, names)
    return names, highest, where, count


def _samples(tar: Path) -> Iterator[tuple[str, int, IndexedSample]]:
    with opened(tar) as descriptor:
        for sample in group(scan(tar)):
            yield f"{tar}: key {sample.key}", descriptor, sample


def _check_few(tar: Path, labels: Labels, names: set[str]) -> None:
    if len(names) > _MOST_NAMES:
        raise UserError(
            f"{tar}: more than {_MOST_NAMES:,} different labels ({labels.source})",
            "These are no class names, but texts that belong to single images. Choose another --label.",
        )
