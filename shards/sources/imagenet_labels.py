"""Labels of ImageNet's validation images, in every form in which they are passed around.

The validation archive holds images and no labels. They come with the official devkit, whose numbers
(``ILSVRC2012_ID``) are not the positions in the sorted list of WNIDs that everybody trains with, or as one of the
lists that people made from it. All forms end as WNIDs here; which form a file has is read off its content.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from shards.errors import UserError
from shards.sources.imagenet_devkit import GROUND_TRUTH, META, find_devkit, read_devkit, read_devkit_archive
from shards.sources.wordnet import WNID, is_ilsvrc2012

ANCHOR = ("ILSVRC2012_val_00000001", "n01751748")
"""The first validation image shows a sea snake: class 65 of the sorted list, ILSVRC2012_ID 490 of the devkit."""

FORMS = (
    "Labels can come from any of these:",
    "- the devkit, ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it",
    "- a text file of lines 'ILSVRC2012_val_00000001.JPEG 65' or '… n01751748', or Kaggle's LOC_val_solution.csv",
    "- a text file of one WNID per line, in the order of the images",
    "- a folder of WNID folders with the validation images in them",
)
"""What `read_val_labels` takes, as the last lines of messages."""

_MAX_BYTES = 64 << 20
"""Of a label file; those in use have 1 to 4 MB."""


@dataclass(frozen=True)
class ValLabels:
    """Which class each validation image has."""

    path: Path
    """Where the labels came from."""
    wnids: Mapping[str, str]
    """WNID by the image's file name without folder and extension."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the classes are called, by WNID, where the labels tell."""


def read_val_labels(path: Path, classes: Sequence[str]) -> ValLabels:
    """Read labels in any of `FORMS`.

    Args:
        path: file or folder.
        classes: sorted WNIDs of the training images; class numbers are positions in this list.

    Raises:
        UserError: naming the file, and the line where there is one, if its form is not known or could mean two
            things, or if its labels cannot be right for these classes.
    """
    try:
        labels = _read_folder(path) if path.is_dir() else _read_file(path, classes)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    _check_classes(labels, classes)
    return labels


def _check_classes(labels: ValLabels, classes: Sequence[str]) -> None:
    known = set(classes)
    if known.isdisjoint(labels.wnids.values()):
        raise UserError(
            f"{labels.path}: none of its labels is a class of the training images",
            f"It begins with {next(iter(labels.wnids.values()))}; the classes with {classes[0]}.",
        )
    if not is_ilsvrc2012(classes):
        return
    for stem, wnid in labels.wnids.items():
        if wnid not in known:
            raise UserError(f"{labels.path}: {stem}: label {wnid} is none of ILSVRC2012's 1,000 classes")
    stem, expected = ANCHOR
    if labels.wnids.get(stem, expected) != expected:
        raise UserError(
            f"{labels.path}: says that {stem} is {labels.wnids[stem]} (class {classes.index(labels.wnids[stem])})",
            f"It is {expected}, class {classes.index(expected)} in the sorted order of WNIDs, counted from 0. The file "
            "numbers images or classes in another way, and most of its labels would be wrong.",
            "Labels that are surely right come with the devkit.",
        )


def _read_folder(folder: Path) -> ValLabels:
    devkit = find_devkit(folder)
    names = sorted(item.name for item in os.scandir(folder) if item.is_dir() and not item.name.startswith("."))
    synsets = [name for name in names if WNID.fullmatch(name)]
    if devkit and synsets:
        raise UserError(
            f"{folder}: holds a devkit and WNID folders; the labels of either could be meant",
            f"Give {devkit} or a folder that has the WNID folders only.",
        )
    if devkit:
        meta, truth = (_read_limited(devkit / name) for name in (META, GROUND_TRUTH))
        return _in_order(folder, *read_devkit(str(folder), meta, truth))
    if not synsets:
        raise UserError(f"{folder}: holds neither a devkit ({META}) nor WNID folders", *FORMS)
    if synsets != names:
        other = next(name for name in names if name not in synsets)
        raise UserError(f"{folder / other}: is no WNID, while {folder / synsets[0]} beside it is one")
    wnids: dict[str, str] = {}
    for wnid in synsets:
        for name in sorted(item.name for item in os.scandir(folder / wnid) if not item.name.startswith(".")):
            _add(wnids, name, wnid, f"{folder / wnid / name}")
    if not wnids:
        raise UserError(f"{folder}: its WNID folders are empty")
    return ValLabels(folder, wnids)


