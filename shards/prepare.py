"""From a source of images to a finished data set folder.

The samples of each split are shuffled once, over the whole split, and cut into shards of equal size, so that any
reader of the shards, however simple, sees well-mixed labels. One process writes one shard at a time; which
process, and in what order, leaves no trace in the bytes. A shard counts as done when its record, holding its
digest and the digest of the plan it belongs to, has been written after it; a run that was interrupted goes on
from there. `index.json` is written last.
"""

from __future__ import annotations

import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from shards import jpeg
from shards.catalog import Catalog, build_catalog, training_split
from shards.crop_index import report
from shards.errors import UserError
from shards.files import exclusive, remove_orphans, sha256_file, write_whole
from shards.images import ORDINARY_KINDS
from shards.manifest import (
    CLASSES_NAME,
    INDEX_NAME,
    INFO_NAME,
    PREPARE_FOLDER,
    Manifest,
    Shard,
    info_faults,
    read_classes,
    read_manifest,
    timm_info,
    to_json,
    write_classes,
    write_manifest,
)
from shards.plan import (
    PLAN_NAME,
    REPLACED_NAME,
    check_counts,
    cut,
    describe_plan,
    other_plan,
    plan_digest,
    read_plan,
    replaceable,
)
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.reencode import Reencoding
from shards.select import Selection, select
from shards.sidecars import SIDECARS, Extras, lacks_extras
from shards.sources.base import Source
from shards.table import CACHE_FOLDER, ShardTable, join, save_cached, split_digest
from shards.tally import IMAGES_KEY, Tally, summary
from shards.work import Broken, Job, Task, find_written, write_extras, write_shard

BROKEN_NAME = "broken.txt"
"""In the state folder: broken images of the last run, one a line."""

_MOST_SHOWN = 20


STAGED_NAME = "staged"
"""Folder in the state folder that belongs to the source; see `Source.stage`."""


def prepare(
    source: Source,
    out: Path,
    *,
    shards: int | None = None,
    samples_per_shard: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    class_map: Path | None = None,
    limit_classes: str | None = None,
    limit_per_class: int | None = None,
    reencoding: Reencoding | None = None,
    check_decode: bool = False,
    crop_index: bool = True,
    console: Console | None = None,
) -> Manifest:
    """Write a source as shards with index, or finish what an earlier, interrupted call began.

    The result depends on the source's data, on `seed`, the number of shards and what is chosen of classes and
    encoding, and on nothing else. The source must not change meanwhile, which includes the time between an
    interruption and the next run: added, removed and resized files are noticed and refused, but of a file that was
    replaced by one of the same size, a shard that is finished keeps the old content.

    Args:
        source: what to write.
        out: data set folder; made if absent.
        shards: number of shards of the training split; the other splits get shards of the same size.
        samples_per_shard: upper bound, instead of `shards`.
        seed: of the shuffle.
        workers: number of processes, by default one per usable core.
        overwrite: remove an earlier data set, all that its index lists, from `out` first.
        class_map, limit_classes, limit_per_class: which classes, see `shards.select.select`.
        reencoding: which images to encode anew; by default all bytes are kept.
        check_decode: decode every image before it is written, to find broken ones; a data set that is complete is
            left to `shards.verify.verify`.
        crop_index: write a crop index beside every shard, where the C extension is there; no other byte depends on it.
        console: where progress and the summary go; nothing is printed without one.

    Returns:
        What was written, as in `index.json`.

    Raises:
        UserError: if the options contradict each other or what is in `out`, another process writes there, an
            image is broken, or the disk is full.
    """
    console = console or Console(quiet=True)
    reencoding = reencoding or Reencoding()
    reencoding.check()
    check_counts(shards=shards, samples_per_shard=samples_per_shard, workers=workers, limit_per_class=limit_per_class)
    out = Path(out)
    _check_apart(source, out)
    _make_folder(out)
    with exclusive(out):
        try:
            remove_orphans(out / PREPARE_FOLDER)
            listing = out / PREPARE_FOLDER / "listing"
            shutil.rmtree(listing, ignore_errors=True)  # of a killed run
            _make_folder(listing)
            earlier = None if overwrite else read_plan(out)
            stale = replaceable(out) if overwrite else []
            selection = select(source.classes, class_map, limit_classes, limit_per_class)
            splits = sorted(source.splits, key=lambda split: split != training_split(source))
            catalogs = [build_catalog(source, split, seed, listing, selection) for split in splits]
            ranges = cut(catalogs, shards, samples_per_shard)
            plan = describe_plan(source, selection, reencoding, catalogs, ranges, seed)
            _say_reading(console, source, selection, catalogs)
            if overwrite:
                _remove_data_set(out, stale)
            elif earlier is not None and earlier != plan:
                raise other_plan(out, earlier, plan)
            tasks = _make_tasks(out, plan, catalogs, ranges)
            job = Job(
                source, out, plan_digest(plan), reencoding, check_decode, Extras.MAKE if crop_index else Extras.DROP
            )
            workers = workers or usable_cores()
            complete = (out / INDEX_NAME).exists() and all(task.found for task in tasks)
            if complete:
                manifest = read_manifest(out)
                restored = _restore(manifest, selection, source)
                extended = _restore_extras(job, manifest, workers, console)
                done = f"wrote {' and '.join(restored)} again:" if restored else "" if extended else "nothing to do:"
                if check_decode:
                    console.out(f"note      not decoded again: shards verify {out} --decode", highlight=False)
            else:
                source.stage(out / PREPARE_FOLDER / STAGED_NAME, workers, console)
                manifest = _write_all(job, selection, plan, tasks, workers, console)
                done = ""
        finally:
            _tidy(out)
        _say_done(console, manifest, len(selection.classes), done, crop_index)
        return manifest


