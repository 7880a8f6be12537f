"""What a source of images is. Adding one means one small module and one line.

A source lists its samples as a stream of `Entry` and later reads single images by their *locator*, a short
text that it chose itself: a path, ``archive:offset:size``, a row number. `shards prepare` writes the list to
disk once, shuffles it there, and hands each worker process the source (pickled) and its part of the list. So:

- `entries` must be a generator that keeps nothing per sample, in an order that depends only on the data;
- instances must pickle small: roots and options, no listings, no open files (open them in `read`, on demand);
- `read` returns the image's original bytes, never decoded and encoded again;
- where the data's own files give no single image, `stage` lays the images out first;
- anything wrong with the data is a `UserError` that names the file.

To add one: write ``shards/sources/<name>.py`` with a subclass of `Source`, register it in
``shards/sources/__init__.py``, and add a test that compares labels, counts and bytes with a small real input.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a source before it is read."""

    key: str
    """Unique in its split; see `make_key`."""
    label: int
    """Position in the source's `classes`."""
    locator: str
    """Where the source finds the image; may hold surrogate escapes, as file names do. Enters the digest that
    decides whether an interrupted run can go on, so it must not depend on where the data's root lies."""
    size: int = -1
    """Of the image in bytes, or -1 where only reading it would tell."""


class Source(ABC):
    """A labelled set of images in one or more splits."""

    name: str
    """On the command line and in index.json."""
    summary: ClassVar[str]
    """One line for --help."""
    classes: tuple[str, ...]
    """Names in label order, all different; see `make_distinct`."""
    titles: tuple[str, ...] | None = None
    """What a person calls each class, where `classes` are WordNet ids; "" for those without a name."""
    splits: tuple[str, ...]
    """Such as ("train", "val")."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the source's positional arguments and options for the command line; none by default."""
        return

    @classmethod
    @abstractmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        """Open the source from parsed options.

        Raises:
            UserError: if the data is not there or not in the expected layout.
        """

    @abstractmethod
    def entries(self, split: str) -> Iterator[Entry]:
        """All samples of a split, streamed in an order that depends only on the data."""

    @abstractmethod
    def read(self, locator: str) -> bytes:
        """The original bytes of one image.

        Raises:
            UserError: naming the file, if it cannot be read.
        """

    def stage(self, folder: Path, workers: int, console: Console) -> None:
        """Make the images readable one by one, where the source's own files do not allow that; nothing by default.

        Called once, after the listing and before the first `read`, when there are shards to write. What is left in
        `folder` by an interrupted run is found there by the next one, which should go on from it; all of it is
        removed when the data set is complete. The bytes that `read` returns must depend on none of this.

        Args:
            folder: the source's own, inside the output folder; need not exist.
            workers: number of processes to use.
            console: where progress goes.

        Raises:
            UserError: if there is not enough space, or the data are not what the listing said.
        """
        return

    def folders(self) -> tuple[Path, ...]:
        """Folders whose whole content is taken for data; the shards must not be written inside them."""
        return ()

    def place(self, locator: str) -> str:
        """How messages name the image at a locator."""
        return f"{self.name} {locator}"

    def options(self) -> dict[str, Any]:
        """Options that shape the result, for the record in index.json (JSON values, no absolute paths)."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What a person should know after the listing, such as files skipped; one line each."""
        return ()


def make_key(*parts: str) -> str:
    """A key that every reader of shards agrees on, from class and file names.

    Dots would end the key, slashes make folders of it, blanks break the ``.idx`` format; each run of those and of
    unprintable characters becomes one underscore.
    """
    text = "_".join(parts)
    kept = (character if _is_plain(character) else " " for character in text)
    return "_".join("".join(kept).split()) or "_"


_NOT_PLAIN = frozenset(" ./\\")
"""Printable, and still no part of a key; all other white space is unprintable."""


def _is_plain(character: str) -> bool:
    return character.isprintable() and character not in _NOT_PLAIN


def make_distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Class names that can be told apart: one that repeats gets its label, ``crane (134)`` and ``crane (517)``."""
    distinct = list(names)
    while len(counts := Counter(distinct)) < len(distinct):  # again, where a name with its label is there already
        distinct = [f"{name} ({label})" if counts[name] > 1 else name for label, name in enumerate(distinct)]
    return tuple(distinct)


def is_valid_key(key: str) -> bool:
    """Whether a key survives tar, webdataset's splitting rule and the ``.idx`` format."""
    return bool(key) and key.isprintable() and _NOT_PLAIN.isdisjoint(key)
