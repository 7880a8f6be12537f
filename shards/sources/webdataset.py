"""Tar shards made elsewhere, or by this package, to be shuffled and cut anew.

The tars are read in place: where every image lies comes from their headers. Image and label are carried over, the
image byte for byte; keys are kept where they are valid.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.classes import CLASSES_HELP, FROM_LABELS, name_classes, note_first_class, read_titles, survey_classes
from shards.errors import UserError
from shards.files import opened
from shards.idx import IndexedSample, group
from shards.images import IMAGE_EXTENSIONS
from shards.labels import DEFAULT_RULE, RULE_HELP, Labels, read_sample, recorded_rule
from shards.layout import find_shards
from shards.manifest import INDEX_NAME, Manifest, read_manifest
from shards.sources.base import Entry, Source, is_valid_key, make_distinct, make_key
from shards.tar import scan


class WebDataset(Source):
    """Tars of samples as webdataset groups them.

    Args:
        root: folder of tars, in subfolders named like splits or with names that say the split.
        label: rule that says where the labels stand; by default the one that an index there records, else ``cls``.
        classes: file of names, a number, or ``from-labels``; by default `classes.json`, else as many as the highest
            label calls for, for which all labels are read once.
        workers: processes for that reading.
        image: extension of the component to take as the image, where samples hold several.

    Raises:
        UserError: if there are no tars, they are not what an index there says, the classes cannot be found out, or
            `image` is no extension of images.
    """

    name = "webdataset"
    summary = "tar shards made elsewhere, shuffled and cut anew (to use them as they are: shards index)"

    def __init__(
        self,
        root: Path,
        label: str | None = None,
        classes: str | None = None,
        workers: int | None = None,
        image: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.image = image.removeprefix(".").lower() if image is not None else None
        if self.image is not None and self.image.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            raise UserError(f"--image {image}: must be an extension of images, such as jpg")
        manifest = read_manifest(self.root) if (self.root / INDEX_NAME).exists() else None
        tars = _find_tars(self.root, manifest)
        self.splits = tuple(tars)
        rule = label or (recorded_rule(manifest.record) if manifest is not None else None) or DEFAULT_RULE
        self.labels = Labels(rule, name_classes(self.root, classes))
        found = self.labels.classes
        if found is None:
            found = survey_classes([tar for part in tars.values() for tar in part], self.labels, workers)
            self.labels = Labels(rule, found if classes == FROM_LABELS else None)
        self.classes = make_distinct(found)
        if classes is None:
            self.titles = read_titles(self.root)
        self._left_out: dict[str, Counter[str]] = {}
        self._mended: Counter[str] = Counter()
        self._lowest: dict[str, int] = {}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare DIR, --label, --classes and --image."""
        parser.add_argument("root", type=Path, metavar="DIR", help="folder of tars")
        parser.add_argument("--label", metavar="RULE", help=f"{RULE_HELP} (default: as DIR was indexed, else cls)")
        parser.add_argument(
            "--classes",
            metavar="FILE|N",
            help=f"{CLASSES_HELP} (default: classes.json in DIR, else highest label + 1)",
        )
        parser.add_argument(
            "--image", metavar="EXT", help="extension of the image, where samples hold several, such as a mask's .png"
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> WebDataset:
        """Find the tars and the classes."""
        return cls(arguments.root, arguments.label, arguments.classes, arguments.workers, arguments.image)

    def options(self) -> dict[str, Any]:
        """The label rule, where it is not the usual one, and the image; the classes are recorded for all sources."""
        options = {"label": self.labels.rule} if self.labels.rule != DEFAULT_RULE else {}
        return options | ({"image": self.image} if self.image is not None else {})

    def folders(self) -> tuple[Path, ...]:
        """The root."""
        return (self.root,)

    def notes(self) -> tuple[str, ...]:
        """Which components were left out, how many keys had to be changed, and whether class 0 is empty."""
        counts = sum(self._left_out.values(), Counter())
        notes = []
        if counts:
            parts = ", ".join(f".{extension} of {count:,}" for extension, count in counts.most_common(8))
            notes.append(f"only image and label are carried over; left out: {parts} samples")
        if mended := self._mended.total():
            notes.append(f"{mended:,} keys had dots, slashes or blanks, which became underscores")
        if self._lowest and (note := note_first_class(self.classes, min(self._lowest.values()))):
            notes.append(note)
        return tuple(notes)

    def entries(self, split: str) -> Iterator[Entry]:
        """Samples in the order of the tars and of each tar; the locator is ``<offset>:<size>:<tar>``."""
        manifest = read_manifest(self.root) if (self.root / INDEX_NAME).exists() else None
        left_out = self._left_out[split] = Counter()
        self._mended[split] = 0
        self._lowest.pop(split, None)
        for tar in _find_tars(self.root, manifest)[split]:
            url = tar.relative_to(self.root).as_posix()
            with opened(tar) as descriptor:
                for sample in _samples(tar):
                    image, _, label = read_sample(tar, descriptor, sample, self.labels, self.image)
                    self._lowest[split] = min(label, self._lowest.get(split, label))
                    for component in sample.components:
                        if component is not image and component.extension.lower() != self.labels.extension:
                            left_out[component.extension] += 1
                    key = sample.key
                    if not is_valid_key(key):
                        key = make_key(key)
                        self._mended[split] += 1
                    yield Entry(key, label, f"{image.offset}:{image.size}:{url}", image.size)

    def read(self, locator: str) -> bytes:
        """The image's bytes, out of its tar."""
        tar, offset, size = self._locate(locator)
        with opened(tar) as descriptor:
            data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{tar}: byte {offset:,}: ends inside an image", "It was cut off after it was listed.")
        return data

    def place(self, locator: str) -> str:
        """The tar and the byte where the image begins."""
        tar, offset, _ = self._locate(locator)
        return f"{tar}: byte {offset:,}"

    def _locate(self, locator: str) -> tuple[Path, int, int]:
        offset, size, url = locator.split(":", 2)
        return self.root / url, int(offset), int(size)


def _find_tars(root: Path, manifest: Manifest | None) -> dict[str, Sequence[Path]]:
    """The tars of each split: those of the index, which must be all there are, or by their names."""
    if manifest is None:
        return dict(find_shards(root).splits)
    from shards.index import check_shard_files  # here, since it needs NumPy, which --help can do without

    for shards in manifest.splits.values():
        for shard in shards:
            check_shard_files(root, shard)
    listed = {name: [shard.path for shard in shards] for name, shards in manifest.splits.items()}
    known = {path: name for name, paths in listed.items() for path in paths}
    for tar in find_shards(root, known).tars:
        if tar not in known:
            raise UserError(
                f"{tar}: is not listed in {INDEX_NAME}",
                f"Index the folder again with: shards index {root}. Or move this tar away.",
            )
    return dict(listed)


def _samples(tar: Path) -> Iterator[IndexedSample]:
    """From the headers: an ``.idx`` may be that of an older tar of the same size."""
    empty = True
    for sample in group(scan(tar)):
        empty = False
        yield sample
    if empty:
        raise UserError(f"{tar}: no samples in this tar")
