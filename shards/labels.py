"""Where the label of a sample stands, and what its text means.

Shards made by this package, by timm and by most others hold the class number in ``<key>.cls``. Others hold it in a
field of ``<key>.json`` or in another small text file, as a number or as a name. Labels are read as text or as JSON,
never unpickled, and never at a size that no label has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from shards.errors import UserError
from shards.idx import Component, IndexedSample
from shards.images import IMAGE_EXTENSIONS
from shards.manifest import CLASSES_NAME, INDEX_NAME, to_json

DEFAULT_RULE = "cls"
RULE_HELP = (
    "where the label of a sample stands: an extension such as cls, txt or cls.txt, or json:FIELD for a field of its "
    ".json (a.b for a field inside a field); a class number, or a name listed in the classes"
)
"""For --help of the commands that take a rule."""

_MAX_TEXT_BYTES = 1024
_MAX_JSON_BYTES = 1 << 20
_UNREADABLE = frozenset(("pyd", "pickle", "pkl", "pt", "pth", "npy", "npz", "ten", "tb", "mp", "msg", "cbor"))
"""Extensions of serialised objects, the first ones of which run code when they are loaded."""
_USUAL_FIELDS = ("label", "class", "cls", "target", "category", "wnid", "synset")
_SHOWN = 6
_SEVERAL = -1


@dataclass(frozen=True)
class Labels:
    """How the samples of a data set are labelled; pickles small.

    Args:
        rule: an extension, or ``EXTENSION:FIELD`` for a field of a JSON component; see `RULE_HELP`.
        classes: names in label order, among which a label that is no number is looked up; None refuses names.

    Raises:
        UserError: if the rule names a component that cannot hold a readable label.
    """

    rule: str = DEFAULT_RULE
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        place = f"--label {self.rule}"
        last = self.extension.rpartition(".")[2]
        if not self.extension or (":" in self.rule and not self.fields):
            raise UserError(f"{place}: must be an extension, such as cls or txt, or json:FIELD")
        if last in _UNREADABLE:
            raise UserError(
                f"{place}: .{last} files hold Python or binary objects, which are not loaded",
                "Loading some of them runs code. Make shards with a .cls, or with the label in a .json.",
            )
        if last in IMAGE_EXTENSIONS:
            raise UserError(f"{place}: a .{last} holds an image, not a label")
        if last == "json" and not self.fields:
            raise UserError(f"{place}: say which field of the .json: --label {self.extension}:FIELD")
        if last != "json" and self.fields:
            raise UserError(f"{place}: only a .json has fields", f"Use --label {self.extension}, or json:FIELD.")

    @classmethod
    def from_record(cls, root: Path | str, record: dict[str, Any], classes: tuple[str, ...] | None) -> Self:
        """The labels of a data set as `shards index` recorded them in index.json; by default those of ``.cls``.

        Args:
            root: folder or URL of the data set, for messages.
            record: of its index.
            classes: of its classes.json; None if that cannot be read.

        Raises:
            UserError: if the record is not of that form, or names were looked up in other classes than `classes`.
        """
        section = record.get("label")
        if section is None:
            return cls()
        try:
            rule, digest = str(section["rule"]), section.get("classes_sha256")
        except (TypeError, KeyError, AttributeError):
            raise UserError(
                f"{root}/{INDEX_NAME}: label rule {section!r} is not one that shards index writes",
                f"Write it again: shards index {root} --label RULE",
            ) from None
        if digest is not None and classes is not None and digest != _digest(classes):
            raise UserError(
                f"{root}/{CLASSES_NAME}: has changed since the names in the shards were looked up in it",
                f"Restore it, or look them up again with: shards index {root}",
            )
        return cls(rule, classes if digest else None)

    def record(self, by_name: bool) -> dict[str, Any]:
        """What index.json must say to find the same labels again: nothing for numbers in ``.cls``.

        Args:
            by_name: whether some label was a name, so that it depends on the classes.
        """
        if not by_name:
            return {} if self.rule == DEFAULT_RULE else {"label": {"rule": self.rule}}
        return {"label": {"rule": self.rule, "classes_sha256": _digest(self.classes or ())}}

    @cached_property
    def extension(self) -> str:
        """Of the component that holds the label, in lower case and without its first dot."""
        return self.rule.partition(":")[0].removeprefix(".").lower()

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names to follow into a JSON document; empty for a text."""
        return tuple(filter(None, self.rule.partition(":")[2].split(".")))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for number, name in enumerate(self.classes or ()):
            numbers[name] = _SEVERAL if name in numbers else number
        return numbers

    def text(self, place: str, descriptor: int, sample: IndexedSample) -> str:
        """The label of a sample as it is written.

        Args:
            place: shard and key, for messages.
            descriptor: of the open tar.
            sample: where its components lie.

        Raises:
            UserError: if there is no such component or field, or it is larger than any label.
        """
        for component in sample.components:
            if component.extension.lower() == self.extension:
                break
        else:
            raise self._absent(place, descriptor, sample)
        limit = _MAX_JSON_BYTES if self.fields else _MAX_TEXT_BYTES
        if component.size > limit:
            raise UserError(
                f"{place}: label in {component.name} has {component.size:,} bytes, at most {limit:,} are read"
            )
        return self.parse(place, os.pread(descriptor, component.size, component.offset))

    def parse(self, place: str, data: bytes) -> str:
        """The label in the content of the component that holds it, as it is written.

        Raises:
            UserError: if it is larger than any label, no text, or has no such field.
        """
        limit = _MAX_JSON_BYTES if self.fields else _MAX_TEXT_BYTES
        if len(data) > limit:
            raise UserError(f"{place}: label ({self.source}) has {len(data):,} bytes, at most {limit:,} are read")
        if self.fields:
            return self._field(f"{place}.{self.extension}", data)
        try:
            return data.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"{place}: label {data[:40]!r} ({self.source}) is no text") from None

    def number(self, place: str, text: str) -> int:
        """The class number that a label's text means.

        Raises:
            UserError: if it is neither a number nor the name of a class, or both, for different classes.
        """
        named = self._numbers.get(text)
        if named == _SEVERAL:
            raise UserError(
                f"{place}: label {text!r} ({self.source}) is the name of several classes",
                "Give every class a name of its own with --classes FILE, such as the WordNet ids of ImageNet.",
            )
        if not is_number(text):
            if named is not None:
                return named
            raise UserError(f"{place}: label {text[:80]!r} ({self.source}) is no class number", *self._no_name())
        number = int(text)
        if named is not None and named != number:
            raise UserError(
                f"{place}: label {text!r} ({self.source}) is a class number, and also the name of class {named}",
                "Rename the classes so that a name never is the number of another class.",
            )
        return number

    @property
    def source(self) -> str:
        """The rule in words: ``.cls``, or ``field label of .json``."""
        return f"field {'.'.join(self.fields)} of .{self.extension}" if self.fields else f".{self.extension}"

    def _no_name(self) -> tuple[str, ...]:
        classes = self.classes or ()
        return (
            f"Nor is it one of the {len(classes):,} classes ({', '.join(classes[:3])}, …)."
            if classes
            else "A name needs a list of classes to be looked up in.",
            "Give the list with --classes FILE, or take it from the labels with --classes from-labels.",
        )

    def _field(self, place: str, data: bytes) -> str:
        value = _parse_json(place, data)
        for name in self.fields:
            if isinstance(value, dict) and name in value:
                value = value[name]
            else:
                there = ", ".join(f"{path} ({json.dumps(found)})" for path, found in _scalar_fields(value))
                raise UserError(
                    f"{place}: has no field {name!r} (--label {self.rule})",
                    f"There: {there}." if there else "There are no fields with a number or a short text.",
                )
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # tables with missing values are written with 3.0 for 3
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return str(value).strip()
        raise UserError(
            f"{place}: field {'.'.join(self.fields)} is neither a whole number nor a text: {str(value)[:80]}"
        )

    def _absent(self, place: str, descriptor: int, sample: IndexedSample) -> UserError:
        names = " and ".join(component.name for component in sample.components)
        choices = list(_suggest(place, descriptor, sample))
        return UserError(
            f"{place}: has no label (.{self.extension}); it consists of {names}",
            *(
                ("Say where the label stands, with one of:", *(f"  --label {choice}" for choice in choices[:_SHOWN]))
                if choices
                else (f"Every sample needs one image and one .{self.extension} with its class number.",)
            ),
            "Members of one sample must be neighbours in the tar; tar --sort=name makes them so.",
        )


