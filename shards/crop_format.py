"""The layout of a ``.cropindex`` file, and reading its parts; docs/crop_index.md draws it.

Little-endian throughout: a header bound to the tar by its sha256, a directory with one entry for each image in the
order of the tar, and the records, one after the other in the same order.
"""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np

MAGIC = b"cropidx\n"
VERSION = 1
SPACING = 48
"""Pixels between two places where decoding can start, as far as the image's MCUs allow. Readers go by the records."""

HEADER = struct.Struct("<8sIIQQ32s")
"""Magic, version, spacing in pixels, number of images, size of the tar in bytes, sha256 of the tar."""
DIRECTORY_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("zero", "<u4")])
"""Where the record of an image lies, in bytes from the start of the file. The C code reads it by itself."""
RECORD = struct.Struct("<IIIIHHBBHII")
"""Before the entries of a record: crc32 of all that follows; row, size and the low half of XXH64 of the image; its
width, height, kind, components; MCUs of a run, offset of the scan, number of entries."""
ENTRY_BYTES = 8
KIND_NONE, KIND_BASELINE = 0, 1


def read_header(descriptor: int) -> tuple[str, int, int, int]:
    """Read the header of an open file: the tar's sha256, the spacing, the number of images, and the tar's size.

    Raises:
        ValueError: saying what is wrong with the header, the end of a sentence about the file.
    """
    head = os.pread(descriptor, HEADER.size, 0)
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise ValueError("is damaged: it does not begin like a crop index")
    if len(head) < HEADER.size:
        raise ValueError("is truncated")
    _, version, spacing, count, size, digest = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"is of version {version}; version {VERSION} is needed here")
    length = os.fstat(descriptor).st_size
    if not 0 < count <= length // DIRECTORY_DTYPE.itemsize:
        raise ValueError(f"is truncated or damaged: {count:,} images in {length:,} bytes")
    return digest.hex(), spacing, count, size


def read_directory(descriptor: int, count: int) -> np.ndarray:
    """Read the directory of an open file: DIRECTORY_DTYPE [count], its records one after the other up to the end.

    Raises:
        ValueError: as `read_header`.
    """
    length = count * DIRECTORY_DTYPE.itemsize
    data = os.pread(descriptor, length, HEADER.size)
    if len(data) < length:
        raise ValueError("is truncated")
    directory = np.frombuffer(data, DIRECTORY_DTYPE)
    ends = HEADER.size + length + np.cumsum(directory["size"], dtype=np.uint64)
    starts = ends - directory["size"]
    if (
        np.any(directory["offset"] != starts)
        or np.any(directory["zero"])
        or np.any(directory["size"] < RECORD.size)
        or ends[-1] != os.fstat(descriptor).st_size
    ):
        raise ValueError("is damaged: its directory does not describe its records")
    return directory


def record_fault(record: bytes, row: int, image_size: int) -> str | None:
    """What is wrong with the record of an image, as the end of a sentence about it; None if nothing is.

    Args:
        record: all of its bytes.
        row: of the image.
        image_size: in bytes; 0 if it is not known.
    """
    if len(record) < RECORD.size:  # the file has just been cut
        return "is truncated"
    crc, row_there, size_there, _, _, _, kind, _, _, _, entries = RECORD.unpack_from(record)
    if crc != zlib.crc32(record[4:]):
        return "is damaged"
    if row_there != row or (image_size and size_there != image_size):
        return "is of another image"
    if kind not in (KIND_NONE, KIND_BASELINE) or len(record) != RECORD.size + ENTRY_BYTES * entries:
        return "is not what its header says"
    return None
