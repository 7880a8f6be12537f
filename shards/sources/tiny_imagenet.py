"""Tiny ImageNet: 200 classes, 64×64 pixels, as the Stanford course CS231n publishes it.

``wnids.txt`` lists the classes and ``words.txt`` what they are called. Training images lie in
``train/<wnid>/images`` beside ``<wnid>_boxes.txt``, which lists them. Validation images lie together in
``val/images``, their labels in ``val/val_annotations.txt``; the test images have no labels and are left out. The
zip is read as it is, or the folder unpacked from it.
"""

from __future__ import annotations

import argparse
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import read_file
from shards.images import IMAGE_EXTENSIONS
from shards.sources.base import Entry, Source, make_key
from shards.sources.wordnet import WNID, look_up_titles

_FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"
_AGAIN = "Unpack or download the data again."
_MAX_FILE_BYTES = 64 << 20
"""Of any file in the zip; its largest, words.txt, has a few MB."""


class TinyImageNet(Source):
    """Training and validation images of Tiny ImageNet.

    Args:
        root: the folder ``tiny-imagenet-200``, the one it lies in, or the zip.

    Raises:
        UserError: if it is not of this layout.
    """

    name = "tiny-imagenet"
    summary = "Tiny ImageNet (tiny-imagenet-200) as published, folder or zip"
    splits = ("train", "val")

    def __init__(self, root: Path) -> None:
        root = Path(root)
        self._files: _Files = _Folder(root) if root.is_dir() else _Zip(root)
        self.classes = self._read_classes()
        self.titles = look_up_titles(self.classes, self._read_words())
        self._annotations = self._read_annotations()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare ROOT."""
        parser.add_argument("root", type=Path, metavar="ROOT", help=f"folder {_FOLDER}, or {_FOLDER}.zip")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> TinyImageNet:
        """Open the folder or the zip."""
        return cls(arguments.root)

    def __getstate__(self) -> dict[str, Any]:
        """For the workers, which only read: without the labels."""
        return {**self.__dict__, "_annotations": {}, "titles": None}

    def folders(self) -> tuple[Path, ...]:
        """The folders of the splits, if this is not the zip."""
        root = self._files.root
        return (root / "train", root / "val") if root.is_dir() else ()

    def notes(self) -> tuple[str, ...]:
        """That the test images are left out."""
        count = len(self._files.listing("test/images"))
        return (f"left out {count:,} test images, which have no labels",) if count else ()

    def entries(self, split: str) -> Iterator[Entry]:
        """Images by class and name, those for validation by name; the locator is the path."""
        return self._train_entries() if split == "train" else self._val_entries()

    def read(self, locator: str) -> bytes:
        """The file's bytes."""
        return self._files.read(locator)

    def place(self, locator: str) -> str:
        """The file's path, or the zip and the path in it."""
        return self._files.place(locator)

    def _train_entries(self) -> Iterator[Entry]:
        for label, wnid in enumerate(self.classes):
            folder = f"train/{wnid}/images"
            images = self._images(folder)
            if not images:
                raise UserError(f"{self.place(folder)}: holds no image of this class, which is in wnids.txt", _AGAIN)
            boxes = f"train/{wnid}/{wnid}_boxes.txt"
            listed = self._files.read_lines(boxes) if self._files.has(boxes) else []
            self._check_all_there(folder, images, [line.partition("\t")[0] for line in listed], boxes)
            for name, size in images.items():
                stem = name.rpartition(".")[0]
                key = make_key(stem) if stem.startswith(f"{wnid}_") else make_key(wnid, stem)
                yield Entry(key, label, f"{folder}/{name}", size)

    def _val_entries(self) -> Iterator[Entry]:
        folder = "val/images"
        images = self._images(folder)
        self._check_all_there(folder, images, list(self._annotations), _ANNOTATIONS)
        numbers = {wnid: number for number, wnid in enumerate(self.classes)}
        for name, size in images.items():
            if name not in self._annotations:
                raise UserError(f"{self.place(f'{folder}/{name}')}: has no label in {_ANNOTATIONS}")
            label = numbers[self._annotations[name]]
            yield Entry(make_key(name.rpartition(".")[0]), label, f"{folder}/{name}", size)

    def _images(self, folder: str) -> dict[str, int]:
        """Size by name of the images in a folder, sorted; hidden files are left out."""
        images = {name: size for name, size in self._files.listing(folder) if not name.startswith(".")}
        for name in images:
            stem, _, extension = name.rpartition(".")
            if not stem or extension.lower() not in IMAGE_EXTENSIONS:
                raise UserError(f"{self.place(f'{folder}/{name}')}: not an image by its name", "Move it away.")
        return images

    def _check_all_there(self, folder: str, images: dict[str, int], listed: list[str], by: str) -> None:
        missing = [name for name in listed if name not in images]
        if missing:
            raise UserError(
                f"{self.place(f'{folder}/{missing[0]}')}: no such image, but it is listed in {by}",
                f"{len(missing):,} of the {len(listed):,} images listed there are missing. {_AGAIN}",
            )

    def _read_classes(self) -> tuple[str, ...]:
        place = self.place("wnids.txt")
        if not self._files.has("wnids.txt"):
            raise UserError(f"{place}: no such file; it lists the classes", f"Give {_FOLDER}, folder or zip.")
        wnids = [line.strip() for line in self._files.read_lines("wnids.txt")]
        for wnid in wnids:
            if not WNID.fullmatch(wnid):
                raise UserError(f"{place}: {wnid[:40]!r} is no WNID")
        if not wnids:
            raise UserError(f"{place}: lists no classes", _AGAIN)
        if len(set(wnids)) < len(wnids):
            raise UserError(f"{place}: lists a class twice", _AGAIN)
        return tuple(sorted(wnids))

    def _read_words(self) -> dict[str, str]:
        """What classes are called; ``words.txt`` has all of WordNet."""
        lines = self._files.read_lines("words.txt") if self._files.has("words.txt") else []
        pairs = (line.partition("\t") for line in lines)
        wanted = set(self.classes)
        return {wnid: words.strip() for wnid, _, words in pairs if wnid in wanted}

    def _read_annotations(self) -> dict[str, str]:
        """WNID by file name: lines are file, WNID and bounding box, separated by tabs."""
        place = self.place(_ANNOTATIONS)
        if not self._files.has(_ANNOTATIONS):
            raise UserError(
                f"{place}: no such file; it has the labels of the validation images",
                f"{_AGAIN} If those were sorted into folders of classes, use:",
                "shards prepare imagefolder --train ROOT/train --val ROOT/val OUT",
            )
        known = set(self.classes)
        annotations: dict[str, str] = {}
        for number, line in enumerate(self._files.read_lines(_ANNOTATIONS), 1):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0].strip()
            if not name or wnid not in known:
                raise UserError(f"{place}: line {number}: {wnid[:40]!r} is no class of wnids.txt")
            if name in annotations:
                raise UserError(f"{place}: line {number}: {name} has a label already, {annotations[name]}")
            annotations[name] = wnid
        return annotations


