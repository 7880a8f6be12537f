"""What the kernel keeps of files in memory: emptying it without being root, and looking whether that worked."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Residence(NamedTuple):
    """A part of an open file; offset and size in bytes."""

    descriptor: int
    offset: int
    size: int


def drop(descriptors: Iterable[int]) -> None:
    """Ask the kernel to forget these files: those pages that are on disk, and that nobody has mapped."""
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(places: Sequence[Residence]) -> float:
    """The share of the pages of some parts that is in memory, by ``mincore``; 1.0 where that cannot be told.

    Linux tells it of a file only to who may write to it, and says that everything is there to others.
    """
    resident = total = 0
    for place in places:
        start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
        size = place.offset + place.size - start
        if size <= 0:
            continue
        pages = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        try:
            # private and writable, because ctypes gives no address of a read-only buffer; nothing is written
            mapped = mmap.mmap(place.descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
            with mapped:
                buffer = ctypes.c_char.from_buffer(mapped)
                failed = ctypes.CDLL(None).mincore(
                    ctypes.c_void_p(ctypes.addressof(buffer)), ctypes.c_size_t(size), vector
                )
                del buffer  # the mapping cannot be closed while it is referred to
        except (OSError, AttributeError, ValueError):
            return 1.0
        if failed:
            return 1.0
        resident += sum(page & 1 for page in vector)
        total += pages
    return resident / total if total else 1.0


def available_memory() -> int | None:
    """Bytes that the page cache could take, as the kernel estimates it; None where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return int(kilobytes) * 1024
