"""Image data sets in parquet files, as the Hugging Face hub keeps them: ``data/train-00000-of-00294.parquet``.

A row has an image, ``image: struct<bytes: binary, path: string>`` or plain ``binary``, and a label: a number whose
class names stand in the schema's metadata (``huggingface``: ``info.features.label.names``, a ``ClassLabel``), a
number without names, or a string.

Parquet packs many rows into one compressed block, so a single image cannot be read without its neighbours, and a
shuffled read would unpack each block hundreds of times. The images are therefore *staged*: before the shards are
written, each file is read once from beginning to end and its images are laid into a plain file (`shards.spool`)
in the state folder of the output, from where they are read in any order. This needs room for the images once
more until the shards are finished. Listing reads the labels and paths alone, which lie apart from the images.
"""

from __future__ import annotations

import argparse
import shutil
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from rich.console import Console

from shards.classes import note_first_class, number_found_classes
from shards.errors import UserError
from shards.labels import is_number
from shards.pool import run_tasks
from shards.progress import shard_progress
from shards.sources.base import Entry, Source, make_key
from shards.sources.parquet_columns import (
    Columns,
    Part,
    check_pyarrow,
    distinct_labels,
    find_columns,
    inspect_file,
    open_parquet,
    read_images,
    read_labels,
)
from shards.sources.parquet_files import find_splits
from shards.spool import is_spooled, read_spooled, remove_others, write_spool
from shards.table import hash_key


class Parquet(Source):
    """Images and labels in the columns of parquet files.

    Args:
        root: folder of a data set, or one parquet file.
        image_column: name of the column; found by itself if there is one choice.
        label_column: the same for the labels.

    Raises:
        UserError: if pyarrow or files are missing, files are damaged or differ in their columns, no or several
            columns could be meant, or images or labels are not in the files.
    """

    name = "parquet"
    summary = "Hugging Face image data sets: parquet files with an image and a label column"

    def __init__(self, root: Path, image_column: str | None = None, label_column: str | None = None) -> None:
        check_pyarrow()
        splits = find_splits(Path(root))
        first = next(iter(splits.values()))[0]
        with open_parquet(first) as file:
            self._columns = find_columns(first, file.schema_arrow, image_column, label_column)
        self._notes: dict[str, str] = {}
        self._files: list[Part] = []
        self._split_files: dict[str, range] = {}
        labels: dict[Any, Path] = {}
        for split, paths in splits.items():
            files = [inspect_file(path, first, self._columns) for path in paths]
            found = {label: file.path for file in files for label in distinct_labels(file.path, self._columns.label)}
            if found.keys() == {-1} and split != "train":  # such as the test split of ImageNet
                count = sum(file.rows for file in files)
                self._notes[split] = f"left out split {split!r}: its {count:,} images have no labels, all are -1"
                continue
            self._split_files[split] = range(len(self._files), len(self._files) + len(files))
            self._files += files
            labels |= found
        if "val" not in self._split_files and "test" in self._split_files:  # as with class folders
            self._split_files["val"] = self._split_files.pop("test")
        self.splits = tuple(self._split_files)
        rows = sum(file.rows for file in self._files)
        self.classes, self._numbers = _number_classes(self._columns, labels, rows)
        numbers = labels.keys() - {None} if self._numbers is None else self._numbers.values()
        if self._columns.names is None and (note := note_first_class(self.classes, min(numbers, default=0))):
            self._notes["classes"] = note
        self._staged = Path()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare ROOT, --image-column and --label-column."""
        parser.add_argument(
            "root", type=Path, metavar="ROOT", help="folder with data/train-….parquet and so on, or one parquet file"
        )
        parser.add_argument("--image-column", metavar="NAME", help="column of the images (default: found by type)")
        parser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: label, …)")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Parquet:
        """Find the files of each split and the two columns."""
        return cls(arguments.root, arguments.image_column, arguments.label_column)

    def options(self) -> dict[str, Any]:
        """The columns, named or found."""
        return {"image_column": self._columns.image, "label_column": self._columns.label}

    def notes(self) -> tuple[str, ...]:
        """Splits left out, and where keys could not be made from paths."""
        return tuple(self._notes.values())

    def entries(self, split: str) -> Iterator[Entry]:
        """Rows file by file; the locator is ``<file number>:<row>:<digest of the file's footer>``."""
        numbers = self._split_files[split]
        by_path = self._columns.path_leaf is not None and self._paths_differ(split)
        if not by_path:
            self._notes[split] = f"keys of split {split!r} are row numbers: its images have no paths that differ"
        first_row = 0
        for number in numbers:
            file = self._files[number]
            for row, (value, path) in enumerate(read_labels(file, self._columns)):
                key = _stem_key(path) if by_path else f"{split}_{first_row + row:08d}"
                label = value if self._numbers is None else self._numbers.get(value)
                if label is None or label == -1:
                    raise UserError(
                        f"{file.path}: row {row:,}: has no label: {self._columns.label} is {value}",
                        "Rows without a label cannot be trained on. Leave them out of the file.",
                    )
                yield Entry(key, label, f"{number}:{row}:{file.footer}")
            first_row += file.rows

    def stage(self, folder: Path, workers: int, console: Console) -> None:
        """Lay the images of each file into a spool, several files at a time; spools of an earlier run are kept.

        Raises:
            UserError: if there is not enough space, or naming file and row, if a row has no image bytes.
        """
        self._staged = folder
        folder.mkdir(parents=True, exist_ok=True)
        tasks = list(enumerate(self._files))
        done = {number for number, file in tasks if is_spooled(folder, number, file.origin(self._columns))}
        remove_others(folder, done)
        waiting = [task for task in tasks if task[0] not in done]
        if not waiting:
            return
        size = sum(file.image_bytes for _, file in waiting)
        _check_space(folder, size, resumed=bool(done))
        console.out(
            f"staging   {size / 1e6:,.1f} MB of images copied out of {len(waiting):,} parquet files; removed at the end"
            + (f" ({len(done):,} of {len(tasks):,} files are there from an earlier run)" if done else ""),
            highlight=False,
        )
        images = sum(file.rows for _, file in waiting)
        workers = min(workers, len(waiting))
        with shard_progress(console, "staging", len(tasks), images, workers, len(done), unit="files") as advance:
            for (_, file), _ in run_tasks(partial(_stage_file, folder, self._columns), waiting, workers):
                advance(file.rows)

    def read(self, locator: str) -> bytes:
        """The image's bytes, from the spool."""
        number, row, _ = locator.split(":")
        return read_spooled(self._staged, int(number), int(row))

    def place(self, locator: str) -> str:
        """The parquet file and the row, counted from 0."""
        number, row, _ = locator.split(":")
        return f"{self._files[int(number)].path}: row {int(row):,}"

    def _paths_differ(self, split: str) -> bool:
        hashes = array("Q")
        for number in self._split_files[split]:
            for _, path in read_labels(self._files[number], self._columns):
                if not path:
                    return False
                hashes.append(hash_key(_stem_key(path)))
        return len(np.unique(np.frombuffer(hashes, np.uint64))) == len(hashes)


