"""ImageNet (ILSVRC2012) from its official archives, read in place.

``ILSVRC2012_img_train.tar`` holds one tar per class, ``n01440764.tar`` and so on, and those hold the images. The
list of an image's bytes therefore is an offset and a size in the outer archive, and nothing is ever unpacked.
``ILSVRC2012_img_val.tar`` holds the images alone; `shards.sources.imagenet_labels` finds their labels. Classes are
numbered in the sorted order of their WNIDs.

Archives of the same layout with other classes are read as well, such as a part of ImageNet-21k; what is known of
the 1,000 classes, such as the number of images, is checked for those only.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.images import IMAGE_EXTENSIONS
from shards.sources.base import Entry, Source, make_key
from shards.sources.imagenet_archives import OFFICIAL, check_md5, check_val_archive, class_tars, find_official
from shards.sources.imagenet_labels import FORMS, ValLabels, read_val_labels
from shards.sources.wordnet import is_ilsvrc2012, look_up_titles
from shards.tar import Member, scan

TOTALS = {"train": 1_281_167, "val": 50_000}
"""Images of the whole set; O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015."""

VAL_PER_CLASS = 50

_SCANS_AHEAD = 8
"""Inner tars scanned at once. Headers lie 100 kB apart, so on cold storage each costs a whole latency."""


class ImageNetTar(Source):
    """The training archive and, if given, the validation archive with its labels.

    Args:
        train: tar of one tar per class.
        val: tar of the validation images.
        val_labels: where their labels are, in any form that `read_val_labels` takes.
        incomplete: accept the 1,000 classes with other than the known numbers of images, and labels of
            validation images that are not there.
        md5: compare the archives with the published MD5s first, which reads all of them.

    Raises:
        UserError: if an archive is missing, compressed, or not what it should be, or the labels are not usable.
    """

    name = "imagenet-tar"
    summary = "ImageNet (ILSVRC2012) from its official archives, read in place"

    def __init__(
        self,
        train: Path,
        val: Path | None = None,
        val_labels: Path | None = None,
        *,
        incomplete: bool = False,
        md5: bool = False,
    ) -> None:
        self._archives = {"train": Path(train)}
        self._tars = class_tars(self._archives["train"])
        self.classes = tuple(self._tars)
        self.splits = ("train",)
        self.incomplete = incomplete
        self._is_ilsvrc2012 = is_ilsvrc2012(self.classes)
        self._labels: ValLabels | None = None
        self._descriptors: dict[str, int] = {}
        self._said: dict[str, list[str]] = {}
        self._has_md5 = md5
        if val is not None:
            check_val_archive(Path(val))
            if val_labels is None:
                raise UserError(f"{val}: this archive holds no labels", "Give them with --val-labels.", *FORMS)
            self._archives["val"] = Path(val)
            self.splits = ("train", "val")
            self._labels = read_val_labels(Path(val_labels), self.classes)
        elif val_labels is not None:
            raise UserError(f"--val-labels {val_labels}: there is no validation archive", "Give it with --val.")
        self.titles = look_up_titles(self.classes, self._labels.names if self._labels else None)
        if md5:
            archives = dict(self._archives)
            if self._labels is not None and self._labels.path.name == OFFICIAL["devkit"][0]:
                archives["devkit"] = self._labels.path
            check_md5(archives)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare TRAIN, --val, --val-labels, --incomplete and --md5."""
        parser.add_argument(
            "train",
            type=Path,
            metavar="TRAIN.tar|ROOT",
            help=f"{OFFICIAL['train'][0]}, or a folder with the official archives under their own names",
        )
        parser.add_argument("--val", type=Path, metavar="TAR", help=f"{OFFICIAL['val'][0]}")
        parser.add_argument(
            "--val-labels",
            type=Path,
            metavar="PATH",
            help=f"{OFFICIAL['devkit'][0]} or the folder unpacked from it; or lines 'file label' (WNID or class "
            "number), LOC_val_solution.csv, one WNID per line, or a folder of WNID folders with the images",
        )
        parser.add_argument(
            "--incomplete", action="store_true", help="accept fewer images of the 1,000 classes than there should be"
        )
        parser.add_argument("--md5", action="store_true", help="check the published MD5s first; reads all archives")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ImageNetTar:
        """Take the archives as given, or look for the official names in ROOT."""
        train, val, val_labels = arguments.train, arguments.val, arguments.val_labels
        if train.is_dir():
            train, found_val, found_labels = find_official(train)
            val = val or found_val
            val_labels = val_labels or (found_labels if val else None)
        return cls(train, val, val_labels, incomplete=arguments.incomplete, md5=arguments.md5)

    def __getstate__(self) -> dict[str, Any]:
        """For the workers, which only read: neither the labels nor the open files."""
        return {**self.__dict__, "_labels": None, "_tars": {}, "_descriptors": {}, "titles": None}

    def __del__(self) -> None:
        """Close the archives."""
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def notes(self) -> tuple[str, ...]:
        """What was checked, which set this is if not the whole one, and what was left out."""
        notes = ["the archives have the published MD5s"] if self._has_md5 else []
        if not self._is_ilsvrc2012:
            notes.append(f"{len(self.classes):,} classes, not ILSVRC2012's 1,000: no totals to check")
        if "val" not in self.splits:
            notes.append("no validation archive, so no validation split")
        return (*notes, *(line for split in self.splits for line in self._said.get(split, [])))

    def entries(self, split: str) -> Iterator[Entry]:
        """Training images class by class, validation images in the order of the archive.

        The locator is ``<split>:<offset>:<size>:<name>``, the name for messages only.
        """
        self._said[split] = []
        yield from self._train_entries() if split == "train" else self._val_entries()

    def read(self, locator: str) -> bytes:
        """The image's bytes out of the archive."""
        split, offset, size, _ = locator.split(":", 3)
        try:
            if split not in self._descriptors:
                self._descriptors[split] = os.open(self._archives[split], os.O_RDONLY)
            image = os.pread(self._descriptors[split], int(size), int(offset))
        except OSError as error:
            raise UserError(f"{self.place(locator)}: cannot be read: {error.strerror}") from error
        if len(image) < int(size):
            raise UserError(f"{self.place(locator)}: cut off after {len(image):,} of {int(size):,} bytes")
        return image

    def place(self, locator: str) -> str:
        """Archive, inner tar and file."""
        split, _, _, name = locator.split(":", 3)
        return f"{self._archives[split]}: {name}"

    def _train_entries(self) -> Iterator[Entry]:
        archive = self._archives["train"]
        count = skipped = 0
        for label, (tar, members) in enumerate(_scan_ahead(archive, self._tars.values())):
            before, wnid = count, self.classes[label]
            for member in members:
                name = member.name.rpartition("/")[2]
                if name.startswith("."):
                    skipped += 1
                    continue
                place = f"{tar.name}/{member.name}"
                stem = _image_stem(archive, place, member)
                key = make_key(stem) if stem.startswith(f"{wnid}_") else make_key(wnid, stem)
                yield Entry(key, label, f"train:{member.offset}:{member.size}:{place}", member.size)
                count += 1
            if count == before:
                raise UserError(f"{archive}: {tar.name}: holds no images", "Every class needs images for training.")
        self._say_skipped("train", skipped)
        self._check_total("train", count)

    def _val_entries(self) -> Iterator[Entry]:
        archive, labels = self._archives["val"], self._labels
        assert labels is not None
        numbers = {wnid: number for number, wnid in enumerate(self.classes)}
        per_class = [0] * len(self.classes)
        seen: set[str] = set()
        skipped = others = 0
        for member in scan(archive):
            if member.name.rpartition("/")[2].startswith("."):
                skipped += 1
                continue
            stem = _image_stem(archive, member.name, member)
            wnid = labels.wnids.get(stem)
            if wnid is None:
                raise UserError(
                    f"{archive}: {member.name}: has no label in {labels.path}",
                    f"Labels for {len(labels.wnids):,} images are there; the first is for {next(iter(labels.wnids))}.",
                )
            seen.add(stem)
            label = numbers.get(wnid)
            if label is None:  # of the 1,000 classes all labels are known to be good
                others += 1
                continue
            per_class[label] += 1
            yield Entry(make_key(stem), label, f"val:{member.offset}:{member.size}:{member.name}", member.size)
        self._say_skipped("val", skipped)
        if others:
            self._said["val"].append(f"left out {others:,} validation images of classes without training images")
        self._check_labels_used(labels, numbers, seen)
        self._check_total("val", sum(per_class))
        self._check_per_class(per_class)

    def _check_labels_used(self, labels: ValLabels, numbers: dict[str, int], seen: set[str]) -> None:
        unused = [stem for stem, wnid in labels.wnids.items() if stem not in seen and wnid in numbers]
        if unused and not self.incomplete:
            raise UserError(
                f"{self._archives['val']}: {len(unused):,} images that {labels.path} has labels for are not there",
                f"The first is {unused[0]}. Copy or download the archive again, or accept it with --incomplete.",
            )
        if unused:
            self._said["val"].append(f"{len(unused):,} labels have no validation image")

    def _check_total(self, split: str, count: int) -> None:
        if not self._is_ilsvrc2012 or count == TOTALS[split]:
            return
        what = f"{count:,} {split} images of the 1,000 classes; the whole set has {TOTALS[split]:,}"
        if not self.incomplete:
            raise UserError(
                f"{self._archives[split]}: holds {what}",
                "Copy or download the archive again (--md5 checks it), or accept it with --incomplete.",
            )
        self._said[split].append(what)

    def _check_per_class(self, per_class: list[int]) -> None:
        if not self._is_ilsvrc2012 or self.incomplete:
            return
        for wnid, count in zip(self.classes, per_class, strict=True):
            if count != VAL_PER_CLASS:
                raise UserError(
                    f"{self._archives['val']}: {count:,} images of class {wnid}; every class has {VAL_PER_CLASS}",
                    "The labels are not those of this archive. Labels that are surely right come with the devkit.",
                )

    def _say_skipped(self, split: str, count: int) -> None:
        if count:
            self._said[split].append(f"skipped {count:,} hidden files in {self._archives[split].name}")


def _scan_ahead(archive: Path, tars: Iterable[Member]) -> Iterator[tuple[Member, list[Member]]]:
    """Each inner tar with its members, while the next few are being scanned."""
    pool = ThreadPoolExecutor(_SCANS_AHEAD)
    pending: deque[tuple[Member, Future[list[Member]]]] = deque()
    try:
        for tar in tars:
            pending.append((tar, pool.submit(lambda tar: list(scan(archive, tar)), tar)))
            if len(pending) > _SCANS_AHEAD:
                first, members = pending.popleft()
                yield first, members.result()
        for first, members in pending:
            yield first, members.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _image_stem(archive: Path, place: str, member: Member) -> str:
    """File name without extension, of what at least claims to be an image."""
    stem, _, extension = member.name.rpartition("/")[2].rpartition(".")
    if not stem or extension.lower() not in IMAGE_EXTENSIONS:
        raise UserError(f"{archive}: {place}: not an image by its name", "The archive holds images only.")
    if not member.size:
        raise UserError(f"{archive}: {place}: the file is empty")
    return stem
