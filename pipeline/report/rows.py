"""Which runs belong together, and what their errors say: one row per configuration, compared with the first.

Runs whose configurations differ in nothing but the seed are one row: mean and standard deviation over seeds, as in
the paper (§5.1).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import RESOLVED_FILE
from pipeline.identity import changes_training, leaves
from pipeline.metrics import Event
from pipeline.record import MedianError, RunRecord
from shards.errors import UserError

LAST_EPOCHS = 5
"""A run's result is the median over this many final epochs (paper §5.1)."""

_IDENTITY = (
    "model",
    "train_batch_size",
    "micro_batch",
    "logical_workers",
    "peak_lr",
    "reference_lr",
    "reference_batch",
    "epochs",
    "train_samples",
    "val_samples",
    "precision",
)
"""Fields of `start` that the runs of a row share. The world size is not one: it does not change the training."""

# Two-sided 95 % quantiles of Student's t for 1 … 30 degrees of freedom; SciPy is not a dependency.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class PaperResult:
    """What was published of a row.

    Attributes:
        error: mean top-1 error, percent.
        std: its standard deviation over runs; None where it was not published.
        source: where it stands.
        task: what it was measured on, where that is not what the row's runs train; else empty.
        difference: from the baseline's published error, in points; None for the baseline, or where it has none.
    """

    error: float
    std: float | None = None
    source: str = ""
    task: str = ""
    difference: float | None = None


@dataclass(frozen=True)
class Survivors:
    """The runs of a row that did not diverge, by name; mean and standard deviation of their errors, percent."""

    runs: tuple[str, ...]
    error: float
    std: float | None


@dataclass
class Row:
    """One configuration: a line of the table and a curve in every chart. Errors are top-1, in percent.

    Attributes:
        label: what the row is called.
        runs: its runs by name; a row of a sweep may not have any yet.
        baseline: whether the others are compared with this one.
        difference: mean error minus the baseline's, in points; None for the baseline, while either is unfinished, and
            where either diverged.
        interval: the difference's 95 % interval (Welch); None unless both rows have at least two runs.
        paper: what was published of it, if anything.
        notes: what else to know before trusting it, in sentences.
    """

    label: str
    runs: dict[str, RunRecord]
    baseline: bool = False
    difference: float | None = None
    interval: tuple[float, float] | None = None
    paper: PaperResult | None = None
    notes: tuple[str, ...] = ()

    @property
    def start(self) -> Event:
        """The facts that the runs of a row share; empty without any."""
        return next((record.start for record in self.runs.values()), {})

    @cached_property
    def diverged(self) -> dict[str, RunRecord]:
        """The runs that diverged. With one of them the row has no error: that of the others is not the arm's."""
        return {name: record for name, record in self.runs.items() if record.diverged}

    @cached_property
    def counted(self) -> dict[str, RunRecord]:
        """The runs that the figures are over: the finished ones, or where none has finished all that may still."""
        finished = {name: record for name, record in self.runs.items() if record.finished}
        return finished or {name: record for name, record in self.runs.items() if name not in self.diverged}

    @property
    def finished(self) -> bool:
        """Whether there are figures, and over finished runs of which none diverged."""
        return bool(self.runs) and not self.diverged and all(record.finished for record in self.counted.values())

    @property
    def state(self) -> str:
        """What is to be said beside the label; empty where the figures are over finished runs, and where all ended."""
        if not self.runs:
            return "not trained"
        ended = all(record.finished or record.diverged for record in self.runs.values())
        return "" if self.finished or ended else "unfinished"

    @property
    def paper_gap(self) -> float | None:
        """Mean error minus the published one, in points; None while unfinished, or where it is of something else."""
        if self.error is None or not self.finished or self.paper is None or self.paper.task:
            return None
        return self.error - self.paper.error

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the counted runs, and of those that diverged."""
        return sorted((record.start.get("seed") for record in (self.counted | self.diverged).values()), key=str)

    @cached_property
    def medians(self) -> list[MedianError]:
        """The result of every counted run that was evaluated."""
        return [median for record in self.counted.values() if (median := record.median_error(LAST_EPOCHS))]

    @property
    def images(self) -> list[int]:
        """The distinct numbers of images that the results were measured on."""
        return sorted({count for median in self.medians for count in median.images})

    @property
    def error(self) -> float | None:
        """Mean over the runs of the median error of their last epochs; None where one diverged."""
        return None if self.diverged else _mean(self.medians)

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy in percent: 100 − error."""
        return None if self.error is None else 100 - self.error

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n − 1) of the error over the runs; None with one, and where one diverged."""
        return None if self.diverged else _std(self.medians)

    @property
    def survivors(self) -> Survivors | None:
        """The runs that finished where others diverged; None where none did either."""
        finished = [name for name, record in self.runs.items() if record.finished]
        mean = _mean(self.medians)
        if not (self.diverged and finished) or mean is None:
            return None
        return Survivors(tuple(finished), mean, _std(self.medians))

    @property
    def seconds(self) -> float | None:
        """Mean time of a run."""
        return self._mean(lambda record: record.seconds)

    @property
    def images_per_second(self) -> float | None:
        """Mean speed of a run."""
        return self.mean_over_time("images_per_second")

    def mean_over_time(self, field: str) -> float | None:
        """Mean over the runs of a field's mean (`RunRecord.mean_over_time`)."""
        return self._mean(lambda record: record.mean_over_time(field))

    def _mean(self, figure: Callable[[RunRecord], float | None]) -> float | None:
        values = [value for record in self.counted.values() if (value := figure(record)) is not None]
        return statistics.fmean(values) if values else None


