"""What the processes do that share a cache in the tests; in a module of its own so that a fresh process finds it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from shards.cache import ShardCache
from shards.errors import UserError
from shards.fetch import Retry
from shards.remote import open_remote

QUICK = Retry(attempts=6, first_delay=0.01, stall=2)

context = get_context("forkserver")
context.set_forkserver_preload(["tests.shards.cache_workers", "fsspec.implementations.http"])


def run(function: Callable[..., Any], arguments: list[tuple]) -> list[Any]:
    """Call a function in one process per tuple of arguments, all at once; what each returns or raises as UserError."""
    with context.Pool(len(arguments), maxtasksperchild=1) as pool:
        return pool.starmap(function, arguments, chunksize=1)


def pin_all(url: str, folder: Path, seed: int) -> dict[int, tuple[bytes, bytes]]:
    """Pin all shards at once, in an order of this process's own: table and tar of each shard."""
    split = open_remote(url, "train", folder)
    cache = ShardCache(folder, sum(shard.size for shard in split.shards), retry=QUICK)
    order = Random(seed).sample(range(len(split.shards)), len(split.shards))
    pins = {number: split.pin(cache, number) for number in order}
    found = {
        number: (pin.samples.tobytes(), os.pread(pin.descriptor, 1 << 30, 0)) for number, pin in sorted(pins.items())
    }
    for pin in pins.values():
        pin.close()
    return found


def work_through(url: str, folder: Path, capacity: int, seed: int, rounds: int) -> int:
    """Read shards in a random order through a cache that holds few of them: images read that had the right bytes."""
    split = open_remote(url, "train", folder)
    cache = ShardCache(folder, capacity, retry=QUICK, patience=60)
    random = Random(seed)
    right = 0
    for _ in range(rounds):
        number = random.randrange(len(split.shards))
        with split.pin(cache, number) as pin:
            for row, record in enumerate(pin.samples):
                data = os.pread(pin.descriptor, int(record["size"]), int(record["offset"]))
                right += data[:16] == expected_start(number, row) and pin.path.exists()
                time.sleep(0.0005)
    return right


def expected_start(shard: int, row: int) -> bytes:
    """How each image of the tests' shards begins."""
    return f"{shard:07d},{row:07d};".encode()


def pin_and_wait(url: str, folder: Path, number: int, capacity: int, ready: Path) -> None:
    """Pin a shard and hold it for ever."""
    split = open_remote(url, "train", folder)
    pin = split.pin(ShardCache(folder, capacity, retry=QUICK), number)
    ready.touch()
    signal.pause()
    pin.close()


def refusal(url: str, folder: Path, capacity: int, number: int, patience: float) -> str:
    """The message with which a shard is refused."""
    split = open_remote(url, "train", folder)
    try:
        split.pin(ShardCache(folder, capacity, retry=QUICK, patience=patience), number)
    except UserError as error:
        return str(error)
    return "not refused"
