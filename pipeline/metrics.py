"""A run's record as a file: `RUN/metrics.jsonl`, one JSON object per line, written as it happens.

Every line has `event` and `time` (wall clock, ISO-8601 UTC with milliseconds). Shares are 0 … 1, accuracies are
percent, durations are seconds, `samples` counts training images consumed since the run began, `epoch` is
samples / train_samples. A number that was not finite is null. Of images that `recipe.mixing` mixed, the top1 of
`train` and `epoch` is of the class with the larger share. What the time of updates went into is of rank 0: `data_wait`
stood still for images, `communication` for gradients of other ranks (not what goes on beside the backward pass; but
waiting for a slower rank, of whatever it is slow), `compute` is the rest. Null where it was not measured.

    start       config overrides model train_samples val_samples epochs seed world_size train_batch_size micro_batch
                logical_workers accumulation workers_at_once reference_lr reference_batch peak_lr steps_per_epoch steps
                order decoder precision loss index_digest run device host plan versions resumed_from
    resume      samples path world_size saved_world_size: of the process that saved, or null
    train       step samples epoch loss [top1] lr images_per_second compute communication data_wait skipped_steps
                step_seconds
    epoch       epoch samples images loss [top1] seconds images_per_second compute communication data_wait
    evaluation  epoch samples top1 top5 loss images seconds [precise_bn precise_bn_seconds: training images that BN's
                statistics were recomputed over, and how long it took] [ema_top1 ema_top5 ema_loss ema_seconds: of
                the averaged weights] [weights: "ema" where they alone were measured, and all figures are theirs]
    decode      samples split images, and those of tally.FIELDS that are not 0: what decoded the images of an epoch
                or an evaluation, of all ranks, with those that only fill its last micro-batches
    checkpoint  samples path seconds held: written when it is on disk; the training stood still for `held` seconds
    skip        step skipped loss_scale: updates withheld by an overflow since the last report
    warning     kind message …
    stopped     step samples why: saved before the end, because somebody wanted it to stop
    diverged    step samples epoch why: ended there, because the loss or a weight was not finite any more, or because
                float16 updates were withheld one after the other
    fault       kind rank host step message launch: a launch that failed; written by the launcher after it has ended
    launch      hosts step code message: likewise of every launch of `onehour launch` that others followed or could have
    finished    samples top1 top5 images [ema_top1 ema_top5] median_top1 median_epochs seconds steps_share

The file is only ever appended to; `pipeline.record` reads it as the history of one run.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from shards.errors import UserError

FILE_NAME = "metrics.jsonl"

Event = dict[str, Any]

_NUMBERS: dict[str, tuple[str, ...]] = {
    "train": ("samples", "epoch"),
    "epoch": ("samples", "epoch"),
    "evaluation": ("samples", "epoch", "top1"),
    "resume": ("samples",),
    "diverged": ("samples", "epoch"),
}
"""Fields without which an event cannot be placed or counted."""


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: scalars of NumPy and torch unwrapped, paths as text, NaN and ±inf as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None  # NaN is not JSON; jq and most readers would refuse the whole line
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written to the record: {value!r}")


def _mend_last_line(path: Path) -> None:
    """Cut off what a killed writer left of its last line, or end the line where only the newline is missing."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        complete = content.rfind(b"\n") + 1
        if _parse(content[complete:]) is None:
            file.truncate(complete)
        else:
            file.write(b"\n")


class MetricsWriter:
    """Appends events to a record, each line flushed on its own: a kill costs at most the line being written.

    Args:
        path: the file, usually `RUN/metrics.jsonl`; it and its folder are made when missing. A partial last line
            of an earlier process is cut off first.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(self.path)
        self._file: BinaryIO = self.path.open("ab")

    def write(self, event: str, /, **fields: Any) -> None:
        """Write one event with the time of now.

        Raises:
            ValueError: `fields` holds `event` or `time`.
            UserError: the file cannot be written, as on a full disk.
        """
        if clash := {"event", "time"} & fields.keys():
            raise ValueError(f"the record's own fields cannot be given: {', '.join(sorted(clash))}")
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"event": event, "time": now} | _plain(fields), ensure_ascii=False, allow_nan=False)
        # lone surrogates come from file names that are not UTF-8
        try:
            self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}",
                "What is saved is whole: make room, then run the same command again.",
            ) from error

    def close(self) -> None:
        """Close the file; further writes raise ValueError."""
        with contextlib.suppress(OSError):  # what could not be written has been told of
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes) -> Event | None:
    """The event on a line, or None when the line is broken. No strict prefix of an object parses."""
    try:
        value = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def is_number(value: Any) -> bool:
    """Whether a field holds a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_metrics(path: Path | str) -> list[Event]:
    """The events of a record, in the order they were written.

    A last line without its newline that does not parse is what a kill leaves: it is dropped. Raises UserError when
    the file is missing, or any other line is broken or lacks a number that its event needs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file", "A run writes it from its first step on.")
    *lines, rest = path.read_bytes().split(b"\n")
    if _parse(rest) is not None:
        lines.append(rest)
    events = []
    for number, line in enumerate(lines, start=1):
        event = _parse(line)
        if event is None:
            raise UserError(
                f"{path}:{number}: not a line of a run's record",
                f"Found {line[:60]!r}; expected one JSON object with an “event”.",
                "Only a last line may be broken off. If the file was edited, delete this line.",
            )
        for field in _NUMBERS.get(event["event"], ()):
            if not is_number(event.get(field)):
                raise UserError(
                    f"{path}:{number}: {event['event']} event without the number “{field}”",
                    f"Found {event.get(field)!r}. If the file was edited, delete this line.",
                )
        events.append(event)
    return events


def event_time(event: Event) -> datetime | None:
    """When the event was written (UTC), or None where the record does not say."""
    try:
        moment = datetime.fromisoformat(event["time"])
    except (KeyError, TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
