"""What happened to a run besides training: starts and ends, resumes, skipped updates, warnings, divergence."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pipeline.fault import FAULTS_FOLDER
from pipeline.metrics import Event, event_time
from pipeline.record import RunRecord
from pipeline.report import text

_ROUTINE = ("train", "epoch", "evaluation", "checkpoint")
"""Events that the curves and facts show."""


@dataclass
class Line:
    """A line of the log: an event, what kind of thing it is, and what to say of it.

    Attributes:
        event: the first event that the line is about.
        kind: one word, e.g. "skipped".
        what: what happened.
        detail: where, and with which numbers.
        times: how many of them there were.
    """

    event: Event
    kind: str
    what: str
    detail: str = ""
    times: int = 1


@dataclass(frozen=True)
class LogEntry:
    """A line as text: `when` (UTC), `after` (since the first process began), `epoch`, and what happened."""

    when: str
    after: str
    epoch: str
    kind: str
    what: str
    detail: str


def event_log(record: RunRecord) -> list[LogEntry]:
    """What failed, was skipped, resumed or warned, in order.

    Skipped updates are one line per process, and equal warnings one after the other are one line with their number.
    """
    lines: list[Line] = []
    process: list[Event] = []
    for event in record.events:
        if event["event"] == "start":
            if process and all(earlier["event"] != "finished" for earlier in process):
                lines += _broken_off(process, event.get("resumed_from"))
            process = []
        process.append(event)
        line = _line(event)
        if line is None:
            continue
        if line.kind == "launch" and lines and lines[-1].what == event.get("message"):  # its fault, just told
            line.what = line.what.partition(": ")[0]
        old = _repeated(lines, line)
        if old is None:
            lines.append(line)
        else:
            _join(old, line)
    if not (record.finished or record.diverged):
        how = "not continued yet" if _told(process) else "still running, or stopped without finishing"
        what = f"the record ends here: {how}"
        lines.append(Line(record.events[-1], "unfinished", what))
    begin = event_time(record.events[0])
    return [_entry(record, line, begin) for line in lines]


def _line(event: Event) -> Line | None:
    """What an event says on its own; None for those that are routine."""
    kind = event["event"]
    ranks = f"{event.get('world_size', text.UNKNOWN)} ranks"
    if kind == "start":
        what = "training started" if event.get("resumed_from") is None else "a process started"
        return Line(event, "started", what, f"{ranks} · {event.get('device', text.UNKNOWN)}")
    if kind == "resume":
        what = f"from {event.get('path', 'a checkpoint')}"
        saved_by = event.get("saved_world_size")
        if saved_by not in (None, event.get("world_size")):
            ranks = f"{saved_by} → {ranks}"
        return Line(event, "resumed", what, f"{event['samples']:,} images done · {ranks}")
    if kind == "stopped":
        why = event.get("why", text.UNKNOWN)
        return Line(event, "stopped", f"saved and stopped after update {_step(event)}: {why}")
    if kind == "diverged":
        return Line(event, "diverged", str(event.get("why", "")))
    if kind == "fault":
        where = f"stacks in {FAULTS_FOLDER}/{event['launch']}" if "launch" in event else ""
        return Line(event, "failed", str(event.get("message", "")), where)
    if kind == "launch":
        what = f"the one on {', '.join(event.get('hosts', ()))} ended: {event.get('message', text.UNKNOWN)}"
        return Line(event, "launch", what, f"after update {_step(event)} · exit code {event.get('code', text.UNKNOWN)}")
    if kind == "skip":
        times = event.get("skipped", 1)
        what = f"{times:,} update{'s' * (times != 1)} not applied, overflow: near update {_step(event)}"
        return Line(event, "skipped", what, f"loss scale {_scale(event)}", times)
    if kind == "train" and "loss" in event and event["loss"] is None:
        what = "the training loss is not a finite number from here on"
        return Line(event, "failed", what, f"step {_step(event)}")
    if kind == "finished":
        return Line(event, "finished", "training finished")
    if kind in _ROUTINE or event.get("kind") == "overflow":  # its `skip` event says the same
        return None
    own = ("event", "time", "kind", "message")
    detail = " · ".join(f"{key} {value}" for key, value in event.items() if key not in own)
    return Line(event, "warned" if kind == "warning" else kind, str(event.get("message", "")), detail)


def _repeated(lines: list[Line], line: Line) -> Line | None:
    """The line that `line` repeats: the same warning just before, or one of its kind since the process started."""
    if line.kind == "warned":
        return lines[-1] if lines and (lines[-1].kind, lines[-1].what) == ("warned", line.what) else None
    if line.kind in ("skipped", "failed") and line.event["event"] != "fault":
        old = next((old for old in reversed(lines) if old.kind in (line.kind, "started")), None)
        return old if old and old.kind == line.kind else None
    return None


def _join(old: Line, line: Line) -> None:
    """Let `old` speak for `line` too."""
    old.times += line.times
    if line.kind == "skipped":
        steps = f"first at {_step(old.event)}, last at {_step(line.event)}"
        old.what = f"{old.times:,} updates not applied, overflow: {steps}"
        old.detail = f"loss scale {_scale(old.event)} → {_scale(line.event)}"
    elif line.kind == "warned":
        old.detail = "; last: ".join(filter(None, (f"{old.times:,} times", line.detail)))


def _told(process: list[Event]) -> bool:
    """Whether the record says how a process ended that did not finish."""
    return any(event["event"] in ("stopped", "diverged", "fault") for event in process)


def _broken_off(process: list[Event], resumed_from: int | None) -> list[Line]:
    """The end of a process that another one followed without its having finished; nothing where all is told."""
    reached = max(event.get("samples") or 0 for event in process)
    lost = 0 if resumed_from is None else max(0, reached - resumed_from)
    detail = f"{lost:,} images after the checkpoint are done again" if lost else ""
    if _told(process) and not detail:
        return []
    return [Line(process[-1], "stopped", "the process ended without finishing", detail)]


def _step(event: Event) -> str:
    step = event.get("step")
    return text.UNKNOWN if step is None else str(step)


def _scale(event: Event) -> str:
    scale = event.get("loss_scale")
    return text.UNKNOWN if scale is None else f"{scale:.10g}"


def _entry(record: RunRecord, line: Line, begin: datetime | None) -> LogEntry:
    event, moment = line.event, event_time(line.event)
    samples = event.get("samples", event.get("resumed_from"))
    if samples is None and isinstance(event.get("step"), int):
        samples = event["step"] * record.start.get("train_batch_size", 0)
    total = record.start.get("train_samples")
    return LogEntry(
        when=f"{moment:%Y-%m-%d %H:%M:%S}" if moment else text.UNKNOWN,
        # a clock may have been set back
        after=text.duration((moment - begin).total_seconds()) if moment and begin and moment >= begin else text.UNKNOWN,
        epoch=f"{samples / total:.2f}" if samples and total else "",
        kind=line.kind,
        what=line.what,
        detail=line.detail,
    )
