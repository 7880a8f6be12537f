"""The demo: 1,797 handwritten digits of 8×8 pixels that come with scikit-learn, as JPEG files.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; the
copy in scikit-learn (``sklearn.datasets.load_digits``) is that set's test part, 10 classes, values 0 to 16.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError
from shards.sources.base import Entry, Source

_SIDE = 8
_MAXIMUM = 16
_EVERY = 5
"""Every fifth image of the list sorted by class is held out: 360 of 1,797, each class in proportion."""


class Demo(Source):
    """scikit-learn's digits: 1,437 for training and 360 for validation, always the same ones."""

    name = "demo"
    summary = "1,797 handwritten digits of 8×8 pixels, from scikit-learn; nothing to download"
    classes = tuple("0123456789")
    splits = ("train", "val")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Demo:
        """There is nothing to choose."""
        return cls()

    def entries(self, split: str) -> Iterator[Entry]:
        """The digits of a split. The locator of a picture this small is its pixels, in hexadecimal."""
        by_class = sorted(enumerate(_read_digits()), key=lambda item: item[1][1])
        for position, (number, (pixels, label)) in enumerate(by_class):
            if (position % _EVERY == 0) == (split == "val"):
                yield Entry(f"digit_{number:04d}", label, pixels.hex())

    def read(self, locator: str) -> bytes:
        """The picture as a gray JPEG, values 0…16 spread over 0…255: decoded as ImageNet's photographs are."""
        from PIL import Image

        pixels = bytes(round(value * 255 / _MAXIMUM) for value in bytes.fromhex(locator))
        buffer = io.BytesIO()
        Image.frombytes("L", (_SIDE, _SIDE), pixels).save(buffer, "JPEG", quality=100)  # within 1 of the values
        return buffer.getvalue()


def _read_digits() -> Iterator[tuple[bytes, int]]:
    """Pixels (64 bytes, 0…16, row by row) and label of each digit.

    The file is read where scikit-learn keeps it, because importing scikit-learn takes two seconds.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError(
            "demo: scikit-learn, which the demo's digits come with, is not installed",
            "Install it with: pip install 'onehour[demo]'",
        )
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii", newline="") as file:
            for row in csv.reader(file):
                values = [int(float(value)) for value in row]
                yield bytes(values[: _SIDE * _SIDE]), values[_SIDE * _SIDE]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error}", "Install scikit-learn again: pip install 'onehour[demo]'"
        ) from error
