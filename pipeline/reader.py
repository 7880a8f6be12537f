"""Encoded images by sample id, read straight out of the tars at the offsets of the index.

`pread` and no mmap: page-sized faults make mapped tars ten times slower when the data is cold.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import numpy as np

from shards.crop_index import open_index
from shards.errors import UserError
from shards.index import Split
from shards.jpeg import EXTENT_DTYPE


class Encoded(NamedTuple):
    """A sample as it is stored."""

    image: bytes
    """The encoded image."""
    label: int


class Located(NamedTuple):
    """Samples as they lie in open files."""

    extents: np.ndarray
    """shards.jpeg.EXTENT_DTYPE [n]; a descriptor of -1 where the file could not be kept open: use `Reader.read`."""
    labels: np.ndarray
    """int64 [n]"""


class Reader(Protocol):
    """What the loader needs of a data set; safe to share between threads."""

    def read(self, sample: int) -> Encoded:
        """The encoded image of a sample and its class.

        Raises:
            UserError: it cannot be had; names shard and key where they are known.
        """

    def extents(self, samples: np.ndarray) -> AbstractContextManager[Located] | None:
        """Where some samples lie, in files that stay open within the context; None if they lie in no files.

        Args:
            samples: ids, int64 [n].

        Raises:
            UserError: a shard cannot be had, or its crop index is damaged or another shard's.
        """

    def expect(self, position: int) -> None:
        """Told by the loader: whatever this rank has up to this position of its stream of samples is read soon."""

    def passed(self, position: int) -> None:
        """Told by the loader: nothing before this position will be read any more."""

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""

    def mend(self) -> str:
        """What to do about a damaged image, for messages."""

    def interrupt(self) -> None:
        """Make reads that wait for data give up, because nobody needs them any more."""

    def close(self) -> None:
        """Let go of everything that is open, and end whatever reads ahead."""


MOST_OPEN = 4096
"""Files that a reader keeps open, as far as the limit of open files allows: two readers may be at work."""

NOT_OPEN = -1
NO_INDEX = -1
"""As shards.jpeg has it, in place of a descriptor."""
_NOT_LOOKED_FOR = -2


class ShardReader:
    """Random access to one split whose shards are files on this host.

    Args:
        split: an opened index.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._first = np.cumsum([0, *(shard.samples for shard in split.shards)], dtype=np.int64)
        self._descriptors = np.full(len(split.shards), NOT_OPEN, np.int32)
        self._indexes = np.full(len(split.shards), _NOT_LOOKED_FOR, np.int32)
        self._most_open = min(MOST_OPEN, raise_open_files() // 4)
        self._open_files = 0
        self._lock = threading.Lock()

    def read(self, sample: int) -> Encoded:
        """See `Reader.read`."""
        record = self.split.samples[sample]
        offset, size = int(record["offset"]), int(record["size"])
        with contextlib.ExitStack() as opened:
            descriptor = self._open_shard(int(record["shard"]), opened)
            try:
                data = os.pread(descriptor, size, offset)
            except OSError as error:
                raise UserError(f"{self.split.describe(sample)}: cannot be read: {error}") from None
        if len(data) != size:
            raise UserError(
                f"{self.split.describe(sample)}: the shard ends after {len(data):,} of the image's {size:,} bytes",
                f"The index does not match the tar any more. Check it with: shards verify {self.split.root} --digests",
            )
        return Encoded(data, int(record["label"]))

    @contextmanager
    def extents(self, samples: np.ndarray) -> Iterator[Located]:
        """See `Reader.extents`; shards beyond those that stay open are opened for the time of the context."""
        records = self.split.samples[samples]
        shards = records["shard"].astype(np.intp)
        found = np.empty(len(samples), EXTENT_DTYPE)
        found["offset"] = records["offset"]
        found["size"] = records["size"]
        found["row"] = samples - self._first[shards]
        found["descriptor"] = self._descriptors[shards]
        found["index_descriptor"] = self._indexes[shards]
        with contextlib.ExitStack() as opened:
            new = (found["descriptor"] == NOT_OPEN) | (found["index_descriptor"] == _NOT_LOOKED_FOR)
            if new.any():
                for shard in np.unique(shards[new]).tolist():
                    here = shards == shard
                    found["descriptor"][here] = self._open_shard(shard, opened)
                    found["index_descriptor"][here] = self._open_index(shard, opened)
            yield Located(found, records["label"].astype(np.int64))

    def expect(self, position: int) -> None:
        """Nothing is read ahead: the threads of the loader are enough for a local disk."""

    def passed(self, position: int) -> None:
        """Shards stay open."""

    def interrupt(self) -> None:
        """No read waits for long."""

    def describe(self, sample: int) -> str:
        """Folder, shard, key and byte."""
        return f"{self.split.root}: {self.split.describe(sample)}"

    def mend(self) -> str:
        """How to find all damaged images."""
        return f"List every damaged image with: shards verify {self.split.root} --decode"

    def close(self) -> None:
        """Close every open file."""
        with self._lock:
            for descriptors, nothing in ((self._descriptors, NOT_OPEN), (self._indexes, _NOT_LOOKED_FOR)):
                for descriptor in descriptors[descriptors >= 0].tolist():
                    os.close(descriptor)
                descriptors[:] = nothing
            self._open_files = 0

    def _open_shard(self, shard: int, opened: contextlib.ExitStack) -> int:
        """A descriptor of a shard, which stays open or is closed with `opened`."""
        descriptor = int(self._descriptors[shard])
        if descriptor != NOT_OPEN:
            return descriptor
        path = self.split.shards[shard].path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: the shard cannot be opened: {error.strerror}") from None
        return self._keep(self._descriptors, shard, NOT_OPEN, descriptor, opened)

    def _open_index(self, shard: int, opened: contextlib.ExitStack) -> int:
        """A descriptor of a shard's crop index, likewise; or NO_INDEX."""
        descriptor = int(self._indexes[shard])
        if descriptor != _NOT_LOOKED_FOR:
            return descriptor
        entry = self.split.shards[shard]
        found = open_index(entry.path, entry.sha256, entry.samples)
        return self._keep(self._indexes, shard, _NOT_LOOKED_FOR, NO_INDEX if found is None else found, opened)

    def _keep(
        self, descriptors: np.ndarray, shard: int, nothing: int, descriptor: int, opened: contextlib.ExitStack
    ) -> int:
        """Keep a descriptor open if there is room and no other thread was faster; else close it with `opened`."""
        with self._lock:
            kept = descriptors[shard] == nothing and (descriptor < 0 or self._open_files < self._most_open)
            if kept:
                descriptors[shard] = descriptor
                self._open_files += descriptor >= 0
        if not kept and descriptor >= 0:
            opened.callback(os.close, descriptor)
        return descriptor


def raise_open_files() -> int:
    """Allow this process as many open files as it may allow itself; returns the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
