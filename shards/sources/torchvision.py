"""Labelled sets of images that torchvision knows: ``shards prepare torchvision:CIFAR10 ROOT OUT``.

What an item of such a set is comes out by loading it. Torchvision's sets open every picture with
``PIL.Image.open``; while an item is loaded here, that function only notes what it is given and decodes nothing. A
set that opens one picture per item keeps it as a file (or as encoded bytes), and exactly those bytes go into the
shards. A set that opens none keeps arrays of pixels (MNIST, CIFAR, SVHN, STL10, USPS, …), which become PNG files,
without loss. The first item of each split is also loaded as usual, to see that it shows the noted picture.

The PNG files are stored, not deflated: arrays are kept for pictures of at most 96 × 96 pixels, where deflating
gains little, and deflated bytes would depend on the build of zlib. A digest of each stands in the listing, so a
difference between two machines is an error and never a mixed data set.

Some sets come as pickles (CIFAR): torchvision unpickles them, after checking their MD5 against its own list. LSUN is
refused, as torchvision unpickles a file for it that it finds in the working folder, unchecked. Torchvision holds the
list of a split in memory, and arrays as well: once in the process that lists them and once in each worker.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shards.classes import number_found_classes
from shards.errors import UserError
from shards.files import read_file
from shards.sources.base import Entry, Source, make_key
from shards.sources.torchvision_class import (
    Arguments,
    cannot_open,
    check_argument,
    construct,
    constructor_parameters,
    find_class,
    find_splits,
    open_dataset,
    parse_argument,
)
from shards.sources.torchvision_items import (
    check_same_picture,
    class_names,
    describe,
    is_picture,
    locate_picture,
    noting_pictures,
    whole_number,
)


class Torchvision(Source):
    """A data set class of torchvision.

    Args:
        dataset: name of a class in ``torchvision.datasets``.
        root: the folder that the class calls root.
        arguments: further arguments of its constructor.
        splits: arguments by split, where they cannot be told from the constructor's ``train`` or ``split``.
        download: let torchvision download what is missing.

    Raises:
        UserError: if there is no such class, the data are not there, an argument is unknown, or the class is
            not one of labelled images.
    """

    name = "torchvision:<Class>"
    summary = "a data set of torchvision.datasets, such as torchvision:CIFAR10, already downloaded to ROOT"

    def __init__(
        self,
        dataset: str,
        root: Path,
        arguments: Mapping[str, Any] | None = None,
        splits: Mapping[str, Mapping[str, Any]] | None = None,
        download: bool = False,
    ) -> None:
        self.name = f"torchvision:{dataset}"
        self.root = Path(root)
        self._dataset = dataset
        self._chosen = dict(arguments or {}), {split: dict(given) for split, given in (splits or {}).items()}
        open_dataset.cache_clear()
        parameters = constructor_parameters(dataset, find_class(dataset))
        common: dict[str, Any] = dict(arguments or {})
        for name in [*common, *(name for given in (splits or {}).values() for name in given)]:
            check_argument(self.name, name, parameters)
        if "download" in parameters:
            common["download"] = False  # said in any case: SEMEION's own default is to download
        elif download:
            raise UserError(f"--download: torchvision cannot download {dataset}")
        self._arguments: dict[str, Arguments] = {}
        self._notes: list[str] = []
        self._as_png = False
        for split, given in (splits or find_splits(dataset, self.root, parameters, common, download)).items():
            if download:
                construct(dataset, self.root, {**common, **given, "download": True})
            chosen = tuple(sorted({**common, **given}.items()))
            if self._is_labelled(split, chosen, required=split == "train" or splits is not None):
                self._arguments[split] = chosen
        if "val" not in self._arguments and "test" in self._arguments:
            self._arguments["val"] = self._arguments.pop("test")
        self.splits = tuple(self._arguments)
        self.classes, self.titles = self._name_classes()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare ROOT, --download, --arg and --split; the class comes first, split off by the command line."""
        parser.add_argument("dataset", metavar="<Class>", help=argparse.SUPPRESS)
        parser.add_argument("root", type=Path, metavar="ROOT", help="torchvision's root folder of the data set")
        parser.add_argument("--download", action="store_true", help="let torchvision download what is missing")
        parser.add_argument(
            "--arg",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a further argument of the class, such as split=letters for EMNIST; may be repeated",
        )
        parser.add_argument(
            "--split",
            action="append",
            default=[],
            metavar="SPLIT:NAME=VALUE",
            help="the argument that makes a split, such as train:version=2021_train for INaturalist; may be repeated "
            "(default: found from the class's arguments train or split)",
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Torchvision:
        """Parse the arguments of the class."""
        splits: dict[str, dict[str, Any]] = {}
        for text in arguments.split:
            split, _, pair = text.partition(":")
            argument = parse_argument(pair)
            if argument is None or not re.fullmatch("[a-z]+", split):
                raise UserError(f"--split {text}: must be SPLIT:NAME=VALUE, such as train:split=extra")
            splits.setdefault(split, {}).update([argument])
        given: dict[str, Any] = {}
        for text in arguments.arg:
            argument = parse_argument(text)
            if argument is None:
                raise UserError(f"--arg {text}: must be NAME=VALUE, such as split=letters")
            given.update([argument])
        return cls(arguments.dataset, arguments.root, given, splits or None, arguments.download)

    def options(self) -> dict[str, Any]:
        """The arguments of the class, and whether its pictures were arrays."""
        options: dict[str, Any] = {"encoding": "png"} if self._as_png else {}
        arguments, splits = json.loads(json.dumps(self._chosen))  # with lists for tuples, as they are read back
        return options | ({"arguments": arguments} if arguments else {}) | ({"splits": splits} if splits else {})

    def folders(self) -> tuple[Path, ...]:
        """The root, where every folder in it is a class."""
        return (self.root,) if self._dataset == "ImageFolder" else ()

    def notes(self) -> tuple[str, ...]:
        """Splits left out, and what became of arrays."""
        return tuple(self._notes)

    def entries(self, split: str) -> Iterator[Entry]:
        """Items by index; the locator is ``file/<path below the root>`` or ``item/<split>/<index>/<digest>``."""
        dataset = self._open(split)
        for index in range(len(dataset)):
            source, label = self._item(split, index)
            if isinstance(source, Path):
                path = Path(os.path.relpath(source, self.root))
                yield Entry(make_key(str(path.with_suffix(""))), label, f"file/{path}", _file_size(source))
            else:
                yield Entry(f"{split}_{index:06d}", label, f"item/{split}/{index}/{_digest(source)}", len(source))

    def read(self, locator: str) -> bytes:
        """The file's bytes, or the item's picture as PNG; the set is opened once per process."""
        kind, _, rest = locator.partition("/")
        if kind == "file":
            path = self.root / rest
            try:
                return read_file(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        split, index, digest = rest.split("/")
        source, _ = self._item(split, int(index))
        if isinstance(source, Path) or _digest(source) != digest:
            raise UserError(
                f"{self.place(locator)}: is not the picture that was listed",
                "The data set changed, or this machine's Pillow writes PNG files differently. Use one version of "
                "both, and begin again in another folder.",
            )
        return source

    def place(self, locator: str) -> str:
        """The file's path, or the number of the item."""
        kind, _, rest = locator.partition("/")
        if kind == "file":
            return str(self.root / rest)
        split, index, _ = rest.split("/")
        return f"{self.name}: {split} item {int(index):,}"

    def _open(self, split: str) -> Any:
        return open_dataset(self._dataset, self.root, self._arguments[split])

    def _item(self, split: str, index: int) -> tuple[Path | bytes, int]:
        """Where item `index` has its picture, a file or encoded bytes, and its label."""
        place = f"{self.name}: {split} item {index:,}"
        try:
            with noting_pictures() as noted:
                item = self._open(split)[index]
            source = locate_picture(place, item, noted)
        except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{place}: cannot be loaded: {error}") from error
        label = whole_number(item[1])
        if label is None or label < 0:
            raise UserError(f"{place}: has no label: {describe(item[1])}")
        return source, label

    def _is_labelled(self, split: str, arguments: Arguments, required: bool) -> bool:
        """Check what an item of the split is, and that its picture is the one noted."""
        dataset = open_dataset(self._dataset, self.root, arguments)
        try:
            if not len(dataset):
                raise UserError(f"{self.name}: split {split!r} has no images")
            with noting_pictures() as noted:
                item = dataset[0]
            shown = dataset[0]
        except UserError:
            raise
        except Exception as error:
            raise cannot_open(self.name, self.root, error) from error
        place = f"{self.name}: {split} item 0"
        if not isinstance(item, tuple) or len(item) != 2 or not is_picture(item[0]):
            parts = item if isinstance(item, tuple) else (item,)
            raise UserError(
                f"{self.name}: is not a set of labelled images: an item is ({', '.join(map(describe, parts))})",
                "An item must be one image and one class number.",
            )
        label = whole_number(item[1])
        if label is None or label < 0:
            if not required and (item[1] is None or label == -1):
                self._notes.append(f"left out split {split!r}: its images have no labels")
                return False
            raise UserError(
                f"{self.name}: is not a set of labelled images: the target of an item is {describe(item[1])}",
                "An item must be one image and one class number. Some classes give another target with --arg.",
            )
        source = locate_picture(place, item, noted)
        if noted:
            check_same_picture(place, source, shown[0])
        elif not self._as_png:
            self._as_png = True
            self._notes.append("the data set keeps arrays of pixels: they are written as PNG, without loss")
        return True

    def _name_classes(self) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Class names, WordNet ids where there are any with the names as titles; numbers without names."""
        found = {split: class_names(self._open(split)) for split in self.splits}
        names, titles = found["train"] if "train" in found else next(iter(found.values()))
        for split, (others, _) in found.items():
            if others != names:
                raise UserError(f"{self.name}: split {split!r} has other classes than the first split")
        if not names:
            items = [(split, i) for split in self.splits for i in range(len(self._open(split)))]
            highest, split, index = max((self._item(split, i)[1], split, i) for split, i in items)
            names = number_found_classes(
                f"{self.name}: {split} item {index:,}",
                highest,
                len(items),
                "Some classes of torchvision give another target with --arg.",
            )
        return names, titles


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a file")
    return status.st_size
