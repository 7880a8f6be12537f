"""Which classes of a source go into a data set, under which names, and how many images of each.

A class map renames, merges and drops classes; limits then take some of what is left. Sources know nothing of it:
the labels of their entries are translated while they are listed. What is chosen shows in the plan, through the
class names and the digest of the listing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError

_EVERY_OTHER = "*"
"""In a class map: what becomes of the classes that it does not list."""

_FORMS = (
    "A class map is YAML or JSON, {class: new name}, or text with two columns, or a list of [class, new name] pairs.",
    "A new name of null (in text: -) drops the class; the class * stands for all that are not listed, and",
    "the new name * keeps the name.",
)


@dataclass(frozen=True)
class Selection:
    """The classes of a data set and how to get there from those of its source."""

    classes: tuple[str, ...]
    """New names in label order."""
    labels: tuple[int | None, ...]
    """The new label of each of the source's classes; None where the class is left out."""
    per_class: int | None = None
    """At most so many images of each class."""
    record: dict[str, Any] = field(default_factory=dict)
    """The options, for the plan; empty where there are none. A class map is recorded without what it leaves alone."""

    def titles(self, classes: tuple[str, ...], titles: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The titles of the new classes, from those of the source's; a new name has none."""
        if titles is None or self.classes == classes:
            return titles
        by_name = dict(zip(classes, titles, strict=True))
        return tuple(by_name.get(name, "") for name in self.classes)

    def thin(self, order: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The shuffled order without what exceeds `per_class`: of each class, its first images in that order.

        Args:
            order: int64 [n], a permutation.
            labels: int [n], new labels before the shuffle.
        """
        if self.per_class is None:
            return order
        shuffled_labels = labels[order]
        by_label = np.argsort(shuffled_labels, kind="stable")
        first = np.searchsorted(shuffled_labels[by_label], np.arange(len(self.classes)))
        rank = np.empty(len(order), np.int64)
        rank[by_label] = np.arange(len(order)) - first[shuffled_labels[by_label]]
        return order[rank < self.per_class]


def select(
    classes: tuple[str, ...],
    class_map: Path | None = None,
    limit_classes: str | None = None,
    limit_per_class: int | None = None,
) -> Selection:
    """Resolve the options that choose classes.

    Args:
        classes: the source's, in label order.
        class_map: file that says what becomes of each class. New labels follow the sorted new names if it is a
            mapping, the order in which the names first appear if it is a list or text.
        limit_classes: of the (new) classes: how many of the first, or a file with one name a line, or names
            separated by commas. The labels of those kept close up in unchanged order.
        limit_per_class: of the training split: at most so many images of each class, chosen by the seed.

    Raises:
        UserError: naming the option, the file and the class, if a class is unknown, not listed, or listed twice.
    """
    record: dict[str, Any] = {}
    if limit_per_class is not None:
        record["limit_per_class"] = limit_per_class
    if class_map is None and limit_classes is None:
        return Selection(classes, tuple(range(len(classes))), limit_per_class, record)
    _check_distinct(classes)
    names = classes
    targets: list[str | None] = list(classes)
    if class_map is not None:
        targets, names = _map_classes(classes, class_map)
        changed = {old: new for old, new in zip(classes, targets, strict=True) if new != old}
        record |= {"class_map": changed} if changed else {}
    if limit_classes is not None:
        names = _limit_classes(names, limit_classes)
        record["limit_classes"] = len(names)
    numbers = {name: label for label, name in enumerate(names)}
    labels = tuple(None if target is None else numbers.get(target) for target in targets)
    return Selection(names, labels, limit_per_class, record)


def _check_distinct(classes: tuple[str, ...]) -> None:
    """Classes are chosen by name; without a choice two of them may share one, as ImageNet's "crane" do."""
    if len(set(classes)) < len(classes):
        name = next(name for name in classes if classes.count(name) > 1)
        raise UserError(
            f"--class-map, --limit-classes: {classes.count(name)} classes of the source are called {name!r}",
            "Classes are chosen by their names. Give each one of its own in the source.",
        )


def _map_classes(classes: tuple[str, ...], path: Path) -> tuple[list[str | None], tuple[str, ...]]:
    """The new name of each class, and the new names in label order."""
    place = f"--class-map {path}"
    pairs, is_ordered = _read_pairs(path)
    mapping: dict[str, str | None] = {}
    for old, new in pairs:
        if old in mapping:
            raise UserError(f"{place}: class {old!r} is listed twice", "Each class gets one new name.")
        if old != _EVERY_OTHER:
            _check_known(place, old, classes)
        mapping[old] = old if new == _EVERY_OTHER and old != _EVERY_OTHER else new
    missing = [name for name in classes if name not in mapping]
    if missing and _EVERY_OTHER not in mapping:
        raise UserError(
            f"{place}: {len(missing):,} of the source's {len(classes):,} classes are not listed, {_some(missing)}",
            "List them, or say what becomes of all others with the class *:",
            "'*': null drops them, '*': name merges them, '*': '*' keeps them.",
        )
    rest = mapping.get(_EVERY_OTHER)
    targets = [mapping.get(name, name if rest == _EVERY_OTHER else rest) for name in classes]
    used = {target for target in targets if target is not None}
    if not used:
        raise UserError(f"{place}: drops every class")
    listed = [new for new in mapping.values() if new in used]
    in_order = tuple(dict.fromkeys((*listed, *(name for name in targets if name in used))))
    return targets, in_order if is_ordered else tuple(sorted(used))


def _read_pairs(path: Path) -> tuple[list[tuple[str, str | None]], bool]:
    """(class, new name) as listed, and whether their order means something."""
    place = f"--class-map {path}"
    text = _read_text(place, path)
    try:
        if path.suffix.lower() == ".json":
            pairs, is_ordered = _from_json(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            pairs, is_ordered = _from_yaml(text)
        else:
            pairs, is_ordered = [_two_columns(line) for line in _lines(text)], True
    except RecursionError as error:
        raise UserError(f"{place}: is nested too deeply", *_FORMS) from error
    except ValueError as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}", *_FORMS) from error
    if not pairs:
        raise UserError(f"{place}: lists no classes", *_FORMS)
    return pairs, is_ordered


def _two_columns(line: str) -> tuple[str, str | None]:
    old, separator, new = line.partition("\t") if "\t" in line else line.partition(" ")
    if not separator or not new.strip():
        raise ValueError(f"line {line!r} has no second column")
    return old.strip(), None if new.strip() == "-" else new.strip()


class _Object(list):
    """A JSON object as its pairs: a dict would drop a key that comes twice."""


def _from_json(text: str) -> tuple[list[tuple[str, str | None]], bool]:
    document = json.loads(text, object_pairs_hook=_Object)
    if not isinstance(document, list):
        raise ValueError("is neither an object nor a list of pairs")
    pairs = []
    for pair in document:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], str | int | None):
            raise ValueError(f"{json.dumps(pair)} is no pair of class and new name")
        pairs.append((str(pair[0]), None if pair[1] is None else str(pair[1])))
    return pairs, not isinstance(document, _Object)