def _read_file(path: Path, classes: Sequence[str]) -> ValLabels:
    data = _read_limited(path)
    if data.startswith(b"\x1f\x8b") or data[257:262] == b"ustar":
        return _in_order(path, *read_devkit_archive(str(path), data))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: is neither text nor a devkit archive (.tar.gz)", *FORMS)
    lines = [(f"{path}: line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty", *FORMS)
    if "," in lines[0][1]:
        return _pair_labels(path, list(_csv_pairs(lines)), classes)
    if len(lines[0][1].split()) == 1:
        return _ordered_labels(path, lines)
    return _pair_labels(path, list(_text_pairs(lines)), classes)


def _csv_pairs(lines: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(place, file, label) from ``ImageId,PredictionString`` rows: the label is the first word of the second."""
    for number, (place, line) in enumerate(lines):
        try:
            row = next(csv.reader([line]))
        except csv.Error as error:
            raise UserError(f"{place}: {error}") from error
        words = row[1].split() if len(row) > 1 else []
        if number == 0 and row[0].strip().lower() in ("imageid", "image", "file", "filename", "id"):
            continue
        if not words:
            raise UserError(f"{place}: is not 'image,label'")
        yield place, row[0].strip(), words[0]


def _text_pairs(lines: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    for place, line in lines:
        words = line.split()
        if len(words) != 2:
            raise UserError(f"{place}: is not 'file label'", *FORMS)
        yield place, words[0], words[1]


def _pair_labels(path: Path, pairs: list[tuple[str, str, str]], classes: Sequence[str]) -> ValLabels:
    if not pairs:
        raise UserError(f"{path}: has a header and no labels")
    numbered = _is_number(pairs[0][2])
    for place, _, label in pairs:
        if not (_is_number(label) if numbered else WNID.fullmatch(label)):
            what = "class number, as on the lines before" if numbered else "WNID"
            raise UserError(f"{place}: label {label[:40]!r} is no {what}")
    if numbered:
        pairs = _resolve_numbers(path, pairs, classes)
    wnids: dict[str, str] = {}
    for place, name, wnid in pairs:
        _add(wnids, name, wnid, place)
    return ValLabels(path, wnids)


def _resolve_numbers(
    path: Path, pairs: list[tuple[str, str, str]], classes: Sequence[str]
) -> list[tuple[str, str, str]]:
    if not is_ilsvrc2012(classes):
        raise UserError(
            f"{path}: labels are class numbers, while the training images have {len(classes):,} classes that are not "
            "ILSVRC2012's 1,000",
            "A number could count these classes or all 1,000. Give labels that name WNIDs.",
            *FORMS,
        )
    numbers = [int(label) for _, _, label in pairs]
    if max(numbers) >= len(classes):
        counted = ", as if counted from 1" if min(numbers) == 1 and max(numbers) == len(classes) else ""
        raise UserError(
            f"{path}: labels run from {min(numbers)} to {max(numbers)}{counted}; class numbers run from 0 to 999",
            "They are positions in the sorted list of WNIDs. The devkit's ILSVRC2012_ID is something else.",
            *FORMS,
        )
    if all(PurePosixPath(name).stem != ANCHOR[0] for _, name, _ in pairs):
        raise UserError(
            f"{path}: has class numbers, but none for {ANCHOR[0]}",
            "The class of that image is known, which tells how the numbers count. Give a list with it (labels of more "
            "images than the archive has are accepted with --incomplete), or labels that name WNIDs.",
            *FORMS,
        )
    return [(place, name, classes[number]) for (place, name, _), number in zip(pairs, numbers, strict=True)]


def _ordered_labels(path: Path, lines: list[tuple[str, str]]) -> ValLabels:
    words = [line.strip() for _, line in lines]
    if all(map(_is_number, words)):
        raise UserError(
            f"{path}: holds numbers alone; they could be ILSVRC2012_IDs or positions in the sorted WNIDs",
            f"If this is the devkit's {GROUND_TRUTH}, give the devkit itself: it says what the numbers mean.",
            *FORMS,
        )
    for (place, _), word in zip(lines, words, strict=True):
        if not WNID.fullmatch(word):
            raise UserError(f"{place}: {word[:60]!r} is no WNID", *FORMS)
    return _in_order(path, words)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _in_order(path: Path, wnids: Sequence[str], names: Mapping[str, str] | None = None) -> ValLabels:
    """Labels listed in the order of the images' official numbers, which count from 1."""
    stems = (f"ILSVRC2012_val_{number:08d}" for number in range(1, len(wnids) + 1))
    return ValLabels(path, dict(zip(stems, wnids, strict=True)), names or {})


def _add(wnids: dict[str, str], name: str, wnid: str, place: str) -> None:
    stem = PurePosixPath(name).stem
    if stem in wnids:
        raise UserError(f"{place}: {stem} has a label already, {wnids[stem]}")
    wnids[stem] = wnid


def _read_limited(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file")  # opening a FIFO would wait for ever
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so no labels of 50,000 images", *FORMS)
    return data
