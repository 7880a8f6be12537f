"""A run as its weights came about: its record folded into one history, and the error that is reported of it.

A run that was killed and resumed did some images twice; `RunRecord` keeps what the weights come from and drops the
rest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.metrics import FILE_NAME, Event, event_time, is_number, read_metrics
from shards.errors import UserError

OF_THE_LAUNCHER = ("fault", "launch")
"""Events that the launcher wrote, once all ranks had ended."""


@dataclass(frozen=True)
class MedianError:
    """The median top-1 error of a run's last epochs.

    `error` is percent; `epochs` are the positions (in epochs) of the evaluations that were used, ascending, and
    `wanted` how many should have been; `images` are the distinct numbers of images they were measured on.
    """

    error: float
    epochs: tuple[float, ...]
    wanted: int
    images: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent: 100 − error."""
        return 100 - self.error

    @property
    def used(self) -> int:
        """How many evaluations the median is over; fewer than `wanted` in a short or unfinished run."""
        return len(self.epochs)


def median_last_epochs(evaluations: Iterable[Mapping[str, Any]], n: int = 5) -> MedianError | None:
    """The median top-1 error over the final `n` epoch evaluations (paper §5.1: "median error of final 5 epochs").

    The evaluation of an epoch is the first one at or after its end: the update that ends an epoch usually reaches
    a little into the next. Evaluations within an epoch, and one before training, are not used, unless a run of less
    than an epoch has nothing else: then its last one is. Returns None where there is no evaluation at all.

    Args:
        evaluations: the `evaluation` events: `epoch` (float), `top1` (percent), `images`. Any order.
        n: how many epochs; with fewer evaluations all of them are used, see `MedianError.used`.
    """
    by_epoch: dict[int, Mapping[str, Any]] = {}
    ordered = sorted(evaluations, key=lambda evaluation: evaluation["epoch"])
    for evaluation in ordered:
        # epochs are ratios, rounded when written: 89.9999 is the end of epoch 90
        by_epoch.setdefault(math.floor(evaluation["epoch"] + 1e-3), evaluation)
    by_epoch.pop(0, None)
    last = [by_epoch[epoch] for epoch in sorted(by_epoch)][-n:] or ordered[-1:]
    if not last:
        return None
    return MedianError(
        error=statistics.median(100 - evaluation["top1"] for evaluation in last),
        epochs=tuple(float(evaluation["epoch"]) for evaluation in last),
        wanted=n,
        images=tuple(sorted({int(e["images"]) for e in last if is_number(e.get("images"))})),
    )


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run as its weights came about, whatever happened on the way.

    `events` is everything in the order written. `start` is the last `start` event. `train`, `epochs` and
    `evaluations` hold what was not superseded: after a resume at S samples, earlier ones beyond S were done again.
    `finished` is None unless the last process wrote that it finished, and `diverged` unless it wrote that the training
    came apart. `repeated` counts the images that were trained on again after resumes.
    """

    folder: Path
    events: list[Event]
    start: Event
    train: list[Event]
    epochs: list[Event]
    evaluations: list[Event]
    finished: Event | None
    repeated: int
    diverged: Event | None = None

    @classmethod
    def read(cls, folder: Path | str) -> RunRecord:
        """The record of a run folder. Raises UserError: no folder, no record in it, or a broken record."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run folder", "Give the folder that training wrote.")
        if not (folder / FILE_NAME).is_file():
            raise UserError(
                f"{folder}: no {FILE_NAME} in it, so it is not a run",
                "Give the folder that training wrote; it begins its record with the first process.",
            )
        return cls.fold(read_metrics(folder / FILE_NAME), folder)

    @classmethod
    def fold(cls, events: Sequence[Event], folder: Path | str) -> RunRecord:
        """Fold events into one history. Raises UserError when no process recorded that it started."""
        folder = Path(folder)
        kept: dict[str, list[Event]] = {"train": [], "epoch": [], "evaluation": []}
        start: Event | None = None
        finished: Event | None = None
        diverged: Event | None = None
        reached, repeated = 0, 0
        for event in events:
            kind = event["event"]
            if kind in kept:
                kept[kind].append(event)
                reached = max(reached, event["samples"])
            elif kind == "finished":
                finished = event
            elif kind == "diverged":
                diverged = event
            elif kind == "start":
                start, finished, diverged = event, None, None
                position = event.get("resumed_from")
                # a start from nothing in a used folder was asked for: what was there before is another run's
                keep = -1 if position is None else position
                kept = {name: [e for e in old if e["samples"] <= keep] for name, old in kept.items()}
                repeated += 0 if position is None else max(0, reached - position)
                reached = position or 0
        if start is None:
            raise UserError(f"{folder / FILE_NAME}: no process recorded its start, so the run is unknown")
        histories = (kept["train"], kept["epoch"], kept["evaluation"])
        return cls(folder, list(events), start, *histories, finished, repeated, diverged)

    @property
    def samples(self) -> int:
        """Training images behind the present weights, as far as the record goes."""
        last = [events[-1]["samples"] for events in (self.train, self.epochs, self.evaluations) if events]
        return max([*last, (self.finished or {}).get("samples") or 0, self.start.get("resumed_from") or 0])

    def of_last_process(self, events: Sequence[Event]) -> list[Event]:
        """Those of `events` that the last process of the run wrote; the ones before may have been of other ranks."""
        return [event for event in events if event["samples"] > (self.start.get("resumed_from") or 0)]

    @property
    def epoch(self) -> float:
        """How far the run has come, in epochs."""
        total = self.start.get("train_samples")
        if total:
            return self.samples / total
        return max((event["epoch"] for event in self.train + self.epochs + self.evaluations), default=0.0)

    @property
    def sessions(self) -> list[list[datetime]]:
        """The recorded moments of each process of the run (UTC), as written; not what others wrote after its end."""
        sessions: list[list[datetime]] = []
        for event in self.events:
            moment = event_time(event)
            if moment is None or event["event"] in OF_THE_LAUNCHER:
                continue
            if event["event"] == "start":
                sessions.append([moment])
            elif sessions:
                sessions[-1].append(moment)
        return sessions

    @property
    def seconds(self) -> float:
        """Time spent: as the run measured it, or, when it took several processes, the sum of their sessions.

        The sum includes images that were done twice, and not the pauses between processes. Where a clock was set back
        in between, that moment counts as none.
        """
        sessions = self.sessions
        measured = (self.finished or {}).get("seconds")
        if measured is not None and len(sessions) <= 1:
            return float(measured)
        spans = (later - earlier for session in sessions for earlier, later in pairwise(session))
        return sum(max(0.0, span.total_seconds()) for span in spans)

    def mean_over_time(self, field: str) -> float | None:
        """A field of the `train` (else `epoch`) events, averaged over time spent in steps; None where unknown.

        For `images_per_second` this is all images divided by all seconds.
        """
        for events in (self.train, self.epochs):
            total = weight = 0.0
            before = 0
            for event in events:
                images, before = event["samples"] - before, event["samples"]
                rate, value = event.get("images_per_second") or 0.0, event.get(field)
                if images > 0 and rate > 0 and is_number(value):
                    weight += images / rate
                    total += value * images / rate
            if weight:
                return total / weight
        return None

    def median_error(self, n: int = 5) -> MedianError | None:
        """See `median_last_epochs`."""
        return median_last_epochs(self.evaluations, n)
