"""Encoded images out of remote shards: fetched ahead in the order of use, pinned in the host's cache while in use.

Every rank runs a few threads that walk its own windows. `shards.cache` makes one download per shard of what all ranks
of a host ask for, so a thread that meets a shard on its way goes on to the next one and comes back. Where there is no
room it does not: a later window would take what an earlier one waits for, and the ranks wait for each other.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pipeline.pins import NO_WINDOW, Held, Wanted
from pipeline.reader import MOST_OPEN, NO_INDEX, NOT_OPEN, Encoded, Located, raise_open_files
from pipeline.window import Block
from shards.cache import Pinned, ShardCache
from shards.crop_index import open_index
from shards.errors import UserError
from shards.jpeg import EXTENT_DTYPE
from shards.remote import RemoteSplit

DOWNLOADS = 4
"""At a time and rank, of what is fetched ahead: a single connection seldom fills the line."""

FILES_OF_A_SHARD = 2
"""The tar and its crop index."""

_SECONDS_BEFORE_RETRY = 0.2
_SECONDS_TO_CLOSE = 3.0


class CachedReader:
    """Random access to one remote split through the host's cache.

    Reads only wait; threads of its own pin the shards, first what a read waits for, then what comes into sight.

    Args:
        split: the opened index.
        cache: of this host.
        blocks: what will be read, in the order of first use; may be endless.
        start: the position that reading begins at.
        lookahead: how many positions ahead shards are fetched.
        next_use: the next position, at or after a given one, that needs a shard, by its sha256; None if none is
            known. Decides what is removed when the cache is full.
    """

    def __init__(
        self,
        split: RemoteSplit,
        cache: ShardCache,
        blocks: Iterator[Block],
        *,
        start: int,
        lookahead: int,
        next_use: Callable[[str, int], int | None],
    ) -> None:
        self.split = split
        self._cache = cache
        self._blocks = blocks
        self._next_block = next(blocks, None)
        self._lookahead = lookahead
        self._position = self._expected = start
        self._next_use = next_use
        self._demanded: list[int] = []
        self._upcoming: list[Wanted] = []
        self._arriving: set[int] = set()
        self._held: dict[int, Held] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._failure: Exception | None = None
        self._closed = False
        self._most_idle = min(MOST_OPEN, raise_open_files() // 4) // FILES_OF_A_SHARD
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._fetch, args=(number == 0,), name=f"fetch-{number}", daemon=True)
            for number in range(1 + DOWNLOADS)
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
            self._let_go(shard, held)
        if len(data) != size:
            raise UserError(
                f"{self.describe(sample)}: the cached shard ends after {len(data):,} of the image's {size:,} bytes",
                f"It is damaged. Remove it, it will be fetched again: {held.pinned.path}",
            )
        return Encoded(data, int(record["label"]))

    @contextmanager
    def extents(self, samples: np.ndarray) -> Iterator[Located]:
        """See `reader.Reader.extents`; waits until each shard has been there, one that has gone again is not open."""
        shards = np.searchsorted(self.split.first, samples, side="right") - 1
        rows = samples - self.split.first[shards]
        found = np.zeros(len(samples), EXTENT_DTYPE)
        found["descriptor"], found["index_descriptor"], found["row"] = NOT_OPEN, NO_INDEX, rows
        labels = np.zeros(len(samples), np.int64)
        held = self._hold_present(np.unique(shards).tolist())
        try:
            for shard, hold in held.items():
                here = np.flatnonzero(shards == shard)
                records = hold.pinned.samples[rows[here]]
                found["offset"][here] = records["offset"]
                found["size"][here] = records["size"]
                found["descriptor"][here] = hold.pinned.descriptor
                found["index_descriptor"][here] = hold.index
                labels[here] = records["label"]
            yield Located(found, labels)
        finally:
            with self._changed:
                for shard, hold in held.items():
                    hold.users -= 1
                    self._settle(shard, hold)

    def expect(self, position: int) -> None:
        """Have fetched what is read soon, though it may lie beyond the lookahead."""
        with self._changed:
            self._expected = max(self._expected, position)
            self._changed.notify_all()

    def passed(self, position: int) -> None:
        """Unpin what lies behind, and fetch what comes into sight."""
        with self._changed:
            self._position = position
            for shard in [s for s, held in self._held.items() if held.is_behind(position)]:
                self._held.pop(shard).close()
            self._changed.notify_all()

    def next_use(self, digest: str) -> int | None:
        """When this reader needs a shard next, as a position; None if it is not known to."""
        return self._next_use(digest, self._position)

    def describe(self, sample: int) -> str:
        """URL, and key where the shard has arrived."""
        return self.split.describe(sample)

    def mend(self) -> str:
        """How to find all damaged images."""
        return "List every damaged image on a host that has the shards with: shards verify DIR --decode"

    def interrupt(self) -> None:
        """End the waiting of reads at once, and the threads when they come back from what they do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Unpin everything; what has been fetched of a shard is kept, and gone on with later."""
        self.interrupt()
        deadline = time.monotonic() + _SECONDS_TO_CLOSE
        for thread in self._threads:
            # they are daemons: one that waits for a server cannot hold up the end
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            for held in self._held.values():
                held.close()
            self._held.clear()

    def _hold(self, shard: int) -> Held:
        with self._changed:
            while shard not in self._held:
                self._wait_for([shard])
            return self._use(shard)

    def _hold_present(self, shards: Sequence[int]) -> dict[int, Held]:
        """Hold several shards, as far as they are there at once after each of them was.

        Nothing is held while this waits: what it held could be the room that the rest waits for.
        """
        with self._changed:
            waiting = set(shards)
            while waiting := waiting - self._held.keys():
                self._wait_for(sorted(waiting))
            return {shard: self._use(shard) for shard in shards if shard in self._held}

    def _wait_for(self, shards: Sequence[int]) -> None:
        """Ask for shards that are not there, and wait until something has changed; the lock is held."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("the reader was closed while it waited for a shard")
        new = [shard for shard in shards if shard not in self._demanded]
        if new:
            self._demanded += new
            self._changed.notify_all()
        self._changed.wait()

    def _use(self, shard: int) -> Held:
        held = self._held[shard]
        held.users += 1
        self._idle.pop(shard, None)
        return held

    def _let_go(self, shard: int, held: Held) -> None:
        with self._changed:
            held.users -= 1
            self._settle(shard, held)

    def _settle(self, shard: int, held: Held) -> None:
        """Keep what nobody uses and no window needs open as long as there is room for it."""
        if held.users or held.needed_until != NO_WINDOW:
            return
        self._idle[shard] = None
        while len(self._idle) > self._most_idle:
            oldest, _ = self._idle.popitem(last=False)
            self._held.pop(oldest).close()

    def _fetch(self, demands_only: bool) -> None:
        while True:
            with self._changed:
                while (wanted := self._next_wanted(demands_only)) is None and not self._closed:
                    self._changed.wait(_SECONDS_BEFORE_RETRY if self._upcoming and not demands_only else None)
                if self._closed or wanted is None:
                    return
                self._arriving.add(wanted.shard)
            pinned, index = None, NO_INDEX
            try:
                pinned = self._pin(wanted)
                if pinned is not None:
                    shard = self.split.shards[wanted.shard]
                    opened = open_index(pinned.path, shard.sha256, shard.samples)
                    index = NO_INDEX if opened is None else opened
            except Exception as error:  # raised by whoever waits for an image: nobody else would hear of it
                self._failure = self._failure or error
                if pinned is not None:
                    pinned.close()
                    pinned = None
            with self._changed:
                self._arriving.discard(wanted.shard)
                if pinned is not None:
                    self._take(wanted.shard, Held(pinned, index))
                self._changed.notify_all()

    def _pin(self, wanted: Wanted) -> Pinned | None:
        pinned = self.split.pin(self._cache, wanted.shard, self.next_use, wait=False)
        if pinned is not None:
            return pinned
        wanted.is_elsewhere = self._cache.is_arriving(self.split.shards[wanted.shard])
        if not wanted.is_demanded:
            wanted.not_before = time.monotonic() + _SECONDS_BEFORE_RETRY
            return None
        if not wanted.is_elsewhere:
            self._drop_lookahead()
        return self.split.pin(self._cache, wanted.shard, self.next_use, wait=True)

    def _drop_lookahead(self) -> None:
        """Give the room of what nobody waits for to what somebody waits for; it will be asked for again."""
        with self._changed:
            for shard, held in list(self._held.items()):
                if held.needed_from > self._expected and not held.users:
                    self._held.pop(shard).close()
                    self._idle.pop(shard, None)
                    self._upcoming.append(Wanted(shard, held.needed_from, held.needed_until))
            self._upcoming.sort(key=lambda wanted: wanted.needed_from)

    def _take(self, shard: int, held: Held) -> None:
        if self._closed:
            held.close()
            return
        if shard in self._demanded:
            self._demanded.remove(shard)
        windows = [wanted for wanted in self._upcoming if wanted.shard == shard]
        self._upcoming = [wanted for wanted in self._upcoming if wanted.shard != shard]
        held.needed_from = min((wanted.needed_from for wanted in windows), default=NO_WINDOW)
        held.needed_until = max((wanted.needed_until for wanted in windows), default=NO_WINDOW)
        self._held[shard] = held
        self._settle(shard, held)

    def _next_wanted(self, demands_only: bool) -> Wanted | None:
        """What a thread should pin now; None if there is nothing, or nothing that may go before its turn."""
        for shard in self._demanded:
            if shard not in self._arriving:
                return Wanted(shard, self._expected, NO_WINDOW, is_demanded=True)
        if demands_only:
            return None
        self._look_ahead()
        self._upcoming = [wanted for wanted in self._upcoming if not wanted.is_behind(self._position)]
        now = time.monotonic()
        for wanted in self._upcoming:
            if wanted.shard in self._arriving:
                continue
            if now >= wanted.not_before:
                return wanted
            if not wanted.is_elsewhere:
                return None  # there was no room: what is needed later must not take it
        return None

    def _look_ahead(self) -> None:
        """Put the shards of every block that has come into sight on the list."""
        sight = max(self._position + self._lookahead, self._expected)
        while self._next_block is not None and self._next_block.first <= sight:
            block = self._next_block
            for shard in dict.fromkeys(piece.shard for piece in block.pieces):
                if shard in self._held and block.last != NO_WINDOW:
                    self._idle.pop(shard, None)
                    self._held[shard].needed_until = max(self._held[shard].needed_until, block.last)
                elif shard not in self._held:
                    self._upcoming.append(Wanted(shard, block.first, block.last))
            self._next_block = next(self._blocks, None)
