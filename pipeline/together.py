"""Setting up on all ranks at once: one mistake anywhere stops every rank, and nobody trains on other facts.

Each host reads its own copy of the configuration, the shards and the checkpoints. If one of them had other files,
the ranks would still agree on every collective and train quietly on different samples at different rates.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.meeting import RankError
from shards.errors import UserError

Prepared = TypeVar("Prepared")


def prepare_together(
    prepare: Callable[[], Prepared],
    facts: Callable[[Prepared], Mapping[str, Any]],
    mends: Mapping[str, str] | None = None,
) -> Prepared:
    """Run `prepare` on every rank, and compare what came out.

    Args:
        prepare: does this rank's share, without talking to the others.
        facts: what must be the same everywhere, by name; values are compared with ==.
        mends: what to do where a fact differs, by name, for those where something else helps than equal hosts.

    Returns:
        What `prepare` returned on this rank.

    Raises:
        UserError: on every rank alike: all ranks met one, or the facts differ; it names the hosts.
        RankError: on every rank alike: some hosts alone met one, or found another checkpoint.
    """
    prepared, mistake = None, None
    try:
        prepared = prepare()
    except UserError as error:
        mistake = error
    mine = {
        "host": socket.gethostname(),
        "mistake": (mistake.headline, *mistake.details) if mistake is not None else None,
        "facts": dict(facts(prepared)) if prepared is not None else {},
    }
    every: list[Any] = [mine]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    _raise_mistakes(every)
    _raise_differences(every, mends or {})
    assert prepared is not None
    return prepared


def _raise_mistakes(every: list[dict[str, Any]]) -> None:
    hosts_of: dict[tuple[str, ...], list[str]] = {}
    for answer in every:
        if answer["mistake"] is not None:
            hosts_of.setdefault(answer["mistake"], []).append(answer["host"])
    if not hosts_of:
        return
    (headline, *details), hosts = next(iter(hosts_of.items()))
    if len(hosts) < len(every):
        # not what was asked for, but what a host is like: another try, or other hosts, may do
        raise RankError(
            headline, *details, f"On {', '.join(sorted(set(hosts)))} only; {len(every)} ranks stop with it."
        )
    raise UserError(headline, *details)


def _raise_differences(every: list[dict[str, Any]], mends: Mapping[str, str]) -> None:
    lines = []
    differing = set()
    for name, value in every[0]["facts"].items():
        others = {answer["host"]: answer["facts"][name] for answer in every if answer["facts"][name] != value}
        if others:
            found = ", ".join(f"{host} has {other}" for host, other in others.items())
            differing.add(name)
            lines.append(f"{name}: {every[0]['host']} has {value}, {found}")
            if name in mends:
                lines.append(mends[name])
    if lines:
        # a file system may show one host an old listing
        kind = RankError if differing <= {"checkpoint", "checkpoint's digests"} else UserError
        raise kind(
            "the hosts do not agree; they would train different things without noticing",
            *lines,
            "Every host needs the same code, configuration and shards, and one run folder that they share.",
        )
