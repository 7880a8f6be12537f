"""How many images each rung of the decoder's ladder took, refused, and started from a crop index."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipeline.rungs import NAMES, RUNGS, Rung

REASONS = ("unsupported", "damaged")
"""Why a rung refuses an image: a kind that it does not decode, or one that it decodes, but broken."""

FIELDS = (
    *RUNGS,
    "indexed",
    "stale",
    *(f"{rung}_{reason}" for rung in RUNGS[:-1] for reason in REASONS),
)
"""Images decoded by each rung; of the C extension's, those that began at their crop index and those whose record was
damaged or another image's; and images refused by each rung but the last, whose refusal is an error."""

_NUMBER = {field: number for number, field in enumerate(FIELDS)}


class Tally:
    """Counts by FIELDS. Not safe to share between threads: each task has its own, and whoever takes them adds up.

    Args:
        counts: int64 [len(FIELDS)]; zeros by default.
    """

    def __init__(self, counts: np.ndarray | None = None) -> None:
        self.counts = np.zeros(len(FIELDS), np.int64) if counts is None else counts

    def __getitem__(self, field: str) -> int:
        return int(self.counts[_NUMBER[field]])

    def __iadd__(self, other: Tally) -> Tally:
        self.counts += other.counts
        return self

    def add(self, field: str, images: int = 1) -> None:
        """Count images under a field."""
        self.counts[_NUMBER[field]] += images

    @property
    def images(self) -> int:
        """Decoded, by whichever rung."""
        return sum(self[rung] for rung in RUNGS)

    def figures(self) -> dict[str, int]:
        """The counts that are not zero, by field."""
        return {field: self[field] for field in FIELDS if self[field]}

    def fallen(self, ladder: Iterable[Rung]) -> str:
        """What went past the live rung, and why, for people; empty if nothing did.

        Args:
            ladder: the rungs of the run, the live one first.
        """
        live, *others = ladder
        if live == "pillow" or self.images == self[live]:
            return ""
        takers = " and ".join(f"{self[rung]:,} by {NAMES[rung]}" for rung in others if self[rung])
        reasons = " and ".join(
            f"{self[f'{live}_{reason}']:,} {reason}" for reason in REASONS if self[f"{live}_{reason}"]
        )
        plural = "s" * (self.images - self[live] != 1)
        return (
            f"{self.images - self[live]:,} of {self.images:,} image{plural} not decoded by the {NAMES[live]}"
            f"{f' ({reasons})' * bool(reasons)}, but {takers}"
        )
