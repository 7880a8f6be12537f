"""Writing files so that they are either whole or not there, and hashing and locking them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from shards.errors import UserError

LOCK_NAME = ".lock"

MAX_FILE_BYTES = 1 << 28
"""Of an index or a list that is read as a whole; that of a million shards has less."""


@contextmanager
def whole_file(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when complete and on disk.

    The temporary name contains the process id: a worker that outlived a killed parent can then never write
    into the file of its successor.

    Args:
        path: final name; replaced atomically when the block ends without an exception.
        scratch: folder on the same file system for the temporary file; the target's own by default.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path)):
            raise  # some other file failed inside the block; its own message is better
        raise UserError(
            f"{path}: cannot be written: {error.strerror}",
            "Nothing half-written counts as done: free or choose another disk, then run the same command again.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """`whole_file` for content that is already there."""
    with whole_file(path, scratch) as file:
        file.write(data)


def remove_orphans(folder: Path) -> None:
    """Remove the temporary files of `whole_file` in a folder whose process no longer runs: a SIGKILL leaves them.

    Args:
        folder: written by processes of this host alone at the moment; need not exist.
    """
    for path in folder.glob(".*.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isascii() and process.isdigit() and not _is_running(int(process)):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process in (0, os.getpid()):  # 0 would mean our own group; the caller has written nothing yet
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable; a no-op where folders cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor to read a file with; of a file and nothing else: opening a named pipe would wait for ever.

    Raises:
        OSError: if it is not a file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return descriptor


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a file that should be small.

    Raises:
        OSError: if it is not a file, cannot be read, or is larger than `limit` bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit:,} bytes, more than any such file has", str(path))
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read a file with, at any position.

    Raises:
        UserError: if the file cannot be opened, or cannot be read inside the block.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        yield descriptor
    except OSError as error:
        if error.filename is not None:
            raise  # of some other file
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def exclusive(folder: Path, writer: str = "shards process") -> Iterator[None]:
    """Hold the only right to write into a folder, for as long as the block runs.

    The lock belongs to the process and ends with it, however it ends. The lock file itself stays: removing it
    would let two processes lock two different files of the same name.

    Args:
        folder: must exist.
        writer: what holds the lock, for the message to another one.

    Raises:
        UserError: at once, if another process holds it or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another {writer} is writing here",
            "Wait for it to end, or choose another folder.",
            f"If none is running on any host, the file system kept the lock: remove {folder / LOCK_NAME}.",
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
