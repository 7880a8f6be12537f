"""Checking a data set folder against its index, reporting everything that is wrong rather than the first."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from rich.console import Console

from shards.duplicates import HASH_BYTES, HASH_DTYPE, NO_IMAGE, Occurrence, describe_group, equal_rows
from shards.errors import UserError
from shards.files import opened, sha256_file
from shards.findings import Problem, Remark, Report
from shards.idx import IndexedSample, list_samples
from shards.labels import Labels
from shards.manifest import INFO_NAME, Manifest, Shard, info_faults, read_classes, read_manifest
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.sidecars import SIDECARS, ShardContents, partly_missing
from shards.table import ShardTable, build_table, repeated_keys

_MOST_CLASSES = 1 << 20
"""Counted where there is no list of classes."""


@dataclass(frozen=True)
class _Job:
    root: Path
    labels: Labels
    classes: int | None
    digests: bool
    decode: bool
    duplicates: bool


@dataclass
class _Checked:
    """What one worker finds out about one shard."""

    problems: list[Problem]
    table: ShardTable | None = None
    hashes: np.ndarray | None = None
    """HASH_DTYPE [n] of the images' bytes, if duplicates are looked for."""


def verify(
    root: Path,
    *,
    digests: bool = False,
    decode: bool = False,
    duplicates: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> Report:
    """Check every shard: its size, its headers against its ``.idx``, its labels; keys over each whole split.

    Args:
        root: data set folder.
        digests: read every byte and compare the sha256 with the index.
        decode: decode every image with Pillow, and compare crop indexes with the images.
        duplicates: find images of equal bytes in the whole data set; keeps 16 bytes per image in memory.
        workers: number of processes, by default one per usable core.
        console: where progress goes; none is shown without one.

    Raises:
        UserError: if there is no readable `index.json`; everything else is reported.
    """
    root = Path(root)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    manifest = read_manifest(root)
    problems: list[Problem] = []
    names: tuple[str, ...] | None = None
    labels = Labels()
    try:
        names = read_classes(root)
    except UserError as error:
        problems.append(_problem(root, error))
    try:
        labels = Labels.from_record(root, manifest.record, names)
    except UserError as error:
        problems.append(_problem(root, error))
    problems += _check_folder(manifest)
    shards = [shard for split in manifest.splits.values() for shard in split]
    checked: dict[Path, _Checked] = {}
    images = sum(shard.samples for shard in shards)
    workers = min(workers or usable_cores(), max(len(shards), 1))
    job = _Job(root, labels, len(names) if names else None, digests, decode, duplicates)
    with shard_progress(console or Console(quiet=True), "checking", len(shards), images, workers) as advance:
        for shard, result in run_tasks(partial(_check_shard, job), shards, workers):
            checked[shard.path] = result
            advance(shard.samples)
    for shard in shards:
        problems += checked[shard.path].problems
    for name, split in manifest.splits.items():
        problems += _check_keys(
            root, name, [shard for shard in split if checked[shard.path].table is not None], checked
        )
    histograms = {name: _count_labels(split, checked, len(names or ())) for name, split in manifest.splits.items()}
    remarks = [remark for name, counts in histograms.items() for remark in _remark_on_classes(name, counts, names)]
    if duplicates:
        remarks += _remark_on_duplicates(manifest, checked)
    remarks += [Remark("missing-files", what) for what in partly_missing(root, shards)]
    checks: tuple[str, ...] = ("sizes", "index", "labels", "keys")
    checks += ("digests",) if digests else ()
    checks += ("every image decoded",) if decode else ()
    checks += ("duplicates",) if duplicates else ()
    return Report(manifest, checks, tuple(problems), tuple(remarks), histograms)


def _check_folder(manifest: Manifest) -> list[Problem]:
    """What the JSON files and the folder say about each other."""
    problems = [Problem(INFO_NAME, None, f"does not agree with index.json: {it}") for it in info_faults(manifest)]
    listed = {shard.path for split in manifest.splits.values() for shard in split}
    folders = {manifest.root, *(path.parent for path in listed)}
    for path in sorted(path for folder in folders for path in folder.glob("*.tar")):
        if path not in listed:
            problems.append(Problem(_url(manifest.root, path), None, "is not listed in index.json"))
    return problems


def _check_shard(job: _Job, shard: Shard) -> _Checked:
    checked = _Checked([])
    try:
        _check_tar(job, shard, checked)
    except UserError as error:
        checked.problems.append(_problem(job.root, error))
    if checked.table is None:  # nothing to compare them with, but they should be there
        for sidecar in SIDECARS:
            path = sidecar.path(shard.path)
            if not path.is_file() and (path.exists() or not sidecar.optional):
                what = "is not a file" if path.exists() else "is missing"
                checked.problems.append(Problem(_url(job.root, path), None, what))
    return checked


def _check_tar(job: _Job, shard: Shard, checked: _Checked) -> None:
    name, problems = _url(job.root, shard.path), checked.problems
    try:
        status = shard.path.stat()
    except OSError as error:
        problems.append(Problem(name, None, f"cannot be read: {error.strerror}"))
        return
    if not stat.S_ISREG(status.st_mode):
        problems.append(Problem(name, None, "is not a file"))
        return
    if status.st_size != shard.size:
        problems.append(Problem(name, None, f"has {status.st_size:,} bytes, index.json says {shard.size:,}"))
    if job.digests:
        digest = sha256_file(shard.path)
        if digest != shard.sha256:
            problems.append(Problem(name, None, f"has sha256 {digest}, index.json says {shard.sha256}"))
    samples = list_samples(shard.path)
    table = build_table(shard.path, samples, job.labels, lambda error: problems.append(_problem(job.root, error)))
    checked.table = table
    contents = ShardContents(shard.path, samples, table, shard.sha256)
    for sidecar in SIDECARS:
        if sidecar.optional and not sidecar.path(shard.path).exists():
            continue
        fault = sidecar.content_fault(contents) if job.decode else sidecar.fault(contents)
        if fault is not None:
            problems.append(Problem(_url(job.root, sidecar.path(shard.path)), None, fault))
    _check_samples(job, shard, samples, checked)


def _check_samples(job: _Job, shard: Shard, samples: list[IndexedSample], checked: _Checked) -> None:
    name = _url(job.root, shard.path)
    problems, table = checked.problems, checked.table
    if table is None:
        return
    if len(samples) != shard.samples:
        problems.append(Problem(name, None, f"holds {len(samples):,} samples, index.json says {shard.samples:,}"))
    if job.classes is not None:
        for row in np.flatnonzero(table.samples["label"] >= job.classes):
            label = table.samples["label"][row]
            problems.append(Problem(name, samples[row].key, f"label {label} is outside the {job.classes:,} classes"))
    if not (job.decode or job.duplicates):
        return
    hashes = []
    with opened(shard.path) as descriptor:
        for sample, row in zip(samples, table.samples, strict=True):
            if row["label"] < 0:
                hashes.append(NO_IMAGE)  # has been reported
                continue
            data = os.pread(descriptor, int(row["size"]), int(row["offset"]))
            hashes.append(hashlib.blake2b(data, digest_size=HASH_BYTES).digest() if job.duplicates else NO_IMAGE)
            fault = _decoding_fault(data) if job.decode else None
            if fault is not None:
                problems.append(Problem(name, sample.key, f"does not decode: {fault}"))
    checked.hashes = np.frombuffer(b"".join(hashes), HASH_DTYPE) if job.duplicates else None


def _decoding_fault(data: bytes) -> str | None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF and the like, which training does not look at either
            with Image.open(BytesIO(data)) as image:
                image.load()
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _check_keys(root: Path, split: str, shards: list[Shard], checked: dict[Path, _Checked]) -> list[Problem]:
    if not shards:
        return []
    tables = [table for shard in shards if (table := checked[shard.path].table) is not None]
    problems = []
    try:
        for key, first, second in repeated_keys(shards, tables):
            where = "here" if first == second else f"in {_url(root, first)}"
            problems.append(
                Problem(_url(root, second), key, f"two samples of split {split!r} have the key; the first is {where}")
            )
    except UserError as error:  # a shard that has changed since
        problems.append(_problem(root, error))
    return problems


def _count_labels(shards: tuple[Shard, ...], checked: dict[Path, _Checked], classes: int) -> np.ndarray:
    counts = np.zeros(classes, np.int64)
    for shard in shards:
        table = checked[shard.path].table
        if table is None:
            continue
        labels = table.samples["label"]
        # labels outside the classes have been reported; one of 2³¹ must not call for 2³¹ counters
        found = np.bincount(labels[(labels >= 0) & (labels < (classes or _MOST_CLASSES))], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def _remark_on_classes(split: str, counts: np.ndarray, names: tuple[str, ...] | None) -> Iterator[Remark]:
    missing = np.flatnonzero(counts == 0)
    if len(missing) and counts.any():
        shown = ", ".join(names[label] if names else str(label) for label in missing[:5])
        more = ", …" if len(missing) > 5 else ""
        yield Remark(
            "missing-classes", f"{split}: {len(missing):,} of {len(counts):,} classes have no image: {shown}{more}"
        )


def _remark_on_duplicates(manifest: Manifest, checked: dict[Path, _Checked]) -> list[Remark]:
    """One remark that counts, then one for each image that stands in several samples, the graver ones first."""
    places = [
        (name, shard, checked[shard.path])
        for name, shards in manifest.splits.items()
        for shard in shards
        if checked[shard.path].hashes is not None
    ]
    hashes = [part.hashes for _, _, part in places if part.hashes is not None]
    groups = equal_rows(hashes) if hashes else []
    if not groups:
        return []
    starts = np.cumsum([0, *map(len, hashes)])
    keys: dict[Path, list[str]] = {}

    def occurrence(row: int) -> Occurrence:
        number = int(np.searchsorted(starts, row, "right")) - 1
        name, shard, part = places[number]
        if shard.path not in keys:
            keys[shard.path] = [sample.key for sample in list_samples(shard.path)]
        inner = row - int(starts[number])
        assert part.table is not None
        return Occurrence(
            name, _url(manifest.root, shard.path), keys[shard.path][inner], int(part.table.samples["label"][inner])
        )

    remarks = []
    for rows in groups:
        samples = tuple(map(occurrence, rows))
        remarks.append(Remark(*describe_group(samples), samples))
    kinds = ("label-conflict", "leakage", "repeated")
    remarks.sort(key=lambda remark: kinds.index(remark.kind))
    conflicts = sum(remark.kind == "label-conflict" for remark in remarks)
    leaks = sum(len({sample.split for sample in remark.samples}) > 1 for remark in remarks)
    total = f"{len(groups):,} image{'s stand' if len(groups) > 1 else ' stands'} under more than one key"
    return [
        Remark("duplicates", f"{total}: {leaks:,} in more than one split, {conflicts:,} with different labels"),
        *remarks,
    ]


def _url(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _problem(root: Path, error: UserError) -> Problem:
    """A `UserError` as a problem; its headline begins with a path inside the data set."""
    place, _, what = error.headline.removeprefix(f"{root}{os.sep}").partition(": ")
    key, colon, rest = what.removeprefix("key ").partition(": ")
    return Problem(place, key, rest) if colon and what.startswith("key ") else Problem(place, None, what)
