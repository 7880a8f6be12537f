"""What is required of the results of gpu.py: ratios, that all ways are one training, that the host does not wait."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_points import BARE, ENGINE, TIMM, Point, Settings

Record = dict[str, Any]
"""A result of a section: what it said, and its name as `section`; or why there is none, as `failed`."""

PUBLISHED = 7_945
PUBLISHED_BY = "MLPerf Training v4.0, MXNet in fp16, batch 400, per GPU of 8 × H200"
"""Images per second: training_results_v4.0, NVIDIA/results/h200_ngc24.04_mxnet/resnet."""

TO_BARE, TO_ENGINE, TO_TIMM, TO_TIMM_SMALL, BEST = (
    "engine / bare loop",
    "engine on loaded batches / on resident ones",
    "engine / timm, BN over the large batch",
    "engine, workers at once / timm, in turn",
    "fastest engine on loaded batches, images/s",
)


@dataclass(frozen=True)
class Required:
    """A lower bound, on a ratio formed within a round or, of the fastest, on images per second; at every point."""

    name: str
    bound: float


REQUIRED = (
    Required(TO_BARE, 0.98),
    Required(TO_ENGINE, 0.95),
    Required(TO_TIMM, 1.0),
    Required(TO_TIMM_SMALL, 1.3),
    Required(BEST, 6000),
)


@dataclass(frozen=True)
class Gate:
    """A requirement and what was measured.

    Attributes:
        values: by point, one for each round.
        missing: points that were not measured.
    """

    required: Required
    values: dict[Point, list[float]]
    missing: list[Point]

    @property
    def lowest(self) -> tuple[Point, float] | None:
        """The point with the lowest median; of the fastest engine, that with the highest."""
        medians = [(point, statistics.median(values)) for point, values in self.values.items()]
        choose = max if self.required.name == BEST else min
        return choose(medians, key=lambda found: found[1]) if medians else None

    @property
    def failing(self) -> list[Point]:
        """Points below the bound; of the fastest engine, that one."""
        if self.required.name == BEST:
            return [self.lowest[0]] if self.lowest and self.lowest[1] < self.required.bound else []
        return [point for point, values in self.values.items() if statistics.median(values) < self.required.bound]

    @property
    def met(self) -> bool:
        """At all points; what was not measured is not met."""
        return bool(self.values) and not self.failing and (self.required.name == BEST or not self.missing)


def gates(records: Sequence[Record], settings: Settings) -> list[Gate]:
    """Every requirement with the ratios of its points."""
    steps = step_records(records)
    loaded = {
        Point(**record["point"]): loaded_ratios(record)
        for record in records
        if record["section"] == "end-to-end" and record.get("what") == "engine"
    }
    points = [*settings.eager, *settings.compiled]
    found = []
    for required in REQUIRED:
        if required.name == TO_ENGINE:
            wanted, values = settings.fed, loaded
        elif required.name == BEST:
            wanted = settings.fed
            values = {
                Point(**record["point"]): record["loaded"]
                for record in records
                if record["section"] == "end-to-end" and record.get("what") == "engine"
            }
        else:
            other = BARE if required.name == TO_BARE else TIMM
            wanted = [point for point in points if concerns(required.name, point, settings)]
            values = {
                point: ratios(record, ENGINE, other) for point, record in steps.items() if has(record, ENGINE, other)
            }
        there = {point: values[point] for point in wanted if point in values}
        found.append(Gate(required, there, [point for point in wanted if point not in there]))
    return found


def concerns(name: str, point: Point, settings: Settings) -> bool:
    """Whether a requirement of steps is one at this point."""
    if name == TO_TIMM:
        return point.n == settings.large
    return name == TO_BARE or point.groups > 1


def step_records(records: Iterable[Record]) -> dict[Point, Record]:
    """The points whose contenders were timed."""
    return {
        Point(**record["point"]): record
        for record in records
        if record["section"] in ("eager", "compiled") and "rounds" in record
    }


def has(record: Record, *contenders: str) -> bool:
    """Whether all of these were timed at a point."""
    return all(name in each for each in record["rounds"] for name in contenders)


def rates(record: Record, contender: str) -> list[float]:
    """Images per second in each round."""
    return [each[contender] for each in record["rounds"]]


def ratios(record: Record, contender: str, other: str) -> list[float]:
    """Within each round."""
    return [each[contender] / each[other] for each in record["rounds"]]


def loaded_ratios(record: Record) -> list[float]:
    """Each turn on loaded batches, divided by the mean of those on resident ones before and after it."""
    resident = record["resident"]
    return [rate / statistics.fmean(resident[number : number + 2]) for number, rate in enumerate(record["loaded"])]


def broken(records: Iterable[Record]) -> list[str]:
    """What is not the same training, or waits for the device; and a count of waits that does not count."""
    found = []
    for record in records:
        if record["section"] == "correctness" and "value" in record and not record["value"] <= record["most"]:
            found.append(f"{record['what']}: {record['value']:.1e}")
        elif record["section"] == "synchronisations" and "explicit" in record:
            waits = record["explicit"] or any((record["named"] or {}).values()) or record["raised"]
            if record["timer"] and not record["explicit"]:
                found.append(f"{record['what']}: its synchronisations were not counted")
            elif waits and not record["timer"]:
                found.append(f"{record['what']}: the host waits for the device")
    return found