def _check_space(folder: Path, staged: int, resumed: bool) -> None:
    needed = staged if resumed else 2 * staged  # of a resumed run, some shards may be written as well
    free = shutil.disk_usage(folder).free
    if needed > free:
        also = "" if resumed else f", and as much for the shards: {needed / 1e9:,.1f} GB in all"
        raise UserError(
            f"{folder}: not enough space: staging needs {staged / 1e9:,.1f} GB{also}",
            f"{free / 1e9:,.1f} GB are free. Free some space or choose a folder on another disk.",
            "Parquet cannot be read image by image, so the images are laid out here first, and removed at the end.",
        )


def _stage_file(folder: Path, columns: Columns, task: tuple[int, Part]) -> None:
    number, file = task
    write_spool(folder, number, file.origin(columns), read_images(file, columns))


def _number_classes(
    columns: Columns, labels: dict[Any, Path], rows: int
) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    """Class names in label order and, where labels are strings, the number of each.

    Args:
        columns: of the files.
        labels: those that occur, each with a file that has it.
        rows: of all files.
    """
    present = labels.keys() - {None}
    numbers: dict[Any, int] | None = None
    if columns.text_labels:
        if not all(map(is_number, present)):
            names = tuple(sorted(present))
            return names, {name: number for number, name in enumerate(names)}
        numbers = {text: int(text) for text in present}  # class numbers that were written as text
    elif columns.names:
        return columns.names, None
    highest = max(present, key=numbers.__getitem__ if numbers is not None else None, default=None)
    if highest is None:
        return (), numbers
    mend = "Give the column of the labels with --label-column."
    return number_found_classes(str(labels[highest]), int(highest), rows, mend), numbers


def _stem_key(path: str | None) -> str:
    return make_key(PurePath(path or "").stem)
