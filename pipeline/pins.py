"""Shards that a reader of cached shards has pinned, and those that it wants to pin."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.reader import NO_INDEX
from shards.cache import Pinned

NO_WINDOW = -1
"""Instead of the last position that needs a shard: an order without windows may come back to it at any time."""


@dataclass
class Held:
    """A pinned shard."""

    pinned: Pinned
    index: int
    """Descriptor of its crop index, or NO_INDEX."""
    needed_from: int = NO_WINDOW
    """First position whose window has samples of it, or NO_WINDOW."""
    needed_until: int = NO_WINDOW
    """The last one, or NO_WINDOW."""
    users: int = 0
    """Reads that are under way."""

    def is_behind(self, position: int) -> bool:
        """Whether nobody needs it any more, at a position."""
        return not self.users and NO_WINDOW < self.needed_until < position

    def close(self) -> None:
        """Let the shard go, and close its crop index."""
        if self.index != NO_INDEX:
            os.close(self.index)
            self.index = NO_INDEX
        self.pinned.close()


@dataclass
class Wanted:
    """A shard to pin."""

    shard: int
    needed_from: int
    needed_until: int
    is_demanded: bool = False
    """A read waits for it."""
    not_before: float = 0.0
    """When to try again."""
    is_elsewhere: bool = False
    """The last try found another process fetching it, and not the cache full."""

    def is_behind(self, position: int) -> bool:
        """Whether its windows lie before a position."""
        return NO_WINDOW < self.needed_until < position
