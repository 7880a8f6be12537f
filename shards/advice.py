"""What the rates that `shards bench` measured mean, and how they are printed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

SEQUENTIAL, WINDOW, RANDOM = "sequential", "window", "random"

WINDOW_SHARDS = 16
"""As `recipe.order.window_shards` has it by default."""

HEADROOM = 1.5
"""Storage should be that much faster than the demand: other hosts and checkpoints use it too."""

_SATURATED = 0.9
_TITLES = {SEQUENTIAL: "whole shards", WINDOW: "windowed order", RANDOM: "uniform order"}


def advise(report: dict[str, Any]) -> dict[str, Any]:
    """What the measurements mean for the order of the samples and the number of threads.

    Args:
        report: as `bench` makes it.

    Returns:
        ``saturating_threads``, ``random_to_sequential``, ``order`` (what `recipe.order.kind` should be, or None if
        nothing can be said), and ``advice`` in words.
    """
    ways = {(way["order"], way["threads"]): way["images_per_second"] for way in report["measurements"] if way["cold"]}
    random = {threads: rate for (order, threads), rate in ways.items() if order == RANDOM}
    best = max(random.values())
    saturating = min(threads for threads, rate in random.items() if rate >= _SATURATED * best)
    (sequential,) = (rate for (order, _), rate in ways.items() if order == SEQUENTIAL)
    (window,) = (rate for (order, _), rate in ways.items() if order == WINDOW)
    advice = []
    if saturating == max(random) and len(random) > 1:
        advice.append(f"{saturating} threads were fastest, and the most that were tried: try more with --threads.")
    else:
        advice.append(f"{saturating} threads read {random[saturating]:,.0f} images/s; more gain less than a tenth.")
    if not report["page_cache_dropped"]:
        advice += [
            "The page cache could not be emptied (a file system in memory, shards in use, or no right to look):",
            "the disk itself may be slower than the rates above.",
        ]
    order, words = _choose(report, best, window, sequential)
    return {
        "saturating_threads": saturating,
        "random_to_sequential": best / sequential,
        "order": order,
        "advice": [*advice, *words],
    }


def _choose(report: dict[str, Any], best: float, window: float, sequential: float) -> tuple[str | None, list[str]]:
    demand = report["demand"]
    if demand is None:
        return None, [
            f"Uniform order, the default for local shards, is fine for hosts that train on up to "
            f"{best / HEADROOM:,.0f} images/s each",
            f"({best:,.0f} less a third for headroom). Say with --demand what yours need.",
        ]
    needed = demand * HEADROOM
    asked = f"{demand:,.0f} images/s × {HEADROOM:g} for headroom = {needed:,.0f}"
    if best >= needed:
        return "uniform", [f"{asked}: uniform order gives {best:,.0f}. Leave recipe.order.kind at uniform."]
    fits = report["memory_available"] is not None and report["bytes"] < 0.8 * report["memory_available"]
    warm = [way["images_per_second"] for way in report["measurements"] if not way["cold"] and way["order"] == RANDOM]
    if fits and warm and max(warm) >= needed:
        return "uniform", [
            f"{asked}: uniform order gives {best:,.0f} from the disk, {max(warm):,.0f} from memory.",
            f"All {report['bytes'] / 1e9:,.1f} GB fit into {report['memory_available'] / 1e9:,.1f} GB of free memory: "
            "the first epoch is slower, later ones are not. Leave recipe.order.kind at uniform.",
        ]
    if window >= needed:
        return "window", [
            f"{asked}: uniform order gives {best:,.0f}, windowed order {window:,.0f}.",
            'Set "order": {"kind": "window"} in the recipe, or copy the shards to a faster disk.',
        ]
    faster = "window" if window > 1.1 * best else "uniform"
    words = [f"{asked}: uniform order gives {best:,.0f}, windowed order {window:,.0f}: training would wait for data."]
    if sequential >= needed:
        words.append(
            f"Whole shards come at {sequential:,.0f} images/s: copied to a local disk, or streamed "
            "(recipe.stream), they are fast enough."
        )
    else:
        words.append(f"Whole shards come at {sequential:,.0f} images/s: no order helps. Copy them to a faster disk.")
    return faster, words


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what `bench` measured, and the advice."""

    def line(name: str, text: str) -> None:
        console.out(f"{name:<10}{text}", highlight=False)

    line(
        "data",
        f"{report['place']} · {report['shards']:,} shards · {report['images']:,} images · "
        f"{report['bytes'] / 1e9:,.2f} GB · {report['bytes_per_image'] / 1e3:,.1f} kB per image",
    )
    console.out("")
    table = Table("", box=None, pad_edge=False)
    for heading in ("threads", "images/s", "slowest–fastest", "MB/s", "of whole shards"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cold in (True, False):
        ways = [way for way in report["measurements"] if way["cold"] is cold]
        if not ways:
            continue
        (sequential,) = (way["images_per_second"] for way in ways if way["order"] == SEQUENTIAL)
        emptied = report["page_cache_dropped"]
        table.add_row("from memory" if not cold else "from disk" if emptied else "from disk?")
        for way in ways:
            table.add_row(
                f"  {_TITLES[way['order']]}",
                f"{way['threads']}",
                f"{way['images_per_second']:,.0f}",
                f"{min(way['rounds']):,.0f}–{max(way['rounds']):,.0f}",
                f"{way['bytes_per_second'] / 1e6:,.0f}",
                f"{way['images_per_second'] / sequential:.2f}",
            )
    console.print(table)
    console.out("")
    line("method", f"medians of {report['rounds']} interleaved rounds of at most {report['seconds_each']:.1f} s")
    line("", f"whole shards: 1 MiB reads from end to end; windowed: {WINDOW_SHARDS} shards at a time")
    if report["page_cache_dropped"]:
        line("", "disk: page cache emptied, and checked; memory of a virtual or network disk's host counts as disk")
    for number, words in enumerate(report["advice"]):
        line("advice" if number == 0 else "", words)
