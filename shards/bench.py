"""How fast this storage gives images, in the orders that training can use, and what follows from that.

Every rate is measured here and now: reads go through the same table and the same ``pread`` as those of training.
The ways are interleaved over several rounds, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from shards.advice import RANDOM, SEQUENTIAL, WINDOW, WINDOW_SHARDS, advise
from shards.catalog import shuffled
from shards.errors import UserError
from shards.index import Split, load_split
from shards.manifest import read_manifest
from shards.pagecache import Residence, available_memory, drop, resident_share

ROUNDS = 3
SEQUENTIAL_BYTES = 1 << 20
MOST_SHARDS = 512
"""Opened; of a larger set some are taken at random, so that a limit of 1,024 descriptors is kept."""

MOST_THREADS = 1024
_WARM_BYTES = 1 << 28
_DROPPED = 0.05


@dataclass
class Way:
    """One way of reading, and its rates: one for each round."""

    order: str
    threads: int
    cold: bool
    images_per_second: list[float] = field(default_factory=list)
    bytes_per_second: list[float] = field(default_factory=list)
    resident_before: list[float] = field(default_factory=list)
    """Of what was to be read, the share that was in the page cache."""

    def record(self) -> dict[str, Any]:
        """As JSON values; the rates are medians over the rounds."""
        return {
            "order": self.order,
            "threads": self.threads,
            "cold": self.cold,
            "images_per_second": statistics.median(self.images_per_second),
            "bytes_per_second": statistics.median(self.bytes_per_second),
            "rounds": self.images_per_second,
            "resident_before": max(self.resident_before),
        }


def parse_threads(text: str) -> tuple[int, ...]:
    """``1,8,16`` → (1, 8, 16).

    Raises:
        UserError: if it is no list of numbers.
    """
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= MOST_THREADS for word in words):
        raise UserError(f"--threads {text}: must be numbers from 1 to {MOST_THREADS:,}, with commas between them")
    return tuple(sorted(set(map(int, words))))


def bench(
    root: Path,
    *,
    split: str | None = None,
    seconds: float = 30,
    threads: Sequence[int] = (1, 4, 16),
    demand: float | None = None,
    cold_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the storage that a data set lies on.

    Args:
        root: data set folder.
        split: by default train.
        seconds: of reading in all, divided equally.
        threads: numbers of threads that read images at the same time.
        demand: images a second that a host trains on, for the advice.
        cold_only: measure only what is not in the page cache.
        console: where a line goes while it measures.

    Returns:
        Rates and advice, as JSON values.

    Raises:
        UserError: if there is no data set, it does not match its index, or the options make no sense.
    """
    if not 1 <= seconds <= 3600:
        raise UserError(f"--seconds {seconds:g}: must be from 1 to 3,600")
    if demand is not None and not 0 < demand < 1e9:
        raise UserError(f"--demand {demand:g}: must be a number of images a second")
    root = Path(root)
    splits = tuple(read_manifest(root).splits)
    data = _Data(load_split(root, split or ("train" if "train" in splits else next(iter(splits), "train"))))
    reading = [(SEQUENTIAL, 1), (WINDOW, max(threads)), *((RANDOM, count) for count in threads)]
    ways = [Way(order, count, cold) for cold in ((True,) if cold_only else (True, False)) for order, count in reading]
    each = seconds / (len(ways) * ROUNDS)
    if console is not None:
        console.out(f"reading   {len(ways)} ways, {ROUNDS} rounds of {each:.1f} s each …", highlight=False)
    with data.opened():
        for number in range(ROUNDS):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                data.measure(way, number, each)
    measurements = [way.record() for way in ways]
    cold = [way for way in measurements if way["cold"]]
    # a network or virtual disk may have given bytes from its own host's memory: that is not seen from here
    dropped = max(way["resident_before"] for way in cold) < _DROPPED
    report = {
        "place": f"{root} · {data.split.name}",
        "shards": len(data.split.shards),
        "images": len(data.split),
        "bytes": sum(shard.size for shard in data.split.shards),
        "bytes_per_image": data.bytes_per_image,
        "page_cache_dropped": dropped,
        "memory_available": available_memory(),
        "rounds": ROUNDS,
        "seconds_each": each,
        "demand": demand,
        "measurements": measurements,
    }
    return {**report, **advise(report)}


