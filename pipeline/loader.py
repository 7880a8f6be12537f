"""Positions → batches: threads read and decode ahead of the training, in an order that timing cannot change.

A request names the samples of one micro-batch; the loader answers the requests in their order, at most `prefetch`
ahead. Threads suffice because decoding releases the interpreter's lock; they start at once and share the index. A task
is a slice of a micro-batch: what Python does for it, it does once for all of its images where the decoder reads files.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.decode import AugmentError, DecodeError, Decoder
from pipeline.order import SampleStream, micro_batch_positions
from pipeline.reader import Reader
from pipeline.schema import Transform
from pipeline.slabs import Slab, SlabRing
from pipeline.tally import Tally
from shards.errors import UserError

SMALLEST_SLICE, LARGEST_SLICE = 4, 32
"""Images of a task: enough to share its overhead of some 100 µs, and few enough to end soon when the loader closes."""


@dataclass(frozen=True)
class Request:
    """One micro-batch to load.

    Attributes:
        ids: sample ids, int64 of shape (n,).
        epochs: the epoch of each sample, int64 of shape (n,); None for evaluation.
        weights: float32 of shape (n,), 0 for a filler that only completes the shape.
        first, last: positions, in the stream that the reader reads, between which the samples lie; they ascend from
            request to request.
        size: width and height of the images, in pixels.
    """

    ids: np.ndarray
    epochs: np.ndarray | None
    weights: np.ndarray
    first: int
    last: int
    size: int


@dataclass(frozen=True)
class MicroBatch:
    """A loaded micro-batch, on the CPU.

    Attributes:
        images: uint8 of shape (n, 3, size, size) in channels_last memory; not normalised. Copies of them to a device
            must be made, before the last reference to them is dropped, on the stream that the loader was given: their
            memory is then filled again once that stream is done.
        labels: int64 of shape (n,).
        weights: float32 of shape (n,).
        ids: sample ids, int64 of shape (n,).
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    ids: np.ndarray


def training_requests(
    order: SampleStream, batch: Batch, transform: Transform, rank: int, first_update: int, updates: int
) -> Iterator[Request]:
    """The micro-batches of one rank, from update `first_update` (0-based) to the end of the run.

    Logical workers that go through the model at once are one micro-batch here: a rank's are next to each other.
    All images of an update have one size, that of the epoch in which it begins.
    """
    weights = np.ones(batch.physical, dtype=np.float32)
    for update in range(first_update, updates):
        size = transform.training_size(update * batch.train / order.samples)
        for micro_step in range(batch.passes):
            start, stop = micro_batch_positions(
                update,
                micro_step,
                rank,
                micro=batch.physical,
                accumulation=batch.passes,
                world_size=batch.world_size,
            )
            positions = np.arange(start, stop, dtype=np.int64)
            yield Request(order.at(positions), order.epochs(positions), weights, start, stop - 1, size)


