"""`onehour report RUN…` or `onehour report SWEEP.yaml`: one HTML file, for a person who was not there.

It reads the runs' records (`pipeline.record`) and their `config.resolved.json`; every number in it is computed from
them. The page needs no network and no script, and prints.

    rows       which runs belong together, and the statistics over seeds
    answers    question, answer and remarks, in sentences
    scaling    what more ranks were worth
    table      the columns of the results, for the page, the terminal and scripts
    events     what failed, was skipped, resumed or warned, and when
    charts     what is drawn; `drawing` is how
    sweep      the rows and figures of a sweep file; `figures` draws those in the paper's layout
    page       all of it as one HTML file, by the template `report.html`
    text       numbers as text
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config_file import SWEEP_SUFFIXES
from pipeline.record import MedianError, RunRecord, median_last_epochs
from pipeline.report.rows import Row, compare
from shards.errors import UserError

__all__ = ["MedianError", "Row", "add_arguments", "compare", "median_last_epochs", "run", "write_report"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour report`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, the first is the baseline; or a sweep's file"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: the run, or beside the first")
    parser.add_argument("--reference", type=Path, metavar="RUN", help="the baseline, if it is not the first")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", dest="folder", help="a sweep's runs; default: runs/<name of the sweep>"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the table as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its table; returns 0. Raises UserError as `write_report` does."""
    from pipeline.report import page, table

    title: str | None = None
    if any(path.suffix in SWEEP_SUFFIXES and not path.is_dir() for path in args.runs):
        from pipeline.report import sweep

        if len(args.runs) > 1 or args.reference is not None:
            raise UserError(
                "a sweep is reported on by itself",
                "Its file names its runs and its baseline: onehour report SWEEP.yaml",
            )
        whole = sweep.read(args.runs[0], args.folder)
        rows, title = whole.rows, whole.title
        path = page.write(rows, args.out or whole.folder, title, whole.figures)
    else:
        if args.folder is not None:
            raise UserError("--runs says where the runs of a sweep are: give its file, SWEEP.yaml")
        rows = compare(_read(args.runs), args.reference)
        path = page.write(rows, args.out or default_folder(args.runs))
    if args.json:
        print(table.as_json(rows, path, title))
    elif args.markdown:
        print(table.as_markdown(rows, title))
    else:
        table.print_table(rows, path, title)
    return 0


def write_report(runs: Sequence[Path | str], out: Path | str, reference: Path | str | None = None) -> Path:
    """Write `report.html`, with its charts as PNG files beside it, and return the page's path.

    Args:
        runs: run folders, each with a `metrics.jsonl`. The same folder twice counts once.
        out: the folder to write into; made when missing, files of an earlier report are replaced.
        reference: the run whose configuration is the baseline; the first by default.

    Raises:
        UserError: no runs; a folder without a record; a broken record; an `out` that cannot be written.
    """
    from pipeline.report import page  # brings matplotlib, which an argument parser can do without

    return page.write(compare(_read(runs), reference), Path(out))


def default_folder(runs: Sequence[Path]) -> Path:
    """The run itself for one run, else `report-<names>` beside the first."""
    paths = [path.resolve() for path in runs]
    if len(set(paths)) == 1:
        return runs[0]
    names = list(dict.fromkeys(re.sub(r"[^\w.-]+", "_", path.name) for path in paths))
    name = "-".join(names)
    if len(name.encode()) > 100:  # file systems take 255 bytes, people far fewer
        name = f"{names[0][:40]}-and-{len(names) - 1}-more"
    return paths[0].parent / f"report-{name}"


def _read(runs: Sequence[Path | str]) -> list[RunRecord]:
    if not runs:
        raise UserError("no run given", "Give at least one run folder: onehour report RUN…")
    folders: dict[Path, Path] = {}
    for folder in map(Path, runs):
        folders.setdefault(folder.resolve(), folder)  # a name and a shell's pattern may both give the same folder
    return [RunRecord.read(folder) for folder in folders.values()]
