"""Class folders: ``ROOT/train/<class>/…`` and ``ROOT/val/<class>/…``, or one folder of classes.

A ``ROOT/test`` beside a validation split is a split of its own, if it has the same classes.

Classes are numbered in the sorted order of their folder names, and folders inside a class are searched as well,
as torchvision's ``ImageFolder`` does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.images import IMAGE_EXTENSIONS, SNIFF_BYTES, image_extension
from shards.sources.base import Entry, Source, make_key

_VALIDATION_NAMES = ("val", "valid", "validation", "test")
"""Folder names taken for the validation split; the first that is there. A test folder beside it is a third split."""

_JUNK = frozenset(("thumbs.db", "desktop.ini", "icon\r"))
"""Left behind by file browsers; hidden files are junk as well."""


class ImageFolder(Source):
    """Images in one folder per class.

    Args:
        train: folder whose subfolders are the classes.
        val: the same for validation; must have the same classes.
        val_fraction: without `val`, the share of each class to hold out, in [0, 1).
        seed: chooses the images held out.
        test: a further split; must have the same classes.
        notes: what a person should know of how the folders were chosen.

    Raises:
        UserError: if a folder is missing, has no classes, or the splits' classes differ.
    """

    name = "imagefolder"
    summary = "one folder of images per class, as torchvision's ImageFolder reads"

    def __init__(
        self,
        train: Path,
        val: Path | None = None,
        val_fraction: float = 0.0,
        seed: int = 0,
        test: Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if not 0 <= val_fraction < 1:
            raise UserError(f"--val-fraction {val_fraction:g}: must be at least 0 and less than 1")
        if val is not None and val_fraction:
            raise UserError(
                f"--val-fraction {val_fraction:g}: the data has a validation split already, {val}",
                "Leave the option out, or give only the training folder.",
            )
        self.roots = {"train": Path(train)}
        if val is not None:
            self.roots["val"] = Path(val)
        self.val_fraction = val_fraction
        self.seed = seed
        self.splits = ("train", "val") if val is not None or val_fraction else ("train",)
        if test is not None:
            self.roots["test"] = Path(test)
            self.splits += ("test",)
        self.classes = _class_folders(self.roots["train"])
        for split, root in self.roots.items():
            if split != "train":
                _check_same_classes(self.roots["train"], self.classes, root)
        self._notes = tuple(notes)
        self._skipped: dict[str, int] = {}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare ROOT, --train, --val and --val-fraction."""
        parser.add_argument(
            "root",
            nargs="?",
            type=Path,
            metavar="ROOT",
            help="folder with train/ and val/ (or valid, validation, test), or with the class folders themselves; "
            "test/ beside val/ becomes a third split",
        )
        parser.add_argument("--train", type=Path, metavar="DIR", help="class folders for training, instead of ROOT")
        parser.add_argument("--val", type=Path, metavar="DIR", help="class folders for validation")
        parser.add_argument(
            "--val-fraction",
            type=float,
            default=0.0,
            metavar="F",
            help="hold out this share of each class for validation, chosen by the seed (default: none)",
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ImageFolder:
        """Find the splits from ROOT, or take them from --train and --val."""
        if (arguments.root is None) == (arguments.train is None):
            raise UserError(
                "imagefolder: give either ROOT or --train DIR",
                "shards prepare imagefolder ROOT OUT, or shards prepare imagefolder --train DIR --val DIR OUT",
            )
        if arguments.root is None:
            return cls(arguments.train, arguments.val, arguments.val_fraction, arguments.seed)
        folders, notes = _find_splits(arguments.root, arguments.val)
        return cls(
            folders["train"], folders.get("val"), arguments.val_fraction, arguments.seed, folders.get("test"), notes
        )

    def options(self) -> dict[str, Any]:
        """The held-out share, where the source chose it; the seed is recorded for the whole data set."""
        return {"val_fraction": self.val_fraction} if self.val_fraction else {}

    def folders(self) -> tuple[Path, ...]:
        """The roots of the splits."""
        return tuple(self.roots.values())

    def notes(self) -> tuple[str, ...]:
        """Folders left out, and how many files were skipped as junk."""
        count = sum(self._skipped.values())
        junk = f"skipped {count:,} hidden files and file-browser leftovers (.DS_Store, Thumbs.db)"
        return (*self._notes, junk) if count else self._notes

    def entries(self, split: str) -> Iterator[Entry]:
        """Images class by class, each class sorted by path; the locator is ``<split folder>/<path>``."""
        root_name = split if split in self.roots else "train"
        root = self.roots[root_name]
        self._skipped[root_name] = 0
        listed = False
        for label, class_name in enumerate(self.classes):
            found = False
            images = self._images(root, class_name, root_name)
            for path, size in self._part(images, class_name, split) if self.val_fraction else images:
                found = True
                yield Entry(_key(class_name, path), label, f"{root_name}/{path}", size)
            if split == "train" and not found:
                raise UserError(
                    f"{root / class_name}: no image for training in this class folder",
                    "Add images or remove the folder; labels are numbered by the folders.",
                )
            listed = listed or found
        if self.val_fraction and split == "val" and not listed:
            raise UserError(
                f"--val-fraction {self.val_fraction:g}: holds out no image, for every class has too few",
                "Give a larger share, or a folder of validation images with --val.",
            )

    def read(self, locator: str) -> bytes:
        """The file's bytes."""
        path = self._path(locator)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    def place(self, locator: str) -> str:
        """The file's path."""
        return str(self._path(locator))

    def _path(self, locator: str) -> Path:
        root_name, _, path = locator.partition("/")
        return self.roots[root_name] / path

    def _images(self, root: Path, class_name: str, root_name: str) -> Iterator[tuple[str, int]]:
        """Path relative to `root` and size of each image of a class, sorted, folders after files."""
        folders = [class_name]
        while folders:
            folder = folders.pop()
            inner = []
            for item in _list_folder(root / folder):
                relative = f"{folder}/{item.name}"
                try:
                    if _is_junk(item.name):
                        self._skipped[root_name] += 1
                    elif item.is_dir():
                        _check_no_cycle(item)
                        inner.append(relative)
                    elif not item.is_file():
                        raise UserError(f"{item.path}: not a file, or a link to nothing")
                    else:
                        size = item.stat().st_size
                        _check_named_like_image(Path(item.path))
                        yield relative, size
                except OSError as error:
                    raise UserError(f"{item.path}: cannot be read: {error.strerror}") from error
            folders += reversed(inner)

    def _part(self, images: Iterator[tuple[str, int]], class_name: str, split: str) -> Iterator[tuple[str, int]]:
        """The training or validation part of one class: the images with the smallest keyed hashes are held out."""
        everything = list(images)
        prefix = f"onehour val {self.seed} "
        by_hash = sorted(
            range(len(everything)),
            key=lambda i: hashlib.sha256((prefix + everything[i][0]).encode("utf-8", "surrogateescape")).digest(),
        )
        held_out = set(by_hash[: int(len(everything) * self.val_fraction + 0.5)])
        return (image for i, image in enumerate(everything) if (i in held_out) == (split == "val"))


def _key(class_name: str, path: str) -> str:
    """Class and path without extension; ImageNet's files begin with their class, which is not repeated."""
    stem = path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path
    inner = stem[len(class_name) + 1 :]
    return make_key(inner) if inner.startswith(f"{class_name}_") else make_key(class_name, inner)


def _find_splits(root: Path, chosen_val: Path | None) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folders of a root by split, or the root itself if it holds the classes; and notes on what is left out."""
    folders = _subfolders(root)
    # a class may be called "train" (it is one in COCO): a split holds folders, a class holds files
    if "train" in folders and _subfolders(root / "train"):
        found = {"train": root / "train"}
        val = chosen_val or next((root / name for name in _VALIDATION_NAMES if name in folders), None)
        if val is not None:
            found["val"] = val
        notes = []
        for name in folders:
            if root / name in found.values():
                continue
            if name == "test" and _has_classes(root / name, _subfolders(root / "train")):
                found["test"] = root / name
            elif name == "test":
                notes.append("left out test/: its folders are not the classes of train/")
            else:
                why = f"the validation split is {val}" if name in _VALIDATION_NAMES else "neither train, val nor test"
                notes.append(f"left out {name}/: {why}")
        return found, tuple(notes)
    if folders and set(folders) <= {"train", *_VALIDATION_NAMES}:
        raise UserError(
            f"{root}: has no training split: only {', '.join(folders)}",
            "A root has train/<class>/ beside val/<class>/. Name the folders yourself with --train and --val.",
        )
    return {"train": root} | ({"val": chosen_val} if chosen_val else {}), ()


def _has_classes(root: Path, classes: list[str]) -> bool:
    """Whether a folder can be a split: many a test folder holds images without labels."""
    return _subfolders(root) == classes and not any(
        item.is_file() and Path(item.name).suffix[1:].lower() in IMAGE_EXTENSIONS for item in _list_folder(root)
    )


def _class_folders(root: Path) -> tuple[str, ...]:
    folders = tuple(_subfolders(root))
    for item in _list_folder(root):
        if item.is_file() and Path(item.name).suffix[1:].lower() in IMAGE_EXTENSIONS:
            raise UserError(
                f"{item.path}: an image outside the class folders",
                f"The class of an image is the folder it lies in: {root}/<class>/{item.name}",
            )
    if not folders:
        raise UserError(f"{root}: no class folders in it", f"Images belong into {root}/<class>/.")
    for name in folders:
        if not name.isprintable():
            raise UserError(f"{root / name!r}: the name of this class folder is not printable UTF-8", "Rename it.")
    return folders


def _check_same_classes(train: Path, classes: tuple[str, ...], val: Path) -> None:
    others = _class_folders(val)
    for name in others:
        if name not in classes:
            raise UserError(
                f"{val / name}: this class is not in the training split {train}",
                f"{len(classes):,} classes there, {len(others):,} here; every split needs the same folders.",
            )
    for name in classes:
        if name not in others:
            raise UserError(
                f"{val / name}: no such folder, but {train / name} is a class of the training split",
                "Every split needs the same folders; make an empty one if the split has no image of this class.",
            )


def _subfolders(root: Path) -> list[str]:
    return [item.name for item in _list_folder(root) if item.is_dir() and not item.name.startswith(".")]


def _list_folder(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _check_no_cycle(item: os.DirEntry[str]) -> None:
    if item.is_symlink() and Path(item.path).parent.resolve().is_relative_to(Path(item.path).resolve()):
        raise UserError(f"{item.path}: a link to a folder that contains it")


def _check_named_like_image(path: Path) -> None:
    """Find a stray text file before anything is written; all other content is checked when it is read anyway."""
    if path.suffix[1:].lower() in IMAGE_EXTENSIONS:
        return
    with path.open("rb") as file:
        if image_extension(file.read(SNIFF_BYTES)) is None:
            raise UserError(
                f"{path}: not an image",
                "Class folders may hold images only. Move it away, or hide it with a leading dot.",
            )