def read_sample(
    tar: Path, descriptor: int, sample: IndexedSample, labels: Labels, image_extension: str | None = None
) -> tuple[Component, str, int]:
    """Find the image of a sample and read its label: (image, label as written, class number).

    Args:
        tar: for messages.
        descriptor: of the open tar.
        sample: where its components lie.
        labels: how it is labelled.
        image_extension: of the component that is the image, in lower case; by default the one with an extension of
            images, of which there must not be two.

    Raises:
        UserError: if it has no image or several, no label, two components with one extension, or a label that names
            no class.
    """
    images = []
    place = f"{tar}: key {sample.key}"
    seen = set()
    for component in sample.components:
        extension = component.extension.lower()
        if extension in seen:
            raise UserError(
                f"{place}: two members of this key have the extension .{extension}",
                "webdataset refuses such shards as well. Make the shard again with a key of its own per sample.",
            )
        seen.add(extension)
        if extension == image_extension or (image_extension is None and extension in IMAGE_EXTENSIONS):
            images.append(component)
    if not images:
        names = " and ".join(component.name for component in sample.components)
        wanted = f" (.{image_extension})" if image_extension else ""
        raise UserError(
            f"{place}: has no image{wanted}; it consists of {names}",
            f"Every sample needs one image and one {labels.source} with its class.",
            "Members of one sample must be neighbours in the tar; tar --sort=name makes them so.",
        )
    if len(images) > 1:
        extensions = [component.extension.lower() for component in images]
        raise UserError(
            f"{place}: has {len(images)} images: .{' and .'.join(extensions)}",
            "Readers would take one or the other. Write shards that hold one alone, saying which:",
            f"shards prepare webdataset DIR OUT --image {extensions[0]}",
        )
    image = images[0]
    if image.size >= 2**32:
        raise UserError(f"{place}: an image of {image.size:,} bytes")
    text = labels.text(place, descriptor, sample)
    return image, text, labels.number(place, text)


