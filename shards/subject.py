"""What `shards show` looks at: the samples of a split, or of one tar with or without an index."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.files import opened
from shards.idx import list_samples
from shards.index import load_split
from shards.labels import Labels
from shards.manifest import CLASSES_NAME, INDEX_NAME, read_classes, read_manifest
from shards.survey import Part, image_of


@dataclass(frozen=True)
class Subject:
    """What is looked at: the samples of a split, or of one tar."""

    place: str
    stem: str
    """Of the sheet's file name."""
    tars: tuple[Path, ...]
    starts: np.ndarray
    """Number of the first sample of each tar, and the number of all: int64 [tars + 1]."""
    indexed: bool
    labels: np.ndarray
    """int64 [N]; -1 where there is none."""
    sizes: np.ndarray
    """Of the images in bytes: int64 [N]."""
    classes: tuple[str, ...] | None
    """Names in label order, if they are known."""
    repeated_keys: tuple[str, ...] = ()

    def parts(self, numbers: np.ndarray) -> list[Part]:
        """The samples of these rising numbers, by tar."""
        cuts = np.searchsorted(numbers, self.starts)
        return [
            Part(tar, numbers[first:last] - start, self.indexed)
            for tar, start, first, last in zip(self.tars, self.starts, cuts, cuts[1:], strict=False)
            if first < last
        ]

    def class_name(self, label: int) -> str:
        """For captions: number and name."""
        if label < 0:
            return "no label"
        if self.classes is None or label >= len(self.classes):
            return f"class {label}"
        name = self.classes[label]
        return name if name == str(label) else f"{label} {name}"


def open_subject(target: Path, split: str | None) -> Subject:
    """Open a split of a data set folder, by default train or its only one; or a tar.

    Raises:
        UserError: if there is neither, or it is damaged.
    """
    return _open_folder(target, split) if target.is_dir() else _open_tar(target, split)


def _open_folder(root: Path, name: str | None) -> Subject:
    splits = tuple(read_manifest(root).splits)
    split = load_split(root, name or ("train" if "train" in splits else next(iter(splits), "train")), workers=None)
    starts = np.cumsum([0, *(shard.samples for shard in split.shards)])
    samples = split.samples
    return Subject(
        f"{root} · {split.name}",
        f"{root.resolve().name}-{split.name}",
        tuple(shard.path for shard in split.shards),
        starts,
        True,
        samples["label"].astype(np.int64),
        samples["size"].astype(np.int64),
        split.classes,
    )


def _open_tar(tar: Path, split: str | None) -> Subject:
    if split is not None:
        raise UserError(f"{tar}: a single tar has no splits", "Leave --split out, or name the folder.")
    samples = list_samples(tar)
    classes, rule = _data_set_of(tar)
    labels = np.full(len(samples), -1, np.int64)
    sizes = np.zeros(len(samples), np.int64)
    keys: set[str] = set()
    repeated = []
    with opened(tar) as descriptor:
        for row, sample in enumerate(samples):
            with suppress(UserError):  # a foreign tar may hold its labels elsewhere, and can be shown all the same
                labels[row] = rule.number(sample.key, rule.text(sample.key, descriptor, sample))
            image = image_of(sample)
            sizes[row] = image.size if image else 0
            if sample.key in keys:
                repeated.append(sample.key)
            keys.add(sample.key)
    starts = np.array([0, len(samples)])
    return Subject(str(tar), tar.stem, (tar,), starts, False, labels, sizes, classes, tuple(repeated))


def _data_set_of(tar: Path) -> tuple[tuple[str, ...] | None, Labels]:
    """Class names, and the rule for labels, from the data set that the tar lies in, if it lies in one."""
    for root in (tar.parent, tar.parent.parent):
        if (root / INDEX_NAME).exists():
            try:
                classes = read_classes(root)
                return classes, Labels.from_record(root, read_manifest(root).record, classes)
            except UserError:
                break  # damaged; a tar can be shown without
        if (root / CLASSES_NAME).exists():
            try:
                return read_classes(root), Labels()
            except UserError:
                break
    return None, Labels()
