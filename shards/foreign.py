"""Indexing tars that another tool made, so that training can read them like its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shards.errors import UserError
from shards.files import exclusive, sha256_file, write_whole
from shards.idx import index_path, index_tar
from shards.index import Split, check_labels
from shards.manifest import (
    CLASSES_NAME,
    PREPARE_FOLDER,
    Manifest,
    Shard,
    parse_classes,
    read_manifest,
    write_classes,
    write_manifest,
)
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.table import ShardTable, join, read_shard, save_cached, split_digest

_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?(?=[-_.\d]|$)", re.IGNORECASE)


def index_folder(
    folder: Path, *, classes: str | None = None, workers: int | None = None, console: Console | None = None
) -> Manifest:
    """Write .idx, index.json, _info.json and classes.json for all tars of a folder; the tars are only read.

    Args:
        folder: with the tars directly in it.
        classes: a file of names (one a line, or JSON like classes.json) or a number; by default the
            `classes.json` that is there, else as many classes as the highest label calls for.
        workers: number of processes, by default one per usable core.
        console: where progress and the summary go; nothing is printed without one.

    Returns:
        What was written, as in `index.json`.

    Raises:
        UserError: naming tar and key, if a tar is damaged, a sample has no image or no label, a label is
            outside the classes, or two samples of a split have one key.
    """
    console = console or Console(quiet=True)
    folder = Path(folder)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise UserError(f"{folder}: no tars in this folder", f"Make some with: shards prepare SOURCE {folder}")
    names = _name_classes(folder, classes)
    splits = _sort_into_splits(tars)
    with exclusive(folder):
        if (folder / PREPARE_FOLDER).exists():
            raise UserError(
                f"{folder}: holds an unfinished shards prepare", "Run the same command again; it indexes as well."
            )
        read = _read_all(tars, min(workers or usable_cores(), len(tars)), console)
        tables = {
            name: join(name, [read[tar][0] for tar in part], [read[tar][1] for tar in part])
            for name, part in splits.items()
        }
        names = names or _number_classes(1 + max(int(table["label"].max()) for table in tables.values()))
        shards = {name: tuple(read[tar][0] for tar in part) for name, part in splits.items()}
        manifest = _earlier_manifest(folder, shards) or Manifest(
            folder, folder.resolve().name, shards, {"source": "index"}
        )
        for name, table in tables.items():
            digest = split_digest(shards[name])
            check_labels(Split(folder, name, shards[name], table, names, digest))
            save_cached(folder, name, digest, table)
        write_classes(folder, names)
        write_manifest(manifest)
    for name, table in tables.items():
        console.out(f"{name:<10}{len(shards[name]):,} shards · {len(table):,} images", highlight=False)
    console.out(f"done      {len(names):,} classes · check with: shards verify {folder}", highlight=False)
    return manifest


def _read_all(tars: Sequence[Path], workers: int, console: Console) -> dict[Path, tuple[Shard, ShardTable]]:
    read = {}
    # how many images there are is what this finds out, so the bar runs over shards
    with shard_progress(console, "indexing", len(tars), len(tars), workers) as advance:
        for tar, result in run_tasks(_index_tar, tars, workers):
            read[tar] = result
            advance(1)
    return read


def _index_tar(tar: Path) -> tuple[Shard, ShardTable]:
    index = index_tar(tar)
    path = index_path(tar)
    if not path.exists() or path.read_bytes() != index:
        write_whole(path, index)
    table = read_shard(tar)
    return Shard(tar, len(table.samples), tar.stat().st_size, sha256_file(tar)), table


def _sort_into_splits(tars: Sequence[Path]) -> dict[str, list[Path]]:
    """Tars by split, train first. Names that say nothing are all training shards, if no name says anything."""
    found = {tar: _SPLIT_IN_NAME.search(tar.stem) for tar in tars}
    if not any(found.values()):
        return {"train": list(tars)}
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for tar, match in found.items():
        if match is None:
            raise UserError(
                f"{tar}: its name says no split, while other names do",
                "Begin it with train-, val- or test-, or move it to a folder of its own.",
            )
        splits[match[1].lower()].append(tar)
    if not splits["val"]:  # as with class folders: a test split with labels serves for validation
        splits["val"] = splits.pop("test")
    return {name: part for name, part in splits.items() if part}


def _name_classes(folder: Path, classes: str | None) -> tuple[str, ...] | None:
    if classes is None:
        path = folder / CLASSES_NAME
        return parse_classes(path, "Repair it, or give --classes FILE|N") if path.exists() else None
    if classes.isdigit() and int(classes) > 0:
        return _number_classes(int(classes))
    path = Path(classes)
    if path.suffix == ".json":
        return parse_classes(path, "Give --classes a list of names, or a number.")
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--classes {classes}: neither a number nor a readable file: {error}",
            "Give the number of classes, or a file with one class name a line.",
        ) from error
    if not names:
        raise UserError(f"--classes {classes}: lists no classes")
    return names


def _number_classes(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _earlier_manifest(folder: Path, shards: dict[str, tuple[Shard, ...]]) -> Manifest | None:
    """The index that is there, with its record of how the shards were made, if they are still the same ones."""
    try:
        earlier = read_manifest(folder)
    except UserError:
        return None  # none, or damaged: to be replaced
    return earlier if earlier.splits == shards else None
