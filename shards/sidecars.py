"""The files that stand beside each shard and are made from its bytes alone.

`shards prepare` and `shards index` write them, `shards verify` checks them, all by going through `SIDECARS`. Adding one
means a module with a subclass of `Sidecar` and one line here. A sidecar may read the whole shard: where one is written,
the tar has as a rule just been written or hashed, so that its bytes come from memory. What it holds must be bound to
the shard, by comparing with it or by recording its digest, so that `fault` finds a file that belongs to an earlier one.

A data set is complete without its optional sidecars. One that does not belong to its shard is never left, though, for
whoever reads it would have to refuse it: it is written again, or removed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

from shards import crop_index, jpeg
from shards.errors import UserError
from shards.files import read_file, write_whole
from shards.idx import IndexedSample, format_index, index_path
from shards.manifest import Shard
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


class Extras(Enum):
    """What to do about optional sidecars."""

    MAKE = "write those that are missing or wrong, as far as that can be done here"
    MEND = "write those again that are wrong, but add none"
    DROP = "write none"


class Sidecar(ABC):
    """A kind of file beside each shard."""

    suffix: ClassVar[str]
    """Replaces ``.tar``."""
    optional: ClassVar[bool] = False
    """Whether a data set is complete without it."""

    def unavailable(self) -> str | None:
        """Why it cannot be written here, as the end of a sentence about what is missing; None if it can."""
        return None

    def path(self, tar: Path) -> Path:
        """Where the file of a shard lies."""
        return tar.with_suffix(self.suffix)

    @abstractmethod
    def fault(self, shard: ShardContents) -> str | None:
        """What is wrong with the file that is there, such as "is missing"; None if it belongs to this shard.

        Must be much cheaper than `write`, and must not raise for damaged files.
        """

    def header_fault(self, shard: Shard) -> str | None:
        """`fault` as far as the file's own header tells, in microseconds; of optional sidecars alone."""
        return None

    def content_fault(self, shard: ShardContents) -> str | None:
        """`fault` that spares nothing: it may read and decode the whole shard."""
        return self.fault(shard)

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


class CropIndex(Sidecar):
    """The ``.cropindex`` file; see `shards.crop_index`."""

    suffix = crop_index.SUFFIX
    optional = True

    def unavailable(self) -> str | None:
        """It takes the C extension."""
        reason = jpeg.unavailable()
        return None if reason is None else f"the C extension {reason}"

    def fault(self, shard: ShardContents) -> str | None:
        """Check the header and every record, but no image."""
        return crop_index.index_fault(shard.tar, shard.table.samples, shard.sha256)

    def header_fault(self, shard: Shard) -> str | None:
        """Check what training checks when it opens the file."""
        return crop_index.header_fault(shard.path, shard.sha256, shard.samples)

    def content_fault(self, shard: ShardContents) -> str | None:
        """Compare with every image."""
        return crop_index.content_fault(shard.tar, shard.table.samples, shard.sha256)

    def write(self, shard: ShardContents, scratch: Path | None = None) -> None:
        """Decode every image as far as is needed."""
        crop_index.write_index(shard.tar, shard.table.samples, shard.sha256, scratch)


SIDECARS: tuple[Sidecar, ...] = (SampleIndex(), CropIndex())
"""In the order of writing."""


def write_sidecars(shard: ShardContents, scratch: Path | None = None, extras: Extras = Extras.MEND) -> list[Path]:
    """Write those that are missing or do not belong to the shard.

    Args:
        shard: what to make them from.
        scratch: folder for the temporary files; the shard's own by default.
        extras: what to do about the optional ones.

    Returns:
        The optional ones that were wrong and have been removed, because `extras` or what is missing here said so.

    Raises:
        UserError: as `Sidecar.write`; or if a file cannot be removed.
    """
    removed = []
    for sidecar in SIDECARS:
        path = sidecar.path(shard.tar)
        if sidecar.optional and extras is not Extras.MAKE and not path.exists():
            continue
        if sidecar.fault(shard) is None:
            continue
        if not sidecar.optional or _can_write(sidecar, extras):
            sidecar.write(shard, scratch)
        elif path.exists():
            try:
                path.unlink()
            except OSError as error:
                raise UserError(f"{path}: does not belong to its tar, cannot be removed: {error.strerror}") from error
            removed.append(path)
    return removed


def lacks_extras(shard: Shard, extras: Extras) -> bool:
    """Whether `write_sidecars` would do anything about the optional sidecars of a shard, as far as headers show."""
    for sidecar in SIDECARS:
        wanted = extras is Extras.MAKE and _can_write(sidecar, extras)
        if sidecar.optional and (wanted or sidecar.path(shard.path).exists()) and sidecar.header_fault(shard):
            return True
    return False


def partly_missing(root: Path, shards: list[Shard]) -> Iterator[str]:
    """Which optional sidecars some shards have and others not: none of them, or all, is as it was meant."""
    for sidecar in SIDECARS:
        without = [path for shard in shards if not (path := sidecar.path(shard.path)).exists()]
        if sidecar.optional and 0 < len(without) < len(shards):
            name = without[0].relative_to(root).as_posix() + ", …" * (len(without) > 1)
            yield f"{len(without):,} of {len(shards):,} shards have no {sidecar.suffix}: {name}"


def _can_write(sidecar: Sidecar, extras: Extras) -> bool:
    return extras is not Extras.DROP and sidecar.unavailable() is None
