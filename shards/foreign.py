"""Indexing tars that another tool made, so that training can read them like its own.

Each tar is read once: hashed first, which leaves it in memory for its headers, its labels and its sidecars. A shard
that was indexed before is not hashed again, if nothing about it has changed: its size, all names and sizes in its
headers, and, by its time, that it was not written to after its ``.idx``. Headers and labels are read every time.
Until `index.json` is written, last, nothing counts; what an interrupted run has hashed is kept in a folder of records.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from shards import jpeg
from shards.classes import FROM_LABELS, name_classes, note_first_class, number_found_classes, survey_classes
from shards.crop_index import report, require_extension
from shards.errors import UserError
from shards.files import exclusive, read_file, sha256_file, write_whole
from shards.idx import format_index, index_path, is_older_than_its_index, list_samples
from shards.index import Split, check_labels
from shards.labels import DEFAULT_RULE, Labels, recorded_rule
from shards.layout import find_shards
from shards.manifest import (
    INDEX_NAME,
    INFO_NAME,
    PREPARE_FOLDER,
    Manifest,
    Shard,
    info_faults,
    read_classes,
    read_manifest,
    to_json,
    write_classes,
    write_manifest,
)
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.sidecars import Extras, ShardContents, write_sidecars
from shards.table import ShardTable, build_table, hash_key, join, save_cached, split_digest

STATE_FOLDER = ".index"
"""Where an unfinished `shards index` keeps the digests of the shards it has read; gone once `index.json` is written."""


@dataclass(frozen=True)
class _Job:
    folder: Path
    labels: Labels
    extras: Extras


@dataclass(frozen=True)
class _Task:
    tar: Path
    found: Shard | None
    """What an earlier index or an interrupted run says about it."""


@dataclass(frozen=True)
class _Indexed:
    shard: Shard
    table: ShardTable
    hashed: bool
    seconds: tuple[float, float, float]
    """Spent on the digest, on headers and labels, and on the sidecars."""
    removed: int
    """Optional sidecars of an earlier shard that could not be written again."""


def index_folder(
    folder: Path,
    *,
    classes: str | None = None,
    label: str | None = None,
    rehash: bool = False,
    decode: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> Manifest:
    """Write .idx, index.json, _info.json and classes.json for all tars of a folder; the tars are only read.

    Args:
        folder: with the tars directly in it, or in subfolders named like splits.
        classes: a file of names (one a line, or JSON like classes.json), a number, or ``from-labels`` for the
            names found as labels; by default the `classes.json` that is there, else as many as the highest label
            calls for.
        label: rule that says where the labels stand (`labels.RULE_HELP`); by default the one of the index that is
            there, else ``cls``. Recorded in `index.json`.
        rehash: read every byte, also of shards that seem not to have changed since they were indexed.
        decode: write a crop index beside every shard, which takes a decoding of every image. Without this, those that
            are there are kept, written again if their shard has changed, and removed if that cannot be done here.
        workers: number of processes, by default one per usable core.
        console: where progress and the summary go; nothing is printed without one.

    Returns:
        What was written, as in `index.json`.

    Raises:
        UserError: naming tar and key, if a tar is damaged, a sample has no image or no label, a label is
            outside the classes, or two samples of a split have one key; if crop indexes are asked for, and there is no
            C extension.
    """
    console = console or Console(quiet=True)
    folder = Path(folder)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if decode:
        require_extension()
    earlier = _earlier_manifest(folder)
    known = {shard.path: name for name, shards in earlier.splits.items() for shard in shards} if earlier else {}
    layout = find_shards(folder, known)
    workers = min(workers or usable_cores(), len(layout.tars))
    with exclusive(folder):
        if (folder / PREPARE_FOLDER).exists():
            raise UserError(
                f"{folder}: holds an unfinished shards prepare", "Run the same command again; it indexes as well."
            )
        if earlier is not None and not _is_of(earlier, layout.tars):
            (folder / INDEX_NAME).unlink()  # what it says is wrong already; an interruption must not leave it behind
        labels = _choose_labels(folder, layout.tars, earlier, label, classes, workers)
        found = {} if rehash else _found_before(folder, layout.tars, earlier)
        job = _Job(folder, labels, Extras.MAKE if decode else Extras.MEND)
        read = _read_all(job, [_Task(tar, found.get(tar)) for tar in layout.tars], workers, console)
        shards = {name: tuple(read[tar].shard for tar in part) for name, part in layout.splits.items()}
        tables = {
            name: join(name, shards[name], [read[tar].table for tar in part]) for name, part in layout.splits.items()
        }
        names = labels.classes or _number_classes(read)
        by_name = any(indexed.table.by_name for indexed in read.values())
        manifest = _describe(folder, shards, earlier, labels.record(by_name))
        for name, table in tables.items():
            digest = split_digest(shards[name], manifest.record)
            check_labels(Split(folder, name, shards[name], table, names, digest))
            save_cached(folder, name, digest, table, folder / STATE_FOLDER)
        info_said = info_faults(manifest) if (folder / INFO_NAME).exists() else []
        _write(folder, manifest, names, earlier)
    for path in layout.left_out:
        _say(console, "note", f"left out the tars in {path}: the folder's name says no split")
    for fault in info_said:
        _say(console, "note", f"{INFO_NAME}, now replaced: it {fault}")
    for name, table in tables.items():
        size = sum(shard.size for shard in shards[name])
        _say(console, name, f"{len(shards[name]):,} shards · {len(table):,} images · {size / 1e6:,.1f} MB")
    if manifest.record.get("label"):
        _say(console, "labels", f"{labels.source}" + (", looked up by name among the classes" if by_name else ""))
    if note := note_first_class(names, min(int(table["label"].min()) for table in tables.values())):
        _say(console, "note", note)
    if removed := sum(indexed.removed for indexed in read.values()):
        which = f"{removed:,} crop index{'es' if removed > 1 else ''}"
        _say(console, "note", f"removed {which} of other shards: the C extension {jpeg.unavailable()}")
    if line := report(shard for part in shards.values() for shard in part)[0]:
        console.out(line, highlight=False)
    _say_effort(console, list(read.values()), decode)
    _say(console, "done", f"{len(names):,} classes · check with: shards verify {folder}")
    return manifest


def _choose_labels(
    folder: Path, tars: Sequence[Path], earlier: Manifest | None, rule: str | None, classes: str | None, workers: int
) -> Labels:
    if rule is None and earlier is not None:
        rule = recorded_rule(earlier.record)
    labels = Labels(rule or DEFAULT_RULE, name_classes(folder, classes))
    return replace(labels, classes=survey_classes(tars, labels, workers)) if classes == FROM_LABELS else labels


def _read_all(job: _Job, tasks: Sequence[_Task], workers: int, console: Console) -> dict[Path, _Indexed]:
    read = {}
    try:
        (job.folder / STATE_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.folder}: cannot be written: {error.strerror}") from error
    # how many images there are is what this finds out, so the bar runs over shards
    with shard_progress(console, "indexing", len(tasks), len(tasks), workers) as advance:
        for task, result in run_tasks(partial(_index_tar, job), tasks, workers):
            read[task.tar] = result
            advance(1)
    return read


def _number_classes(read: dict[Path, _Indexed]) -> tuple[str, ...]:
    highest, tar = max((int(indexed.table.samples["label"].max()), tar) for tar, indexed in read.items())
    return number_found_classes(str(tar), highest, sum(indexed.shard.samples for indexed in read.values()))


def _index_tar(job: _Job, task: _Task) -> _Indexed:
    """Index one shard, keeping its digest from before if nothing about it has changed."""
    tar, scratch = task.tar, job.folder / STATE_FOLDER
    before = _stamp(tar)
    times = [time.perf_counter()]
    samples = list_samples(tar) if task.found is not None and is_older_than_its_index(tar) else None
    unchanged = samples is not None and read_file(index_path(tar)) == format_index(samples)
    if task.found is not None and unchanged:
        sha256 = task.found.sha256
        times *= 2
    else:
        sha256 = sha256_file(tar)
        times.append(time.perf_counter())
    samples = samples or list_samples(tar)
    table = build_table(tar, samples, job.labels)
    times.append(time.perf_counter())
    removed = write_sidecars(ShardContents(tar, samples, table, sha256), scratch, job.extras)
    if not (unchanged or is_older_than_its_index(tar)):
        index_path(tar).touch()  # right, but older: from now on its time says that the tar was read after it changed
    if _stamp(tar) != before:
        raise UserError(f"{tar}: changed while it was read", "Run the same command again when nothing writes to it.")
    shard = Shard(tar, len(samples), before[0], sha256)
    record = {"size": shard.size, "samples": shard.samples, "sha256": sha256}
    write_whole(_record_path(job.folder, tar), to_json(record))
    times.append(time.perf_counter())
    seconds = (times[1] - times[0], times[2] - times[1], times[3] - times[2])
    return _Indexed(shard, table, not unchanged, seconds, len(removed))


def _stamp(tar: Path) -> tuple[int, int]:
    """Size in bytes, and time of the last change in nanoseconds."""
    try:
        status = tar.stat()
    except OSError as error:
        raise UserError(f"{tar}: cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _earlier_manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except UserError:
        return None  # none, or damaged: to be replaced


def _is_of(manifest: Manifest, tars: Sequence[Path]) -> bool:
    """Whether an index lists just these tars, with the sizes that they have."""
    sizes = {shard.path: shard.size for shards in manifest.splits.values() for shard in shards}
    return sizes == {tar: _stamp(tar)[0] for tar in tars}


def _found_before(folder: Path, tars: Sequence[Path], earlier: Manifest | None) -> dict[Path, Shard]:
    """Shards as the last index or an interrupted run describe them, if they still have the size said there."""
    found = {shard.path: shard for shards in earlier.splits.values() for shard in shards} if earlier else {}
    for tar in tars:
        try:
            record = json.loads(read_file(_record_path(folder, tar)))
            found[tar] = Shard(tar, int(record["samples"]), int(record["size"]), str(record["sha256"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # no record, no shard: it is read again
    return {tar: shard for tar, shard in found.items() if tar in set(tars) and _stamp(tar)[0] == shard.size}


def _record_path(folder: Path, tar: Path) -> Path:
    return folder / STATE_FOLDER / f"{hash_key(tar.relative_to(folder).as_posix()):016x}.json"


def _describe(
    folder: Path, shards: dict[str, tuple[Shard, ...]], earlier: Manifest | None, label: dict[str, Any]
) -> Manifest:
    """The new index; of shards that are still the same ones it keeps the record of how they were made."""
    manifest = Manifest(folder, folder.resolve().name, shards, {"source": "index"})
    if earlier is not None and earlier.splits == shards:
        manifest = earlier
    return replace(manifest, record={key: value for key, value in manifest.record.items() if key != "label"} | label)


def _write(folder: Path, manifest: Manifest, classes: tuple[str, ...], earlier: Manifest | None) -> None:
    """Write what differs from what is there, index.json last."""
    try:
        same_classes = classes == read_classes(folder)
    except UserError:
        same_classes = False
    if manifest != earlier or not same_classes:
        (folder / INDEX_NAME).unlink(missing_ok=True)
    if not same_classes:  # else left as it is: it may hold more than names
        write_classes(folder, classes, scratch=folder / STATE_FOLDER)
    write_manifest(manifest, folder / STATE_FOLDER)
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)


def _say(console: Console, first: str, rest: str) -> None:
    console.out(f"{first:<10}{rest}", highlight=False)


def _say_effort(console: Console, read: Sequence[_Indexed], decode: bool) -> None:
    """Where the time went, summed over the workers."""
    digests, headers, sidecars = (sum(times) for times in zip(*(indexed.seconds for indexed in read), strict=True))
    unchanged = sum(not indexed.hashed for indexed in read)
    _say(
        console,
        "work",
        f"digests {digests:,.1f} s · headers and labels {headers:,.1f} s · "
        f"{'crop index and other files' if decode else 'files'} written {sidecars:,.1f} s"
        + (f" · {unchanged:,} shards not hashed, unchanged since they were" if unchanged else ""),
    )