def evaluation_requests(
    samples: int, micro: int, size: int, rank: int, world_size: int, *, contiguous: bool = False
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
        yield Request(np.resize(chosen, micro), None, weights, int(chosen[0]), int(chosen[-1]), size)


def evaluation_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """The ids [start, stop) of a rank's contiguous share."""
    return samples * rank // world_size, samples * (rank + 1) // world_size


class Loader:
    """Iterates over the micro-batches that `requests` names.

    Use it as a context manager, or call `close`: both end the threads at once, whatever is in flight. A micro-batch is
    its consumer's for as long as anything refers to it; see `MicroBatch` for copies of it that are under way.

    Args:
        reader: the split's images.
        decoder: bytes → pixels.
        requests: what to load, in order.
        threads: decoding threads.
        prefetch: micro-batches loaded ahead of the one being used.
        copied_on: the stream that the images are copied to a GPU on; see `slabs.SlabRing`.

    Raises:
        UserError: while iterating, when a sample of the micro-batch asked for cannot be read or decoded; it names
            shard, key and byte. Any other error has a note that does. Asked again, it raises the same error: no
            micro-batch is passed over.
    """

    def __init__(
        self,
        reader: Reader,
        decoder: Decoder,
        requests: Iterable[Request],
        *,
        threads: int,
        prefetch: int,
        copied_on: torch.cuda.Stream | None = None,
    ) -> None:
        self.reader = reader
        self.decoder = decoder
        self.prefetch = prefetch
        self._tally = Tally()
        self._requests = iter(requests)
        self._threads = threads
        self._stop = np.zeros(1, np.uint8)
        self._failure: Exception | None = None
        self._pool = decode_pool(threads)
        self._ring = SlabRing(prefetch + 2, copied_on=copied_on)
        self._pending: deque[_Pending] = deque()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._failure is not None:
            raise self._failure
        try:
            pending = self._load_next()
        except Exception as error:
            self._failure = error
            raise
        if pending is None:
            raise StopIteration
        request = pending.request
        self.reader.passed(request.first)
        return MicroBatch(
            images=self._ring.hand_out(pending.slab),
            labels=torch.from_numpy(pending.labels),
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
        self._stop[0] = 1
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.reader.interrupt()
        self._pool.shutdown(wait=True)
        self._pending.clear()

    def take_tally(self) -> Tally:
        """What decoded the images handed out since the last call; the same for any number of threads."""
        taken, self._tally = self._tally, Tally()
        return taken

    def _load_next(self) -> _Pending | None:
        """Wait for the next micro-batch; None after the last."""
        self._submit_ahead()
        if not self._pending:
            return None
        pending = self._pending.popleft()
        for task in pending.tasks:
            self._tally += task.result()
        return pending

    def _submit_ahead(self) -> None:
        while len(self._pending) <= self.prefetch:
            request = next(self._requests, None)
            if request is None:
                return
            self.reader.expect(request.last)
            count, size = len(request.ids), request.size
            slab, labels = self._ring.take((count, size, size, 3)), np.empty(count, dtype=np.int64)
            tasks = [
                self._pool.submit(self._load, request, slab.pixels[part], labels[part], part)
                for part in slices(count, self._threads)
            ]
            self._pending.append(_Pending(request, slab, labels, tasks))

    def _load(self, request: Request, pixels: np.ndarray, labels: np.ndarray, part: slice) -> Tally:
        """Read and decode a slice of a micro-batch, and say who decoded what."""
        tally = Tally()
        ids = request.ids[part]
        epochs = request.epochs[part] if request.epochs is not None else None
        try:
            left = self._load_files(ids, epochs, pixels, labels, tally)
        except AugmentError as error:
            error.add_note(self.reader.describe(error.sample))
            raise
        for slot in left:
            if self._stop[0]:
                break
            sample = int(ids[slot])
            try:
                image, labels[slot] = self.reader.read(sample)
                self.decoder.image(image, pixels[slot], None if epochs is None else int(epochs[slot]), sample, tally)
            except DecodeError as error:
                raise UserError(f"{self.reader.describe(sample)}: the image {error}", self.reader.mend()) from None
            except UserError:
                raise
            except Exception as error:
                error.add_note(self.reader.describe(sample))
                raise
        return tally

    def _load_files(
        self, ids: np.ndarray, epochs: np.ndarray | None, pixels: np.ndarray, labels: np.ndarray, tally: Tally
    ) -> Iterable[int]:
        """Load what decoder and reader can without Python for each image; returns the slots that are left."""
        located = self.reader.extents(ids) if self.decoder.reads_files else None
        if located is None:
            return range(len(ids))
        with located as found:
            labels[...] = found.labels
            return self.decoder.files(found.extents, pixels, epochs, ids, tally, self._stop).tolist()


@dataclass(frozen=True)
class _Pending:
    """A micro-batch being loaded."""

    request: Request
    slab: Slab
    labels: np.ndarray
    tasks: list[Future[Tally]]


def slices(count: int, threads: int) -> list[slice]:
    """Parts of a micro-batch of `count` images, for tasks: about two for each thread, within the limits above."""
    length = min(LARGEST_SLICE, max(SMALLEST_SLICE, math.ceil(count / (2 * threads))))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def decode_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch works alone.

    Else it would start a team of threads for every one of them, and its sums would depend on how many there are.
    """
    # the number is a thread's own (OpenMP's), but one that never asked for it gets the last that any thread has set
    torch.get_num_threads()
    return ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=torch.set_num_threads, initargs=(1,))


def default_threads(local_ranks: int) -> int:
    """This rank's share of the cores it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)
