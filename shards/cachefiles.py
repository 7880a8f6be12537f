"""The files of a shard cache, who holds them, and which go when room is needed.

A tar in use is held by a shared ``flock`` on the open file, and removed only under an exclusive one. A download in
progress holds the lock file of its digest. Both end with their process, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from shards.sidecars import SIDECARS

NextUse = Callable[[str], int | None]
"""sha256 of a shard → when it is needed next, on any scale that grows with time; None if it is not known to be."""

_NAME = re.compile(r"([0-9a-f]{64})(?:\.tar|-(\d+)\.part)")
_NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs")


class Pinned:
    """A shard that stays in the cache until it is closed.

    It belongs to the process that made it: a forked child pins for itself.
    """

    def __init__(self, path: Path, samples: np.ndarray, descriptor: int) -> None:
        self.path = path
        """Of the tar."""
        self.samples = samples
        """SAMPLE_DTYPE [n], in the order of the tar, `shard` 0; mapped into memory, read-only."""
        self.descriptor = descriptor
        """Of the tar, open for reading: give it to `os.pread`. Closed by `close`."""
        self._process = os.getpid()
        self._open = True

    def close(self) -> None:
        """Let the shard go; the cache may then remove it. Closing twice does nothing."""
        if not self._open:
            return
        self._open = False
        if os.getpid() == self._process:
            unlock(self.descriptor)
        else:  # the lock is the parent's as well
            os.close(self.descriptor)

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class CacheFile:
    """A tar, or a ``.part`` that becomes one."""

    path: Path
    sha256: str
    size: int
    """In bytes; of a ``.part`` the size that it will have, so that downloads together never exceed the capacity."""
    used: float
    """When it was last pinned or written to, in seconds since the epoch."""
    complete: bool


def tar_path(folder: Path, sha256: str) -> Path:
    """Where a shard lies in the cache."""
    return folder / f"{sha256}.tar"


def part_path(folder: Path, sha256: str, size: int) -> Path:
    """Where a shard of `size` bytes grows."""
    return folder / f"{sha256}-{size}.part"


def lock_path(folder: Path, sha256: str) -> Path:
    """The lock file of a digest; never removed, so that all who want the lock want that of one file."""
    return folder / f"{sha256}.lock"


def list_files(folder: Path) -> list[CacheFile]:
    """All tars and parts; exact only while nobody adds or renames one."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            size = int(match[2]) if match[2] else status.st_size
            found.append(CacheFile(Path(entry.path), match[1], size, status.st_mtime, not match[2]))
    return found


def open_locked(path: Path, operation: int) -> int | None:
    """Open a file and lock it.

    Args:
        path: of the file.
        operation: ``fcntl.LOCK_SH`` or ``fcntl.LOCK_EX``.

    Returns:
        The descriptor, to be given to `unlock`; None if another holds the lock.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            # between opening and locking it may have been removed, and even have come back
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        unlock(descriptor)


def unlock(descriptor: int) -> None:
    """Give a lock back and close its file; closing alone would not do if a forked child still has it open."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def lock(path: Path, timeout: float) -> Iterator[bool]:
    """Hold the lock of a lock file for as long as the block runs.

    Args:
        path: made if absent.
        timeout: seconds to wait for it; 0 only tries.

    Yields:
        Whether it is held: False if another holds it.
    """
    file_lock = FileLock(path)
    try:
        file_lock.acquire(timeout=timeout, poll_interval=0.02)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.release()


def make_room(folder: Path, needed: int, next_use: NextUse | None = None, before: int | None = None) -> bool:
    """Remove files that nobody holds until `needed` bytes are freed; if that cannot be, remove nothing.

    First go those without a next use, the one not used for longest first; then those used farthest in the future.
    To be called under the lock that all of the folder's users take for it.

    Args:
        folder: of the cache.
        needed: bytes to free, of the tars as they are and the parts as they will be.
        next_use: when a shard is needed next; without it none is.
        before: keep what is needed at this time or earlier.

    Returns:
        Whether there is room now.
    """
    if needed <= 0:
        return True
    ranked = []
    for file in list_files(folder):
        use = next_use(file.sha256) if next_use else None
        if use is None:
            ranked.append(((0, file.used), file))
        elif before is None or use > before:
            ranked.append(((1, -use), file))
    chosen, freed = [], 0
    with ExitStack() as held:
        for _, file in sorted(ranked, key=lambda entry: entry[0]):
            if _hold(file, held):
                chosen.append(file)
                freed += file.size
            if freed >= needed:
                for file in chosen:
                    file.path.unlink(missing_ok=True)
                    if file.complete:
                        _remove_extras(file.path)
                return True
    return False


def _remove_extras(tar: Path) -> None:
    """The optional sidecars are large and go with their tar; the small rest stays for when it comes back."""
    for sidecar in SIDECARS:
        if sidecar.optional:
            sidecar.path(tar).unlink(missing_ok=True)


def _hold(file: CacheFile, held: ExitStack) -> bool:
    if not file.complete:
        return held.enter_context(lock(lock_path(file.path.parent, file.sha256), timeout=0))
    try:
        descriptor = open_locked(file.path, fcntl.LOCK_EX)
    except FileNotFoundError:
        return False
    if descriptor is None:
        return False
    held.callback(unlock, descriptor)
    return True


def network_file_system(folder: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that a folder lies on; None for a local one, or where this is not known.

    Args:
        folder: any folder.
        mounts: text in the form of Linux's ``/proc/self/mounts``, by default that file's.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text("utf-8", "replace")
        except OSError:
            return None
    folder = folder.resolve()
    types = {}
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        types[Path(point.replace("\\040", " "))] = kind  # of two on one point, the later one is seen
    for place in (folder, *folder.parents):
        if place in types:
            return types[place] if types[place] in _NETWORK_FILE_SYSTEMS else None
    return None
