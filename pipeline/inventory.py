"""`onehour checkpoints`: what a run has saved, whether it is whole, and what to do with it."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from pipeline import resume, saves
from pipeline.resume import Checkpoint
from pipeline.saves import DamagedError
from shards.errors import UserError
from shards.files import exclusive, whole_file


@dataclass(frozen=True)
class Row:
    """One save, as far as it can be read.

    Attributes:
        step: updates done, as the folder's name has it.
        folder: where it is.
        saved: its facts; None where they are damaged.
        size: bytes of all its files.
        when: it was written, by the clock of its file system.
        damage: what is wrong with it, as far as was looked.
    """

    step: int
    folder: Path
    saved: Checkpoint | None
    size: int
    when: datetime
    damage: str | None

    @property
    def epoch(self) -> float | None:
        """How far the run had come."""
        return self.saved.samples / self.saved.facts.train_samples if self.saved is not None else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour checkpoints`."""
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--verify", action="store_true", help="compare all files with their digests; exit code 1 if one differs"
    )
    action.add_argument(
        "--export", nargs=2, metavar=("STEP", "OUT"), help="copy the weights of a save to OUT, a new .safetensors file"
    )
    parser.add_argument("--ema", action="store_true", help="with --export: the averaged weights, of recipe.model.ema")
    action.add_argument(
        "--prune", type=int, metavar="KEEP", help="remove what is older than the KEEP newest saves that are whole"
    )


def run(args: argparse.Namespace) -> int:
    """List, verify, export or prune the saves of a run. Returns the exit code: 1 if one is damaged."""
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such run folder", "Give the folder that training wrote.")
    if args.export is not None:
        return _export(args.run, *args.export, name=saves.AVERAGE_FILE if args.ema else saves.WEIGHTS_FILE)
    if args.ema:
        raise UserError("--ema says which weights --export copies: give both, or none")
    removed: list[Path] = []
    if args.prune is not None:
        if args.prune < 1:
            raise UserError(f"--prune {args.prune}: at least one save is kept")
        with exclusive(args.run, "training"):
            removed = saves.prune(args.run, args.prune)
    verified = args.verify or args.prune is not None
    rows = read_rows(args.run, verify=verified)
    next_step = _continues_from(args.run, rows)
    if args.json:
        print(json.dumps(_summary(args.run, rows, next_step, removed, verified=verified), indent=2))
    else:
        _print(args.run, rows, next_step, removed, verified=verified)
    return 1 if args.prune is None and any(row.damage for row in rows) else 0


def read_rows(run_folder: Path, *, verify: bool) -> list[Row]:
    """The saves of a run, oldest first.

    Args:
        run_folder: of the run.
        verify: compare all files with their digests; else only `state.json` is read.

    Raises:
        UserError: a save is of a version that cannot be read.
    """
    rows = []
    for step, folder in saves.saved_steps(run_folder):
        saved, damage = None, None
        try:
            saved = resume.read(folder)
            if verify:
                saves.verify(folder)
        except DamagedError as error:
            damage = error.headline.removeprefix(f"{folder}: damaged: ")
        try:
            size = sum(path.stat().st_size for path in folder.iterdir())
            when = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        except FileNotFoundError:
            continue  # a training that runs has removed it meanwhile
        rows.append(Row(step, folder, saved, size, when, damage))
    return rows


def _continues_from(run_folder: Path, rows: list[Row]) -> int | None:
    """The step that a training would continue from, as far as damage is known."""
    known = {row.folder: row for row in rows}
    order = (known[folder] for folder in saves.in_order_of_use(run_folder) if folder in known)
    return next((row.step for row in order if row.damage is None), None)


def _export(run_folder: Path, step: str, out: str, *, name: str) -> int:
    saved = dict(saves.saved_steps(run_folder))
    folder = saved.get(int(step)) if step.isdecimal() else None
    if folder is None:
        there = ", ".join(map(str, saved)) or "none"
        raise UserError(f"{run_folder}: no save of step {step}", f"Steps that are saved: {there}")
    target = Path(out)
    if target.exists():
        raise UserError(f"{target}: is there already", "Nothing is overwritten: choose another name.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    saves.verify(folder)
    if not (folder / name).exists():
        raise UserError(f"{folder}: no {name}: the run does not average its weights (recipe.model.ema)")
    with whole_file(target) as file, (folder / name).open("rb") as weights:
        shutil.copyfileobj(weights, file)
    averaged = " averaged" * (name == saves.AVERAGE_FILE)
    print(f"{target}   {filesize.decimal(target.stat().st_size)}, the{averaged} weights of step {step}")
    return 0


def _summary(
    run_folder: Path, rows: list[Row], next_step: int | None, removed: list[Path], *, verified: bool
) -> dict[str, Any]:
    latest = saves.latest_step(run_folder)
    return {
        "run": str(run_folder),
        "continues_from": next_step,
        "removed": [str(folder) for folder in removed],
        "checkpoints": [
            {
                "step": row.step,
                "epoch": row.epoch,
                "samples": row.saved.samples if row.saved is not None else None,
                "bytes": row.size,
                "saved": row.when.isoformat(timespec="seconds"),
                "world_size": row.saved.world_size if row.saved is not None else None,
                "path": str(row.folder),
                "latest": row.step == latest,
                "whole": False if row.damage else (True if verified else None),
                "damage": row.damage,
            }
            for row in rows
        ],
    }


def _print(run_folder: Path, rows: list[Row], next_step: int | None, removed: list[Path], *, verified: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for folder in removed:
        console.print(f"removed {folder}", markup=False)
    if not rows:
        console.print(f"{run_folder}: nothing is saved", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("step", "epoch", "samples", "size", "saved", "ranks"):
        table.add_column(name, justify="right")
    table.add_column("")
    latest = saves.latest_step(run_folder)
    for row in rows:
        saved = row.saved
        state = "DAMAGED" if row.damage else "whole" if verified else ""
        table.add_row(
            f"{row.step:,}",
            f"{row.epoch:.2f}" if row.epoch is not None else "?",
            f"{saved.samples:,}" if saved is not None else "?",
            filesize.decimal(row.size),
            f"{row.when.astimezone():%Y-%m-%d %H:%M}",
            str((saved and saved.world_size) or "?"),
            f"{state} ← latest".strip() if row.step == latest else state,
        )
    console.print(table)
    for row in rows:
        if row.damage:
            console.print(f"{row.folder}: damaged: {row.damage}", markup=False)
    if not verified:
        console.print(f"Compare them with their digests: onehour checkpoints {run_folder} --verify", markup=False)
    elif next_step is None:
        console.print("None is whole: training is refused; only with --fresh does it start anew.")
    elif any(row.damage for row in rows):
        console.print(f"Training passes over what is damaged, says so, and continues from step {next_step:,}.")
