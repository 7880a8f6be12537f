"""What one worker of `shards prepare` does: write one shard, or find it already written.

A shard counts as done when its record, holding its digest and the digest of the plan it belongs to, has been
written after it and its sidecar files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.catalog import Catalog
from shards.errors import UserError
from shards.files import opened, read_file, sha256_file, whole_file, write_whole
from shards.idx import IndexedSample, list_samples
from shards.images import describe_image
from shards.manifest import INDEX_NAME, PREPARE_FOLDER, Shard, read_manifest, to_json
from shards.reencode import Reencoding, decode
from shards.sidecars import SIDECARS, Extras, ShardContents, write_sidecars
from shards.sources.base import Entry, Source
from shards.table import ShardTable, build_table
from shards.tally import IMAGES_KEY, Tally
from shards.writer import ShardWriter


@dataclass(frozen=True)
class Found:
    """A shard that an earlier run finished."""

    shard: Shard
    images: dict[str, Any] | None
    """`Tally.record` of its images; None where only index.json has it, for the whole split."""


@dataclass(frozen=True)
class Task:
    """One shard to write, or to find already written."""

    name: str
    number: int
    """In its split."""
    catalog: Catalog
    start: int
    stop: int
    """Positions in the catalog."""
    found: Found | None


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; pickled with each task, so it holds nothing per sample."""

    source: Source
    out: Path
    plan_digest: str
    reencoding: Reencoding
    check_decode: bool
    """Whether to decode every image, to find broken ones."""
    extras: Extras = Extras.MAKE
    """What to do about optional sidecars."""


@dataclass(frozen=True)
class Written:
    """A shard that is done."""

    shard: Shard
    table: ShardTable
    images: dict[str, Any] | None
    """As in `Found`."""


@dataclass(frozen=True)
class Broken:
    """A shard that was not written, because of these images: one line each, with the place and what is wrong."""

    images: tuple[str, ...]


class _BrokenImagesError(Exception):
    """Leaves the block that writes a shard, so that the file never appears."""


def write_shard(job: Job, task: Task) -> Written | Broken:
    """Write one shard with its sidecar files and its record, unless a record's shard is there and intact.

    Raises:
        UserError: if the source changes meanwhile or cannot be read, or the disk is full.
    """
    tar = job.out / f"{task.name}.tar"
    state = job.out / PREPARE_FOLDER
    if task.found is not None and sha256_file(tar) == task.found.shard.sha256:
        samples = list_samples(tar)
        table = build_table(tar, samples)
        broken = _undecodable(tar, samples, table) if job.check_decode else ()
        if broken:
            return Broken(broken)
        write_sidecars(ShardContents(tar, samples, table, task.found.shard.sha256), state, job.extras)
        return Written(task.found.shard, table, task.found.images)
    tally = Tally()
    try:
        with whole_file(tar, state) as file:
            writer = ShardWriter(file)
            for entry, image, extension in _images(job, task, tally):
                writer.add(entry.key, entry.label, image, extension)
            sha256 = writer.close()
    except _BrokenImagesError as error:
        return Broken(error.args)
    table = writer.table()
    write_sidecars(ShardContents(tar, writer.samples, table, sha256), state, job.extras)
    shard = Shard(tar, task.stop - task.start, writer.size, sha256)
    record = {"plan": job.plan_digest, "samples": shard.samples, "size": shard.size, "sha256": sha256}
    write_whole(state / f"{task.name}.json", to_json(record | {IMAGES_KEY: tally.record()}), state)
    return Written(shard, table, tally.record())


def write_extras(job: Job, shard: Shard) -> None:
    """Write the optional sidecars of a shard that is done, or remove those that do not belong to it.

    Raises:
        UserError: if the tar is no longer what the index says.
    """
    if sha256_file(shard.path) != shard.sha256:
        raise UserError(
            f"{shard.path}: is not the shard that {INDEX_NAME} describes",
            f"See what else differs with: shards verify {job.out} --digests",
            "Then remove the tar and run the same command again: it writes the shard anew.",
        )
    samples = list_samples(shard.path)
    contents = ShardContents(shard.path, samples, build_table(shard.path, samples), shard.sha256)
    write_sidecars(contents, job.out / PREPARE_FOLDER, job.extras)


def _images(job: Job, task: Task, tally: Tally) -> Iterator[tuple[Entry, bytes, str]]:
    """Each entry of a shard with the bytes to store and their extension; all broken images are found first."""
    broken = []
    for entry in task.catalog.read(task.start, task.stop):
        data = job.source.read(entry.locator)
        if entry.size not in (-1, len(data)):
            raise UserError(
                f"{job.source.place(entry.locator)}: changed while it was read: {entry.size:,} bytes in the listing, "
                f"now {len(data):,}",
                "Run the same command again when nothing writes to the source any more.",
            )
        header = describe_image(data)
        try:
            if header is None:
                raise ValueError(f"not an image: it begins with {data[:16]!r}" if data else "not an image: it is empty")
            image = job.reencoding.apply(data, header)
            if job.check_decode and image is data:
                decode(data)
        except ValueError as error:
            broken.append(f"{job.source.place(entry.locator)}: key {entry.key}: {error}")
            continue
        tally.add(entry.key, header, len(data), None if image is data else len(image))
        if not broken:
            yield entry, image, header.format if image is data else "jpg"
    if broken:
        raise _BrokenImagesError(*broken)


def _undecodable(tar: Path, samples: list[IndexedSample], table: ShardTable) -> tuple[str, ...]:
    """Broken images of a shard that an earlier run wrote without looking."""
    broken = []
    with opened(tar) as descriptor:
        for sample, row in zip(samples, table.samples, strict=True):
            try:
                decode(os.pread(descriptor, int(row["size"]), int(row["offset"])))
            except ValueError as error:
                broken.append(f"{tar}: key {sample.key}: {error}")
    return tuple(broken)


def find_written(out: Path, digest: str) -> dict[str, Found]:
    """Shards of a plan that earlier runs finished and whose tar is there in full size, with the files it needs."""
    shards: dict[str, Found] = {}
    if (out / INDEX_NAME).exists():
        manifest = read_manifest(out)
        if IMAGES_KEY in manifest.record:
            for split in manifest.splits.values():
                shards |= {shard.path.stem: Found(shard, None) for shard in split}
    for path in (out / PREPARE_FOLDER).glob("*-*.json"):
        try:
            record = json.loads(read_file(path))
            if record["plan"] == digest:
                shard = Shard(out / f"{path.stem}.tar", record["samples"], record["size"], record["sha256"])
                Tally().join(0, record[IMAGES_KEY])
                shards[path.stem] = Found(shard, record[IMAGES_KEY])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # no record, no shard: it is written again
    return {name: found for name, found in shards.items() if _is_there(found.shard)}


def _is_there(shard: Shard) -> bool:
    try:
        return shard.path.stat().st_size == shard.size and all(
            sidecar.optional or sidecar.path(shard.path).exists() for sidecar in SIDECARS
        )
    except OSError:
        return False
