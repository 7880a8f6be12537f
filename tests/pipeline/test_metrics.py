"""The run's record as a file: what is written is read, and what a kill leaves is mended."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.metrics import MetricsWriter, event_time, read_metrics
from shards.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def train(samples: int, **fields: Any) -> dict[str, Any]:
    return {"event": "train", "samples": samples, "epoch": samples / 1000, **fields}


def evaluation(epoch: float, top1: float, images: int = 500) -> dict[str, Any]:
    return {"event": "evaluation", "samples": round(epoch * 1000), "epoch": epoch, "top1": top1, "images": images}


def test_what_is_written_is_read_and_is_on_disk_at_once(path: Path) -> None:
    before = datetime.now(UTC)
    writer = MetricsWriter(path)
    writer.write("train", samples=512, epoch=0.5, loss=2.25, note="γ, β")
    (event,) = read_metrics(path)  # the writer is still open
    writer.close()
    assert {key: event[key] for key in ("event", "samples", "epoch", "loss", "note")} == {
        "event": "train",
        "samples": 512,
        "epoch": 0.5,
        "loss": 2.25,
        "note": "γ, β",
    }
    assert len(event["time"]) == len("2026-11-01T08:00:00.000Z")
    moment = event_time(event)
    assert moment is not None
    assert abs((moment - before).total_seconds()) < 5


def test_every_line_is_standard_json_whatever_the_values_are(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write(
            "warning",
            message="line\nbreak",
            loss=float("nan"),
            scales=[np.float32(0.5), float("inf")],
            count=np.int64(3),
            path=Path("a/b"),
            nested={"x": (1, None, True)},
        )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text(encoding="utf-8").splitlines()
    event = json.loads(line, parse_constant=refuse)
    del event["time"]
    assert event == {
        "event": "warning",
        "message": "line\nbreak",
        "loss": None,
        "scales": [0.5, None],
        "count": 3,
        "path": "a/b",
        "nested": {"x": [1, None, True]},
    }


def test_a_name_that_is_not_utf8_survives(path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    with MetricsWriter(path) as writer:
        writer.write("warning", message=name)
    assert read_metrics(path)[0]["message"] == name


def test_the_records_own_fields_cannot_be_overwritten(path: Path) -> None:
    with MetricsWriter(path) as writer:
        with pytest.raises(ValueError, match="time"):
            writer.write("train", time=0)
        with pytest.raises(TypeError, match="object"):
            writer.write("train", loss=object())
    assert path.read_bytes() == b""


def test_a_record_cut_at_any_byte_is_read_and_continued(path: Path) -> None:
    with MetricsWriter(path) as writer:
        for samples in (256, 512):
            writer.write("train", samples=samples, epoch=samples / 1000, note="β")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = (cut >= first - 1) + (cut >= len(whole) - 1)  # a line may lack nothing but its newline
        assert len(read_metrics(path)) == complete
        with MetricsWriter(path) as writer:
            writer.write("train", samples=768, epoch=0.768)
        events = read_metrics(path)
        assert [event["samples"] for event in events] == [*[256, 512][:complete], 768]
        assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b'{"loss": 1}', b"\x00\x00", b'{"event": 3}'])
def test_a_broken_line_within_names_file_and_line(path: Path, line: bytes) -> None:
    good = json.dumps(train(1)).encode()
    path.parent.mkdir()
    path.write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(UserError) as caught:
        read_metrics(path)
    assert caught.value.headline.startswith(f"{path}:2: ")
    path.write_bytes(b"\n".join([good, good, line, b""]))  # the last, but with its newline: not what a kill leaves
    with pytest.raises(UserError):
        read_metrics(path)


@pytest.mark.parametrize("value", [None, "12", True])
def test_an_evaluation_without_its_number_is_an_error(path: Path, value: Any) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(evaluation(1, 50) | {"top1": value}) + "\n")
    with pytest.raises(UserError, match="evaluation event without the number “top1”"):
        read_metrics(path)


def test_a_divergence_without_its_epoch_is_an_error(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"event": "diverged", "samples": 100, "why": "the loss is nan"}) + "\n")
    with pytest.raises(UserError, match="diverged event without the number “epoch”"):
        read_metrics(path)


def test_a_missing_file_is_a_user_error(path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_metrics(path)