def _restore(manifest: Manifest, selection: Selection, source: Source) -> list[str]:
    """Write what a complete data set has lost beside its shards and index; returns the names."""
    restored = []
    state = manifest.root / PREPARE_FOLDER
    try:
        lost = read_classes(manifest.root) != selection.classes
    except UserError:
        lost = True
    if lost:
        titles = selection.titles(source.classes, source.titles)
        write_classes(manifest.root, selection.classes, titles, scratch=state)
        restored.append(CLASSES_NAME)
    if info_faults(manifest):
        write_whole(manifest.root / INFO_NAME, to_json(timm_info(manifest)), state)
        restored.append(INFO_NAME)
    return restored


def _restore_extras(job: Job, manifest: Manifest, workers: int, console: Console) -> bool:
    """Write the optional sidecars that a complete data set lacks, remove wrong ones; returns whether there were any."""
    shards = [shard for split in manifest.splits.values() for shard in split if lacks_extras(shard, job.extras)]
    images = sum(shard.samples for shard in shards)
    workers = min(workers, max(len(shards), 1))
    with shard_progress(console, "completing", len(shards), images, workers) as advance:
        for shard, _ in run_tasks(partial(write_extras, job), shards, workers):
            advance(shard.samples)
    return bool(shards)


def _write_all(
    job: Job, selection: Selection, plan: dict[str, Any], tasks: list[Task], workers: int, console: Console
) -> Manifest:
    state = job.out / PREPARE_FOLDER
    if job.reencoding.resize_short is None:
        _check_space(job.out, tasks)
    write_whole(state / PLAN_NAME, to_json(plan))
    # a data set that has lost some of its shards: the same plan gives the same index again
    earlier = read_manifest(job.out).record if (job.out / INDEX_NAME).exists() else {}
    (job.out / INDEX_NAME).unlink(missing_ok=True)
    (state / BROKEN_NAME).unlink(missing_ok=True)
    found = sum(task.found is not None for task in tasks)
    if found:
        console.out(
            f"found     {found:,} of {len(tasks):,} shards from an earlier run; "
            f"checking them and writing the other {len(tasks) - found:,}",
            highlight=False,
        )
    by_split: dict[str, list[str]] = {}
    for task in tasks:
        by_split.setdefault(task.catalog.split, []).append(task.name)
    tallies = {split: Tally() for split in by_split}
    shards, tables = _run(job, tasks, tallies, min(workers, len(tasks)), console)
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, names in by_split.items():
        splits[split] = tuple(shards[name] for name in names)
        samples = join(split, splits[split], [tables.pop(name) for name in names])
        save_cached(job.out, split, split_digest(splits[split]), samples, scratch=state)
    images = earlier.get(IMAGES_KEY) or {split: tally.split_record() for split, tally in tallies.items()}
    manifest = Manifest(job.out, job.source.name, splits, plan | {IMAGES_KEY: images})
    titles = selection.titles(job.source.classes, job.source.titles)
    write_classes(job.out, selection.classes, titles, scratch=state)
    write_manifest(manifest, scratch=state)
    return manifest


def _run(
    job: Job, tasks: list[Task], tallies: dict[str, Tally], workers: int, console: Console
) -> tuple[dict[str, Shard], dict[str, ShardTable]]:
    """Write all shards and add up what is in them.

    Raises:
        UserError: in the end, naming every broken image; mending them one by one would take a run for each.
    """
    shards: dict[str, Shard] = {}
    tables: dict[str, ShardTable] = {}
    broken: list[str] = []
    images = sum(task.stop - task.start for task in tasks)
    with shard_progress(console, "writing", len(tasks), images, workers) as advance:
        for task, result in run_tasks(partial(write_shard, job), tasks, workers):
            if isinstance(result, Broken):
                if not broken:
                    console.out(f"broken    {result.images[0]}\n          looking for others", highlight=False)
                broken += result.images
            else:
                shards[task.name], tables[task.name] = result.shard, result.table
                if result.images is not None:
                    tallies[task.catalog.split].join(task.number, result.images)
            advance(task.stop - task.start)
    if broken:
        raise _broken(job.out, sorted(broken))
    return shards, tables