def recorded_rule(record: dict[str, Any]) -> str | None:
    """The label rule that the record of an index holds, if it does."""
    section = record.get("label")
    return section["rule"] if isinstance(section, dict) and isinstance(section.get("rule"), str) else None


def is_number(text: str) -> bool:
    """Whether a label's text is a class number: digits that make a non-negative 32-bit integer."""
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**31


def _suggest(place: str, descriptor: int, sample: IndexedSample) -> Iterator[str]:
    """Rules that would find something in this sample, each with what it would find."""
    for component in sample.components:
        extension = component.extension.lower()
        last = extension.rpartition(".")[2]
        if last in IMAGE_EXTENSIONS or last in _UNREADABLE:
            continue
        if last == "json":
            yield from _suggest_fields(place, descriptor, component)
        elif component.size <= _MAX_TEXT_BYTES:
            text = os.pread(descriptor, component.size, component.offset).decode("utf-8", "replace").strip()
            yield f"{extension}   ({text[:40]!r}{'…' if len(text) > 40 else ''})"


def _suggest_fields(place: str, descriptor: int, component: Component) -> Iterator[str]:
    if component.size > _MAX_JSON_BYTES:
        return
    try:
        document = _parse_json(place, os.pread(descriptor, component.size, component.offset))
    except UserError:
        return
    for path, value in _scalar_fields(document):
        yield f"{component.extension.lower()}:{path}   ({json.dumps(value, ensure_ascii=False)})"


def _parse_json(place: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no valid JSON: {error}") from None


def _scalar_fields(document: Any, prefix: str = "") -> list[tuple[str, int | str]]:
    """Whole numbers and short texts in a document and one level below, those with a label's usual names first."""
    found: list[tuple[str, int | str]] = []
    for name, value in document.items() if isinstance(document, dict) else ():
        if isinstance(value, dict) and not prefix:
            found += _scalar_fields(value, f"{name}.")
        elif (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and len(value) <= 40):
            found.append((prefix + name, value))
    return sorted(found, key=lambda field: not any(usual in field[0].lower() for usual in _USUAL_FIELDS))


def _digest(classes: tuple[str, ...]) -> str:
    return hashlib.sha256(to_json(classes)).hexdigest()
