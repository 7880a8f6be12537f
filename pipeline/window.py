"""The order for shards that come by network: every image once per epoch, out of a few shards at a time.

A uniform permutation touches every shard at every moment, so all of them must lie on the host. This order needs a
window of them. It is as exact and as independent of ranks as `order.Order`, but it is no uniform permutation: images
whose shards are far apart in an epoch's sequence cannot meet in one update. Runs are labelled with it.

Three steps, each a pure function of the seed:

1. *streams*: the shards are dealt, once for the whole run, into C streams of equal length. Stream c feeds the logical
   workers [c·k/C, (c+1)·k/C) of every update, so a host fetches the shards of its own workers' streams alone, and
   finds them in its cache in the next epoch;
2. *shards*: in each epoch the shards of a stream are put in a new random order and laid end to end;
3. *windows*: that sequence is cut into windows of B images, and the images of each window are permuted.

Stream c holds n_c(e) images in epoch e, as many as it has positions there; where kn does not divide N that differs by
less than kn/C between epochs, and the cuts between streams, which may fall inside a shard, move by as much.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np

from pipeline.order import Order, SampleStream, permute


@dataclass(frozen=True)
class Piece:
    """Neighbouring samples of one shard: `samples` of them from row `start` of shard number `shard`."""

    shard: int
    start: int
    samples: int


@dataclass(frozen=True)
class Block:
    """Samples that are read together: the pieces they lie in, and the first and last position that takes one."""

    pieces: tuple[Piece, ...]
    first: int
    last: int


class WindowOrder:
    """The stream of sample ids of one run.

    Args:
        shard_samples: the number of samples of each shard; sample ids count through them.
        seed: the run's seed.
        window: B, images per window.
        streams: C, a divisor of `logical_workers`.
        update: kn, samples per update.
        logical_workers: k.
        name: what the order is called in checkpoints and records, before its numbers.
    """

    def __init__(
        self,
        shard_samples: Sequence[int],
        seed: int,
        *,
        window: int,
        streams: int,
        update: int,
        logical_workers: int,
        name: str = "window-v1",
    ) -> None:
        if logical_workers % streams or update % logical_workers:
            raise ValueError("streams must divide the logical workers, and those the samples of an update")
        self.samples = sum(shard_samples)
        self.seed = seed
        self.window = window
        self.streams = streams
        self.name = f"{name}, {window} images × {streams} streams"
        self.update = update
        self._width = update // streams  # positions of a stream in each update
        self._workers_per_stream = logical_workers // streams
        deal = permute(np.arange(len(shard_samples)), len(shard_samples), f"{seed}:deal")
        self._dealt = _Sequence.of_shards(shard_samples).taken(deal)
        self._sequence = lru_cache(maxsize=2 * streams)(self._build_sequence)

    @property
    def span(self) -> int:
        """Positions over which a window of every stream is used."""
        return self.window * self.streams

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Sample ids at positions [start, stop) of the stream: int64 of shape (stop - start,)."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at any positions: int64, of the shape of `positions` (int64, ≥ 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs = positions // self.samples
        streams = positions % self.update // self._width
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            for stream in np.unique(streams[epochs == epoch]).tolist():
                chosen = (epochs == epoch) & (streams == stream)
                ids[chosen] = self._stream_ids(epoch, stream, positions[chosen])
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch (0-based) that each position belongs to: int64."""
        return np.asarray(positions, dtype=np.int64) // self.samples

    def streams_of(self, workers: range) -> range:
        """The streams that feed some logical workers, given as positions in an update's list of them."""
        per_stream = self._workers_per_stream
        return range(workers.start // per_stream, (workers.stop - 1) // per_stream + 1)

    def blocks(self, stream: int, position: int) -> Iterator[Block]:
        """The windows of one stream in the order they are used, from the one that `position` lies in, without end."""
        for epoch in count(position // self.samples):
            begin, end = self._range(epoch, stream)
            sequence = self._sequence(epoch, stream)
            for start in range(0, end - begin, self.window):
                stop = min(start + self.window, end - begin)
                last = self._position(stream, begin + stop - 1)
                if last >= position:
                    yield Block(sequence.cut(start, stop).pieces(), self._position(stream, begin + start), last)

    def _stream_ids(self, epoch: int, stream: int, positions: np.ndarray) -> np.ndarray:
        begin, end = self._range(epoch, stream)
        offsets = positions // self.update * self._width + positions % self._width - begin
        starts = offsets // self.window * self.window
        for start in np.unique(starts).tolist():
            chosen = starts == start
            size = min(self.window, end - begin - start)
            purpose = f"{self.seed}:{epoch}:{stream}:{start // self.window}"
            offsets[chosen] = start + permute(offsets[chosen] - start, size, purpose)
        sequence = self._sequence(epoch, stream)
        found = np.searchsorted(sequence.bounds, offsets, side="right") - 1
        return sequence.first_ids[found] + offsets - sequence.bounds[found]

    def _range(self, epoch: int, stream: int) -> tuple[int, int]:
        """The stream's own positions, counted from the start of the run, that lie in an epoch."""
        return self._own_before(epoch * self.samples, stream), self._own_before((epoch + 1) * self.samples, stream)

    def _own_before(self, position: int, stream: int) -> int:
        updates, rest = divmod(position, self.update)
        return updates * self._width + min(max(rest - stream * self._width, 0), self._width)

    def _position(self, stream: int, own: int) -> int:
        update, rest = divmod(own, self._width)
        return update * self.update + stream * self._width + rest

    def _build_sequence(self, epoch: int, stream: int) -> _Sequence:
        ranges = [self._range(epoch, number) for number in range(stream + 1)]
        stop = sum(end - begin for begin, end in ranges)
        start = stop - (ranges[-1][1] - ranges[-1][0])
        dealt = self._dealt.cut(start, stop)
        pieces = len(dealt.shards)
        return dealt.taken(permute(np.arange(pieces), pieces, f"{self.seed}:{epoch}:{stream}:shards"))


class _Sequence:
    """Pieces laid end to end, in arrays: there may be a million.

    Args:
        shards: the shard number of each: int64 [pieces].
        starts: the row of its shard that each begins with: int64 [pieces].
        first_ids: the sample id that each begins with: int64 [pieces].
        samples: the number of samples of each: int64 [pieces].

    Attributes:
        bounds: the offset at which each begins, and the end of the last: int64 [pieces + 1].
    """

    def __init__(self, shards: np.ndarray, starts: np.ndarray, first_ids: np.ndarray, samples: np.ndarray) -> None:
        self.shards = shards
        self.starts = starts
        self.first_ids = first_ids
        self.samples = samples
        self.bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(samples)])

    @classmethod
    def of_shards(cls, shard_samples: Sequence[int]) -> _Sequence:
        """Whole shards, in their order."""
        samples = np.asarray(shard_samples, dtype=np.int64)
        return cls(np.arange(len(samples)), np.zeros_like(samples), np.cumsum(samples) - samples, samples)

    def taken(self, numbers: np.ndarray | slice) -> _Sequence:
        """The pieces with some numbers, in their order."""
        return _Sequence(self.shards[numbers], self.starts[numbers], self.first_ids[numbers], self.samples[numbers])

    def cut(self, start: int, stop: int) -> _Sequence:
        """The parts of the pieces that lie at offsets [start, stop)."""
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        last = int(np.searchsorted(self.bounds, stop, side="left"))
        touched, offsets = self.taken(slice(first, last)), self.bounds[first:last]
        begins = np.maximum(start - offsets, 0)
        lengths = np.minimum(stop - offsets, touched.samples) - begins
        parts = _Sequence(touched.shards, touched.starts + begins, touched.first_ids + begins, lengths)
        return parts.taken(np.flatnonzero(lengths > 0))

    def pieces(self) -> tuple[Piece, ...]:
        """The same as objects."""
        return tuple(map(Piece, self.shards.tolist(), self.starts.tolist(), self.samples.tolist()))