def _mean(medians: Sequence[MedianError]) -> float | None:
    return statistics.fmean(median.error for median in medians) if medians else None


def _std(medians: Sequence[MedianError]) -> float | None:
    return statistics.stdev(median.error for median in medians) if len(medians) > 1 else None


def compare(records: Sequence[RunRecord], reference: Path | str | None = None) -> list[Row]:
    """One row per configuration, in the order given but for the baseline, which is first.

    Args:
        records: the runs; none twice.
        reference: folder of the run whose row is the baseline; by default the first run's.

    Raises:
        UserError: the reference is not among the runs.
    """
    groups: dict[str, dict[str, RunRecord]] = {}
    for record, name in zip(records, _names(records), strict=True):
        groups.setdefault(_identity(record), {})[name] = record
    labels = [_label(runs) for runs in groups.values()]
    rows = []
    for label, runs in zip(labels, groups.values(), strict=True):
        first = next(iter(runs))
        alike = labels.count(label) > 1 and len(runs) > 1
        rows.append(Row(f"{label} ({first}, …)" if alike else label, runs))
    if reference is not None:
        wanted = Path(reference).resolve()
        holds = [any(record.folder.resolve() == wanted for record in row.runs.values()) for row in rows]
        if not any(holds):
            given = ", ".join(str(record.folder) for record in records)
            raise UserError(f"the reference {reference} is not among the runs", f"Runs given: {given}.")
        rows.insert(0, rows.pop(holds.index(True)))
    rows[0].baseline = True
    for row in rows[1:]:
        measure_difference(row, rows[0])
    return rows


def measure_difference(row: Row, baseline: Row) -> None:
    """Set the row's difference from the baseline and, with seeds on both sides, Welch's interval of it."""
    if row.error is None or baseline.error is None or not (row.finished and baseline.finished):
        return
    row.difference = row.error - baseline.error
    if row.std is None or baseline.std is None:
        return
    parts = [(row.std**2 / len(row.medians), len(row.medians) - 1)]
    parts += [(baseline.std**2 / len(baseline.medians), len(baseline.medians) - 1)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    margin = _T95[min(max(int(freedom), 1), len(_T95)) - 1] * math.sqrt(variance)
    row.interval = (row.difference - margin, row.difference + margin)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Folder names, with as many parents in front as it takes to tell them apart."""
    paths = [record.folder.resolve() for record in records]
    names = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["/".join(p.parts[-depth:]) if n in twice else n for n, p in zip(names, paths, strict=True)]
    return names


def _label(runs: dict[str, RunRecord]) -> str:
    """The name of a single run, the configuration of several."""
    name, record = next(iter(runs.items()))
    if len(runs) == 1:
        return name
    return " · ".join((Path(str(record.start.get("config") or name)).stem, *_own_overrides(record)))


def _identity(record: RunRecord) -> str:
    """Equal for two runs exactly when they are seeds of one configuration."""
    facts = [record.start.get(key) for key in _IDENTITY]
    try:
        resolved = json.loads((record.folder / RESOLVED_FILE).read_text("utf-8"))
    except (OSError, ValueError):  # a run copied without it: what was typed decides
        return json.dumps([facts, str(record.start.get("config")), _own_overrides(record)])
    return json.dumps([facts, sorted((p, json.dumps(v)) for p, v in leaves(resolved) if changes_training(p))])


def _own_overrides(record: RunRecord) -> list[str]:
    overrides = map(str, record.start.get("overrides") or ())
    return sorted(o for o in overrides if changes_training(o.split("=", 1)[0].strip()))