class _Data:
    """The part of a split that is read, and how it is read in each order."""

    def __init__(self, split: Split) -> None:
        self.split = split
        numbers = np.sort(shuffled(len(split.shards), "onehour shards bench")[:MOST_SHARDS])
        self.paths = {int(number): split.shards[int(number)].path for number in numbers}
        self.ids = np.flatnonzero(np.isin(split.samples["shard"], numbers))
        self.bytes_per_image = float(split.samples["size"][self.ids].mean())
        self._descriptors: dict[int, int] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold every shard open."""
        try:
            for number, path in self.paths.items():
                try:
                    self._descriptors[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
            yield
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def measure(self, way: Way, number: int, seconds: float) -> None:
        """Read for at most that long, or everything once, and note the rates."""
        purpose = f"onehour shards bench {way.order} {way.threads} {number}"
        ids = self._order(way.order, purpose)
        if not way.cold:
            fits = np.cumsum(self.split.samples["size"][ids], dtype=np.int64) <= _WARM_BYTES
            ids = ids[: max(int(fits.sum()), 1)]
            self._run(self._image_readers(ids, 1), None)
        else:
            drop(self._descriptors.values())
        way.resident_before.append(self._resident(ids))
        if way.order == SEQUENTIAL:
            readers = [self._shard_reader(ids)]
        else:
            readers = self._image_readers(ids, way.threads)
        images, size, took = self._run(readers, seconds)
        way.images_per_second.append(images / took)
        way.bytes_per_second.append(size / took)

    def _order(self, order: str, purpose: str) -> np.ndarray:
        if order == RANDOM:
            return self.ids[shuffled(len(self.ids), purpose)]
        shards = self.split.samples["shard"][self.ids]
        numbers = np.array(list(self.paths))
        ranks = np.empty(len(self.split.shards), np.int64)
        ranks[numbers[shuffled(len(numbers), f"{purpose} shards")]] = np.arange(len(numbers))
        if order == SEQUENTIAL:
            return self.ids[np.argsort(ranks[shards], kind="stable")]
        inside = shuffled(len(self.ids), purpose)
        return self.ids[inside[np.argsort(ranks[shards[inside]] // WINDOW_SHARDS, kind="stable")]]

    def _resident(self, ids: np.ndarray) -> float:
        """The share of some of these images that is in the page cache."""
        some = self.split.samples[ids[:: -(-len(ids) // 64)]]
        places = [Residence(self._descriptors[int(row["shard"])], int(row["offset"]), int(row["size"])) for row in some]
        return resident_share(places)

    def _image_readers(self, ids: np.ndarray, threads: int) -> list[Iterator[tuple[float, int]]]:
        return [self._images(ids[start::threads]) for start in range(min(threads, len(ids)))]

    def _images(self, ids: np.ndarray) -> Iterator[tuple[float, int]]:
        samples = self.split.samples
        for sample_id in ids:
            row = samples[sample_id]
            shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
            yield 1, len(self._read(shard, size, offset))

    def _shard_reader(self, ids: np.ndarray) -> Iterator[tuple[float, int]]:
        """The same bytes from end to end: of each shard, from the first to the last of these images."""
        rows = self.split.samples[ids]
        cuts = [0, *(np.flatnonzero(np.diff(rows["shard"])) + 1).tolist(), len(rows)]
        for first, last in pairwise(cuts):
            part = rows[first:last]
            shard, start = int(part[0]["shard"]), int(part["offset"].min())
            stop = int((part["offset"] + part["size"]).max())
            images_per_byte = len(part) / max(stop - start, 1)
            for offset in range(start, stop, SEQUENTIAL_BYTES):
                size = len(self._read(shard, min(SEQUENTIAL_BYTES, stop - offset), offset))
                yield size * images_per_byte, size

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self._descriptors[shard], size, offset)
        except OSError as error:
            raise UserError(f"{self.paths[shard]}: byte {offset:,}: cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise UserError(f"{self.paths[shard]}: ends at byte {offset + len(data):,}, inside an image")
        return data

    @staticmethod
    def _run(readers: list[Iterator[tuple[float, int]]], seconds: float | None) -> tuple[float, int, float]:
        """Let each reader run in a thread of its own: images, bytes, and seconds that all took together."""
        deadline = None if seconds is None else time.perf_counter() + seconds
        counts: list[tuple[float, int]] = []
        faults: list[UserError] = []

        def work(reader: Iterator[tuple[float, int]]) -> None:
            images, size = 0.0, 0
            try:
                for more, read in reader:
                    images, size = images + more, size + read
                    if deadline is not None and time.perf_counter() > deadline:
                        break
            except UserError as error:
                faults.append(error)
            counts.append((images, size))

        started = time.perf_counter()
        workers = [threading.Thread(target=work, args=(reader,), daemon=True) for reader in readers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.perf_counter() - started
        if faults:
            raise faults[0]
        return sum(count[0] for count in counts), sum(count[1] for count in counts), took
