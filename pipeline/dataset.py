"""The data that a configuration names, opened, and the order of samples that its storage allows.

Three kinds of storage, told apart by the configuration alone: shards on this host (`shards.index`), shards that come
by network into a cache on the host (`shards.remote`), and shards that can only be read from end to end
(`shards.streamed`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from rich import filesize

from pipeline.batch import Batch
from pipeline.config import Config
from pipeline.order import Order, SampleStream
from pipeline.schema import Recipe
from pipeline.window import WindowOrder, WindowThenUniform, windows_of
from shards.cache import default_folder
from shards.crop_index import open_index
from shards.errors import UserError
from shards.fetch import is_remote
from shards.index import Split, load_split
from shards.remote import RemoteSplit, has_remote_shards, open_remote
from shards.streamed import StreamSplit, open_stream

AnySplit = Split | RemoteSplit | StreamSplit

MOST_STREAMS = 8
"""By default: on one host all of them are read, and each needs two windows in its cache."""

MOST_STREAMED = 64
"""The same where shards are read from end to end: ranks that share a stream read all of it each."""

EVALUATION_SHARDS = 3
"""That a rank has pinned at once while it evaluates: the one in use, the next, and one that its reads run ahead to."""


def cache_folder(recipe: Recipe) -> Path:
    """Where remote shards are kept on this host."""
    return Path(recipe.cache.folder).expanduser() if recipe.cache.folder else default_folder()


def open_split(recipe: Recipe, name: str) -> AnySplit:
    """Open one split of the recipe's data.

    Raises:
        UserError: if anything about it is not as its index says, naming the file and the mend.
    """
    if recipe.stream is not None:
        return open_stream(recipe.data, name, recipe.stream)
    if is_remote(recipe.data) or has_remote_shards(Path(recipe.data)):
        return open_remote(recipe.data, name, cache_folder(recipe))
    return load_split(Path(recipe.data), name)


def shard_samples(split: AnySplit) -> list[int]:
    """The number of samples of each shard."""
    if isinstance(split, StreamSplit):
        return list(split.counts)
    return [shard.samples for shard in split.shards]


def shard_bytes(split: AnySplit) -> int | None:
    """The size of all tars in bytes; None where the index does not say."""
    return None if isinstance(split, StreamSplit) else sum(shard.size for shard in split.shards)


def crop_indexes(split: AnySplit) -> int | None:
    """How many shards have a crop index beside them; None for shards that are not here.

    Raises:
        UserError: one is damaged, or belongs to another shard.
    """
    if not isinstance(split, Split):
        return None
    found = 0
    for shard in split.shards:
        descriptor = open_index(shard.path, shard.sha256, shard.samples)
        if descriptor is not None:
            os.close(descriptor)
            found += 1
    return found


def choose_order(config: Config, batch: Batch, train: AnySplit, validation: AnySplit) -> SampleStream:
    """The order of the training samples: a function of the configuration and the index, never of the ranks.

    Raises:
        UserError: if the storage does not allow the order that is asked for, or the streams do not divide k.
    """
    recipe = config.recipe
    samples, seed = shard_samples(train), recipe.seed
    kind = recipe.order.kind
    remote = isinstance(train, RemoteSplit)
    fits = _bytes(train) + _bytes(validation) <= capacity(recipe)
    if isinstance(train, StreamSplit):
        return _windowed(config, batch, samples, recipe.order.shuffle_buffer, "stream-v1", MOST_STREAMED)
    if kind == "uniform" and remote and not fits:
        raise UserError(
            f"{config.path}: recipe.order.kind is uniform, and the shards do not fit into the cache",
            f"A uniform order needs all of them at any moment: {filesize.decimal(_bytes(train) + _bytes(validation))} "
            f"of shards, recipe.cache.gigabytes is {recipe.cache.gigabytes:g}.",
            'Enlarge the cache, or choose the order "window".',
        )
    if kind == "uniform" or (kind == "auto" and not remote):
        return Order(sum(samples), seed)
    window = recipe.order.window_shards * math.ceil(sum(samples) / len(samples))
    windowed = _windowed(config, batch, samples, window, "window-v1", MOST_STREAMS)
    return WindowThenUniform(windowed, Order(sum(samples), seed)) if kind == "auto" and fits else windowed


def _windowed(config: Config, batch: Batch, samples: list[int], window: int, name: str, most: int) -> WindowOrder:
    workers = batch.logical_workers
    streams = config.recipe.order.streams
    if streams is None:
        streams = max(number for number in range(1, most + 1) if workers % number == 0)
    if workers % streams:
        divisors = [number for number in range(1, workers + 1) if workers % number == 0]
        raise UserError(
            f"{config.path}: recipe.order.streams is {streams}, which does not divide the {workers} logical workers",
            f"{batch.train} images per update / {batch.micro} per logical worker = {workers}; each stream feeds an "
            "equal number of them.",
            f"Choose one of {', '.join(map(str, divisors[:12]))}{', …' if len(divisors) > 12 else ''}.",
        )
    return WindowOrder(
        samples,
        config.recipe.seed,
        window=window,
        streams=streams,
        update=batch.train,
        logical_workers=workers,
        name=name,
    )


def _bytes(split: AnySplit) -> int:
    return shard_bytes(split) or 0


def capacity(recipe: Recipe) -> int:
    """What the cache may hold, in bytes."""
    return int(recipe.cache.gigabytes * 1e9)


@dataclass(frozen=True)
class Residence:
    """What a host must be able to keep in its cache at once."""

    streams: int
    """That feed the host's logical workers."""
    windows: int
    """Of each stream at once."""
    window_bytes: int
    """At most; a window may begin and end inside a shard."""
    evaluation_bytes: int
    """Shards that an evaluation needs beside the windows."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.streams * self.windows * self.window_bytes + self.evaluation_bytes


def residence(
    recipe: Recipe, order: SampleStream, train: RemoteSplit, validation: RemoteSplit, workers: range, ranks: int
) -> Residence | None:
    """What the host that runs some logical workers needs; None for an order without windows.

    Args:
        recipe: says how far the loader runs ahead.
        order: of the training samples.
        train, validation: the remote splits.
        workers: positions of the host's logical workers in an update's list of them.
        ranks: on the host.
    """
    windowed = windows_of(order)
    if windowed is None:
        return None
    # the window in use, the one that lookahead reaches, and the short one that may lie between at an epoch's end
    windows = 2 + math.ceil(max(windowed.span, (recipe.loader.prefetch + 1) * windowed.update) / windowed.span)
    if recipe.evaluation.precise_bn:
        windows *= 2  # the images of the last updates are read again while training holds what it goes on with
    mean = len(train) / len(train.shards)
    shards = min(math.ceil(windowed.window / mean) + 1, len(train.shards))
    return Residence(
        streams=len(windowed.streams_of(workers)),
        windows=windows,
        window_bytes=shards * max(shard.size for shard in train.shards),
        evaluation_bytes=min(EVALUATION_SHARDS * ranks, len(validation.shards))
        * max(shard.size for shard in validation.shards),
    )


def check_capacity(
    config: Config, order: SampleStream, train: AnySplit, validation: AnySplit, workers: range, ranks: int
) -> None:
    """Refuse windows that the cache of a host cannot hold; the arguments are those of `residence`.

    Raises:
        UserError: with the arithmetic.
    """
    if not isinstance(train, RemoteSplit) or not isinstance(validation, RemoteSplit):
        return
    needed = residence(config.recipe, order, train, validation, workers, ranks)
    everything = _bytes(train) + _bytes(validation)
    if needed is None or min(everything, needed.total) <= capacity(config.recipe):
        return
    window, evaluation, least, of_all = map(
        filesize.decimal,
        (needed.window_bytes, needed.evaluation_bytes, min(everything, needed.total), everything),
    )
    raise UserError(
        f"{config.path}: recipe.cache.gigabytes {config.recipe.cache.gigabytes:g} is less than the {least} that must "
        "be there at once",
        f"{needed.streams} stream{'s' * (needed.streams != 1)} on a host × {needed.windows} windows × {window} "
        f"({config.recipe.order.window_shards} shards and a part of one) + {evaluation} for evaluation; "
        f"all shards: {of_all}.",
        "Enlarge the cache, or lower recipe.order.window_shards or recipe.order.streams.",
    )
