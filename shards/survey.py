"""What the images of some shards look like, from their headers alone: nothing is decoded."""

from __future__ import annotations

import os
import struct
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.files import opened
from shards.idx import Component, IndexedSample, index_path, list_samples, read_samples
from shards.images import IMAGE_EXTENSIONS, describe_image

HEAD_BYTES = 1 << 16
"""Read of each image; the headers of all but the strangest end long before."""

MOST_NAMED = 5
"""Samples named for each finding; all are counted."""

_SAME_FORMAT = {"jpeg": "jpg", "jpe": "jpg", "tif": "tiff"}


@dataclass(frozen=True)
class Part:
    """Samples of one shard to look at; pickles small."""

    tar: Path
    rows: np.ndarray
    """Their places in the tar, rising: int64 [n]."""
    indexed: bool = True
    """Whether there is an ``.idx`` beside the tar; its headers are scanned otherwise."""

    def samples(self) -> list[IndexedSample]:
        """Where the components of these samples lie.

        Raises:
            UserError: if the ``.idx`` or the tar is damaged.
        """
        if self.indexed:
            return read_samples(index_path(self.tar), self.rows.tolist())
        everything = list_samples(self.tar)
        return [everything[row] for row in self.rows]


@dataclass
class Survey:
    """What was found; surveys of parts add up to that of the whole."""

    widths: list[int] = field(default_factory=list)
    """In pixels, of the images whose header was understood; as stored, without regard to EXIF."""
    heights: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """"JPEG", "gray JPEG", "PNG", "no image", …"""
    colours: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    """What a person should know of: files under another format's extension, EXIF orientations, damage."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """Some keys for each finding."""

    def note(self, finding: str, key: str) -> None:
        """Count a finding and name a few of the samples that have it."""
        self.findings[finding] += 1
        keys = self.named.setdefault(finding, [])
        if len(keys) < MOST_NAMED:
            keys.append(key)

    def add(self, other: Survey) -> None:
        """Count what another one found as well."""
        self.widths += other.widths
        self.heights += other.heights
        self.kinds += other.kinds
        self.colours += other.colours
        self.findings += other.findings
        for finding, keys in other.named.items():
            self.named[finding] = (self.named.get(finding, []) + keys)[:MOST_NAMED]


def image_of(sample: IndexedSample) -> Component | None:
    """The component that is the image, by its extension; the first if there are several."""
    for component in sample.components:
        if component.extension.lower() in IMAGE_EXTENSIONS:
            return component
    return None


def survey_part(part: Part) -> Survey:
    """Look at the first bytes of each image of a part.

    Raises:
        UserError: if the ``.idx`` or the tar is damaged or cannot be read.
    """
    survey = Survey()
    with opened(part.tar) as descriptor:
        for sample in part.samples():
            image = image_of(sample)
            if image is None:
                survey.kinds["no image"] += 1
                survey.note("no image among the components", sample.key)
                continue
            head = os.pread(descriptor, min(image.size, HEAD_BYTES), image.offset)
            _look(survey, sample.key, image, head)
    return survey


def _look(survey: Survey, key: str, image: Component, head: bytes) -> None:
    header = describe_image(head)
    if header is None:
        survey.kinds["no image"] += 1
        survey.note("not an image: the file is empty" if not head else "not an image by its first bytes", key)
        return
    survey.kinds[header.kind] += 1
    survey.colours[header.colour or "unknown"] += 1
    if header.width and header.height:
        survey.widths.append(header.width)
        survey.heights.append(header.height)
    else:
        survey.note("header damaged, or beyond the first 64 KiB", key)
    if header.clipped:
        survey.note("gray of more than 8 bits: training sees it clipped to white", key)
    extension = image.extension.lower()
    if _SAME_FORMAT.get(extension, extension) != header.format:
        survey.note(f"{header.format.upper()} under the extension .{extension}", key)
    orientation = exif_orientation(head)
    if orientation not in (None, 1):
        survey.note("EXIF orientation other than 1 (left as stored)", key)


def exif_orientation(head: bytes) -> int | None:
    """The orientation that a JPEG's EXIF segment asks for, 1 to 8; None without a readable one."""
    start = head.find(b"Exif\0\0", 2, 4096)
    if start < 0:
        return None
    from PIL import Image

    # the segment is parsed by itself: the image's own markers may go on beyond these bytes
    (length,) = struct.unpack_from(">H", head, start - 2)
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF is common, and nobody's concern here
            exif.load(head[start : start - 2 + length])
            orientation = exif.get(0x0112)
    except Exception:  # a parser fed with damaged bytes may raise anything
        return None
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float] | None:
    """Minimum, median, mean and maximum; None of nothing."""
    if not len(values):
        return None
    array = np.asarray(values)
    return {
        "min": int(array.min()),
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "max": int(array.max()),
    }
