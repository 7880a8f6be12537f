"""The report as one HTML file: what the template `report.html` is filled with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.record import RunRecord
from pipeline.report import text
from pipeline.report.answers import question, remarks
from pipeline.report.charts import Picture, draw_charts
from pipeline.report.events import event_log
from pipeline.report.rows import LAST_EPOCHS, Row
from pipeline.report.scaling import HEADINGS, SHARES, find_scalings
from pipeline.report.table import columns
from shards.errors import UserError

_FACTS = (
    ("model", "{model}"),
    ("images", "{train_samples:,} training, {val_samples:,} validation"),
    (
        "minibatch",
        "{train_batch_size:,} = {micro_batch} micro-batch × {accumulation} accumulation × {world_size} ranks",
    ),
    ("learning rate", "{peak_lr:.5g} at its peak; {reference_lr:.5g} per {reference_batch:,} images"),
    ("seed", "{seed}"),
    ("precision", "{precision}"),
    ("device", "{device}"),
)
"""What the page says of a run's `start` event: names, and templates of the event's fields."""


def write(rows: Sequence[Row], out: Path, title: str | None = None, figures: Sequence[Picture] = ()) -> Path:
    """Write the page, with its charts as PNG files beside it, and return its path.

    Args:
        rows: of the table.
        out: the folder.
        title: of a sweep, instead of the question that runs are compared for.
        figures: that come before the charts.

    Raises:
        UserError: `out` is not a folder that can be made and written to.
    """
    pictures = [*figures, *draw_charts(rows)]
    path = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (out / picture.file).write_bytes(picture.png)
        # names that are not UTF-8 hold lone surrogates, which no encoder takes
        path.write_text(_render(rows, pictures, title), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written there: {error.strerror or error}") from error
    return path


def _render(rows: Sequence[Row], pictures: Sequence[Picture], title: str | None) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    headline, answers = question(rows)
    runs = [
        {
            "name": name,
            "state": "" if record.finished else _unfinished(record),
            "facts": _facts(record),
            "plan": str(record.start.get("plan") or "").strip("\n"),
            "log": event_log(record),
        }
        for row in rows
        for name, record in row.runs.items()
    ]
    return environment.get_template("report.html").render(
        question=title or headline,
        of_a_sweep=title is not None,
        tasks=sorted({row.paper.task for row in rows if row.paper is not None and row.paper.task}),
        answers=answers,
        rows=rows,
        columns=columns(rows),
        remarks=[remark for row in rows for remark in remarks(row)],
        seeds=any(len(row.counted) > 1 for row in rows),
        intervals=any(row.interval for row in rows),
        last=LAST_EPOCHS,
        scalings=find_scalings([record for row in rows for record in row.runs.values()]),
        scaling_headings=HEADINGS,
        pictures=pictures,
        runs=runs,
    )


def _unfinished(record: RunRecord) -> str:
    return "diverged" if record.diverged else "unfinished"


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """A run in a few lines; what the record does not hold is left out."""
    start = {key: value for key, value in record.start.items() if value is not None}
    state = "finished" if record.finished else _unfinished(record)
    facts = [("state", f"{state}, {text.progress(record)}")]
    if "config" in start:
        overrides = [f"--set {override}" for override in start.get("overrides", [])]
        facts.append(("configuration", " ".join([str(start["config"]), *overrides])))
    for name, template in _FACTS:
        try:
            facts.append((name, template.format_map(start)))
        except (KeyError, ValueError):  # a field is missing, or text where a number was
            continue
    shares = [
        f"{text.percent(share)} {name}"
        for field, name in SHARES.items()
        if (share := record.mean_over_time(field)) is not None
    ]
    if shares:
        facts.append(("time of updates", ", ".join(shares)))
    if record.evaluations:
        last = record.evaluations[-1]
        parts = [f"top-1 {text.number(last['top1'])} %"]
        parts += [f"top-5 {text.number(last['top5'])} %"] if last.get("top5") is not None else []
        parts += [f"loss {text.number(last['loss'], 3)}"] if last.get("loss") is not None else []
        facts.append(("last evaluation", f"{', '.join(parts)}, at epoch {last['epoch']:.4g}"))
    saves = [event for event in record.events if event["event"] == "checkpoint"]
    if saves:
        facts.append(("checkpoints", f"{len(saves):,} saved, the last: {saves[-1].get('path', text.UNKNOWN)}"))
    if len(record.sessions) > 1:
        again = f"; {record.repeated:,} images were done twice" if record.repeated else ""
        facts.append(("processes", f"{len(record.sessions)}, one after the other{again}"))
    if versions := start.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return facts
