"""Encoded images by sample id, read straight out of the tars at the offsets of the index.

`pread` and no mmap: page-sized faults make mapped tars ten times slower when the data is cold.
"""

from __future__ import annotations

import os
import threading

from shards.errors import UserError
from shards.index import Split

MAX_OPEN_SHARDS = 512  # well below the common soft limit of 1,024 descriptors per process


class ShardReader:
    """Random access to one split; safe to share between threads.

    Args:
        split: an opened index.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            UserError: the shard cannot be opened, or ends before the image does.
        """
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
        return data

    def label(self, sample: int) -> int:
        """The class of a sample."""
        return int(self.split.samples[sample]["label"])

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
