"""The sources that `shards prepare` can read, by name. `shards.sources.base` says how to add one."""

from __future__ import annotations

from shards.sources.base import Entry, Source
from shards.sources.demo import Demo
from shards.sources.imagefolder import ImageFolder
from shards.sources.imagenet_tar import ImageNetTar
from shards.sources.parquet import Parquet
from shards.sources.tiny_imagenet import TinyImageNet
from shards.sources.torchvision import Torchvision
from shards.sources.webdataset import WebDataset

__all__ = ["SOURCES", "Entry", "Source"]

SOURCES: dict[str, type[Source]] = {
    source.name: source for source in (Demo, ImageFolder, ImageNetTar, Parquet, TinyImageNet, Torchvision, WebDataset)
}
"""Source classes by their name on the command line."""
