"""The files that stand beside each shard and are made from its bytes alone.

`shards prepare` and `shards index` write them, `shards verify` checks them, all by going through `SIDECARS`. Adding one
means a module with a subclass of `Sidecar` and one line here. A sidecar may read the whole shard: where one is written,
the tar has as a rule just been written or hashed, so that its bytes come from memory. What it holds must be bound to
the shard, by comparing with it or by recording its digest, so that `fault` finds a file that belongs to an earlier one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from shards.files import read_file, write_whole
from shards.idx import IndexedSample, format_index, index_path
from shards.table import ShardTable


@dataclass(frozen=True)
class ShardContents:
    """What is known about a shard when its sidecars are written or checked."""

    tar: Path
    samples: list[IndexedSample]
    """Where every component of every sample lies, from the tar's headers."""
    table: ShardTable
    """Offset and size of every image; size 0 for a sample without one, which `shards verify` reports itself."""
    sha256: str
    """Of the tar, in hexadecimal."""


class Sidecar(ABC):
    """A kind of file beside each shard."""

    suffix: ClassVar[str]
    """Replaces ``.tar``."""

    def path(self, tar: Path) -> Path:
        """Where the file of a shard lies."""
        return tar.with_suffix(self.suffix)

    @abstractmethod
    def fault(self, shard: ShardContents) -> str | None:
        """What is wrong with the file that is there, such as "is missing"; None if it belongs to this shard.

        Must be much cheaper than `write`, and must not raise for damaged files.
        """

    @abstractmethod
    def write(self, shard: ShardContents, scratch: Path | None = None) -> None:
        """Make the file, whole or not at all (`files.whole_file`).

        Args:
            shard: what to make it from.
            scratch: folder for the temporary file; the shard's own by default.

        Raises:
            UserError: naming shard and key, if it cannot be made or written.
        """


class SampleIndex(Sidecar):
    """The ``.idx`` file; see `shards.idx`."""

    suffix = ".idx"

    def path(self, tar: Path) -> Path:
        """As `idx.index_path`."""
        return index_path(tar)

    def fault(self, shard: ShardContents) -> str | None:
        """Compare with the text that the tar's headers call for."""
        path = self.path(shard.tar)
        try:
            if not path.is_file():
                return "not a file" if path.exists() else "is missing"
            return None if read_file(path) == format_index(shard.samples) else "does not describe its tar"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    def write(self, shard: ShardContents, scratch: Path | None = None) -> None:
        """Write the headers' content as text."""
        write_whole(self.path(shard.tar), format_index(shard.samples), scratch)


SIDECARS: tuple[Sidecar, ...] = (SampleIndex(),)
"""In the order of writing."""


def write_sidecars(shard: ShardContents, scratch: Path | None = None) -> int:
    """Write those that are missing or do not belong to the shard; returns how many."""
    wrong = [sidecar for sidecar in SIDECARS if sidecar.fault(shard) is not None]
    for sidecar in wrong:
        sidecar.write(shard, scratch)
    return len(wrong)
