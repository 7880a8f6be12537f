"""Images of equal bytes under two keys, found by 16 bytes of hash per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HASH_BYTES = 16
"""At 128 bits, two different images among 10¹² share a hash with a probability below 10⁻¹⁴."""

HASH_DTYPE = np.dtype([("first", "<u8"), ("second", "<u8")])

NO_IMAGE = bytes(HASH_BYTES)
"""Stands for a sample that could not be read, which equals no other."""


@dataclass(frozen=True)
class Occurrence:
    """One of the samples that hold the same image."""

    split: str
    shard: str
    """Path of the tar in the data set folder."""
    key: str
    label: int

    def __str__(self) -> str:
        return f"{self.shard}: key {self.key}"


def equal_rows(hashes: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups of rows, of two and more, whose hashes are equal; each group and the list of them in order of rows.

    Args:
        hashes: HASH_DTYPE [n] each; rows are counted through all of them. Needs 8 further bytes per row.
    """
    first = np.sort(np.concatenate([part["first"] for part in hashes]))
    repeated = np.unique(first[1:][first[1:] == first[:-1]])
    del first
    groups: dict[bytes, list[int]] = {}
    start = 0
    for part in hashes:
        for row in np.flatnonzero(np.isin(part["first"], repeated)):
            groups.setdefault(part[row].tobytes(), []).append(start + int(row))
        start += len(part)
    return [rows for digest, rows in groups.items() if len(rows) > 1 and digest != NO_IMAGE]


def describe_group(group: Sequence[Occurrence]) -> tuple[str, str]:
    """Kind and description of a group: ``label-conflict``, ``leakage`` over several splits, or ``repeated``."""
    labels = sorted({sample.label for sample in group})
    splits = list(dict.fromkeys(sample.split for sample in group))
    places = ", ".join(map(str, group[:4])) + (f" and {len(group) - 4:,} more" if len(group) > 4 else "")
    if len(labels) > 1:
        kind, what = "label-conflict", f"labels {' and '.join(map(str, labels))} for one image"
    elif len(splits) > 1:
        kind, what = "leakage", f"one image in {' and '.join(splits)}"
    else:
        kind, what = "repeated", "one image"
    return kind, f"{what}: {places}"