def _from_yaml(text: str) -> tuple[list[tuple[str, str | None]], bool]:
    """From YAML's nodes, not its values: those would make numbers, dates and booleans of names like 007 or no."""
    import yaml

    try:
        document = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML: {error}") from error
    if isinstance(document, yaml.MappingNode):
        nodes = [tuple(pair) for pair in document.value]
    elif isinstance(document, yaml.SequenceNode):
        nodes = [tuple(item.value) if isinstance(item, yaml.SequenceNode) else () for item in document.value]
    else:
        raise ValueError("is neither a mapping nor a list of pairs")
    pairs = []
    for pair in nodes:
        if len(pair) != 2 or not all(isinstance(node, yaml.ScalarNode) for node in pair):
            raise ValueError("an entry is no pair of class and new name")
        old, new = pair
        pairs.append((old.value, None if new.tag == "tag:yaml.org,2002:null" else new.value))
    return pairs, isinstance(document, yaml.SequenceNode)


def _limit_classes(names: tuple[str, ...], limit: str) -> tuple[str, ...]:
    place = f"--limit-classes {limit}"
    if limit.isascii() and limit.isdigit():
        if not 1 <= int(limit) <= len(names):
            raise UserError(f"{place}: there are {len(names):,} classes", f"Choose a number from 1 to {len(names):,}.")
        return names[: int(limit)]
    if "," not in limit and Path(limit).is_file():
        chosen = _lines(_read_text(place, Path(limit)))
    else:
        chosen = [name.strip() for name in limit.split(",") if name.strip()]
    if not chosen:
        raise UserError(f"{place}: names no classes")
    for name in chosen:
        _check_known(place, name, names)
    kept = set(chosen)
    if len(kept) < len(chosen):
        twice = next(name for name in chosen if chosen.count(name) > 1)
        raise UserError(f"{place}: class {twice!r} is named twice")
    return tuple(name for name in names if name in kept)


def _check_known(place: str, name: str, classes: Sequence[str]) -> None:
    if name not in classes:
        near = difflib.get_close_matches(name, classes, 3)
        raise UserError(
            f"{place}: no class {name!r} among the {len(classes):,} classes",
            f"Near misses: {', '.join(near)}." if near else f"There are {_some(classes)}.",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")


def _read_text(place: str, path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 text") from error


def _lines(text: str) -> list[str]:
    """Without blank lines and comments."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
