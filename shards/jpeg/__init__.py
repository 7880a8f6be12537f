"""Baseline JPEGs, decoded from anywhere in the file: the C extension, as Python calls it.

The extension (``native/``) is optional: without a C compiler at installation it is not there, and `unavailable` says
so. It decodes what almost every photograph is, a sequential 8-bit Huffman-coded JPEG of one or three components, to
the very pixels of libjpeg-turbo; whatever else there is, and whatever is damaged, it leaves to others by its `Status`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np

VERSION = 2
"""Of the interface between this module and the C code; raised with it, on both sides."""

MEND = (
    "Install a C compiler and Python's headers (Debian: apt install gcc python3-dev), then: ./run.sh setup, or",
    "python -c 'from setuptools import setup; setup()' build_ext --inplace   which shows what goes wrong",
)
"""How to get the extension, in lines."""

EXTENT_DTYPE = np.dtype(
    [("offset", "u8"), ("size", "u4"), ("descriptor", "i4"), ("index_descriptor", "i4"), ("row", "u4")]
)
"""Where an encoded image lies in an open file, in bytes; and its crop index record: an open index file, or -1, and the
row of the image in its shard."""

_CROPS = {"resized": 0, "padded": 1, "none": 2, "evaluation": 3}
_WORD = (1 << 64) - 1

_extension_module: ModuleType | None = None
_reason: str | None = None
try:
    _built = importlib.import_module("shards.jpeg._native")
except ModuleNotFoundError:
    _reason = "was not built when onehour was installed"
except ImportError as error:
    _reason = f"cannot be loaded: {error}"
else:
    if getattr(_built, "VERSION", None) == VERSION:
        _extension_module = _built
    else:
        _reason = "is of another version than the sources: it has to be built again"


class Status(IntEnum):
    """What became of an image. Negative: it was not decoded."""

    INDEXED = 0
    """Decoded, starting from its crop index."""
    PLAIN = 1
    """Decoded from the top of the file: it has no crop index."""
    STALE = 2
    """Decoded from the top: its crop index record is damaged, or is not of this image."""
    UNSUPPORTED = -1
    """Not a JPEG that the extension takes."""
    DAMAGED = -2
    TOO_LARGE = -3
    """More pixels than Pillow takes without a warning."""
    UNREADABLE = -4
    """The file could not be read, or is shorter than it should be."""
    NO_MEMORY = -5
    STOPPED = -6
    """Not tried, because `stop` was set."""


@dataclass(frozen=True)
class Views:
    """What part of an image is shown: the parameters of `pipeline.augment.Augmentation`, which draws the same."""

    key: int
    """Of Philox, 128 bits."""
    crop: str
    """"resized", "padded" or "none"."""
    scale: tuple[float, float]
    ratio: tuple[float, float]
    padding: int
    flip: bool

    def pack(self, size: int) -> tuple[Any, ...]:
        """As the extension takes it."""
        logarithms = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        words = (self.key & _WORD, self.key >> 64)
        return (size, _CROPS[self.crop], *words, *self.scale, *self.ratio, *logarithms, self.padding, self.flip, size)


def unavailable() -> str | None:
    """Why the extension cannot be used, as the end of a sentence about it; None if it can."""
    return _reason


def describe() -> str:
    """What decodes, for people: ``C extension, AVX2``."""
    return f"C extension, {_extension().variant()}"


def decode_files(
    extents: np.ndarray,
    out: np.ndarray,
    status: np.ndarray,
    views: Views,
    epochs: np.ndarray,
    samples: np.ndarray,
    stop: np.ndarray | None = None,
) -> None:
    """Read and decode the training views of some images, without the interpreter's lock.

    Args:
        extents: EXTENT_DTYPE [n], contiguous.
        out: uint8 [n, size, size, 3], contiguous, written in place; only images whose status is not negative.
        status: int32 [n], written: a `Status` for each image.
        views: what to show.
        epochs, samples: int64 [n], the keys of the views.
        stop: uint8 [1]; another thread sets it to end the call after the image under way.
    """
    _check(extents, status, epochs, samples)
    _extension().load_files(views.pack(out.shape[1]), extents, epochs, samples, out, status, stop)


def evaluate_files(
    extents: np.ndarray, out: np.ndarray, status: np.ndarray, resize: int, stop: np.ndarray | None = None
) -> None:
    """`decode_files` for evaluation: the short side scaled to `resize`, and the centre cut out of that."""
    unused = np.zeros(len(extents), np.int64)
    _check(extents, status, unused, unused)
    _extension().load_files(_evaluation(out.shape[1], resize), extents, unused, unused, out, status, stop)


def decode_bytes(
    image: bytes, out: np.ndarray, views: Views, epoch: int, sample: int, record: bytes = b"", row: int = 0
) -> Status:
    """Decode the training view of an image in memory into `out`, uint8 [size, size, 3].

    Args:
        image: the encoded image.
        out: written in place, if the status is not negative.
        views: what to show.
        epoch, sample: the keys of the view.
        record: its crop index record, if there is one, and
        row: its row in the shard.
    """
    packed = views.pack(out.shape[0])
    return Status(_extension().load_bytes(packed, image, record, row, epoch, sample, out))


def evaluate_bytes(image: bytes, out: np.ndarray, resize: int, record: bytes = b"", row: int = 0) -> Status:
    """`decode_bytes` for evaluation, as `evaluate_files`."""
    return Status(_extension().load_bytes(_evaluation(out.shape[0], resize), image, record, row, 0, 0, out))


def index_image(image: bytes, row: int = 0) -> bytes:
    """The crop index record of an image; one without entries if it is no baseline JPEG, or damaged."""
    return _extension().index_image(image, row)


def decode_rectangle(
    image: bytes, left: int, top: int, width: int, height: int, record: bytes = b"", row: int = 0
) -> tuple[Status, np.ndarray | None]:
    """The pixels of a rectangle as they are: uint8 [height, width, 3], or None if the status is not INDEXED or PLAIN.

    With a record nothing else is tried where it does not fit; its status is then STALE.
    """
    status, pixels = _extension().pixels(image, record, row, left, top, width, height)
    if status:
        return Status(status), None
    shaped = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    return (Status.INDEXED if record else Status.PLAIN), shaped


def draw_view(views: Views, size: int, width: int, height: int, epoch: int, sample: int) -> tuple[int, ...]:
    """What the extension shows of an image of `width` × `height` pixels; for tests.

    Returns:
        Left, top, width, height of the part; the width and height that it is scaled to; the left and top of what is
        cut out of that; and 1 if it is mirrored.
    """
    return _extension().draw(views.pack(size), width, height, epoch, sample)


def choose_variant(name: str) -> None:
    """Use other inner loops than the best ones for this processor, e.g. ``portable C``; for tests."""
    _extension().variant(name)


def _check(extents: np.ndarray, status: np.ndarray, epochs: np.ndarray, samples: np.ndarray) -> None:
    """The types of arrays; their sizes and layout are checked where their memory is used."""
    for array, wanted in ((extents, EXTENT_DTYPE), (status, np.int32), (epochs, np.int64), (samples, np.int64)):
        if array.dtype != wanted:
            raise TypeError(f"an array of {np.dtype(wanted)} is needed, this is one of {array.dtype}")


def _evaluation(size: int, resize: int) -> tuple[Any, ...]:
    return (size, _CROPS["evaluation"], 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, False, resize)


def _extension() -> ModuleType:
    if _extension_module is None:
        raise RuntimeError(f"the C extension {_reason}")
    return _extension_module
