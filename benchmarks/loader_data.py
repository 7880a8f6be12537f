"""The images that loader.py measures on, in every form that a loader wants, all made from the same class folder.

A row asks for its form when it is first tried, before anything is measured; forms are kept in the work folder for the
next run. Each is made under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.jpeg_header import read_jpeg_header

SHARDS = 8
SPLIT = "train"
INDEXED = "shards-indexed"


class SkipError(Exception):
    """A row that cannot be measured here; the message says why, in one line."""


@dataclass(frozen=True)
class Data:
    """The forms of one set of images.

    Attributes:
        root: the folder that holds them all.
    """

    root: Path

    @property
    def folder(self) -> Path:
        """One folder of JPEGs per class, as torchvision's ImageFolder reads."""
        return self.root / "folder"

    @property
    def shards(self) -> Path:
        """Our shards, the bytes untouched: WebDataset tars, without a crop index."""
        return self.form("shards", self._write_shards)

    @property
    def indexed_shards(self) -> Path:
        """The same tars (hard links) with a crop index beside them.

        Raises:
            SkipError: the index cannot be made.
        """
        return self.form(INDEXED, self._index_shards)

    @property
    def tars(self) -> list[Path]:
        """The shards themselves, in order."""
        return sorted(self.shards.glob("*.tar"))

    def images(self) -> list[Path]:
        """The files of the class folder, in the order of torchvision's ImageFolder."""
        return sorted(self.folder.glob("*/*"))

    def form(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder or file below the root, made by `make` unless it is there."""
        target = self.root / name
        if not target.exists():
            partial = target.with_name(f"partial-{name}")
            remove(partial)
            make(partial)
            partial.rename(target)
        return target

    def make_shards(self) -> None:
        """Make what most rows need, and forget the crop indexes of earlier runs: they are of the code that wrote them.

        Raises:
            SkipError: it cannot be made.
        """
        remove(self.root / INDEXED)
        self.form("shards", self._write_shards)

    def _write_shards(self, target: Path) -> None:
        tool("prepare", "imagefolder", self.folder, target, "--shards", SHARDS)
        for index in target.glob("*.cropindex"):
            index.unlink()

    def _index_shards(self, target: Path) -> None:
        target.mkdir()
        for path in self.shards.iterdir():
            if path.suffix == ".tar":
                (target / path.name).hardlink_to(path)
            elif path.is_file():
                shutil.copy(path, target)
        tool("index", target, "--decode")
        if not any(target.glob("*.cropindex")):
            raise SkipError("shards index --decode wrote no .cropindex")


def tool(*arguments: object) -> None:
    """Run a command of `shards`.

    Raises:
        SkipError: it fails; with the last line that it says.
    """
    command = [sys.executable, "-m", "shards.cli", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SkipError(f"shards {arguments[0]} failed: {(run.stderr.strip() or 'nothing said').splitlines()[-1]}")


def collect(source: Path, work: Path, count: int) -> Data:
    """Put `count` images of a class folder, or of a zip of one, into a class folder of their own below `work`.

    Taken are sequential JPEGs with one or three components, spread evenly over the sorted names; ImageNet's few others
    (progressive, CMYK, a PNG) take another path in every loader. Fewer than `count` are repeated under other names, so
    that an epoch is long enough for loaders that start anew at its end.
    """
    name = hashlib.sha256(f"{source.resolve()}:{count}".encode()).hexdigest()[:8]
    data = Data(work / f"{source.stem}-{count}-{name}")
    data.root.mkdir(parents=True, exist_ok=True)
    data.form("folder", lambda target: _fill(target, source, count))
    return data


def _fill(target: Path, source: Path, count: int) -> None:
    candidates = list(_list_zip(source) if source.is_file() else _list_folder(source))
    if not candidates:
        sys.exit(f"{source}: no JPEGs in class folders")
    step = max(1.0, len(candidates) / count)
    chosen = [candidates[int(i * step)] for i in range(min(count, len(candidates)))]
    images = [image for image in chosen if _usual(image[2]())]
    for number in range(count):
        copy, place = divmod(number, len(images))
        label, stem, read = images[place]
        path = target / label / f"{stem}_{copy}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read())


Image = tuple[str, str, Callable[[], bytes]]
"""Class, name, and how to read it."""


def _list_folder(source: Path) -> Iterator[Image]:
    for path in sorted(source.glob("*/*")):
        if path.suffix.lower() in (".jpg", ".jpeg"):
            yield path.parent.name, path.stem, path.read_bytes


def _list_zip(source: Path) -> Iterator[Image]:
    archive = zipfile.ZipFile(source)
    for name in sorted(archive.namelist()):
        path = Path(name)
        if path.suffix.lower() in (".jpg", ".jpeg") and path.parent.name:
            yield path.parent.name, path.stem, lambda name=name: archive.read(name)


def _usual(data: bytes) -> bool:
    header = read_jpeg_header(data) if data.startswith(b"\xff\xd8") else None
    return (
        header is not None
        and header.components in (1, 3)
        and header.bits == 8
        and header.process in ("baseline", "extended")
        and header.one_scan
        and not header.arithmetic
    )


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
