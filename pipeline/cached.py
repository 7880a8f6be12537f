"""Encoded images out of remote shards: fetched ahead in the order of use, pinned in the host's cache while in use.

Every rank runs a few threads that walk its own windows. `shards.cache` makes one download per shard of what all ranks
of a host ask for, so a thread that meets a shard on its way goes on to the next one and comes back.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.reader import Encoded
from pipeline.window import Block
from shards.cache import Pinned, ShardCache
from shards.errors import UserError
from shards.remote import RemoteSplit

DOWNLOADS = 4
"""At a time and rank: a single connection seldom fills the line."""

NO_WINDOW = -1
"""Instead of the last position that needs a shard: an order without windows may come back to it at any time."""

MOST_OPEN = 4096
"""Shards kept open without a window that needs them, as far as the limit of open files allows."""

_SECONDS_BEFORE_RETRY = 0.2
_SECONDS_TO_CLOSE = 5.0


@dataclass
class _Held:
    """A pinned shard."""

    pinned: Pinned
    needed_until: int
    """Last position whose window has samples of it, or NO_WINDOW."""
    users: int = 0
    """Reads that are under way."""


@dataclass
class _Wanted:
    shard: int
    needed_until: int


class CachedReader:
    """Random access to one remote split through the host's cache.

    Args:
        split: the opened index.
        cache: of this host.
        blocks: what will be read, in the order of first use; may be endless.
        start: the position that reading begins at.
        lookahead: how many positions ahead shards are fetched.
        next_use: the next position that needs a shard, by its sha256; None if none is known. Decides what is removed
            when the cache is full.
    """

    def __init__(
        self,
        split: RemoteSplit,
        cache: ShardCache,
        blocks: Iterator[Block],
        *,
        start: int,
        lookahead: int,
        next_use: Callable[[str, int], int | None] = lambda digest, position: None,
    ) -> None:
        self.split = split
        self._cache = cache
        self._blocks = blocks
        self._next_block = next(blocks, None)
        self._lookahead = lookahead
        self._position = start
        self._expected = start
        self._next_use = next_use
        self._wanted: deque[_Wanted] = deque()
        self._fetching: set[int] = set()
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._failure: Exception | None = None
        self._closed = False
        self._most_idle = min(MOST_OPEN, _raise_open_files() // 4)
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._fetch_ahead, name=f"fetch-{number}", daemon=True)
            for number in range(DOWNLOADS)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, sample: int) -> Encoded:
        """See `reader.Reader.read`; waits for the shard where it has not arrived."""
        shard, row = self.split.locate(sample)
        held = self._hold(shard)
        try:
            record = held.pinned.samples[row]
            size, offset = int(record["size"]), int(record["offset"])
            data = os.pread(held.pinned.descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self.describe(sample)}: cannot be read: {error}") from None
        finally:
            self._let_go(held)
        if len(data) != size:
            raise UserError(
                f"{self.describe(sample)}: the cached shard ends after {len(data):,} of the image's {size:,} bytes",
                f"It is damaged. Remove it, it will be fetched again: {held.pinned.path}",
            )
        return Encoded(data, int(record["label"]))

    def expect(self, position: int) -> None:
        """Have fetched what is read soon, though it may lie beyond the lookahead."""
        with self._changed:
            self._expected = max(self._expected, position)
            self._changed.notify_all()

    def passed(self, position: int) -> None:
        """Unpin what lies behind, and fetch what comes into sight."""
        with self._changed:
            self._position = position
            for shard in [shard for shard, held in self._held.items() if NO_WINDOW < held.needed_until < position]:
                if not self._held[shard].users:
                    self._held.pop(shard).pinned.close()
            self._changed.notify_all()

    def describe(self, sample: int) -> str:
        """URL, and key where the shard has arrived."""
        return self.split.describe(sample)

    def mend(self) -> str:
        """How to find all damaged images."""
        return "List every damaged image on a host that has the shards with: shards verify DIR --decode"

    def interrupt(self) -> None:
        """End the threads that fetch, and the waiting for them; a request to a server is waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Unpin everything; what has been fetched of a shard is kept, and gone on with later."""
        self.interrupt()
        for thread in self._threads:
            thread.join(_SECONDS_TO_CLOSE)  # they are daemons: one that waits for a server cannot hold up the end
        for held in self._held.values():
            held.pinned.close()
        self._held.clear()

    def _hold(self, shard: int) -> _Held:
        with self._changed:
            while shard in self._fetching and self._failure is None and not self._closed:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise RuntimeError("the reader was closed while it waited for a shard")
            if shard in self._held:
                self._held.move_to_end(shard)
                self._held[shard].users += 1
                return self._held[shard]
            self._fetching.add(shard)
        pinned = None
        try:
            pinned = self.split.pin(self._cache, shard, self._priority, wait=True)
        finally:
            self._fetched(shard, pinned, NO_WINDOW, users=1)
        return self._held[shard]

    def _let_go(self, held: _Held) -> None:
        with self._changed:
            held.users -= 1
            idle = [shard for shard, other in self._held.items() if other.needed_until == NO_WINDOW and not other.users]
            for shard in idle[: max(0, len(idle) - self._most_idle)]:
                self._held.pop(shard).pinned.close()

    def _fetched(self, shard: int, pinned: Pinned | None, needed_until: int, users: int = 0) -> None:
        with self._changed:
            self._fetching.discard(shard)
            if pinned is not None and self._closed:
                pinned.close()
            elif pinned is not None:
                # it may have been asked for ahead, and read before its turn came
                needed = [wanted.needed_until for wanted in self._wanted if wanted.shard == shard]
                self._held[shard] = _Held(pinned, max(needed_until, *needed, NO_WINDOW), users)
            self._changed.notify_all()

    def _look_ahead(self) -> None:
        """Put the shards of every block that has come into sight on the list."""
        sight = max(self._position + self._lookahead, self._expected)
        while self._next_block is not None and self._next_block.first <= sight:
            block = self._next_block
            for shard in dict.fromkeys(piece.shard for piece in block.pieces):
                if shard in self._held:
                    self._held[shard].needed_until = max(self._held[shard].needed_until, block.last)
                else:
                    self._wanted.append(_Wanted(shard, block.last))
            self._next_block = next(self._blocks, None)

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                while (wanted := self._next_wanted()) is None and not self._closed:
                    self._changed.wait()
                if wanted is None or self._closed:
                    return
                self._fetching.add(wanted.shard)
            pinned = None
            try:
                pinned = self.split.pin(self._cache, wanted.shard, self._priority, wait=False)
            except Exception as error:  # raised by whoever waits for an image: nobody else would hear of it
                self._failure = self._failure or error
            finally:
                self._fetched(wanted.shard, pinned, wanted.needed_until)
            if pinned is None and self._failure is None:
                with self._changed:  # another process fetches it, or there is no room yet
                    self._wanted.append(wanted)
                    self._changed.wait(_SECONDS_BEFORE_RETRY)

    def _next_wanted(self) -> _Wanted | None:
        self._look_ahead()
        for _ in range(len(self._wanted)):
            wanted = self._wanted.popleft()
            if wanted.shard in self._held:
                held = self._held[wanted.shard]
                held.needed_until = max(held.needed_until, wanted.needed_until)
            elif NO_WINDOW < wanted.needed_until < self._position:
                continue
            elif wanted.shard in self._fetching:
                self._wanted.append(wanted)
            else:
                return wanted
        return None

    def _priority(self, digest: str) -> int | None:
        return self._next_use(digest, self._position)


def _raise_open_files() -> int:
    """Allow this process as many open files as it may allow itself; returns the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft
