"""Checking a data set folder against its index, reporting everything that is wrong rather than the first."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shards.errors import UserError
from shards.files import sha256_file
from shards.idx import index_path, index_tar, read_index
from shards.manifest import INFO_NAME, Manifest, Shard, read_classes, read_manifest, timm_info
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.table import ShardTable, join, read_shard


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a file of the data set, and a sample's key where there is one), and what."""

    place: str
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.place}{f': key {self.key}' if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`."""

    manifest: Manifest
    checks: tuple[str, ...]
    """What was compared, for the summary."""
    problems: tuple[Problem, ...]
    """In the order of the index."""


@dataclass(frozen=True)
class _Job:
    classes: int | None
    digests: bool
    decode: bool


def verify(
    root: Path,
    *,
    digests: bool = False,
    decode: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> Report:
    """Check every shard: its size, its headers against its ``.idx``, its labels; keys over each whole split.

    Args:
        root: data set folder.
        digests: read every byte and compare the sha256 with the index.
        decode: decode every image with Pillow.
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
    classes = None
    try:
        classes = len(read_classes(root))
    except UserError as error:
        problems.append(_problem(root, error))
    problems += _check_folder(manifest)
    shards = [shard for split in manifest.splits.values() for shard in split]
    found: dict[Path, list[Problem]] = {}
    tables: dict[Path, ShardTable] = {}
    images = sum(shard.samples for shard in shards)
    workers = min(workers or usable_cores(), max(len(shards), 1))
    with shard_progress(console or Console(quiet=True), "checking", len(shards), images, workers) as advance:
        for shard, (faults, table) in run_tasks(partial(_check_shard, _Job(classes, digests, decode)), shards, workers):
            found[shard.path] = faults
            if table is not None:
                tables[shard.path] = table
            advance(shard.samples)
    for shard in shards:
        problems += found[shard.path]
    for name, split in manifest.splits.items():
        readable = [shard for shard in split if shard.path in tables]
        if not readable:
            continue
        try:
            join(name, readable, [tables[shard.path] for shard in readable])
        except UserError as error:
            problems.append(_problem(root, error))
    checks: tuple[str, ...] = ("sizes", "index", "labels", "keys")
    checks += ("digests",) if digests else ()
    checks += ("every image decoded",) if decode else ()
    return Report(manifest, checks, tuple(problems))


def _check_folder(manifest: Manifest) -> list[Problem]:
    """What the JSON files and the folder say about each other."""
    problems = []
    try:
        info = json.loads((manifest.root / INFO_NAME).read_bytes())
        if info.get("splits") != timm_info(manifest)["splits"]:
            problems.append(Problem(INFO_NAME, None, "does not agree with index.json"))
    except (OSError, ValueError, AttributeError) as error:
        problems.append(Problem(INFO_NAME, None, f"cannot be read: {error}"))
    listed = {shard.path for split in manifest.splits.values() for shard in split}
    for path in sorted(manifest.root.glob("*.tar")):
        if path not in listed:
            problems.append(Problem(path.name, None, "is not listed in index.json"))
    return problems


def _check_shard(job: _Job, shard: Shard) -> tuple[list[Problem], ShardTable | None]:
    name, folder = shard.path.name, shard.path.parent
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        return [Problem(name, None, f"cannot be read: {error.strerror}")], None
    problems = []
    if size != shard.size:
        problems.append(Problem(name, None, f"has {size:,} bytes, index.json says {shard.size:,}"))
    table = None
    try:
        if job.digests:
            digest = sha256_file(shard.path)
            if digest != shard.sha256:
                problems.append(Problem(name, None, f"has sha256 {digest}, index.json says {shard.sha256}"))
        actual = index_tar(shard.path)
        path = index_path(shard.path)
        if not path.exists():
            problems.append(Problem(path.name, None, "is missing"))
        elif path.read_bytes() != actual:
            problems.append(Problem(path.name, None, "does not describe its tar"))
        else:
            table = read_shard(shard.path)
            problems += _check_samples(job, shard, table)
    except UserError as error:
        problems.append(_problem(folder, error))
    return problems, table


def _check_samples(job: _Job, shard: Shard, table: ShardTable) -> list[Problem]:
    name = shard.path.name
    problems = []
    if len(table.samples) != shard.samples:
        problems.append(Problem(name, None, f"holds {len(table.samples):,} samples, index.json says {shard.samples:,}"))
    keys = [sample.key for sample in read_index(index_path(shard.path))]
    if job.classes is not None:
        for key, label in zip(keys, table.samples["label"].tolist(), strict=True):
            if label >= job.classes:
                problems.append(Problem(name, key, f"label {label} is outside the {job.classes:,} classes"))
    if job.decode:
        with shard.path.open("rb") as file:
            for key, sample in zip(keys, table.samples, strict=True):
                fault = _decoding_fault(os.pread(file.fileno(), int(sample["size"]), int(sample["offset"])))
                if fault is not None:
                    problems.append(Problem(name, key, f"does not decode: {fault}"))
    return problems


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


def _problem(root: Path, error: UserError) -> Problem:
    """A `UserError` as a problem; its headline begins with a path inside the data set."""
    place, _, what = error.headline.removeprefix(f"{root}{os.sep}").partition(": ")
    return Problem(place, None, what)


def print_report(report: Report, console: Console) -> None:
    """Print a table of the splits, every problem, and a line that sums up."""
    table = Table("split", box=None, pad_edge=False)
    for heading in ("shards", "images", "MB"):
        table.add_column(heading, justify="right")
    for name, shards in report.manifest.splits.items():
        table.add_row(
            name,
            f"{len(shards):,}",
            f"{sum(shard.samples for shard in shards):,}",
            f"{sum(shard.size for shard in shards) / 1e6:,.1f}",
        )
    console.print(table)
    for problem in report.problems:
        console.out(f"problem   {problem}", highlight=False)
    checked = ", ".join(report.checks)
    if report.problems:
        count = len(report.problems)
        console.out(f"{count:,} problem{'s' if count > 1 else ''}   (checked: {checked})", highlight=False)
    else:
        console.out(f"ok        {checked}", highlight=False)