class _Files(ABC):
    """The files of one Tiny ImageNet, by their path in it; `root` is its folder or the zip."""

    root: Path

    @abstractmethod
    def listing(self, folder: str) -> list[tuple[str, int]]:
        """Names and sizes of the files in a folder, sorted; none if there is no such folder."""

    @abstractmethod
    def has(self, path: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """A file's bytes."""

    @abstractmethod
    def place(self, path: str) -> str:
        """How messages name a file."""

    def read_lines(self, path: str) -> list[str]:
        """The lines of a text that are not empty."""
        try:
            return [line for line in self.read(path).decode("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{self.place(path)}: is no UTF-8 text", _AGAIN) from None


class _Folder(_Files):
    def __init__(self, root: Path) -> None:
        self.root = next((path for path in (root, root / _FOLDER) if (path / "wnids.txt").is_file()), root)

    def listing(self, folder: str) -> list[tuple[str, int]]:
        try:
            with os.scandir(self.root / folder) as items:
                found = []
                for item in items:
                    if not item.is_file() and not item.name.startswith("."):
                        raise UserError(f"{item.path}: not a file", "Move it away.")
                    found.append((item.name, item.stat().st_size))
                return sorted(found)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{error.filename or self.place(folder)}: cannot be read: {error.strerror}") from error

    def has(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read(self, path: str) -> bytes:
        try:
            return read_file(self.root / path, _MAX_FILE_BYTES)
        except OSError as error:
            raise UserError(f"{self.root / path}: cannot be read: {error.strerror}") from error

    def place(self, path: str) -> str:
        return str(self.root / path)


class _Zip(_Files):
    """Members are looked up and read, never extracted; each process opens the zip for itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._zip: zipfile.ZipFile | None = None
        inside = [name for name in self._open().namelist() if name.rpartition("/")[2] == "wnids.txt"]
        if len(inside) != 1:
            raise UserError(f"{root}: holds {len(inside)} files wnids.txt; {_FOLDER}.zip has one", _AGAIN)
        self._prefix = inside[0].removesuffix("wnids.txt")
        self._folders: dict[str, list[tuple[str, int]]] = {}
        for info in self._open().infolist():
            folder, _, name = info.filename.removeprefix(self._prefix).rpartition("/")
            if name and info.filename.startswith(self._prefix):
                self._folders.setdefault(folder, []).append((name, info.file_size))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_prefix": self._prefix, "_zip": None, "_folders": {}}

    def listing(self, folder: str) -> list[tuple[str, int]]:
        return sorted(self._folders.get(folder, []))

    def has(self, path: str) -> bool:
        return self._prefix + path in self._open().NameToInfo

    def read(self, path: str) -> bytes:
        try:
            info = self._open().getinfo(self._prefix + path)
            if info.file_size > _MAX_FILE_BYTES:
                raise UserError(f"{self.place(path)}: {info.file_size:,} bytes; no file of Tiny ImageNet is that large")
            with self._open().open(info) as file:
                return file.read(info.file_size)  # with a limit, a member cannot unpack to more than it announces
        except KeyError:
            raise UserError(f"{self.place(path)}: no such file") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise UserError(f"{self.place(path)}: cannot be read: {error}", _AGAIN) from error

    def place(self, path: str) -> str:
        return f"{self.root}: {path}"

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            if self.root.exists() and not self.root.is_file():
                raise UserError(f"{self.root}: neither a folder nor a zip")
            try:
                self._zip = zipfile.ZipFile(self.root)
            except OSError as error:
                raise UserError(f"{self.root}: cannot be opened: {error.strerror}") from error
            except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise UserError(f"{self.root}: neither a folder nor a zip: {error}") from error
        return self._zip
