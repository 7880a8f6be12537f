"""What this host would train with, and what is wrong with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline import rungs
from pipeline.config import Config
from pipeline.dataset import AnySplit, crop_indexes, open_split, shard_samples
from pipeline.doctor import folders
from pipeline.doctor.finding import Finding
from pipeline.rungs import NAMES, RUNGS, Rung
from pipeline.schema import DecoderChoice
from pipeline.tally import Tally
from pipeline.versions import versions
from shards.errors import UserError
from shards.index import Split

SAMPLE = 256
"""Images that are decoded for a check, spread over a split."""


def examine(experiment: Config | None) -> Iterator[Finding]:
    """The findings about this host, and about the data of a configuration."""
    choice: DecoderChoice = experiment.recipe.loader.decoder if experiment is not None else "auto"
    found = versions()
    yield Finding("versions", "good", " · ".join(f"{name} {number}" for name, number in found.items()))
    yield from _decoder(choice)
    cores = len(os.sched_getaffinity(0))
    threads = (experiment and experiment.recipe.loader.threads) or cores
    yield Finding("threads", "good", f"{threads} decoding, with one rank here · {cores} cores")
    if experiment is not None:
        yield from _data(experiment)
        yield from folders.examine(experiment)


def _decoder(choice: DecoderChoice) -> Iterator[Finding]:
    try:
        live, *others = rungs.ladder(choice)
    except UserError as error:
        yield Finding("decode", "wrong", error.headline, error.details)
        return
    slower = f", then {', '.join(NAMES[rung] for rung in others)}" if others else ""
    yield Finding("decode", "good", rungs.describe(live) + slower)
    if choice != "auto" and live != RUNGS[0]:
        yield Finding("", "slow", f'recipe.loader.decoder is "{choice}": nothing faster is tried')
        return
    for rung, reason in rungs.better(live).items():
        yield Finding("", "slow", f"the {NAMES[rung]} {reason}", rungs.MENDS[rung])


def _data(experiment: Config) -> Iterator[Finding]:
    recipe = experiment.recipe
    splits: list[AnySplit] = []
    for name in dict.fromkeys(("train", recipe.evaluation.split)):
        try:
            split = open_split(recipe, name)
        except UserError as error:
            yield Finding("shards", "wrong", error.headline, error.details)
            return
        splits.append(split)
        text = f"{name}: {len(split):,} images in {len(shard_samples(split)):,} shards · index {split.digest[:12]}"
        yield Finding("shards", "good", text)
    try:
        ladder = rungs.ladder(recipe.loader.decoder)
    except UserError:
        return  # has been said
    for split in splits:
        if not isinstance(split, Split):
            yield Finding("images", "good", f"{split.name}: not here yet, so none was decoded")
            continue
        if ladder[0] == "native":
            yield _crop_index(split)
        yield _sample(experiment, split, ladder)


def _crop_index(split: Split) -> Finding:
    try:
        number = crop_indexes(split) or 0
    except UserError as error:
        return Finding("crop index", "wrong", error.headline, error.details)
    text = f"{split.name}: {number:,} of {len(split.shards):,} shards have one"
    if number == len(split.shards):
        return Finding("crop index", "good", text)
    return Finding("crop index", "slow", text, (f"shards index {split.root} --decode",))


def _sample(experiment: Config, split: Split, ladder: Sequence[Rung]) -> Finding:
    """Decode some images, as training or evaluation would."""
    # here, so that a host is looked at without waiting for torch
    from pipeline.decode import make_decoder
    from pipeline.loader import Loader, Request, default_threads
    from pipeline.reader import ShardReader

    recipe = experiment.recipe
    ids = np.unique(np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(np.int64))
    epochs, size = None, recipe.transform.size
    if split.name == "train":
        epochs, size = np.zeros(len(ids), np.int64), recipe.transform.training_size(0)
    request = Request(ids, epochs, np.ones(len(ids), np.float32), 0, int(ids[-1]), size)
    try:
        with (
            contextlib.closing(ShardReader(split)) as reader,
            Loader(
                reader,
                make_decoder(recipe.transform, recipe.seed, recipe.loader.decoder),
                [request],
                threads=recipe.loader.threads or default_threads(1),
                prefetch=1,
            ) as loader,
        ):
            next(loader)
            tally = loader.take_tally()
    except UserError as error:
        return Finding("images", "wrong", error.headline, error.details)
    return _describe(split, tally, ladder)


def _describe(split: Split, tally: Tally, ladder: Sequence[Rung]) -> Finding:
    counts = ", ".join(f"{tally[rung]:,} by {NAMES[rung]}" for rung in ladder if tally[rung])
    text = f"{split.name}: {tally.images:,} decoded of {len(split):,}: {counts}"
    if tally["indexed"]:
        text += f", {tally['indexed']:,} of them from their crop index"
    if tally["stale"]:
        text += f" · {tally['stale']:,} crop index records are damaged or another image's"
        return Finding("images", "wrong", text, (f"shards index {split.root} --decode",))
    fallen = tally.images - tally[ladder[0]]
    return Finding("images", "slow" if fallen > tally.images // 2 else "good", text)
