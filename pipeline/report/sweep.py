"""`onehour report SWEEP.yaml`: the table and the figures of a sweep, out of the records of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import config, sweep_file
from pipeline.config import Config
from pipeline.metrics import FILE_NAME, Event
from pipeline.record import RunRecord
from pipeline.report.charts import Picture
from pipeline.report.figures import Divergence, Point, curves, minibatch
from pipeline.report.rows import PaperResult, Row, measure_difference
from pipeline.sweep_file import Arm, Figure, Sweep, SweepRun
from pipeline.sweep_state import differences_from, last_endings
from shards.errors import UserError


@dataclass(frozen=True)
class Table:
    """A sweep's rows and figures.

    Attributes:
        title: of the sweep.
        folder: of its runs.
        rows: one for each arm, in the file's order; those of arms that were not trained are empty.
        figures: drawn.
    """

    title: str
    folder: Path
    rows: list[Row]
    figures: list[Picture]


def read(path: Path, folder: Path | None = None) -> Table:
    """Read the records of a sweep's runs, and draw its figures.

    Args:
        path: the sweep file.
        folder: of the runs, where it is not the sweep's own.

    Raises:
        UserError: the file has a mistake, or there are no runs.
    """
    sweep = sweep_file.load(path)
    folder = folder or sweep.folder
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there are no runs of {path}",
            f"Train them: onehour sweep {path}",
            "If they are somewhere else: onehour report … --runs DIR",
        )
    rows, sizes = rows_of(sweep, folder)
    named = {row.label: row for row in rows}
    figures = [
        _draw(figure, f"figure-{number}", sweep, named, sizes) for number, figure in enumerate(sweep.figures(), start=1)
    ]
    return Table(sweep.sections.title, folder, rows, figures)


def rows_of(sweep: Sweep, folder: Path) -> tuple[list[Row], dict[str, int]]:
    """A row for each arm, compared with the baseline's; and the minibatch of each arm, trained or not, where known.

    Args:
        sweep: the file.
        folder: of the runs.
    """
    endings = last_endings(folder)
    runs = sweep.runs(folder)
    published = {arm.name: arm.paper for arm in sweep.arms}
    at_baseline = published[sweep.baseline]
    rows, sizes = [], {}
    for arm in sweep.arms:
        wanted = _load([run for run in runs if run.arm is arm])
        row = _row(arm, wanted, endings)
        row.baseline = arm.name == sweep.baseline
        if arm.paper is not None:
            compared = at_baseline is not None and not row.baseline
            difference = arm.paper.error - at_baseline.error if compared and at_baseline is not None else None
            row.paper = PaperResult(
                arm.paper.error, arm.paper.std, arm.paper.source, sweep.sections.paper_task, difference
            )
        size = row.start.get("train_batch_size") or next(
            (loaded.blocks.train_batch_size for _, loaded in wanted if loaded is not None), None
        )
        if size:
            sizes[arm.name] = size
        rows.append(row)
    baseline = next(row for row in rows if row.baseline)
    for row in rows:
        if row is not baseline:
            measure_difference(row, baseline)
    return rows, sizes


def _load(runs: Sequence[SweepRun]) -> list[tuple[SweepRun, Config | None]]:
    """The runs with their configurations as the sweep has them now; None where one cannot be loaded any more."""
    loaded: list[tuple[SweepRun, Config | None]] = []
    for run in runs:
        try:
            loaded.append((run, config.load(run.config, run.overrides)))
        except UserError:
            loaded.append((run, None))
    return loaded


def _row(arm: Arm, wanted: Sequence[tuple[SweepRun, Config | None]], endings: dict[str, Event]) -> Row:
    records: dict[str, RunRecord] = {}
    notes: list[str] = []
    absent: list[str] = []
    for run, experiment in wanted:
        record = None
        if (run.folder / FILE_NAME).exists():
            try:
                record = records[run.name] = RunRecord.read(run.folder)
                reasons = differences_from(record, experiment) if experiment is not None else []
                notes += [f"{run.name} is not what the sweep asks for: {'; '.join(reasons)}."] if reasons else []
            except UserError as error:
                notes.append(f"{run.name}: {error.headline}.")
        ending = endings.get(run.name)
        ended = record is not None and (record.finished or record.diverged)
        if ending is not None and ending.get("how") == "failed" and not ended:
            said = "".join(f" “{line.strip()}”" for line in (ending.get("last") or [])[-1:])
            notes.append(f"{run.name} failed with exit code {ending.get('code')}.{said}")
        elif record is None:
            absent.append(run.folder.name)
    if absent:
        notes.append(f"{arm.name}: {', '.join(absent)} {'has' if len(absent) == 1 else 'have'} not been trained.")
    return Row(arm.name, records, notes=tuple(notes))


def _draw(figure: Figure, name: str, sweep: Sweep, rows: dict[str, Row], sizes: dict[str, int]) -> Picture:
    arms = [rows[arm] for arm in figure.arms or ()]
    if figure.kind == "curves":
        assert figure.baseline is not None, "the sweep completes its figures"
        return curves(
            name, figure.title, rows[figure.baseline], arms, list(rows.values()), validation=figure.validation
        )
    ours = [Point(sizes[row.label], row.error, row.std) for row in arms if row.finished and row.error is not None]
    divergences = [Divergence(sizes[row.label], len(row.diverged), len(row.runs)) for row in arms if row.diverged]
    published = {arm.name: arm.paper for arm in sweep.arms if arm.paper is not None}
    papers = [
        Point(paper.minibatch or sizes[name], paper.error, paper.std)
        for name, paper in published.items()
        if name in (figure.arms or ()) and (paper.minibatch or name in sizes)
    ]
    return minibatch(name, figure.title, ours, papers, sweep.sections.paper_task, divergences)
