"""Encoded images by sample id, read straight out of the tars at the offsets of the index.

`pread` and no mmap: page-sized faults make mapped tars ten times slower when the data is cold.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple, Protocol

from shards.errors import UserError
from shards.index import Split


class Encoded(NamedTuple):
    """A sample as it is stored."""

    image: bytes
    """The encoded image."""
    label: int


class Reader(Protocol):
    """What the loader needs of a data set; safe to share between threads."""

    def read(self, sample: int) -> Encoded:
        """The encoded image of a sample and its class.

        Raises:
            UserError: it cannot be had; names shard and key where they are known.
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


MAX_OPEN_SHARDS = 512  # well below the common soft limit of 1,024 descriptors per process


class ShardReader:
    """Random access to one split whose shards are files on this host.

    Args:
        split: an opened index.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, sample: int) -> Encoded:
        """See `Reader.read`."""
        record = self.split.samples[sample]
        shard, offset, size = int(record["shard"]), int(record["offset"]), int(record["size"])
        descriptor, kept = self._open(shard)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self.split.describe(sample)}: cannot be read: {error}") from None
        finally:
            if not kept:
                os.close(descriptor)
        if len(data) != size:
            raise UserError(
                f"{self.split.describe(sample)}: the shard ends after {len(data):,} of the image's {size:,} bytes",
                f"The index does not match the tar any more. Check it with: shards verify {self.split.root} --digests",
            )
        return Encoded(data, int(record["label"]))

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
        """Close every open shard."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _open(self, shard: int) -> tuple[int, bool]:
        """A descriptor of a shard, and whether it stays open: the first few hundred shards do."""
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            return descriptor, True
        path = self.split.shards[shard].path
        with self._lock:
            if shard in self._descriptors:
                return self._descriptors[shard], True
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{path}: the shard cannot be opened: {error.strerror}") from None
            kept = len(self._descriptors) < MAX_OPEN_SHARDS
            if kept:
                self._descriptors[shard] = descriptor
        return descriptor, kept
