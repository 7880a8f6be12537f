"""What `shards verify` finds, and how it is shown.

What is wrong is a *problem*. What may be meant so, but is better known, is a *remark*: classes without images, equal
images under two keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shards.duplicates import Occurrence
from shards.manifest import Manifest, to_json

_MOST_LINES = 100
"""Of problems and of remarks on the screen; ``--json`` has them all."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a file of the data set, and a sample's key where there is one), and what."""

    place: str
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.place}{f': key {self.key}' if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class Remark:
    """Something that may be meant so."""

    kind: str
    """``missing-classes``, ``missing-files``, ``label-conflict``, ``leakage``, ``repeated``, or ``duplicates`` for the
    sum of the last three."""
    what: str
    samples: tuple[Occurrence, ...] = ()
    """Where the same image stands."""


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`."""

    manifest: Manifest
    checks: tuple[str, ...]
    """What was compared, for the summary."""
    problems: tuple[Problem, ...]
    """In the order of the index."""
    remarks: tuple[Remark, ...] = ()
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    """By split: int64 [classes], images of each class, over the samples that could be read."""


def print_report(report: Report, console: Console) -> None:
    """Print a table of the splits, problems, remarks, and a line that sums up."""
    table = Table("split", box=None, pad_edge=False)
    for heading in ("shards", "images", "MB", "classes", "images per class"):
        table.add_column(heading, justify="right")
    for name, shards in report.manifest.splits.items():
        classes, spread = _describe_counts(report.histograms.get(name, np.zeros(0, np.int64)))
        table.add_row(
            name,
            f"{len(shards):,}",
            f"{sum(shard.samples for shard in shards):,}",
            f"{sum(shard.size for shard in shards) / 1e6:,.1f}",
            classes,
            spread,
        )
    console.print(table)
    _print_lines(console, "problem", report.problems)
    _print_lines(console, "remark", [remark.what for remark in report.remarks])
    checked = ", ".join(report.checks)
    if report.problems:
        count = len(report.problems)
        console.out(f"{count:,} problem{'s' if count > 1 else ''}   (checked: {checked})", highlight=False)
    else:
        console.out(f"ok        {checked}", highlight=False)


def _describe_counts(counts: np.ndarray) -> tuple[str, str]:
    """``998 of 1,000`` classes with images, and the least, middle and largest number of images among those."""
    seen = counts[counts > 0]
    if not len(seen):
        return f"0 of {len(counts):,}", ""
    least, middle, most = int(seen.min()), float(np.median(seen)), int(seen.max())
    spread = f"{least:,}" if least == most else f"{least:,} … {middle:,.0f} … {most:,}"
    return f"{len(seen):,} of {len(counts):,}", spread


def _print_lines(console: Console, first: str, lines: Sequence[object]) -> None:
    for line in lines[:_MOST_LINES]:
        console.out(f"{first:<10}{line}", highlight=False)
    if len(lines) > _MOST_LINES:
        console.out(f"{first:<10}… and {len(lines) - _MOST_LINES:,} more, all of them with --json", highlight=False)


def report_as_json(report: Report) -> str:
    """The report for scripts: `ok`, `checks`, `splits` with their label histograms, `problems` and `remarks`."""
    splits: dict[str, Any] = {}
    for name, shards in report.manifest.splits.items():
        counts = report.histograms.get(name, np.zeros(0, np.int64))
        seen = counts[counts > 0]
        splits[name] = {
            "shards": len(shards),
            "images": sum(shard.samples for shard in shards),
            "bytes": sum(shard.size for shard in shards),
            "classes": len(counts),
            "classes_seen": len(seen),
            "classes_missing": np.flatnonzero(counts == 0).tolist(),
            "images_per_class": {
                "min": int(seen.min()) if len(seen) else 0,
                "median": float(np.median(seen)) if len(seen) else 0.0,
                "max": int(seen.max()) if len(seen) else 0,
            },
            "histogram": counts.tolist(),
        }
    document = {
        "ok": not report.problems,
        "checks": list(report.checks),
        "splits": splits,
        "problems": [asdict(problem) for problem in report.problems],
        "remarks": [asdict(remark) for remark in report.remarks],
    }
    return to_json(document).decode("utf-8", "backslashreplace").rstrip()
