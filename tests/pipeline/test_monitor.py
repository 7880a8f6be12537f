"""What a run says of its decoding: counts in the record, and each kind of warning once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.monitor import Monitor
from pipeline.rungs import RUNGS
from pipeline.tally import Tally


class Said(Monitor):
    """A monitor of no run: keeps what it would write down and print."""

    def __init__(self) -> None:
        config = SimpleNamespace(recipe=SimpleNamespace(data="/data/x"))
        self.plan = SimpleNamespace(rungs=RUNGS, crop_indexes=2, config=config)  # type: ignore[assignment]
        self.events: list[dict] = []
        self.printed: list[str] = []
        self._seen = set()
        self._metrics = SimpleNamespace(write=lambda event, **fields: self.events.append({"event": event, **fields}))
        self.console = SimpleNamespace(print=self.printed.append)  # type: ignore[assignment]


def tally(**counts: int) -> Tally:
    made = Tally()
    for field, images in counts.items():
        made.add(field, images)
    return made


@pytest.fixture
def monitor() -> Said:
    return Said()


def test_nothing_is_said_where_the_live_rung_decodes_everything(monitor: Said) -> None:
    monitor.decoding(samples=96, split="train", tally=tally(native=96, indexed=96))
    assert monitor.printed == []
    assert monitor.events == [
        {"event": "decode", "samples": 96, "split": "train", "images": 96, "native": 96, "indexed": 96}
    ]


def test_what_fell_through_is_said_once_and_counted_always(monitor: Said) -> None:
    for samples in (100, 200):
        counts = tally(native=97, indexed=90, simplejpeg=2, pillow=1, native_unsupported=3, simplejpeg_unsupported=1)
        monitor.decoding(samples=samples, split="train", tally=counts)
    (line,) = monitor.printed
    assert "3 of 100 images" in line and "2 by simplejpeg and 1 by Pillow" in line and "C extension" in line
    assert [event["event"] for event in monitor.events] == ["decode", "warning", "decode"]
    assert all(event["pillow"] == 1 for event in monitor.events if event["event"] == "decode")


def test_stale_records_are_said_once_with_the_mend(monitor: Said) -> None:
    for samples in (100, 200):
        monitor.decoding(samples=samples, split="train", tally=tally(native=100, indexed=90, stale=10))
    (line,) = monitor.printed
    assert "10 images" in line and "shards verify" in line


def test_a_missing_crop_index_is_said_once_with_the_mend(monitor: Said) -> None:
    monitor.plan.crop_indexes = 0  # type: ignore[misc]
    for split in ("train", "val"):
        monitor.decoding(samples=100, split=split, tally=tally(native=100))
    (line,) = monitor.printed
    assert "train: no image" in line and "shards index /data/x --decode" in line


def test_nothing_is_said_of_a_crop_index_that_cannot_be_made_here(monitor: Said) -> None:
    monitor.plan.crop_indexes = None  # type: ignore[misc]
    monitor.decoding(samples=100, split="train", tally=tally(native=100))
    assert monitor.printed == []