def _broken(out: Path, images: list[str]) -> UserError:
    mend = "Repair or remove them, then run the same command again."
    if len(images) == 1:
        return UserError(images[0], mend.replace("them", "it"))
    path = out / PREPARE_FOLDER / BROKEN_NAME
    write_whole(path, "".join(f"{line}\n" for line in images).encode("utf-8", "surrogateescape"))
    shown = images[:_MOST_SHOWN]
    rest = (f"… and {len(images) - len(shown):,} more",) if len(images) > len(shown) else ()
    return UserError(f"{len(images):,} images are broken; all are listed in {path}", *shown, *rest, mend)


def _make_tasks(out: Path, plan: dict[str, Any], catalogs: list[Catalog], ranges: dict[str, list[int]]) -> list[Task]:
    found = find_written(out, plan_digest(plan))
    tasks = []
    for catalog in catalogs:
        for number, (start, stop) in enumerate(pairwise(ranges[catalog.split])):
            name = f"{catalog.split}-{number:05d}"
            tasks.append(Task(name, number, catalog, start, stop, found.get(name)))
    return tasks


def _check_space(out: Path, tasks: list[Task]) -> None:
    """Refuse at once what cannot fit, where the source knows its sizes; headers and padding are not counted."""
    needed = sum({task.catalog.split: task.catalog.image_bytes for task in tasks}.values())
    needed -= sum(task.found.shard.size for task in tasks if task.found is not None)
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
    begun = any((state / name).exists() for name in (PLAN_NAME, REPLACED_NAME)) or any(
        (state / STAGED_NAME).glob("*.json")
    )
    if (out / INDEX_NAME).exists() or not begun:
        shutil.rmtree(state, ignore_errors=True)
    else:
        shutil.rmtree(state / "listing", ignore_errors=True)


def _remove_data_set(out: Path, tars: list[Path]) -> None:
    """Remove a data set or what an interrupted run left of one; other files in the folder are left alone."""
    state = out / PREPARE_FOLDER
    if (out / INDEX_NAME).exists():
        # what is left is then an incomplete data set, and the next run still knows its shards if this one is killed
        (out / INDEX_NAME).replace(state / REPLACED_NAME)
    for tar in tars:
        for path in (*(sidecar.path(tar) for sidecar in SIDECARS), tar):
            path.unlink(missing_ok=True)
    for name in (INFO_NAME, CLASSES_NAME):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / CACHE_FOLDER, ignore_errors=True)
    records = [path for path in state.glob("*.json") if path.name not in (PLAN_NAME, REPLACED_NAME)]
    for path in (*records, state / PLAN_NAME, state / REPLACED_NAME):  # the lists of the shards last
        path.unlink(missing_ok=True)


def _say_reading(console: Console, source: Source, selection: Selection, catalogs: list[Catalog]) -> None:
    images = " / ".join(f"{catalog.count:,} {catalog.split}" for catalog in catalogs)
    size = sum(catalog.image_bytes for catalog in catalogs)
    classes = f"{len(selection.classes):,}"
    if len(selection.classes) != len(source.classes):
        classes += f" (from {len(source.classes):,})"
    line = f"reading   {source.name}   {classes} classes · {images} images"
    console.out(line + (f" · {size / 1e6:,.1f} MB" if size else ""), highlight=False)
    for note in source.notes():
        console.out(f"note      {note}", highlight=False)


def _say_done(console: Console, manifest: Manifest, classes: int, before: str, crop_index: bool) -> None:
    normalized = manifest.record["options"].get("normalize_odd", False)
    images = manifest.record.get(IMAGES_KEY, {})
    for line in summary(images, normalized):
        console.out(line, highlight=False)
    line, indexed = report(shard for split in manifest.splits.values() for shard in split)
    reason = jpeg.unavailable()
    if indexed:  # of pixels from arrays, stored as PNG, there is nothing to say
        console.out(line, highlight=False)
    elif crop_index and reason and any(kind in ORDINARY_KINDS for split in images.values() for kind in split["kinds"]):
        console.out(f"note      no crop index: the C extension {reason}", highlight=False)
    digest = sha256_file(manifest.root / INDEX_NAME)
    shards = sum(map(len, manifest.splits.values()))
    counts = " / ".join(f"{sum(s.samples for s in part):,} {name}" for name, part in manifest.splits.items())
    console.out(
        f"done      {before + ' ' if before else ''}{shards:,} shards · {counts} images · {classes:,} classes · "
        f"index.json sha256 {digest[:4]}…{digest[-2:]}",
        highlight=False,
    )
    console.out(f"          verify with: shards verify {manifest.root}", highlight=False)
