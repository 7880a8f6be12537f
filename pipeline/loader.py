"""Positions → batches: threads read and decode ahead of the training, in an order that timing cannot change.

A request names the samples of one micro-batch; the loader answers the requests in their order, at most `prefetch`
ahead. Threads suffice because decoding releases the interpreter's lock; they start at once and share the index.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.decode import DecodeError, PillowDecoder
from pipeline.order import SampleStream, micro_batch_positions
from pipeline.reader import Reader
from shards.errors import UserError

SAMPLES_PER_TASK = 4  # a task's overhead, some 30 µs, is shared by this many decodes of a millisecond or more


@dataclass(frozen=True)
class Request:
    """One micro-batch to load.

    Attributes:
        ids: sample ids, int64 of shape (n,).
        epochs: the epoch of each sample, int64 of shape (n,); None for evaluation.
        weights: float32 of shape (n,), 0 for a filler that only completes the shape.
        first, last: positions, in the stream that the reader reads, between which the samples lie; they ascend from
            request to request.
    """

    ids: np.ndarray
    epochs: np.ndarray | None
    weights: np.ndarray
    first: int
    last: int


@dataclass(frozen=True)
class MicroBatch:
    """A loaded micro-batch, on the CPU.

    Attributes:
        images: uint8 of shape (n, 3, size, size) in channels_last memory; not normalised.
        labels: int64 of shape (n,).
        weights: float32 of shape (n,).
        ids: sample ids, int64 of shape (n,).
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    ids: np.ndarray


def training_requests(
    order: SampleStream, batch: Batch, rank: int, first_update: int, updates: int
) -> Iterator[Request]:
    """The micro-batches of one rank, from update `first_update` (0-based) to the end of the run."""
    weights = np.ones(batch.micro, dtype=np.float32)
    for update in range(first_update, updates):
        for micro_step in range(batch.accumulation):
            start, stop = micro_batch_positions(
                update,
                micro_step,
                rank,
                micro=batch.micro,
                accumulation=batch.accumulation,
                world_size=batch.world_size,
            )
            positions = np.arange(start, stop, dtype=np.int64)
            yield Request(order.at(positions), order.epochs(positions), weights, start, stop - 1)


def evaluation_requests(
    samples: int, micro: int, rank: int, world_size: int, *, contiguous: bool = False
) -> Iterator[Request]:
    """A rank's share of the ids below `samples`, in micro-batches of one shape; fillers have weight 0.

    The share is ids rank, rank + W, …; or, `contiguous`, one W-th of the range, for shards that are read from end
    to end.
    """
    ids = (
        np.arange(*evaluation_range(samples, rank, world_size)) if contiguous else np.arange(rank, samples, world_size)
    )
    for start in range(0, len(ids), micro):
        chosen = ids[start : start + micro]
        weights = np.zeros(micro, dtype=np.float32)
        weights[: len(chosen)] = 1
        yield Request(np.resize(chosen, micro), None, weights, int(chosen[0]), int(chosen[-1]))


def evaluation_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """The ids [start, stop) of a rank's contiguous share."""
    return samples * rank // world_size, samples * (rank + 1) // world_size


class Loader:
    """Iterates over the micro-batches that `requests` names.

    Use it as a context manager, or call `close`: both end the threads at once, whatever is in flight.

    Args:
        reader: the split's images.
        decoder: bytes → pixels.
        requests: what to load, in order.
        threads: decoding threads.
        prefetch: micro-batches loaded ahead of the one being used.
        pin: allocate in pinned memory, for copies to a GPU that overlap with its work.

    Raises:
        UserError: while iterating, when a sample of the micro-batch asked for cannot be read or decoded; it names
            shard, key and byte.
    """

    def __init__(
        self,
        reader: Reader,
        decoder: PillowDecoder,
        requests: Iterable[Request],
        *,
        threads: int,
        prefetch: int,
        pin: bool = False,
    ) -> None:
        self.reader = reader
        self.decoder = decoder
        self.prefetch = prefetch
        self.pin = pin
        self._requests = iter(requests)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._pending: deque[tuple[Request, torch.Tensor, torch.Tensor, list[Future[None]]]] = deque()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        self._submit_ahead()
        if not self._pending:
            raise StopIteration
        request, images, labels, tasks = self._pending.popleft()
        for task in tasks:
            task.result()
        self.reader.passed(request.first)
        return MicroBatch(
            images=images.permute(0, 3, 1, 2),
            labels=labels,
            weights=torch.from_numpy(request.weights),
            ids=request.ids,
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is loaded ahead and end the threads, and reads that wait; a decode under way is waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.reader.interrupt()
        self._pool.shutdown(wait=True)
        self._pending.clear()

    def _submit_ahead(self) -> None:
        while len(self._pending) <= self.prefetch:
            request = next(self._requests, None)
            if request is None:
                return
            self.reader.expect(request.last)
            size = self.decoder.transform.size
            images = torch.empty((len(request.ids), size, size, 3), dtype=torch.uint8, pin_memory=self.pin)
            labels = torch.empty(len(request.ids), dtype=torch.int64)
            tasks = [
                self._pool.submit(self._load, request, images.numpy(), labels.numpy(), start)
                for start in range(0, len(request.ids), SAMPLES_PER_TASK)
            ]
            self._pending.append((request, images, labels, tasks))

    def _load(self, request: Request, pixels: np.ndarray, labels: np.ndarray, start: int) -> None:
        for slot in range(start, min(start + SAMPLES_PER_TASK, len(request.ids))):
            sample = int(request.ids[slot])
            image, labels[slot] = self.reader.read(sample)
            try:
                if request.epochs is None:
                    self.decoder.evaluate(image, pixels[slot])
                else:
                    self.decoder.train(image, pixels[slot], int(request.epochs[slot]), sample)
            except DecodeError as error:
                raise UserError(f"{self.reader.describe(sample)}: the image {error}", self.reader.mend()) from None


def default_threads(local_ranks: int) -> int:
    """This rank's share of the cores it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)
