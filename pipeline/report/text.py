"""Numbers as a reader takes them in: the same in the table, the sentences, the log and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.record import RunRecord
from pipeline.report.rows import Row

UNKNOWN = "–"
_MINUS = "\u2212"


def number(value: float | None, digits: int = 2) -> str:
    """`23.6` as "23.60"."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}".replace("-", _MINUS)


def signed(value: float | None) -> str:
    """`0.1` as "+0.10"."""
    return UNKNOWN if value is None else f"{value:+.2f}".replace("-", _MINUS)


def spread(mean: float | None, std: float | None) -> str:
    """Mean and, where there is one, standard deviation: "23.60 ± 0.12"."""
    return number(mean) if std is None else f"{number(mean)} ± {number(std)}"


def percent(share: float | None) -> str:
    """`0.914` as "91.4 %"."""
    return UNKNOWN if share is None else f"{number(100 * share, 1)} %"


def count(value: float | None) -> str:
    """`50000` as "50,000"."""
    return UNKNOWN if value is None else f"{round(value):,}"


def rate(value: float | None) -> str:
    """A learning rate, to five digits."""
    return UNKNOWN if value is None else f"{value:.5g}"


def duration(seconds: float | None) -> str:
    """Seconds as "34.2 s", "7:12" or "1:02:45"."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def counts(values: Sequence[int]) -> str:
    """One count, or the least and the greatest of several, which are in ascending order."""
    if len(values) > 1:
        return f"{count(values[0])} – {count(values[-1])}"
    return count(values[0]) if values else UNKNOWN


def seeds(values: Sequence[Any]) -> str:
    """`0, 1, 2, 3` as "0–3", anything else as it is."""
    if len(values) > 2 and all(type(value) is int for value in values):
        ordered = sorted(values)
        if ordered == list(range(ordered[0], ordered[0] + len(ordered))):
            return f"{ordered[0]}–{ordered[-1]}"
    return ", ".join(UNKNOWN if value is None else str(value) for value in values)


def diverges(row: Row) -> str:
    """What stands in place of the error of a row that has none: "diverges (2 of 3 seeds)"."""
    number = len(row.runs)
    return f"diverges ({len(row.diverged)} of {number} seeds)" if number > 1 else "diverges"


def progress(record: RunRecord) -> str:
    """How far a run has come: "epoch 7.5 of 90"."""
    epochs = record.start.get("epochs")
    # the last minibatch of a run usually reaches a little beyond its end
    position = f"{min(record.epoch, epochs or record.epoch):.2f}".rstrip("0").rstrip(".")
    return f"epoch {position}" + (f" of {epochs:g}" if epochs else "")
