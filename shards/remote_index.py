"""Indexing shards that lie at URLs and that nobody has indexed: makes a local folder that lists them, to train from.

Every shard has to be read once for its digest, so it is fetched into the cache, where training will look for it.
What an interrupted run has indexed is kept in a folder of records, and not fetched again.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from rich.console import Console

from shards.cache import ShardCache
from shards.cachefiles import tar_path
from shards.cachetables import load_table, place
from shards.classes import FROM_LABELS, name_classes, note_first_class, number_found_classes
from shards.crop_index import report
from shards.errors import UserError
from shards.fetch import check_scheme, join_url, list_folder, mask, read_small, size_of
from shards.files import exclusive, write_whole
from shards.idx import index_path, read_index
from shards.labels import DEFAULT_RULE, Labels
from shards.layout import SPLIT_IN_NAME, sort_into_splits
from shards.manifest import (
    CLASSES_NAME,
    INDEX_NAME,
    Manifest,
    Shard,
    class_names,
    to_json,
    write_classes,
    write_manifest,
)
from shards.progress import shard_progress
from shards.remote import has_remote_shards
from shards.table import ShardTable, hash_key, join

RECORDS_FOLDER = ".index"
"""In OUT, while shards are being indexed: what is known of those that are done."""

DOWNLOADS = 8
"""At a time, by default: a single connection seldom fills the line."""

_MOST_SHARDS = 1_000_000

_Indexed = tuple[Shard, ShardTable]


@dataclass(frozen=True)
class _Job:
    records: Path
    cache: ShardCache
    labels: Labels


def index_remote(
    location: str,
    out: Path,
    cache: ShardCache,
    *,
    classes: str | None = None,
    label: str | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> Manifest:
    """Write index.json and classes.json for shards at URLs.

    Args:
        location: URL of a folder of tars, or of tars with braces (``https://host/train-{000..127}.tar``).
        out: folder for the two files; made if absent. `recipe.data` then names it.
        cache: where the shards are fetched to, and stay as far as it has room.
        classes: as for `foreign.index_folder`, without ``from-labels``; by default the `classes.json` in `out`, else
            the one beside the shards.
        label: rule that says where the labels stand, by default ``cls``.
        workers: downloads at a time.
        console: where progress and the summary go; nothing is printed without one.

    Returns:
        What was written, as in `index.json`.

    Raises:
        UserError: naming URL and key, if a shard cannot be fetched, is damaged, or its labels cannot be read.
    """
    console = console or Console(quiet=True)
    workers = DOWNLOADS if workers is None else workers
    _check(location, out, classes, workers)
    with exclusive(out):
        names = name_classes(out, classes) or (_classes_there(location) if classes is None else None)
        job = _Job(out / RECORDS_FOLDER, cache, Labels(label or DEFAULT_RULE, names))
        splits = _find_splits(location)
        read = _read_all(job, [url for part in splits.values() for url in part], workers, console)
        if names is None:
            highest, url = max((int(table.samples["label"].max()), url) for url, (_, table) in read.items())
            names = number_found_classes(mask(url), highest, sum(shard.samples for shard, _ in read.values()))
        for name, part in splits.items():
            _check_split(name, [read[url] for url in part], names, f"shards index {location} {out} --classes FILE|N")
        manifest = Manifest(
            out,
            out.resolve().name,
            {name: tuple(read[url][0] for url in part) for name, part in splits.items()},
            {"source": "index"} | job.labels.record(any(table.by_name for _, table in read.values())),
        )
        write_classes(out, names)
        write_manifest(manifest)
        shutil.rmtree(job.records, ignore_errors=True)
    for name, shards in manifest.splits.items():
        images, size = sum(shard.samples for shard in shards), sum(shard.size for shard in shards)
        console.out(f"{name:<10}{len(shards):,} shards · {images:,} images · {size / 1e6:,.1f} MB", highlight=False)
    if line := report(shard for shard, _ in read.values())[0]:
        console.out(line, highlight=False)
    if note := note_first_class(names, min(int(table.samples["label"].min()) for _, table in read.values())):
        console.out(f"note      {note}", highlight=False)
    console.out(f"done      {len(names):,} classes · train with recipe.data: {out}", highlight=False)
    return manifest


def _check(location: str, out: Path, classes: str | None, workers: int) -> None:
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    check_scheme(location)
    if "@" in urlsplit(location).netloc and mask(location) != location:
        raise UserError(
            f"{mask(location)}: the user and password would be written into {INDEX_NAME}",
            "Keep them where curl looks for them, in ~/.netrc, and leave them out of the URL.",
        )
    if classes == FROM_LABELS:
        raise UserError(
            f"--classes {FROM_LABELS}: not for shards at URLs", "Give the names with --classes FILE, or their number."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    if (out / INDEX_NAME).exists() and not has_remote_shards(out):
        raise UserError(f"{out}: holds a data set of its own", "Give another folder for the index of the remote one.")


def _classes_there(location: str) -> tuple[str, ...] | None:
    if "{" in location:
        return None
    url = join_url(location, CLASSES_NAME)
    try:
        return class_names(json.loads(read_small(url)), mask(url), "Repair it, or give --classes FILE|N")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{mask(url)}: no valid JSON: {error}", "Repair it, or give --classes FILE|N") from error


def _find_splits(location: str) -> dict[str, list[str]]:
    """URLs of the tars by split, each sorted by name."""
    if "{" in location or location.endswith(".tar"):
        urls = _expand(location)
        root = Path(os.path.commonpath([Path(unquote(url)).parent for url in urls]))
    else:
        urls, root = _list_tars(location), Path(unquote(location))
    by_path = {Path(unquote(url)).relative_to(root): url for url in urls}  # as paths, for the names of the splits
    splits = sort_into_splits(Path(), sorted(by_path), {})
    return {name: [by_path[path] for path in part] for name, part in splits.items()}


def _expand(pattern: str) -> list[str]:
    import braceexpand

    try:
        urls = list(itertools.islice(braceexpand.braceexpand(pattern, escape=False), _MOST_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"{mask(pattern)}: {error}", "Write the shards as https://host/train-{000..127}.tar") from None
    if len(urls) > _MOST_SHARDS:
        raise UserError(f"{mask(pattern)}: expands to more than {_MOST_SHARDS:,} shards")
    return urls


def _list_tars(location: str) -> list[str]:
    """Tars directly in a folder, and in its subfolders that are named like a split."""
    urls = []
    for entry in list_folder(location):
        name = unquote(entry.url.rstrip("/").rpartition("/")[2])
        if name.startswith("."):
            continue
        if entry.is_folder and SPLIT_IN_NAME.search(name):
            urls += [inner.url for inner in list_folder(entry.url) if inner.url.endswith(".tar")]
        elif name.endswith(".tar"):
            urls.append(entry.url)
    if not urls:
        raise UserError(
            f"{mask(location)}: no tars are listed there",
            "If the server lists no folders, name the shards: https://host/train-{000..127}.tar",
        )
    return urls


def _read_all(job: _Job, urls: Sequence[str], workers: int, console: Console) -> dict[str, _Indexed]:
    try:
        job.records.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.records}: cannot be written: {error.strerror}") from error
    read = {}
    workers = min(workers, len(urls))
    # how many images there are is what this finds out, so the bar runs over shards
    with shard_progress(console, "indexing", len(urls), len(urls), workers) as advance:
        for url, result in _in_threads(lambda url: _index(job, url), urls, workers):
            read[url] = result
            advance(1)
    return read


def _in_threads(
    function: Callable[[str], _Indexed], tasks: Sequence[str], threads: int
) -> Iterator[tuple[str, _Indexed]]:
    """Results in any order. The threads are daemons: a download under way cannot hold up the end of the program."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, _Indexed | BaseException]] = queue.SimpleQueue()
    stopped = threading.Event()
    for task in tasks:
        waiting.put(task)

    def work() -> None:
        while not stopped.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((task, function(task)))
            except BaseException as error:
                done.put((task, error))

    for _ in range(threads):
        threading.Thread(target=work, daemon=True, name="index").start()
    try:
        for _ in tasks:
            task, result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield task, result
    finally:
        stopped.set()


def _index(job: _Job, url: str) -> _Indexed:
    size = size_of(url)
    path = job.records / f"{hash_key(url):016x}.json"
    found = _indexed_before(job, path, url, size)
    if found is not None:
        return found
    shard, table = job.cache.add(url, size, job.labels)
    record = {"samples": shard.samples, "sha256": shard.sha256, "by_name": table.by_name}
    write_whole(path, to_json({"url": url, "size": size} | record))
    return shard, table


def _indexed_before(job: _Job, path: Path, url: str, size: int) -> _Indexed | None:
    """What an interrupted run found out, as far as it is still beside where the shard was in the cache."""
    try:
        record = json.loads(path.read_bytes())
        if (record["url"], record["size"]) != (url, size):
            return None
        sha256 = str(record["sha256"])
        shard = Shard(tar_path(job.cache.folder, sha256), int(record["samples"]), size, sha256, url)
        samples = load_table(job.cache.folder, shard, job.labels)
        if samples is None:
            return None
        keys = np.array([hash_key(sample.key) for sample in read_index(index_path(shard.path))], np.uint64)
        return shard, ShardTable(samples.copy(), keys, bool(record["by_name"]))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # it is fetched again


def _check_split(name: str, read: Sequence[_Indexed], classes: tuple[str, ...], mend: str) -> None:
    """No key twice, no label outside the classes."""
    shards = [shard for shard, _ in read]
    try:
        join(name, shards, [table for _, table in read])
    except UserError as error:
        headline = error.headline
        for shard in shards:
            headline = headline.replace(str(shard.path), place(shard))
        raise UserError(headline, *error.details) from error
    for shard, table in read:
        row = int(np.argmax(table.samples["label"]))
        label = int(table.samples["label"][row])
        if label >= len(classes):
            key = read_index(index_path(shard.path))[row].key
            raise UserError(
                f"{place(shard)}: label {label} of key {key} is outside the {len(classes):,} classes",
                f"Labels run from 0 to {len(classes) - 1:,}. Give all classes with: {mask(mend)}",
            )
