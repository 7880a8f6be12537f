"""Progress of long commands: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]
"""To be called with the number of images of each finished shard."""


@contextmanager
def shard_progress(
    console: Console, verb: str, shards: int, images: int, workers: int, finished: int = 0, unit: str = "shards"
) -> Iterator[Advance]:
    """Show how far a command over shards has come.

    Args:
        console: where to; a terminal gets a live bar.
        verb: first word of the line, such as "writing".
        shards: number in all.
        images: number in all, over which the bar runs.
        workers: number of processes, shown to the person.
        finished: shards that need no work.
        unit: what to call the shards, where they are files of another kind.
    """
    started = time.perf_counter()
    done_shards, done_images = finished, 0

    def status() -> str:
        rate = done_images / max(time.perf_counter() - started, 1e-9)
        return f"{done_shards:,}/{shards:,} {unit}   {rate:,.0f} img/s"

    if not console.is_terminal:
        last_line = started

        def advance(count: int) -> None:
            nonlocal done_shards, done_images, last_line
            done_shards, done_images = done_shards + 1, done_images + count
            if time.perf_counter() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.perf_counter()
                console.out(f"{verb:<10}{status()}   {workers} workers", highlight=False)

        yield advance
        return

    columns = (
        TextColumn(f"{verb:<9}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn(f"{workers} workers"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=images, status=status())

        def advance_bar(count: int) -> None:
            nonlocal done_shards, done_images
            done_shards, done_images = done_shards + 1, done_images + count
            bar.update(task, advance=count, status=status())

        yield advance_bar