class WindowThenUniform:
    """The first epoch in windows, while the shards arrive, and the later ones uniform, when all are there.

    Args:
        window: the order of the first epoch.
        uniform: the order of the others, over the same samples.
    """

    def __init__(self, window: WindowOrder, uniform: Order) -> None:
        self.window = window
        self.uniform = uniform
        self.samples = uniform.samples
        self.seed = uniform.seed
        self.name = f"{window.name} in epoch 1, then {uniform.name}"

    def ids(self, start: int, stop: int) -> np.ndarray:
        """As `order.Order.ids`."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """As `order.Order.at`."""
        positions = np.asarray(positions, dtype=np.int64)
        return np.where(positions < self.samples, self.window.at(positions % self.samples), self.uniform.at(positions))

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """As `order.Order.epochs`."""
        return self.uniform.epochs(positions)


def windows_of(order: SampleStream) -> WindowOrder | None:
    """The order in windows that an order is, or begins with; None for one without windows."""
    if isinstance(order, WindowThenUniform):
        return order.window
    return order if isinstance(order, WindowOrder) else None


def sequential_blocks(shard_samples: Sequence[int], start: int, stop: int, size: int) -> Iterator[Block]:
    """Samples [start, stop) by their ids, in blocks of at most `size`, as evaluation reads them."""
    sequence = _Sequence.of_shards(shard_samples)
    for first in range(start, stop, size):
        last = min(first + size, stop)
        yield Block(sequence.cut(first, last).pieces(), first, last - 1)


def merge(streams: Sequence[Iterator[Block]]) -> Iterator[Block]:
    """The blocks of several streams in the order in which they are first used."""
    return heapq.merge(*streams, key=lambda block: block.first)
