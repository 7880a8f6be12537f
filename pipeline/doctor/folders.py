"""Where a run writes on a host: whether it can, and whether there is room."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich import filesize

from pipeline.config import Config
from pipeline.dataset import cache_folder, capacity, open_split, shard_bytes
from pipeline.doctor.finding import Finding
from shards.errors import UserError
from shards.remote import RemoteSplit

MARKER = ".onehour-doctor-"
"""How a file begins that one host writes into the run's place and the others look for."""

CLASSES = 1000  # where the shards, which would tell, cannot be opened
RECORD_BYTES = 100_000_000
"""Room for what a run writes besides its checkpoints: metrics, the report, the exported weights of a small model."""


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def examine(experiment: Config) -> Iterator[Finding]:
    """The findings about the run folder, and about the cache where shards come by network."""
    yield _run_folder(experiment)
    yield from _cache(experiment)


def leave_marker(run_folder: Path, marker: str) -> str | None:
    """Write a file where the run will be, for others to look for. Returns why that is not possible, else None."""
    try:
        (nearest(run_folder) / (MARKER + marker)).write_bytes(b"onehour doctor\n")
    except OSError as error:
        return error.strerror or str(error)
    return None


def seen_markers(run_folder: Path, markers: list[str]) -> list[str]:
    """Which of the markers are there. By name: a listing may be an old one on a network file system."""
    return [marker for marker in markers if (nearest(run_folder) / (MARKER + marker)).exists()]


def _run_folder(experiment: Config) -> Finding:
    folder, place = experiment.run_folder, nearest(experiment.run_folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=MARKER) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        mend = "Name a folder with recipe.run (or --run) that can be written on every host, or mend its rights."
        if error.errno == errno.ENOSPC:
            mend = f"Free some of it: df {place}"
        return Finding("run folder", "wrong", f"{place} cannot be written: {error.strerror}", (mend,))
    free = shutil.disk_usage(place).free
    try:
        one = _checkpoint_bytes(experiment)
    except UserError as error:
        return Finding("run folder", "wrong", error.headline, error.details)
    keep = experiment.recipe.checkpoint.keep
    needed = (keep + 1) * one + RECORD_BYTES  # the new one is whole before the oldest goes
    saves = f"{keep} + 1 checkpoints of {filesize.decimal(one)}"
    if free < needed:
        return Finding(
            "run folder",
            "wrong",
            f"{folder}: {filesize.decimal(free)} free, {saves} and the record need {filesize.decimal(needed)}",
            (f"Free some of {place}, choose another recipe.run, or keep fewer: recipe.checkpoint.keep",),
        )
    return Finding("run folder", "good", f"{folder}: {filesize.decimal(free)} free for {saves}")


def _checkpoint_bytes(experiment: Config) -> int:
    """The size of one checkpoint: weights, statistics, and at most two tensors of the optimizer for each weight."""
    from pipeline import model  # here, so that a host is looked at without waiting for torch

    classes = CLASSES
    with contextlib.suppress(UserError):
        classes = len(open_split(experiment.recipe, "train").classes)
    network = model.create(experiment.recipe.model, classes, experiment.recipe.seed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    return (2 if experiment.blocks.optimizer.type == "SGD" else 3) * weights + buffers


def _cache(experiment: Config) -> Iterator[Finding]:
    try:
        splits = [open_split(experiment.recipe, name) for name in ("train", experiment.recipe.evaluation.split)]
    except UserError:
        return  # has been said
    if not all(isinstance(split, RemoteSplit) for split in splits):
        return
    folder = cache_folder(experiment.recipe)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    room = shutil.disk_usage(nearest(folder)).free + there
    needed = min(capacity(experiment.recipe), sum(shard_bytes(split) or 0 for split in splits))
    text = f"{folder}: room for {filesize.decimal(room)} of the {filesize.decimal(needed)} of shards that it will hold"
    if room >= needed:
        yield Finding("cache", "good", text)
    else:
        mend = "Name another folder with recipe.cache.folder, or a smaller recipe.cache.gigabytes."
        yield Finding("cache", "wrong", text, (mend,))
