"""What the report draws: every chart's panels, their values out of the records, and what to see in them."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.metrics import Event
from pipeline.record import RunRecord
from pipeline.report.drawing import Panel, Points, draw, from_zero, logarithmic_if_wide
from pipeline.report.rows import LAST_EPOCHS, Row


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        name: of the file, without `.png`.
        caption: what to see in it.
        panels: left to right.
        with_end: whether the last fifth of its one panel, where the result is decided, is shown once more beside it.
    """

    name: str
    caption: str
    panels: tuple[Panel, ...]
    with_end: bool = False


@dataclass(frozen=True)
class Picture:
    """A chart as drawn: its file beside the page, its title and caption, and its bytes as PNG."""

    file: str
    title: str
    caption: str
    png: bytes

    @property
    def data_uri(self) -> str:
        """The picture as text, so that the page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def _points(events: Sequence[Event], field: str, change: Callable[[float], float] = float) -> Points:
    """The curve of a field; NaN where it was recorded as not finite."""
    return [(e["epoch"], math.nan if e[field] is None else change(e[field])) for e in events if field in e]


def _means(field: str, change: Callable[[float], float] = float) -> Callable[[RunRecord], Points]:
    """Means over epochs; within the first two, where they would be a dot or two, over the steps between reports."""

    def points(record: RunRecord) -> Points:
        epochs = _points(record.epochs, field, change)
        return epochs if len(epochs) > 2 else _points(record.train, field, change) or epochs

    return points


def _error(top1: float) -> float:
    return 100 - top1


TRAINING_ERROR = Chart(
    "training-error",
    "Measured on the training minibatches as they went by.",
    (Panel("Training error", "top-1 error (%)", _means("top1", _error)),),
    with_end=True,
)
TRAINING_LOSS = Chart(
    "training-loss",
    "Measured on the training minibatches as they went by.",
    (Panel("Training loss", "cross-entropy", _means("loss")),),
    with_end=True,
)
VALIDATION_ERROR = Chart(
    "validation-error",
    "Share of the validation images whose most likely class is wrong.",
    (Panel("Validation error", "top-1 error (%)", lambda record: _points(record.evaluations, "top1", _error)),),
    with_end=True,
)
LEARNING_RATE = Chart(
    "learning-rate",
    "As recorded while training, not as planned; lines join the updates that were logged.",
    (Panel("Learning rate", "", lambda record: _points(record.train, "lr"), logarithmic_if_wide),),
)
SPEED = Chart(
    "throughput",
    "Waiting is the part of a step in which rank 0 had no images to work on, or no gradients of the other ranks.",
    (
        Panel("Throughput", "images / s", _means("images_per_second"), from_zero),
        Panel("Waiting for data", "share of step time (%)", _means("data_wait", lambda share: 100 * share), from_zero),
        Panel("Waiting for gradients", "share of step time (%)", _means("communication", lambda s: 100 * s), from_zero),
    ),
)


def draw_charts(rows: Sequence[Row]) -> list[Picture]:
    """Draw the charts for which the records hold anything, in the order of the page."""
    runs = [record for row in rows for record in row.runs.values()]
    # curves that are compared must all be there: the loss is, where a record lacks the accuracy
    training = TRAINING_ERROR if all(map(TRAINING_ERROR.panels[0].points, runs)) else TRAINING_LOSS
    pictures = []
    for chart in (training, VALIDATION_ERROR, LEARNING_RATE, SPEED):
        panels = tuple(panel for panel in chart.panels if any(_has_numbers(panel.points(record)) for record in runs))
        if panels:
            panels = _with_end(panels[0], runs) if chart.with_end else panels
            pictures.append(Picture(f"{chart.name}.png", panels[0].title, chart.caption, draw(rows, panels)))
    return pictures


def _has_numbers(points: Points) -> bool:
    return any(not math.isnan(value) for _, value in points)


def _with_end(panel: Panel, runs: Sequence[RunRecord]) -> tuple[Panel, ...]:
    """The panel and, unless the runs are short, their last epochs enlarged beside it."""
    end = max(curve[-1][0] for record in runs if (curve := panel.points(record)))
    if end < 8:
        return (panel,)
    begin = math.floor(end - max(LAST_EPOCHS - 1, 0.2 * end) + 1e-6)
    return replace(panel, width=1.7), replace(panel, title=f"the same from epoch {begin} on", unit="", begin=begin)
