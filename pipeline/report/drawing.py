"""How curves are drawn: one line per row of the table, a band over its seeds, panels side by side as one PNG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from pipeline.record import RunRecord
from pipeline.report.rows import Row

DPI = 200
WIDTH, HEIGHT = 9.6, 3.5  # inches

# Okabe and Ito's palette, the darker colours first. The dashes keep lines apart in gray print; their number and the
# colours' have no common divisor, so that 35 lines differ.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.4, 1.5)), (0, (9, 3)))
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
}
_MARKED = 25
"""Curves of at most this many points show them."""
_LABEL = 44
"""Longer labels are cut in a legend, which would otherwise squeeze the panels."""

Points = list[tuple[float, float]]
"""(epoch, value) in ascending order; a value is NaN where it was not finite."""


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: above it.
        unit: of the values.
        points: a run's curve; empty where its record has none.
        fit: sets the value axis once everything is drawn.
        begin: the first epoch that is shown.
        width: relative to the panels beside it.
    """

    title: str
    unit: str
    points: Callable[[RunRecord], Points]
    fit: Callable[[Axes], None] = lambda axes: None
    begin: float = 0.0
    width: float = 1.0


def from_zero(axes: Axes) -> None:
    """Show zero, for values that are read by their size."""
    _, high = axes.dataLim.intervaly
    axes.set_ylim(0, 1.06 * high if high > 0 else 1)


def logarithmic_if_wide(axes: Axes) -> None:
    """A log axis where values span more than a factor of 30, as a rate with three milestones does."""
    low, high = axes.dataLim.intervaly
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw(rows: Sequence[Row], panels: Sequence[Panel]) -> bytes:
    """The panels side by side, under one legend where there are several rows, as PNG."""

    def fill(figure: Figure) -> None:
        widths = [panel.width for panel in panels]
        grid = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": widths})
        for axes, panel in zip(grid[0], panels, strict=True):
            _draw_panel(axes, rows, panel)
        if len(rows) > 1:
            _add_legend(figure, [row.label for row in rows])

    return as_png(fill)


def as_png(fill: Callable[[Figure], None], height: float = HEIGHT) -> bytes:
    """A figure of the page's width and style; `fill` draws into it."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")  # pyplot's global state stays out of it
        fill(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def _draw_panel(axes: Axes, rows: Sequence[Row], panel: Panel) -> None:
    """The means of the counted runs, with bands; runs that are not counted are drawn thin."""
    for index, row in enumerate(rows):
        style = line_style(index)
        for name, record in row.runs.items():
            if name not in row.counted and (curve := panel.points(record)):
                draw_apart(axes, curve, panel.begin, **style)
        curves = [curve for record in row.counted.values() if (curve := panel.points(record))]
        if not curves:
            continue
        # later rows are dashed and lie on top, so that equal curves show both colours
        draw_mean(axes, curves, panel.begin, index, **style)
    panel.fit(axes)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    count_epochs(axes)


def count_epochs(axes: Axes, most: int = 10) -> None:
    """Label the horizontal axis with epochs, `most` of them at most."""
    axes.set_xlabel("epoch")
    first, last = axes.get_xlim()
    if last - first > 2:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]))


def draw_apart(axes: Axes, curve: Points, begin: float = 0.0, **style: Any) -> None:
    """The curve of a run that is not counted, thin; the arguments are as of `draw_mean`."""
    epochs, values, _ = _mean([curve], begin)
    axes.plot(epochs, values, **style, linewidth=0.7, alpha=0.7, marker="." if len(epochs) == 1 else "")


def draw_mean(axes: Axes, curves: Sequence[Points], begin: float = 0.0, order: int = 0, **style: Any) -> None:
    """The mean of curves as a line, with a band of one sample standard deviation where there are several.

    Args:
        axes: to draw into.
        curves: of the runs of a row, one at least.
        begin: the first epoch that is drawn.
        order: lines of a higher order lie on top.
        style: of the line.
    """
    epochs, mean, std = _mean(curves, begin)
    marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(epochs) <= _MARKED else {}
    axes.plot(epochs, mean, **marker, **style, zorder=3 + 0.01 * order)
    if len(curves) > 1:
        axes.fill_between(epochs, mean - std, mean + std, color=style["color"], alpha=0.18, linewidth=0, zorder=2)


def _mean(curves: Sequence[Points], begin: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs from `begin` on, mean and sample standard deviation of curves, on the epochs of the shortest.

    Seeds of one configuration are logged at the same epochs, so nothing is interpolated unless a run was logged
    more rarely than another. The standard deviation of one curve is NaN.
    """
    arrays = [np.asarray(curve, dtype=float).T for curve in curves]
    grid = min(arrays, key=lambda array: array.shape[1])[0]
    begin, end = max(begin, *(array[0, 0] for array in arrays)), min(array[0, -1] for array in arrays)
    grid = grid[(grid >= begin) & (grid <= end)]
    values = np.stack([np.interp(grid, *array) for array in arrays])
    std = values.std(axis=0, ddof=1) if len(arrays) > 1 else np.full(len(grid), math.nan)
    return grid, values.mean(axis=0), std


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of a row, by its place in the table."""
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _DASHES[index % len(_DASHES)]}


def _add_legend(figure: Figure, labels: Sequence[str]) -> None:
    """Above the panels, in as many columns as fit."""
    labels = [label if len(label) <= _LABEL else label[: _LABEL - 1] + "…" for label in labels]
    legend = figure.legend(
        [Line2D([], [], **line_style(index)) for index in range(len(labels))],
        [str(index) for index in range(len(labels))],
        loc="outside upper left",
        ncols=max(1, min(len(labels), 120 // (max(map(len, labels)) + 8))),
        handlelength=3.2,
        columnspacing=1.8,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)  # given as a label, one that begins with an underscore would be dropped
