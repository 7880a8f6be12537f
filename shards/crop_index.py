"""The ``.cropindex`` file beside a shard: where in each JPEG decoding can start, so that a crop costs only its part.

docs/crop_index.md describes the file and what is checked when; `shards.jpeg` makes and reads its records, and
`shards.crop_format` knows where they lie. Equal tars have equal files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards import jpeg
from shards.crop_format import (
    DIRECTORY_DTYPE,
    HEADER,
    MAGIC,
    RECORD,
    SPACING,
    VERSION,
    read_directory,
    read_header,
    record_fault,
)
from shards.errors import UserError
from shards.files import open_regular, opened, whole_file
from shards.idx import data_set_of
from shards.manifest import Shard

SUFFIX = ".cropindex"


@dataclass(frozen=True)
class Counts:
    """What the crop index of a shard holds."""

    images: int
    indexed: int
    """Those that decoding can enter anywhere; the others are no baseline JPEGs, or damaged."""
    bytes: int
    """Of the file."""


def crop_index_path(tar: Path) -> Path:
    """``train-00000.tar`` → ``train-00000.cropindex``."""
    return tar.with_suffix(SUFFIX)


def require_extension() -> None:
    """Refuse to make crop indexes where the C extension is not there.

    Raises:
        UserError: with the mend.
    """
    reason = jpeg.unavailable()
    if reason is not None:
        raise UserError(f"--decode: a crop index takes the C extension, which {reason}", *jpeg.MEND)


def open_index(tar: Path, sha256: str, samples: int | None = None) -> int | None:
    """Open the crop index of a shard for `jpeg.decode_files`, looking at its header and its size alone.

    Args:
        tar: the shard.
        sha256: of the tar, in hexadecimal, as `index.json` records it.
        samples: number of images in the tar, if known.

    Returns:
        A descriptor for reading, closed on exec; the caller closes it. None if the shard has no crop index.

    Raises:
        UserError: if the file that is there is damaged, or of another version or another shard, with the mend.
    """
    descriptor = _open(tar)
    if descriptor is not None:
        try:
            _check_header(descriptor, tar, sha256, samples)
        except (ValueError, OSError) as error:
            os.close(descriptor)
            raise _unusable(crop_index_path(tar), _describe(error)) from error
    return descriptor


def _open(tar: Path) -> int | None:
    """A descriptor of the crop index of a shard; None if it has none."""
    path = crop_index_path(tar)
    try:
        return open_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error


def header_fault(tar: Path, sha256: str, samples: int) -> str | None:
    """Why `open_index` would refuse the file, or "is missing"; None if it would not."""

    def look(descriptor: int) -> None:
        _check_header(descriptor, tar, sha256, samples)

    return _fault(tar, look)


def index_fault(tar: Path, samples: np.ndarray, sha256: str) -> str | None:
    """What is wrong with the file that is there, every record looked at but no image; None if nothing is.

    Args:
        tar: the shard.
        samples: SAMPLE_DTYPE [n], the images of the tar; of those with size 0 nothing is known.
        sha256: of the tar, in hexadecimal.
    """

    def look(descriptor: int) -> str | None:
        spacing = _check_header(descriptor, tar, sha256, len(samples))
        if spacing != SPACING:
            return f"was made with {spacing:,} pixels between entries, not {SPACING}"
        for row, entry in enumerate(read_directory(descriptor, len(samples))):
            record = os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
            fault = record_fault(record, row, int(samples["size"][row]))
            if fault is not None:
                return f"its record of image {row} {fault}"
        return None

    return _fault(tar, look)


def _fault(tar: Path, look: Callable[[int], str | None]) -> str | None:
    """What `look` finds in the open crop index of a shard, or why it cannot look, or "is missing"."""
    try:
        descriptor = open_regular(crop_index_path(tar))
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else _describe(error)
    try:
        return look(descriptor)
    except (ValueError, OSError) as error:
        return _describe(error)
    finally:
        os.close(descriptor)


def content_fault(tar: Path, samples: np.ndarray, sha256: str) -> str | None:
    """`index_fault`, and whether every record is the one of its image: it is made again and compared.

    Where there is no C extension, the records' own checksums have to do.
    """
    fault = index_fault(tar, samples, sha256)
    if fault is not None or jpeg.unavailable() is not None:
        return fault
    try:
        with opened(crop_index_path(tar)) as descriptor, opened(tar) as shard:
            for row, entry in enumerate(read_directory(descriptor, len(samples))):
                if not samples["size"][row]:
                    continue
                record = os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
                image = _read_image(tar, shard, samples[row])
                if record != jpeg.index_image(image, row):
                    return f"its record of image {row} is not the one that the image calls for"
    except (UserError, OSError, ValueError) as error:
        return f"cannot be compared with its shard: {error.headline if isinstance(error, UserError) else error}"
    return None


def write_index(tar: Path, samples: np.ndarray, sha256: str, scratch: Path | None = None) -> None:
    """Decode the entropy-coded part of every image once and write the file; one image at a time is in memory.

    Args:
        tar: the shard.
        samples: SAMPLE_DTYPE [n], its images.
        sha256: of the tar, in hexadecimal.
        scratch: folder for the temporary file; the shard's own by default.

    Raises:
        UserError: if the tar cannot be read, or the file not be written.
    """
    directory = np.zeros(len(samples), DIRECTORY_DTYPE)
    with opened(tar) as shard, whole_file(crop_index_path(tar), scratch) as file:
        size = os.fstat(shard).st_size
        file.write(HEADER.pack(MAGIC, VERSION, SPACING, len(samples), size, bytes.fromhex(sha256)))
        file.write(bytes(directory.nbytes))  # known only after the records
        position = HEADER.size + directory.nbytes
        for row, sample in enumerate(samples):
            record = jpeg.index_image(_read_image(tar, shard, sample), row)  # of a multiple of 8 bytes: all are aligned
            directory[row] = (position, len(record), 0)
            position += len(record)
            file.write(record)
        file.seek(HEADER.size)
        file.write(directory.tobytes())


def summarize(tar: Path) -> Counts | None:
    """Count what the crop index of a shard holds, from its directory; None if the shard has none.

    Raises:
        UserError: if the file is damaged.
    """
    descriptor = _open(tar)
    if descriptor is None:
        return None
    try:
        count = read_header(descriptor)[2]
        sizes = read_directory(descriptor, count)["size"]
        return Counts(count, int(np.count_nonzero(sizes > RECORD.size)), os.fstat(descriptor).st_size)
    except (ValueError, OSError) as error:
        raise _unusable(crop_index_path(tar), _describe(error)) from error
    finally:
        os.close(descriptor)


def report(shards: Iterable[Shard]) -> tuple[str, int]:
    """A line about the crop indexes of some shards, "" if none has one that is whole; and the number of images indexed.

    Returns:
        Such as ``crop index: 1,281,144 of 1,281,167 images, 4.9 GB (3.5 %)``, the share that of the tars' bytes.
    """
    shards, found = list(shards), []
    for shard in shards:
        with suppress(UserError):  # one that is damaged indexes nothing
            found.append(summarize(shard.path))
    counts = [count for count in found if count is not None]
    if not counts:
        return "", 0
    images, size = sum(shard.samples for shard in shards), sum(count.bytes for count in counts)
    indexed = sum(count.indexed for count in counts)
    share = 100 * size / sum(shard.size for shard in shards)
    amount = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    return f"crop index: {indexed:,} of {images:,} images, {amount} ({share:.1f} %)", indexed


def _read_image(tar: Path, descriptor: int, sample: np.void) -> bytes:
    try:
        image = os.pread(descriptor, int(sample["size"]), int(sample["offset"]))
    except OSError as error:
        raise UserError(f"{tar}: cannot be read: {error.strerror}") from error
    if len(image) != sample["size"]:
        raise UserError(f"{tar}: byte {int(sample['offset'])}: the image ends after {len(image):,} bytes")
    return image


def _check_header(descriptor: int, tar: Path, sha256: str, samples: int | None) -> int:
    """Check that the file is of this tar, and as long as its directory says; returns the spacing.

    Raises:
        ValueError: as `read_header`.
    """
    digest, spacing, count, size = read_header(descriptor)
    if digest != sha256:
        raise ValueError("is of another shard, or of this one before it was changed")
    if samples is not None and count != samples:
        raise ValueError(f"is damaged: it is of {count:,} images, the shard holds {samples:,}")
    try:
        there = tar.stat().st_size
    except OSError:
        there = size  # a tar that cannot be read is reported by whoever reads it
    if size != there:
        raise ValueError(f"is of a tar of {size:,} bytes, the shard has {there:,}")
    last = os.pread(descriptor, DIRECTORY_DTYPE.itemsize, HEADER.size + (count - 1) * DIRECTORY_DTYPE.itemsize)
    length = os.fstat(descriptor).st_size
    if len(last) == DIRECTORY_DTYPE.itemsize:
        entry = np.frombuffer(last, DIRECTORY_DTYPE)[0]
        end = int(entry["offset"]) + int(entry["size"])
        if end == length:
            return spacing
        if end < length:
            raise ValueError(f"is damaged: it has {length:,} bytes, its directory says {end:,}")
    raise ValueError("is truncated")


def _describe(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def _unusable(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what}",
        f"Make it again with: shards index {data_set_of(path)} --decode",
        "Or remove the file: images are then decoded from their beginning, which takes longer.",
    )
