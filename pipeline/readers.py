"""The reader that goes with a split, for training from a position on, or for one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, takewhile

from pipeline.batch import Batch
from pipeline.cached import CachedReader
from pipeline.dataset import AnySplit, cache_folder, capacity
from pipeline.loader import evaluation_range
from pipeline.order import SampleStream
from pipeline.pins import NO_WINDOW
from pipeline.reader import Reader, ShardReader
from pipeline.schema import Recipe
from pipeline.stream import StreamReader
from pipeline.window import Block, Piece, WindowOrder, WindowThenUniform, merge, sequential_blocks, windows_of
from shards.cache import ShardCache
from shards.fetch import Retry
from shards.index import Split
from shards.remote import RemoteSplit
from shards.streamed import StreamSplit

PATIENT = Retry(attempts=20)
"""Some seven minutes without a byte before a training under way is given up; what cannot get better ends it at once."""

EVALUATION_BLOCK = 256
"""Images that a streamed evaluation holds in memory at once, twice."""


def training_reader(
    split: AnySplit, recipe: Recipe, order: SampleStream, batch: Batch, *, rank: int, local_ranks: range, position: int
) -> Reader:
    """Open the training split for one rank.

    Args:
        split: as `dataset.open_split` gave it.
        recipe: says where the cache is.
        order: of the samples.
        batch: how many logical workers a rank runs.
        rank: this one.
        local_ranks: the ranks on this host, which share the cache.
        position: samples consumed so far.
    """
    if isinstance(split, Split):
        return ShardReader(split)
    workers = range(rank * batch.accumulation, (rank + 1) * batch.accumulation)
    if isinstance(split, StreamSplit):
        assert isinstance(order, WindowOrder)
        return StreamReader(split, [order.blocks(stream, position) for stream in order.streams_of(workers)])
    host_workers = range(local_ranks.start * batch.accumulation, local_ranks.stop * batch.accumulation)
    return CachedReader(
        split,
        ShardCache(cache_folder(recipe), capacity(recipe), retry=PATIENT),
        _training_blocks(order, split, workers, position),
        start=position,
        lookahead=_lookahead(order),
        next_use=_NextUse(order, split, host_workers),
    )


def evaluation_reader(
    split: AnySplit, recipe: Recipe, *, rank: int, world_size: int, training: Reader | None = None
) -> Reader:
    """Open a split for one pass over all of it; positions are sample ids.

    Args:
        split: as `dataset.open_split` gave it.
        recipe: says where the cache is.
        rank, world_size: the rank's share of a split that can only be read from end to end.
        training: the reader that training goes on with, whose next shards should stay in the cache.
    """
    if isinstance(split, Split):
        return ShardReader(split)
    if isinstance(split, StreamSplit):
        start, stop = evaluation_range(len(split), rank, world_size)
        return StreamReader(split, [sequential_blocks(split.counts, start, stop, EVALUATION_BLOCK)])
    counts = [shard.samples for shard in split.shards]
    return CachedReader(
        split,
        ShardCache(cache_folder(recipe), capacity(recipe), retry=PATIENT),
        sequential_blocks(counts, 0, len(split), max(counts)),
        start=0,
        lookahead=max(counts),
        next_use=lambda digest, position: training.next_use(digest) if isinstance(training, CachedReader) else None,
    )


def reads_in_sequence(split: AnySplit) -> bool:
    """Whether each rank evaluates a contiguous share, because nothing else can be read."""
    return isinstance(split, StreamSplit)


def _training_blocks(order: SampleStream, split: RemoteSplit, workers: range, position: int) -> Iterator[Block]:
    """What a rank reads from a position on; all shards at once, in an order without windows."""
    whole = (Block((Piece(number, 0, shard.samples),), 0, NO_WINDOW) for number, shard in enumerate(split.shards))
    if isinstance(order, WindowOrder):
        return _window_blocks(order, workers, position)
    if isinstance(order, WindowThenUniform) and position < order.samples:
        windows = _window_blocks(order.window, workers, position)
        return chain(takewhile(lambda block: block.first < order.samples, windows), whole)
    return whole


def _window_blocks(order: WindowOrder, workers: range, position: int) -> Iterator[Block]:
    return merge([order.blocks(stream, position) for stream in order.streams_of(workers)])


def _lookahead(order: SampleStream) -> int:
    """One window of every stream."""
    windowed = windows_of(order)
    return windowed.span if windowed is not None else 0


class _NextUse:
    """When a host needs a shard again: what is needed last is removed first (Belady 1966)."""

    def __init__(self, order: SampleStream, split: RemoteSplit, workers: range) -> None:
        self._order = order
        self._workers = workers
        self._number = {shard.sha256: number for number, shard in enumerate(split.shards)}
        self._known: tuple[int, dict[int, int]] = (-1, {})

    def __call__(self, digest: str, position: int) -> int | None:
        number = self._number.get(digest)
        if number is None or not isinstance(self._order, WindowOrder):
            return position if number is not None else None
        if self._known[0] != position:
            uses: dict[int, int] = {}
            for block in _window_blocks(self._order, self._workers, position):
                if block.first > position + self._order.samples:
                    break
                for piece in block.pieces:
                    uses.setdefault(piece.shard, block.first)
            self._known = (position, uses)
        return self._known[1].get(number)
