"""Writing one shard: a tar whose bytes depend on its samples alone.

Headers carry no times, owners or machine names. Names of up to 100 ASCII bytes give plain ustar headers; only
longer or non-ASCII ones get a PAX header before them.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

from shards.idx import Component, IndexedSample
from shards.tar import BLOCK, RECORD


class ShardWriter:
    """Appends samples to a tar, computing its digest and its index on the way.

    Args:
        file: opened for writing, at position 0.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0
        """Bytes written so far."""
        self.samples: list[IndexedSample] = []
        """What has been written, as the ``.idx`` records it."""

    def add(self, key: str, label: int, image: bytes, extension: str) -> None:
        """Append ``<key>.cls`` and ``<key>.<extension>``; the image's bytes go in untouched."""
        label_text = str(label).encode("ascii")
        components = (self._member(key, "cls", label_text), self._member(key, extension, image))
        self.samples.append(IndexedSample(key, components))

    def close(self) -> str:
        """Write the end of the archive and return the tar's SHA-256 in hexadecimal; the file stays open."""
        end = self.size + 2 * BLOCK
        self._write(bytes(2 * BLOCK + -end % RECORD))
        return self._hash.hexdigest()

    def _member(self, key: str, extension: str, data: bytes) -> Component:
        name = f"{key}.{extension}"
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o444
        self._write(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return Component(extension, offset, len(data), name)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
