"""The table of results: its columns, which the page and the terminal share, and its numbers for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report import text
from pipeline.report.answers import question, remarks
from pipeline.report.rows import Row
from pipeline.report.scaling import HEADINGS, SHARES, Scaling, find_scalings


@dataclass(frozen=True)
class Column:
    """A figure of every row.

    Attributes:
        heading: on the page, its first line.
        unit: on the page, its second line.
        short: the heading in the terminal.
        cell: the figure as text.
        note: small print below the figure, on the page only.
        strong: whether the page sets it in bold.
        shown: whether it is in a table of some rows.
    """

    heading: str
    unit: str
    short: str
    cell: Callable[[Row], str]
    note: Callable[[Row], str] = lambda row: ""
    strong: bool = False
    shown: Callable[[Sequence[Row]], bool] = lambda rows: True


def _error(row: Row) -> str:
    return text.diverges(row) if row.diverged else text.spread(row.error, row.std)


def _survivors(row: Row) -> str:
    survivors = row.survivors
    return f"the others: {text.spread(survivors.error, survivors.std)}" if survivors is not None else ""


def _difference(row: Row) -> str:
    return "baseline" if row.baseline else text.signed(row.difference)


def _interval(row: Row) -> str:
    return " … ".join(map(text.signed, row.interval)) if row.interval else ""


def _paper(row: Row) -> str:
    return text.spread(row.paper.error, row.paper.std) if row.paper is not None else text.UNKNOWN


def _source(row: Row) -> str:
    return row.paper.source if row.paper is not None else ""


def _paper_difference(row: Row) -> str:
    return "baseline" if row.baseline else text.signed(row.paper.difference if row.paper is not None else None)


def _several(rows: Sequence[Row]) -> bool:
    return len(rows) > 1


def _published(rows: Sequence[Row]) -> bool:
    return any(row.paper is not None for row in rows)


def _comparable(rows: Sequence[Row]) -> bool:
    return any(row.paper is not None and not row.paper.task for row in rows)


_COLUMNS = (
    Column("minibatch", "kn, images", "kn", lambda row: text.count(row.start.get("train_batch_size"))),
    Column("learning", "rate, peak", "peak LR", lambda row: text.rate(row.start.get("peak_lr"))),
    Column("seeds", "", "seeds", lambda row: text.seeds(row.seeds) or text.UNKNOWN),
    Column("top-1 error", "%", "error %", _error, note=_survivors, strong=True),
    # what was published takes the room of what can be done without
    Column("accuracy", "%", "top-1 %", lambda row: text.number(row.accuracy), shown=lambda rows: not _published(rows)),
    Column("evaluated", "on images", "images", lambda row: text.counts(row.images), shown=lambda r: not _published(r)),
    Column("difference", "points of error", "vs baseline", _difference, note=_interval, shown=_several),
    Column("the paper", "error, %", "paper %", _paper, note=_source, shown=_published),
    Column(
        "difference",
        "in the paper",
        "in the paper",
        _paper_difference,
        shown=lambda rows: _published(rows) and _several(rows),
    ),
    Column("ours − paper", "points of error", "ours − paper", lambda r: text.signed(r.paper_gap), shown=_comparable),
    Column("time", "per run", "time", lambda row: text.duration(row.seconds)),
    Column("speed", "images / s", "img/s", lambda row: text.count(row.images_per_second)),
)


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns beside the row's label, of those that say something of these rows."""
    return [column for column in _COLUMNS if column.shown(rows)]


def print_table(rows: Sequence[Row], page: Path, title: str | None = None) -> None:
    """Print question (or a sweep's title), answers, table and remarks to the terminal, and where the page is."""
    console = Console()
    piped = not console.is_terminal
    if piped:
        console.width = 160  # a file or a pipe has no edge to fold at
    headline, answers = question(rows)
    console.print(Text(title or headline, style="bold"))
    for answer in answers:
        console.print(Text(answer), soft_wrap=piped)
    gap = 1 if console.width < 110 else 2
    table = Table(box=None, padding=(0, 0, 0, gap), pad_edge=False, header_style="dim")
    table.add_column("arm" if title is not None else "run", overflow="fold", min_width=10)
    shown = columns(rows)
    for column in shown:
        table.add_column(column.short, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(_labelled(row)), *(Text(column.cell(row)) for column in shown))
    console.print()
    console.print(table)
    for row in rows:
        for remark in remarks(row):
            console.print(Text(remark), soft_wrap=piped)
    for scaling in _scalings(rows):
        _print_scaling(console, scaling, gap)
    console.print()
    console.print(Text(str(page)), soft_wrap=True)


def _scalings(rows: Sequence[Row]) -> list[Scaling]:
    return find_scalings([record for row in rows for record in row.runs.values()])


def _print_scaling(console: Console, scaling: Scaling, gap: int) -> None:
    table = Table(box=None, padding=(0, 0, 0, gap), pad_edge=False, header_style="dim")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in scaling.cells():
        table.add_row(*cells)
    console.print()
    console.print(Text(scaling.heading, style="bold"))
    console.print(table)


def as_markdown(rows: Sequence[Row], title: str | None = None) -> str:
    """The table as Markdown, with the remarks below it, for a page of results."""
    shown = columns(rows)
    lines = [
        "| " + " | ".join(["arm" if title is not None else "run", *map(_heading, shown)]) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for row in rows:
        cells = [_labelled(row)]
        for column in shown:
            note = "" if column.note is _source else column.note(row)  # long, and the page's alone
            cells.append(column.cell(row) + (f" ({note})" if note else ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", *(f"- {remark}" for row in rows for remark in remarks(row))]
    return "\n".join([*([f"**{title}**", ""] if title is not None else []), *lines]).rstrip()


def _labelled(row: Row) -> str:
    return f"{row.label} ({row.state})" if row.state else row.label


def _heading(column: Column) -> str:
    return f"{column.heading}<br>{column.unit}" if column.unit else column.heading


def as_json(rows: Sequence[Row], page: Path, title: str | None = None) -> str:
    """The table unrounded, for scripts."""
    table = [
        {
            "label": row.label,
            "runs": [str(record.folder) for record in row.runs.values()],
            "finished": row.finished,
            "diverged": {name: record.diverged["epoch"] for name, record in row.diverged.items() if record.diverged},
            "train_batch_size": row.start.get("train_batch_size"),
            "peak_lr": row.start.get("peak_lr"),
            "seeds": row.seeds,
            "top1_error": row.error,
            "top1_accuracy": row.accuracy,
            "std": row.std,
            "survivors": asdict(row.survivors) if row.survivors is not None else None,
            "evaluations_used": [median.used for median in row.medians] if not row.diverged else [],
            "images": row.images,
            "difference": row.difference,
            "difference_95": row.interval,
            "seconds": row.seconds,
            "images_per_second": row.images_per_second,
            **{field: row.mean_over_time(field) for field in SHARES},
            "medians": [median.error for median in row.medians] if not row.diverged else [],
            "paper": asdict(row.paper) if row.paper is not None else None,
            "ours_minus_paper": row.paper_gap,
            "remarks": remarks(row),
        }
        for row in rows
    ]
    named = {"title": title} if title is not None else {}
    scalings = [scaling.as_json() for scaling in _scalings(rows)]
    return json.dumps({**named, "report": str(page), "rows": table, "scaling": scalings}, indent=2)
