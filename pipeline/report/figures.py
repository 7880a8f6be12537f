"""A sweep's figures in the paper's layout: curves of an arm beside the baseline's, and error against minibatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pipeline.record import RunRecord
from pipeline.report import text
from pipeline.report.charts import TRAINING_ERROR, VALIDATION_ERROR, Picture
from pipeline.report.drawing import Points, as_png, count_epochs, draw_apart, draw_mean, line_style
from pipeline.report.rows import Row

SIDE_BY_SIDE = 3
"""Panels of curves, at most."""

PANEL_HEIGHT = 3.1
POINTS_HEIGHT = 4.2

CURVES_CAPTION = (
    "Training error, measured on the minibatches as they went by: the baseline and one arm in each panel; mean and ± 1 "
    "standard deviation over seeds. In the legends: minibatch, peak learning rate, and validation error (mean ± "
    "standard deviation of the runs’ medians over their last epochs). Thin: runs that diverged."
)
VALIDATION_CAPTION = "Dotted: the validation error after each epoch."
POINTS_CAPTION = (
    "Top-1 validation error against the minibatch; bars are ± 2 standard deviations over runs. Arms that have not "
    "finished are left out."
)
DIVERGED_CAPTION = "Crosses at the upper edge: arms that diverged, and with how many of their seeds."


@dataclass(frozen=True)
class Point:
    """Error (mean, percent) at a minibatch of kn images; `std` over runs, None where not known."""

    kn: int
    error: float
    std: float | None = None


@dataclass(frozen=True)
class Divergence:
    """At a minibatch of kn images `diverged` of so many `runs` diverged, so that there is no error."""

    kn: int
    diverged: int
    runs: int


def curves(
    name: str, title: str, baseline: Row, arms: Sequence[Row], order: Sequence[Row], *, validation: bool
) -> Picture:
    """Training error against epochs, an arm and the baseline in each panel (the paper's figures 2, 3 and 5).

    Args:
        name: of the file, without `.png`.
        title: of the figure.
        baseline: drawn in every panel.
        arms: a panel each.
        order: all rows of the table, which have their colours by their place in it.
        validation: whether the validation error is drawn too (figure 4).
    """
    across = min(SIDE_BY_SIDE, len(arms))
    down = math.ceil(len(arms) / across)

    def fill(figure: Figure) -> None:
        _entitle(figure, title)
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for number, axes in enumerate(grid.flat):
            if number >= len(arms):
                axes.set_axis_off()
                continue
            _draw_curves(axes, baseline, arms[number], order, validation=validation)
            axes.tick_params(labelbottom=True)
        for row in grid:
            row[0].set_ylabel("top-1 error (%)" if validation else "training error (%)")

    caption = f"{CURVES_CAPTION} {VALIDATION_CAPTION}" if validation else CURVES_CAPTION
    return Picture(f"{name}.png", title or "Training error", caption, as_png(fill, PANEL_HEIGHT * down))


def _draw_curves(axes: Axes, baseline: Row, arm: Row, order: Sequence[Row], *, validation: bool) -> None:
    pair = [arm] if arm is baseline else [baseline, arm]
    for number, row in enumerate(pair):
        style = line_style(order.index(row)) | {"linestyle": "-"}
        training = TRAINING_ERROR.panels[0].points
        _draw_runs(axes, row, training, style | {"label": _legend(row)}, order=number)
        if validation:
            _draw_runs(axes, row, VALIDATION_ERROR.panels[0].points, style | {"linestyle": ":"}, order=number)
    axes.set_title(arm.label)
    count_epochs(axes, most=5)
    if axes.has_data():
        axes.legend(fontsize=8, frameon=True, framealpha=0.8, edgecolor="none")
    else:
        axes.text(0.5, 0.5, "not trained yet", transform=axes.transAxes, ha="center", color="#555555")


def _draw_runs(
    axes: Axes, row: Row, points: Callable[[RunRecord], Points], style: dict[str, Any], *, order: int
) -> None:
    """The mean of the counted runs with its band, and those that diverged one by one; one line has the label."""
    counted = [curve for record in row.counted.values() if (curve := points(record))]
    if counted:
        draw_mean(axes, counted, order=order, **style)
        style = style | {"label": None}
    for record in row.diverged.values():
        if curve := points(record):
            draw_apart(axes, curve, **style)
            style = style | {"label": None}


def _legend(row: Row) -> str:
    size, rate = row.start.get("train_batch_size"), row.start.get("peak_lr")
    shown = short(size) if isinstance(size, int) else text.UNKNOWN
    result = f"{text.spread(row.error, row.std)} %" if row.error is not None else ""
    if row.diverged:
        result = text.diverges(row)
    elif not row.finished:
        result = "(unfinished)"
    return f"kn = {shown}, η = {text.rate(rate)}   {result}".rstrip()


def minibatch(
    name: str,
    title: str,
    ours: Sequence[Point],
    papers: Sequence[Point],
    task: str,
    divergences: Sequence[Divergence] = (),
) -> Picture:
    """Error against the minibatch on a logarithmic axis (the paper's figure 1), the paper's points beside.

    Args:
        name, title: as of `curves`.
        ours: what was measured.
        papers: what was published, of the same minibatches.
        task: what the published points are of, where that is not what was trained here: they then have axes of their
            own.
        divergences: where ours diverged, which has a mark at the upper edge instead of a point.
    """
    apart = bool(task) and bool(papers)

    def fill(figure: Figure) -> None:
        _entitle(figure, title)
        every = figure.subplots(1, 2 if apart else 1, squeeze=False)[0]
        _draw_points(every[0], ours, 0, "this sweep")
        _draw_points(every[-1], papers, 1, f"Goyal et al. 2017{f', {task}' if task else ''}", beside=not apart)
        _draw_divergences(every[0], divergences, 0)
        own = {point.kn for point in ours} | {divergence.kn for divergence in divergences}
        published = {point.kn for point in papers}
        for axes, sizes in zip(every, (own, published) if apart else (own | published,), strict=True):
            kns = sorted(sizes)
            axes.set_xlabel("minibatch, images")
            axes.set_ylabel("top-1 validation error (%)")
            if kns:
                axes.set_xscale("log", base=2)
                axes.set_xlim(kns[0] / math.sqrt(2), kns[-1] * math.sqrt(2))
                axes.xaxis.set_major_locator(FixedLocator(kns))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value))))
            if axes.has_data():
                axes.legend(loc="upper left")

    caption = f"{POINTS_CAPTION} {DIVERGED_CAPTION}" if divergences else POINTS_CAPTION
    return Picture(f"{name}.png", title or "Error against minibatch", caption, as_png(fill, POINTS_HEIGHT))


def _draw_points(axes: Axes, points: Sequence[Point], index: int, label: str, *, beside: bool = False) -> None:
    """Points with their bars; `beside` moves them a little, so that bars at the same minibatch can be told apart."""
    if not points:
        return
    ordered = sorted(points, key=lambda point: point.kn)
    axes.errorbar(
        [point.kn * (1.06 if beside else 1) for point in ordered],
        [point.error for point in ordered],
        yerr=[2 * (point.std or 0) for point in ordered],
        **line_style(index),
        marker="os"[index],
        markersize=4,
        capsize=3,
        linewidth=1.2,
        label=label,
    )


def _draw_divergences(axes: Axes, divergences: Sequence[Divergence], index: int) -> None:
    """A cross at the upper edge for each, and beside it the number of seeds."""
    if not divergences:
        return
    if not axes.has_data():  # nothing says how high the errors are
        axes.set_ylim(0, 100)
    at_the_edge = axes.get_xaxis_transform()  # minibatches across, shares of the height upwards
    axes.plot(
        [divergence.kn for divergence in divergences],
        [1] * len(divergences),
        color=line_style(index)["color"],
        linestyle="none",
        marker="x",
        markersize=7,
        markeredgewidth=1.8,
        transform=at_the_edge,
        clip_on=False,
        label="diverges",
    )
    for divergence in divergences:
        axes.annotate(
            f"{divergence.diverged} of {divergence.runs}",
            (divergence.kn, 1),
            xycoords=at_the_edge,
            xytext=(-6, -4),  # the paper's bars are to the right
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
        )


def _entitle(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def short(kn: int) -> str:
    """`8192` as "8k", as the paper writes it."""
    return f"{kn // 1024}k" if kn >= 1024 and kn % 1024 == 0 else str(kn)
