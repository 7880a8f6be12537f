"""The development kit of ILSVRC2012: which number stands for which class, and the numbers of the validation images.

Two of its files matter. ``data/meta.mat`` is a MATLAB file with a table of 1,860 synsets, of which the 1,000 without
children are the classes; their ``ILSVRC2012_ID`` runs from 1 to 1000 in an order of its own.
``data/ILSVRC2012_validation_ground_truth.txt`` has one such number per validation image. The formats are described
in the kit's ``readme.txt``.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError
from shards.tar import scan_bytes

META = "meta.mat"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"

_MAX_BYTES = 64 << 20
"""Of everything in the archive; the official one has 2.5 MB, compressed."""
_MAX_META_BYTES = 16 << 20


def find_devkit(folder: Path) -> Path | None:
    """Where in or below a folder the two files lie; None if they do not."""
    candidates = (folder, folder / "data", folder / "ILSVRC2012_devkit_t12" / "data")
    return next((path for path in candidates if (path / META).is_file() and (path / GROUND_TRUTH).is_file()), None)


def read_devkit_archive(place: str, data: bytes) -> tuple[list[str], dict[str, str]]:
    """`read_devkit` out of the archive, a tar that may be compressed with gzip.

    Raises:
        UserError: beginning with `place`, if it is damaged, hostile, or no devkit.
    """
    if data.startswith(b"\x1f\x8b"):
        data = _decompress(place, data)
    found: dict[str, bytes] = {}
    for member in scan_bytes(data, place):
        folder, _, name = member.name.rpartition("/")
        if name in (META, GROUND_TRUTH) and folder.rpartition("/")[2] == "data":
            if name in found:
                raise UserError(f"{place}: holds two files data/{name}")
            found[name] = data[member.offset : member.offset + member.size]
    for name in (META, GROUND_TRUTH):
        if name not in found:
            raise UserError(
                f"{place}: has no data/{name}, so it is not the devkit of ILSVRC2012's tasks 1 and 2",
                "Give ILSVRC2012_devkit_t12.tar.gz, as downloaded, or labels in another form.",
            )
    return read_devkit(place, found[META], found[GROUND_TRUTH])


def _decompress(place: str, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{place}: damaged: {error}", "Copy or download it again.") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"{place}: unpacks to more than {_MAX_BYTES >> 20} MiB; the devkit is far smaller")
    return content


def read_devkit(place: str, meta: bytes, ground_truth: bytes) -> tuple[list[str], dict[str, str]]:
    """WNIDs of the validation images in the order of their numbers, and what each class is called, by WNID.

    Args:
        place: what errors begin with.
        meta: content of ``meta.mat``.
        ground_truth: content of ``ILSVRC2012_validation_ground_truth.txt``.

    Raises:
        UserError: if a file is damaged, one names a class that the other lacks, or scipy is not installed.
    """
    classes = _parse_meta(f"{place}: {META}", meta)
    by_number = {number: wnid for number, wnid, _ in classes}
    labels = []
    for line, text in enumerate(ground_truth.decode("ascii", "replace").split(), 1):
        wnid = by_number.get(int(text)) if text.isdigit() and len(text) < 10 else None
        if wnid is None:
            raise UserError(f"{place}: {GROUND_TRUTH}: line {line}: {text[:40]!r} is no ILSVRC2012_ID of a class")
        labels.append(wnid)
    if not labels:
        raise UserError(f"{place}: {GROUND_TRUTH} is empty")
    return labels, {wnid: words for _, wnid, words in classes}


def _parse_meta(place: str, data: bytes) -> Sequence[tuple[int, str, str]]:
    """ILSVRC2012_ID, WNID and words of the synsets without children."""
    try:
        import numpy as np
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"{place}: scipy, which reads this file, is not installed",
            "Install it with: pip install 'onehour[imagenet]', or give the labels in another form.",
        ) from error
    if len(data) > _MAX_META_BYTES:
        raise UserError(f"{place}: {len(data):,} bytes; the devkit's is far smaller")
    try:
        synsets = loadmat(io.BytesIO(data), variable_names=["synsets"], squeeze_me=True)["synsets"]
        classes = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
            for row in np.atleast_1d(synsets)
            if int(row["num_children"]) == 0
        ]
    except Exception as error:  # a damaged file makes loadmat raise whatever its bytes lead to
        raise UserError(
            f"{place}: is not the devkit's table of synsets ({type(error).__name__}: {error})",
            "Copy or download it again.",
        ) from error
    numbers, wnids, _ = map(set, zip(*classes, strict=True)) if classes else (set(), set(), set())
    if not len(numbers) == len(wnids) == len(classes):
        raise UserError(f"{place}: an ILSVRC2012_ID or a WNID is there twice", "Copy or download it again.")
    return classes
