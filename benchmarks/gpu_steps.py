"""Steps on data that is on the device already, timed in turns: the sections eager and compiled, and compiling."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_contenders import Contender, allow_tf32, bare, forget, make_engine, ours, resident, synchronise, timms, world
from gpu_points import BARE, ENGINE, FLAT_COPIES, FOREACH, TIMER, TIMM, Point, Say, Settings, brief

LEAST_UPDATES, MOST_UPDATES = 3, 500
"""In a turn."""


def timed(contender: Contender, updates: int) -> float:
    """Seconds of so many updates, waited for at both ends."""
    synchronise()
    began = time.perf_counter()
    for _ in range(updates):
        contender.update()
    synchronise()
    return time.perf_counter() - began


def updates_of(contender: Contender, seconds: float) -> int:
    """How many updates take about so long."""
    one = timed(contender, LEAST_UPDATES) / LEAST_UPDATES
    return max(LEAST_UPDATES, min(MOST_UPDATES, round(seconds / one)))


def in_turns(contenders: dict[str, Contender], rounds: int, seconds: float) -> list[dict[str, float]]:
    """Images per second of each contender in each round.

    The order is turned round with every round, so that a drift falls on all of them alike.
    """
    updates = {name: updates_of(contender, seconds) for name, contender in contenders.items()}
    measured = []
    for number in range(rounds):
        names = list(contenders)[:: -1 if number % 2 else 1]
        measured.append(
            {name: updates[name] * contenders[name].images / timed(contenders[name], updates[name]) for name in names}
        )
    return measured


def measure(point: Point, settings: Settings, contenders: dict[str, Callable[[], Contender]]) -> dict[str, Any]:
    """Build, warm up and time the contenders at a point; one that fails is left out, and the others go on."""
    on_cuda = world().device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    first, built, without = {}, {}, {}
    for name, make in contenders.items():
        try:
            contender = make()
            allow_tf32(point.dtype == "tf32")  # making an engine sets it
            first[name] = timed(contender, 1)
            timed(contender, settings.warm_up)
            built[name] = contender
        except Exception as error:
            traceback.print_exc()
            without[name] = brief(error)
    measured = in_turns(built, settings.rounds, settings.block_seconds)
    return {
        "point": vars(point),
        "rounds": measured,
        "first": first,
        "without": without,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if on_cuda else None,
    }


def contenders_at(point: Point, settings: Settings) -> dict[str, Callable[[], Contender]]:
    """The three; at an eager point of bf16 also the engine with one thing changed."""
    batches = resident(point.images, settings.size)

    def changed(**changes: Any) -> Callable[[], Contender]:
        by_path = {name.replace("__", "."): value for name, value in changes.items()}
        return lambda: ours(make_engine(point, settings, by_path), batches)

    found = {
        BARE: lambda: bare(point, settings, batches),
        ENGINE: changed(),
        TIMM: lambda: timms(point, settings, batches),
    }
    if point.dtype == "bf16" and not point.compiled:
        found |= {
            FOREACH: changed(optimizer__params__fused=None, optimizer__params__foreach=True),
            FLAT_COPIES: changed(recipe__step__overlap=False),
            TIMER: changed(timers__throughput__enabled=True),
        }
    return found


def _measure_all(points: Sequence[Point], settings: Settings, say: Say) -> None:
    for point in points:
        try:
            say(**measure(point, settings, contenders_at(point, settings)))
        except Exception as error:  # the other points may do
            traceback.print_exc()
            say(point=vars(point), failed=brief(error))
        forget()


def eager(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """The section eager."""
    _measure_all(settings.eager, settings, say)


def compiled(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """The section compiled."""
    _measure_all(settings.compiled, settings, say)


def compile(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """Compile the step of a point into the cache that all sections share; nothing is timed but this.

    Args:
        what: the `point`, and whether BN's layers are `ours`; else torch's, which look at one group only.
    """
    from torch._dynamo.utils import counters

    point = Point(**what["point"])
    allow_tf32(False)
    world()
    torch.backends.cudnn.benchmark = False  # others compile beside it: it need not be fast, and there is less memory
    contender = bare(point, settings, resident(point.images, settings.size), point.groups if what["ours"] else None)
    seconds = timed(contender, 1)
    found = counters["inductor"]
    say(**what, seconds=seconds, from_cache=found["fxgraph_cache_hit"], anew=found["fxgraph_cache_miss"])
