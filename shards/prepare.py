"""From a source of images to a finished data set folder.

The samples of each split are shuffled once, over the whole split, and cut into shards of equal size, so that any
reader of the shards, however simple, sees well-mixed labels. One process writes one shard at a time; which
process, and in what order, leaves no trace in the bytes. A shard counts as done when its record, holding its
digest and the digest of the plan it belongs to, has been written after it; a run that was interrupted goes on
from there. `index.json` is written last.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from shards.catalog import Catalog, build_catalog
from shards.errors import UserError
from shards.files import exclusive, sha256_file, whole_file, write_whole
from shards.idx import format_index, index_path, index_tar
from shards.images import image_extension
from shards.manifest import (
    CLASSES_NAME,
    INDEX_NAME,
    INFO_NAME,
    PREPARE_FOLDER,
    Manifest,
    Shard,
    read_manifest,
    to_json,
    write_classes,
    write_manifest,
)
from shards.plan import PLAN_NAME, check_counts, cut, describe_plan, other_plan, plan_digest, read_plan
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.sources.base import Source
from shards.table import CACHE_FOLDER, ShardTable, join, read_shard, save_cached, split_digest
from shards.writer import ShardWriter


@dataclass(frozen=True)
class _Task:
    """One shard to write, or to find already written."""

    name: str
    catalog: Catalog
    start: int
    stop: int
    found: Shard | None
    """What a record of an earlier run says about it."""


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; pickled with each task, so it holds nothing per sample."""

    source: Source
    out: Path
    plan_digest: str


