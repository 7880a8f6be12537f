"""The sources that `shards prepare` can read, by name. `shards.sources.base` says how to add one."""

from __future__ import annotations

from shards.sources.base import Entry, Source
from shards.sources.demo import Demo
from shards.sources.imagefolder import ImageFolder

__all__ = ["SOURCES", "Entry", "Source"]

SOURCES: dict[str, type[Source]] = {source.name: source for source in (Demo, ImageFolder)}
"""Source classes by their name on the command line."""
