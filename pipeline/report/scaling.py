"""What more ranks were worth: runs that differ in their ranks and share the work of a rank, or the minibatch.

Weak scaling: every rank has the same micro-batch and accumulation, and the minibatch grows with the ranks, as in the
paper's Figures 7 and 8. Strong scaling: the same minibatch on more ranks. Either way the efficiency of W ranks is

    (images per second on W / images per second on the fewest) / (W / the fewest).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.cost import same_work
from pipeline.metrics import Event, is_number
from pipeline.record import RunRecord
from pipeline.report import text

SHARES = {"compute": "compute", "communication": "communication", "data_wait": "data wait"}
"""Fields of the record, and what they are called."""


@dataclass(frozen=True)
class Size:
    """All runs on so many ranks.

    Attributes:
        world_size: W.
        train_batch_size: kn.
        runs: how many there are.
        unit: what the figures are over, "epoch" or "report".
        events: those of the unit, of all runs, without the first of each, which has what is done once.
    """

    world_size: int
    train_batch_size: int
    runs: int
    unit: str
    events: tuple[Event, ...]

    @cached_property
    def images_per_second(self) -> float:
        """Median over the events."""
        return statistics.median(event["images_per_second"] for event in self.events)

    def share(self, field: str) -> float | None:
        """Mean of one of `SHARES` over the events; None where one of them does not have it."""
        values = [event.get(field) for event in self.events]
        return statistics.fmean(map(float, values)) if all(map(is_number, values)) else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scaling:
    """Runs of the same work on different numbers of ranks: `sizes` in ascending order."""

    kind: str
    what: str
    sizes: tuple[Size, ...]

    @property
    def heading(self) -> str:
        """What the table is about."""
        return f"{self.kind.capitalize()} scaling: {self.what}"

    def efficiency(self, size: Size) -> float:
        """Of a size, relative to the smallest."""
        first = self.sizes[0]
        return size.images_per_second / first.images_per_second / (size.world_size / first.world_size)

    def cells(self) -> list[list[str]]:
        """The table's rows, for `HEADINGS`."""
        return [
            [
                text.count(size.world_size),
                text.count(size.train_batch_size),
                text.number(size.images_per_second, 1),
                text.percent(self.efficiency(size)),
                *(text.percent(size.share(field)) for field in SHARES),
                f"{text.count(len(size.events))} {size.unit}{'s' * (len(size.events) != 1)}",
            ]
            for size in self.sizes
        ]

    def as_json(self) -> dict[str, Any]:
        """The table unrounded, for scripts."""
        return {
            "kind": self.kind,
            "what": self.what,
            "sizes": [
                {
                    "world_size": size.world_size,
                    "train_batch_size": size.train_batch_size,
                    "runs": size.runs,
                    "images_per_second": size.images_per_second,
                    "efficiency": self.efficiency(size),
                    **{field: size.share(field) for field in SHARES},
                    "over": {"unit": size.unit, "count": len(size.events)},
                }
                for size in self.sizes
            ],
        }


HEADINGS = ("ranks", "minibatch", "images / s", "efficiency", *SHARES.values(), "median over")


def find_scalings(records: Sequence[RunRecord]) -> list[Scaling]:
    """Every comparison that the runs allow, weak before strong; a run without a rate to compare is left out."""
    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        start = record.start
        micro, accumulation, kn = (start.get(key) for key in ("micro_batch", "accumulation", "train_batch_size"))
        if None in (micro, accumulation, kn, start.get("world_size")) or not _steady(record)[1]:
            continue
        per_rank = f"{text.count(micro)} micro-batch × {text.count(accumulation)} accumulation on every rank"
        for kind, what in (("weak", per_rank), ("strong", f"{text.count(kn)} images per update")):
            groups.setdefault((kind, what, same_work(record)), []).append(record)
    found = [
        Scaling(kind, what, _sizes(runs))
        for (kind, what, _), runs in groups.items()
        if len({record.start["world_size"] for record in runs}) > 1
    ]
    return sorted(found, key=lambda scaling: scaling.kind, reverse=True)


def _sizes(runs: Sequence[RunRecord]) -> tuple[Size, ...]:
    sizes = []
    for world_size in sorted({record.start["world_size"] for record in runs}):
        alike = [record for record in runs if record.start["world_size"] == world_size]
        steady = [_steady(record) for record in alike]
        # a report of a run that is too short for epochs must not count as much as an epoch of another
        unit = "epoch" if any(of == "epoch" for of, _ in steady) else "report"
        events = tuple(event for of, events in steady if of == unit for event in events)
        sizes.append(Size(world_size, alike[0].start["train_batch_size"], len(alike), unit, events))
    return tuple(sizes)


def _steady(record: RunRecord) -> tuple[str, list[Event]]:
    """A run's epochs, else its reports, by its last process and without the first."""
    epochs, reports = (
        [event for event in record.of_last_process(events)[1:] if (event.get("images_per_second") or 0) > 0]
        for events in (record.epochs, record.train)
    )
    return ("epoch", epochs) if epochs else ("report", reports)
