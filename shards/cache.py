"""Remote shards on this host's disk: fetched once by whichever process comes first, checked, shared by all.

The name of a cached tar is its sha256, so a cache serves any number of data sets, and a shard that was written again
at its address is another shard. A tar appears under its name only when its digest was right; from then on it is
trusted. Beside it lie its sidecar files and the table of its samples, which are small and do not count as room; the
smallest stay when the tar goes. Everything in the folder can be removed while nobody uses it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from shards.cachefiles import (
    NextUse,
    Pinned,
    list_files,
    lock,
    lock_path,
    make_room,
    network_file_system,
    open_locked,
    part_path,
    tar_path,
    unlock,
)
from shards.cachetables import index_shard, is_extended, load_table, place
from shards.errors import UserError
from shards.fetch import Retry, download
from shards.files import sha256_file, sync_folder
from shards.labels import Labels
from shards.manifest import Shard
from shards.table import ShardTable

_ROOM_LOCK = "room.lock"
_DIGEST_ATTEMPTS = 3
_POLL = 0.1  # seconds


def default_folder() -> Path:
    """``shards`` in the user's cache folder for this program."""
    return user_cache_path("onehour") / "shards"


class ShardCache:
    """A folder of shards, shared by all processes and threads of a host.

    Args:
        folder: on a local disk; made if absent.
        capacity: of the tars together, in bytes. It is never exceeded, downloads in progress included, as long as
            all who use the folder are given the same one.
        patience: seconds to wait for room, or for another process whose download does not move.
        retry: how patient each download is.

    Raises:
        UserError: if the folder cannot be written or lies on a network file system.
    """

    def __init__(self, folder: Path, capacity: int, *, patience: float = 600, retry: Retry | None = None) -> None:
        self.folder = Path(folder)
        self.capacity = capacity
        self._patience = patience
        self._retry = retry or Retry()
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            kind = network_file_system(self.folder)
            if kind is not None:
                raise UserError(
                    f"{self.folder}: the cache of remote shards lies on a network file system ({kind})",
                    "It is there to spare the network, and its locks hold for one host. Choose a local disk.",
                )
            with self._room():
                pass

    def pin(
        self, shard: Shard, next_use: NextUse | None = None, wait: bool = True, labels: Labels | None = None
    ) -> Pinned | None:
        """Make sure that a shard is in the cache, and keep it there.

        However many processes and threads ask for a shard at once, one of them downloads it.

        Args:
            shard: with a `url`.
            next_use: when each shard is needed next, for the choice of what goes if there is no room.
            wait: False gives up at once where another process is fetching the shard, or where room could only be
                made by removing what is in use or needed sooner. Whoever fetches ahead goes on with the next shard.
            labels: how its samples are labelled, by default with a number in ``.cls``.

        Returns:
            The shard; None only if `wait` is False.

        Raises:
            UserError: if it cannot be downloaded, is not what the index says, or there is no room, naming shard and
                mend.
        """
        self._check_size(shard)
        with self._usable():
            pinned = self._pin(shard, next_use, wait, labels or Labels())
            if pinned is not None and not is_extended(self.folder, shard):
                self._extend(shard, labels or Labels())
            return pinned

    def add(self, url: str, size: int, labels: Labels) -> tuple[Shard, ShardTable]:
        """Fetch and index a shard that no index describes yet; it may be removed as soon as this returns.

        Nothing but its size can be checked: the digest is that of the bytes that came.

        Args:
            url: of the tar.
            size: of the tar, in bytes.
            labels: how its samples are labelled.

        Raises:
            UserError: if it cannot be downloaded, is no shard, or there is no room.
        """
        name = hashlib.sha256(url.encode()).hexdigest()  # of the part, so that a later attempt finds it
        unknown = Shard(tar_path(self.folder, name), 0, size, name, url)
        self._check_size(unknown)
        with self._usable(), lock(lock_path(self.folder, name), self._patience) as mine:
            if not mine:
                raise UserError(f"{place(unknown)}: another process is fetching it", "Wait for it to end.")
            self._reserve(unknown, None, wait=True)
            sha256, descriptor = self._download(unknown, known=False)
        try:
            table = index_shard(self.folder, replace(unknown, sha256=sha256), labels)
        finally:
            unlock(descriptor)
        return Shard(tar_path(self.folder, sha256), len(table.samples), size, sha256, url), table

    def _pin(self, shard: Shard, next_use: NextUse | None, wait: bool, labels: Labels) -> Pinned | None:
        progress = _Progress(self._patience)
        while True:
            pinned = self._open(shard, labels)
            if pinned is not None:
                return pinned
            with lock(lock_path(self.folder, shard.sha256), 10 * _POLL if wait else 0) as mine:
                if mine:
                    return self._open(shard, labels) or self._bring(shard, next_use, wait, labels)
            if not wait:
                return None
            if not progress.seen(self._bytes_there(shard)):
                raise UserError(
                    f"{place(shard)}: another process has been fetching it for {self._patience:,.0f} s "
                    "without getting anything",
                    f"It holds {lock_path(self.folder, shard.sha256)}: end it, then start again.",
                )

    def _check_size(self, shard: Shard) -> None:
        if shard.size > self.capacity:
            raise UserError(
                f"{place(shard)}: larger than the cache",
                f"The shard has {shard.size:,} bytes, the cache {self.folder} may hold {self.capacity:,}.",
                "Give the cache a larger capacity, or make the data set again with more, smaller shards.",
            )

    def is_arriving(self, shard: Shard) -> bool:
        """Whether a part of a shard is in the cache; if `pin` did not go on with it, another process does."""
        return part_path(self.folder, shard.sha256, shard.size).exists()

    def _open(self, shard: Shard, labels: Labels) -> Pinned | None:
        """The shard if its tar and its table are there."""
        descriptor = self._pin_tar(shard)
        if descriptor is None:
            return None
        samples = load_table(self.folder, shard, labels)
        if samples is None:
            unlock(descriptor)
            return None
        return Pinned(tar_path(self.folder, shard.sha256), samples, descriptor)

    def _bring(self, shard: Shard, next_use: NextUse | None, wait: bool, labels: Labels) -> Pinned | None:
        """Download what is not there and build the table; the shard's lock is held."""
        descriptor = self._pin_tar(shard)
        if descriptor is None:
            self._drop_damaged(shard)
            if not self._reserve(shard, next_use, wait):
                return None
            _, descriptor = self._download(shard)
        try:
            samples = load_table(self.folder, shard, labels)
            if samples is None:
                samples = self._build_table(shard, labels)
        except BaseException:
            unlock(descriptor)
            raise
        return Pinned(tar_path(self.folder, shard.sha256), samples, descriptor)

    def _extend(self, shard: Shard, labels: Labels) -> None:
        """Write the optional sidecars of a shard that came when they could not be made, or was damaged since.

        Without them training is slower and nothing else, so it does not end for them.
        """
        with suppress(OSError, UserError), lock(lock_path(self.folder, shard.sha256), 0) as mine:
            if mine:
                index_shard(self.folder, shard, labels)

    def _pin_tar(self, shard: Shard) -> int | None:
        path = tar_path(self.folder, shard.sha256)
        while True:
            try:
                descriptor = open_locked(path, fcntl.LOCK_SH)
            except FileNotFoundError:
                return None
            if descriptor is not None:
                break
            time.sleep(_POLL / 10)  # being removed at this moment
        if os.fstat(descriptor).st_size != shard.size:
            unlock(descriptor)
            return None
        with suppress(PermissionError):  # another user's
            os.utime(descriptor)  # so that what was used last is kept longest
        return descriptor

    def _drop_damaged(self, shard: Shard) -> None:
        """A tar of the wrong size is nothing that this cache wrote."""
        path = tar_path(self.folder, shard.sha256)
        try:
            if path.stat().st_size == shard.size:
                return  # it has just come from another address, by `add`
            descriptor = open_locked(path, fcntl.LOCK_EX)
        except FileNotFoundError:
            return
        if descriptor is None:
            raise UserError(
                f"{path}: has another size than the shard's {shard.size:,} bytes, and is in use",
                "End what uses it and remove it.",
            )
        path.unlink(missing_ok=True)
        unlock(descriptor)

    def _reserve(self, shard: Shard, next_use: NextUse | None, wait: bool) -> bool:
        """Make room and take it, by making the ``.part`` that stands for the whole shard; True once it is there."""
        partial = part_path(self.folder, shard.sha256, shard.size)
        give_up = time.monotonic() + self._patience
        while True:
            with self._room():
                if partial.exists():
                    return True
                taken = sum(file.size for file in list_files(self.folder))
                before = None if wait or next_use is None else next_use(shard.sha256)
                if make_room(self.folder, taken + shard.size - self.capacity, next_use, before):
                    partial.touch()
                    return True
            if not wait:
                return False
            if time.monotonic() > give_up:
                raise self._crowded(shard)
            time.sleep(_POLL)

    def _download(self, shard: Shard, known: bool = True) -> tuple[str, int]:
        """Fetch, check and name the shard: its sha256, and the descriptor that pins it."""
        url, partial = shard.url, part_path(self.folder, shard.sha256, shard.size)
        assert url is not None, "a shard without an address is a local file"
        for _ in range(_DIGEST_ATTEMPTS):
            try:
                download(url, partial, shard.size, retry=self._retry)
            except UserError:
                if partial.exists() and not partial.stat().st_size:
                    partial.unlink()  # it would only keep room from others
                raise
            found = sha256_file(partial)
            if found == shard.sha256 or not known:
                return found, self._admit(partial, replace(shard, sha256=found))
            os.truncate(partial, 0)
        partial.unlink()
        raise UserError(
            f"{place(shard)}: is not the shard that the index describes",
            f"sha256 {found} arrived {_DIGEST_ATTEMPTS} times in a row; index.json says {shard.sha256}.",
            "If the shard was written again, write index.json again too; if not, something on the way changes it.",
        )

    def _admit(self, partial: Path, shard: Shard) -> int:
        """Turn a complete part into a tar: the descriptor that pins it."""
        descriptor = os.open(partial, os.O_RDONLY)
        os.fsync(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # nobody else locks a part: this cannot wait
        # under the lock of all, for who counts the folder must not see neither of the two names
        with self._room():
            there = self._pin_tar(shard)  # from another address, by `add`
            if there is not None:
                partial.unlink()
                unlock(descriptor)
                return there
            partial.replace(tar_path(self.folder, shard.sha256))
        sync_folder(self.folder)
        return descriptor

    def _build_table(self, shard: Shard, labels: Labels) -> np.ndarray:
        samples = index_shard(self.folder, shard, labels).samples
        if len(samples) != shard.samples:
            raise UserError(
                f"{place(shard)}: holds {len(samples):,} samples, index.json says {shard.samples:,}",
                "Write the index again from the tars.",
            )
        mapped = load_table(self.folder, shard, labels)
        return samples if mapped is None else mapped

    @contextmanager
    def _room(self) -> Iterator[None]:
        """The lock under which room is counted, made and taken; all hold it for milliseconds."""
        path = self.folder / _ROOM_LOCK
        with lock(path, self._patience) as mine:
            if not mine:
                raise UserError(f"{path}: a process holds this lock and does not go on", "End it, then start again.")
            yield

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: the cache of shards cannot be used: {error.strerror or error}",
                "It must be on a local disk with some space left, and this user must be able to write there.",
            ) from error

    def _bytes_there(self, shard: Shard) -> int:
        try:
            return part_path(self.folder, shard.sha256, shard.size).stat().st_size
        except OSError:
            return -1

    def _crowded(self, shard: Shard) -> UserError:
        files = [file for file in list_files(self.folder) if file.sha256 != shard.sha256]
        complete = [file.size for file in files if file.complete]
        arriving = [file.size for file in files if not file.complete]
        return UserError(
            f"{place(shard)}: no room in the cache {self.folder}, waited {self._patience:,.0f} s for it",
            f"{shard.size:,} bytes are needed of a capacity of {self.capacity:,}; {len(complete):,} shards in use take "
            f"{sum(complete):,}, {len(arriving):,} being fetched {sum(arriving):,}.",
            "Give the cache a larger capacity, or let less be in use at once: a smaller window, fewer runs.",
        )


class _Progress:
    """Whether a number has changed within the last `patience` seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._last: int | None = None
        self._changed = time.monotonic()

    def seen(self, value: int) -> bool:
        now = time.monotonic()
        if value != self._last:
            self._last, self._changed = value, now
        return now - self._changed < self._patience