def prepare(
    source: Source,
    out: Path,
    *,
    shards: int | None = None,
    samples_per_shard: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Write a source as shards with index, or finish what an earlier, interrupted call began.

    The result depends on the source's data, `seed` and the number of shards, and on nothing else.

    Args:
        source: what to write.
        out: data set folder; made if absent.
        shards: number of shards of the first split; the other splits get shards of the same size.
        samples_per_shard: upper bound, instead of `shards`.
        seed: of the shuffle.
        workers: number of processes, by default one per usable core.
        overwrite: remove an earlier data set from `out` first.
        console: where progress and the summary go; nothing is printed without one.

    Returns:
        What was written, as in `index.json`.

    Raises:
        UserError: if the options contradict each other or what is in `out`, another process writes there, an
            image is unreadable or no image, or the disk is full.
    """
    console = console or Console(quiet=True)
    check_counts(shards=shards, samples_per_shard=samples_per_shard, workers=workers)
    out = Path(out)
    _check_apart(source, out)
    _make_folder(out)
    with exclusive(out):
        try:
            listing = out / PREPARE_FOLDER / "listing"
            shutil.rmtree(listing, ignore_errors=True)  # of a killed run
            _make_folder(listing)
            earlier = None if overwrite else read_plan(out)
            catalogs = [build_catalog(source, split, seed, listing) for split in source.splits]
            ranges = cut(catalogs, shards, samples_per_shard)
            plan = describe_plan(source, catalogs, ranges, seed)
            _say_reading(console, source, catalogs)
            if overwrite:
                _remove_data_set(out, source.splits)
            elif earlier is not None and earlier != plan:
                raise other_plan(out, earlier, plan)
            tasks = _make_tasks(out, plan, catalogs, ranges)
            complete = (out / INDEX_NAME).exists() and all(task.found for task in tasks)
            if complete:
                manifest = read_manifest(out)
            else:
                job = _Job(source, out, plan_digest(plan))
                manifest = _write_all(job, plan, tasks, workers or usable_cores(), console)
        finally:
            _tidy(out)
        _say_done(console, manifest, len(source.classes), "nothing to do:" if complete else "")
        return manifest


def _write_all(job: _Job, plan: dict[str, Any], tasks: list[_Task], workers: int, console: Console) -> Manifest:
    state = job.out / PREPARE_FOLDER
    _check_space(job.out, tasks)
    write_whole(state / PLAN_NAME, to_json(plan))
    (job.out / INDEX_NAME).unlink(missing_ok=True)  # of a data set that has lost some of its shards
    found = sum(task.found is not None for task in tasks)
    if found:
        console.out(
            f"found     {found:,} of {len(tasks):,} shards from an earlier run; "
            f"checking them and writing the other {len(tasks) - found:,}",
            highlight=False,
        )
    workers = min(workers, len(tasks))
    images = sum(task.stop - task.start for task in tasks)
    written: dict[str, tuple[Shard, ShardTable]] = {}
    with shard_progress(console, "writing", len(tasks), images, workers) as advance:
        for task, result in run_tasks(partial(_write_shard, job), tasks, workers):
            written[task.name] = result
            advance(task.stop - task.start)
    splits: dict[str, tuple[Shard, ...]] = {}
    for split in job.source.splits:
        results = [written[task.name] for task in tasks if task.catalog.split == split]
        splits[split] = tuple(shard for shard, _ in results)
        samples = join(split, splits[split], [table for _, table in results])
        save_cached(job.out, split, split_digest(splits[split]), samples, scratch=state)
    manifest = Manifest(job.out, job.source.name, splits, plan)
    write_classes(job.out, job.source.classes, scratch=state)
    write_manifest(manifest, scratch=state)
    return manifest


def _write_shard(job: _Job, task: _Task) -> tuple[Shard, ShardTable]:
    """Write one shard with its index and its record, unless a record's shard is there and intact."""
    tar = job.out / f"{task.name}.tar"
    state = job.out / PREPARE_FOLDER
    if task.found is not None and sha256_file(tar) == task.found.sha256:
        index = index_tar(tar)
        if not index_path(tar).exists() or index_path(tar).read_bytes() != index:
            write_whole(index_path(tar), index, state)
        return task.found, read_shard(tar)
    with whole_file(tar, state) as file:
        writer = ShardWriter(file)
        for entry in task.catalog.read(task.start, task.stop):
            image = job.source.read(entry.locator)
            extension = image_extension(image)
            place = job.source.place(entry.locator)
            if extension is None:
                raise UserError(
                    f"{place}: not an image" + ("" if image else ": the file is empty"),
                    f"It begins with {image[:16]!r}. Repair or remove the file, then run the same command again.",
                )
            if entry.size not in (-1, len(image)):
                raise UserError(
                    f"{place}: changed while it was read: {entry.size:,} bytes in the listing, now {len(image):,}",
                    "Run the same command again when nothing writes to the source any more.",
                )
            writer.add(entry.key, entry.label, image, extension)
        sha256 = writer.close()
    write_whole(index_path(tar), format_index(writer.samples), state)
    shard = Shard(tar, task.stop - task.start, writer.size, sha256)
    record = {"plan": job.plan_digest, "samples": shard.samples, "size": shard.size, "sha256": sha256}
    write_whole(state / f"{task.name}.json", to_json(record))
    return shard, read_shard(tar)


def _make_tasks(out: Path, plan: dict[str, Any], catalogs: list[Catalog], ranges: dict[str, list[int]]) -> list[_Task]:
    found = _read_records(out, plan_digest(plan))
    tasks = []
    for catalog in catalogs:
        bounds = ranges[catalog.split]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            name = f"{catalog.split}-{number:05d}"
            tasks.append(_Task(name, catalog, start, stop, found.get(name)))
    return tasks


def _read_records(out: Path, digest: str) -> dict[str, Shard]:
    """Shards of this plan that earlier runs finished and whose tar and index are still there in full size."""
    shards: dict[str, Shard] = {}
    if (out / INDEX_NAME).exists():
        for split in read_manifest(out).splits.values():
            shards |= {shard.path.stem: shard for shard in split}
    for path in (out / PREPARE_FOLDER).glob("*-*.json"):
        try:
            record = json.loads(path.read_bytes())
            if record["plan"] == digest:
                tar = out / f"{path.stem}.tar"
                shards[path.stem] = Shard(tar, record["samples"], record["size"], record["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no record, no shard: it is written again
    return {name: shard for name, shard in shards.items() if _is_there(shard)}


def _is_there(shard: Shard) -> bool:
    try:
        return shard.path.stat().st_size == shard.size and index_path(shard.path).exists()
    except OSError:
        return False


def _check_space(out: Path, tasks: list[_Task]) -> None:
    """Refuse at once what cannot fit, where the source knows its sizes; headers and padding are not counted."""
    needed = sum({task.catalog.split: task.catalog.image_bytes for task in tasks}.values())
    needed -= sum(task.found.size for task in tasks if task.found is not None)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: not enough space: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free",
            "Free some space or choose a folder on another disk.",
        )


def _check_apart(source: Source, out: Path) -> None:
    for folder in source.folders():
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{out}: lies inside the folder that the images come from, {folder}",
                "The next run would take the shards for images. Choose a folder outside.",
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from error


def _tidy(out: Path) -> None:
    """Remove the listing; and the whole state once the data set is complete, or if it never began."""
    state = out / PREPARE_FOLDER
    if (out / INDEX_NAME).exists() or not (state / PLAN_NAME).exists():
        shutil.rmtree(state, ignore_errors=True)
    else:
        shutil.rmtree(state / "listing", ignore_errors=True)


def _remove_data_set(out: Path, splits: tuple[str, ...]) -> None:
    """Remove what `prepare` writes, the new listing excepted; other files in the folder are left alone."""
    names = {*splits, "train", "val"}
    (out / INDEX_NAME).unlink(missing_ok=True)  # first: what is left is then an incomplete data set
    for path in out.iterdir():
        split, _, number = path.stem.rpartition("-")
        is_shard = split in names and len(number) == 5 and number.isdigit() and path.suffix in (".tar", ".idx")
        if is_shard or path.name in (INFO_NAME, CLASSES_NAME):
            path.unlink()
    for path in (out / PREPARE_FOLDER).glob("*.json"):
        path.unlink()
    shutil.rmtree(out / CACHE_FOLDER, ignore_errors=True)


def _say_reading(console: Console, source: Source, catalogs: list[Catalog]) -> None:
    images = " / ".join(f"{catalog.count:,} {catalog.split}" for catalog in catalogs)
    size = sum(catalog.image_bytes for catalog in catalogs)
    line = f"reading   {source.name}   {len(source.classes):,} classes · {images} images"
    console.out(line + (f" · {size / 1e6:,.1f} MB" if size else ""), highlight=False)
    for note in source.notes():
        console.out(f"note      {note}", highlight=False)


def _say_done(console: Console, manifest: Manifest, classes: int, before: str = "") -> None:
    digest = sha256_file(manifest.root / INDEX_NAME)
    shards = sum(map(len, manifest.splits.values()))
    images = " / ".join(f"{sum(s.samples for s in part):,} {name}" for name, part in manifest.splits.items())
    console.out(
        f"done      {before + ' ' if before else ''}{shards:,} shards · {images} images · {classes:,} classes · "
        f"index.json sha256 {digest[:4]}…{digest[-2:]}",
        highlight=False,
    )
    console.out(f"          verify with: shards verify {manifest.root}", highlight=False)
