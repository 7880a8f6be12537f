"""The event log, line by line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.record import RunRecord
from pipeline.report.events import event_log

BEGIN = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)


def log(folder: Path, *events: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind, what and detail of every line of the log of events a minute apart."""
    facts = {"world_size": 8, "device": "8 × H100", "train_samples": 1000, "train_batch_size": 100}
    timed = [
        {"time": (BEGIN + timedelta(minutes=minute)).isoformat()} | (facts if event["event"] == "start" else {}) | event
        for minute, event in enumerate(events)
    ]
    return [(line.kind, line.what, line.detail) for line in event_log(RunRecord.fold(timed, folder))]


def start(resumed_from: int | None = None) -> dict[str, Any]:
    return {"event": "start", "resumed_from": resumed_from}


def skip(step: int, skipped: int, scale: float | None) -> list[dict[str, Any]]:
    """What the trainer writes: a warning for the screen, and the event."""
    message = f"{skipped} updates withheld by an overflow near update {step}"
    return [
        {"event": "warning", "kind": "overflow", "message": message},
        {"event": "skip", "step": step, "skipped": skipped, "loss_scale": scale},
    ]


def train(step: int, loss: float | None = 1.0) -> dict[str, Any]:
    return {"event": "train", "step": step, "samples": 100 * step, "epoch": step / 10, "loss": loss}


FINISHED = {"event": "finished", "samples": 1000}


def test_skipped_updates_are_counted_not_their_reports(tmp_path: Path) -> None:
    lines = log(tmp_path, start(), *skip(10, 3, 8192.0), train(10), *skip(20, 1, 4096.0), train(20), FINISHED)
    assert lines == [
        ("started", "training started", "8 ranks · 8 × H100"),
        ("skipped", "4 updates not applied, overflow: first at 10, last at 20", "loss scale 8192 → 4096"),
        ("finished", "training finished", ""),
    ]


def test_one_report_of_skipped_updates_says_near_which(tmp_path: Path) -> None:
    _, (*line,), *_ = log(tmp_path, start(), *skip(10, 1, None))
    assert line == ["skipped", "1 update not applied, overflow: near update 10", "loss scale –"]


def test_every_process_counts_its_own(tmp_path: Path) -> None:
    events = [start(), *skip(1, 2, 4.0), train(5), start(200), {"event": "resume", "samples": 200}, *skip(3, 1, 2.0)]
    assert [line[0] for line in log(tmp_path, *events)] == [
        "started",
        "skipped",
        "stopped",
        "started",
        "resumed",
        "skipped",
        "unfinished",
    ]
    assert log(tmp_path, *events)[2][2] == "300 images after the checkpoint are done again"


def test_equal_warnings_in_a_row_are_one_line(tmp_path: Path) -> None:
    warning = {"event": "warning", "kind": "substitute", "message": "sample substituted"}
    events = [start(), warning | {"key": "a"}, warning | {"key": "b"}, {"event": "warning", "message": "disk"}, warning]
    assert log(tmp_path, *events)[1:-1] == [
        ("warned", "sample substituted", "2 times; last: key b"),
        ("warned", "disk", ""),
        ("warned", "sample substituted", ""),
    ]


def test_divergence_is_said_once(tmp_path: Path) -> None:
    lines = log(tmp_path, start(), train(1), train(2, loss=None), train(3, loss=None))
    assert lines[1:-1] == [("failed", "the training loss is not a finite number from here on", "step 2")]


def test_faults_launches_and_stops_are_told_and_not_told_twice(tmp_path: Path) -> None:
    gone = "rank 1 on b is gone after update 7: no sign of life for 30 s; it was last seen updating, in backward"
    fault = {"event": "fault", "kind": "silent", "rank": 1, "host": "b", "step": 7, "message": gone, "launch": "5e1f"}
    launch = {"event": "launch", "hosts": ["a", "b"], "step": 7, "code": 1, "message": gone}
    resume = {"event": "resume", "samples": 500, "world_size": 4, "saved_world_size": 6, "path": "runs/x"}
    stopped = {"event": "stopped", "step": 8, "samples": 800, "why": "SIGTERM"}
    back = {"event": "launch", "hosts": ["a"], "step": 8, "code": 75, "message": "hosts answer again"}
    events = [start(), train(7), fault, launch, start(500), resume, train(8), stopped, back]
    assert log(tmp_path, *events) == [
        ("started", "training started", "8 ranks · 8 × H100"),
        ("failed", gone, "stacks in faults/5e1f"),
        ("launch", "the one on a, b ended", "after update 7 · exit code 1"),
        ("stopped", "the process ended without finishing", "200 images after the checkpoint are done again"),
        ("started", "a process started", "8 ranks · 8 × H100"),
        ("resumed", "from runs/x", "500 images done · 6 → 4 ranks"),
        ("stopped", "saved and stopped after update 8: SIGTERM", ""),
        ("launch", "the one on a ended: hosts answer again", "after update 8 · exit code 75"),
        ("unfinished", "the record ends here: not continued yet", ""),
    ]
    went_on = log(tmp_path, *events, start(800), train(10), FINISHED)
    assert [kind for kind, _, _ in went_on[-3:]] == ["launch", "started", "finished"], "all was saved, and that is said"


def test_a_fault_after_a_diverged_loss_is_a_line_of_its_own(tmp_path: Path) -> None:
    fault = {"event": "fault", "kind": "error", "step": 3, "message": "the loss is nan", "launch": "1"}
    assert [line[0] for line in log(tmp_path, start(), train(2, loss=None), fault)][1:3] == ["failed", "failed"]


def test_a_clock_that_was_set_back_gives_no_negative_times(tmp_path: Path) -> None:
    early = {"event": "stopped", "step": 1, "samples": 100, "why": "x", "time": (BEGIN - timedelta(days=2)).isoformat()}
    facts = {"time": BEGIN.isoformat(), "world_size": 1, "train_samples": 1000, "train_batch_size": 100}
    entries = event_log(RunRecord.fold([start() | facts, early], tmp_path))
    assert (entries[1].when, entries[1].after, entries[1].epoch) == ("2026-10-30 08:00:00", "–", "0.10")


def test_a_run_that_finished_and_was_started_again_did_not_stop(tmp_path: Path) -> None:
    late = {"event": "warning", "message": "the report could not be written"}
    assert "stopped" not in [line[0] for line in log(tmp_path, start(), train(10), FINISHED, late, start(1000))]


def test_a_divergence_is_an_ending_and_says_why(tmp_path: Path) -> None:
    end = {"event": "diverged", "step": 3, "samples": 300, "epoch": 0.3, "why": "the loss is nan at update 3"}
    lines = log(tmp_path, start(), train(3), end)
    assert lines[1:] == [("diverged", "the loss is nan at update 3", "")]
    tried = log(tmp_path, start(), train(3), end, start(100), train(2), FINISHED)
    assert ("stopped", "the process ended without finishing", "200 images after the checkpoint are done again") in tried
    assert tried[1] == lines[1] and tried[-1][0] == "finished"
