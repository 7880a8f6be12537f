"""Whose fault it is, from what the ranks last said of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pipeline.fault import Fault

NAMED = 4
"""Ranks that a message about many of them names."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, about once a second.

    Attributes:
        host, pid: where it runs.
        number: of the beat; 0 before the first.
        moves: how often the training has got further.
        phase: what it was doing.
        step: updates done.
        samples: training images behind them.
        stack: the innermost calls of its training, innermost first.
    """

    host: str
    pid: int | None = None
    number: int = 0
    moves: int = 0
    phase: str = "joining"
    step: int = 0
    samples: int = 0
    stack: list[str] = field(default_factory=list)

    def text(self, indent: int | None = None) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=indent)

    @classmethod
    def read(cls, text: str | bytes) -> Beat:
        """From `text`. Raises ValueError, TypeError: it is not a beat."""
        return cls(**json.loads(text))

    def place(self) -> str:
        """Where the rank was, for people."""
        return f"it was last seen {self.phase}, in {' ← '.join(self.stack[:2]) or 'an unknown place'}"


def silent(rank: int, beat: Beat, own_step: int, how: str) -> Fault:
    """A rank is gone.

    Args:
        rank: which.
        beat: its last.
        own_step: updates that the rank which says so has done. Beats are a second apart, but in what one rank has done
            every rank had its part.
        how: it was noticed.
    """
    step = max(beat.step, own_step)
    process = beat.pid if beat.pid is not None else "?"
    what = f"rank {rank} on {beat.host} (process {process}) is gone after update {step:,}: {how}; {beat.place()}"
    return Fault("silent" if rank else "first", rank, beat.host, step, what)


def stuck(beats: Mapping[int, Beat], seconds: float) -> Fault:
    """No rank gets any further: who waits for the others is not at fault, who waits for something else may be.

    Args:
        beats: the last of each rank.
        seconds: in which none got further.
    """
    apart = {rank: beat for rank, beat in sorted(beats.items()) if beat.phase != "updating"} or dict(beats)
    behind = min(beat.step for beat in apart.values())
    apart = {rank: beat for rank, beat in apart.items() if beat.step == behind}
    first = min(apart)
    named = "; ".join(
        f"rank {rank} on {beat.host} after update {beat.step:,}: {beat.place()}"
        for rank, beat in list(apart.items())[:NAMED]
    )
    more = f" (and {len(apart) - NAMED:,} others)" if len(apart) > NAMED else ""
    what = f"no rank has got any further for {seconds:g} s: {named}{more}"
    return Fault("stuck", first if len(apart) == 1 else None, apart[first].host, behind, what)
