"""A real sweep, killed in the middle and started again: what has finished is not trained again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.metrics import Event, read_metrics
from pipeline.record import RunRecord
from pipeline.sweep_state import ENDED, LOG_FILE, STARTED
from tests.conftest import kill_everything, tiny_config
from tests.training import VAL, onehour, output_of

pytestmark = [pytest.mark.launcher, pytest.mark.slow, pytest.mark.timeout(600)]  # three launches after one another


def events(path: Path, kind: str) -> list[Event]:
    return [event for event in read_metrics(path) if event["event"] == kind] if path.exists() else []


def test_killed_half_way_and_started_again_it_trains_what_is_missing(
    tiny_shards: Path, tmp_path: Path, capsys, monkeypatch
):
    """Two arms, two seeds, two at once; the sweep and its process group get SIGKILL in the middle of the second arm."""
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config(tiny_shards, Path("elsewhere"))))
    arms = [
        {"name": "short", "set": {"recipe.epochs": 2}, "paper": {"error": 23.6, "std": 0.12}},
        {
            "name": "long",
            "set": {"recipe.epochs": 30, "train_batch_size": 16, "recipe.checkpoint.every_epochs": 2},
            "paper": {"error": 23.74},
        },
    ]
    figures = [{"kind": "curves", "validation": True}, {"kind": "minibatch"}]
    path = tmp_path / "toy.yaml"
    sections = {"title": "A toy", "base": "tiny.json", "seeds": [0, 1], "arms": arms, "figures": figures}
    path.write_text(json.dumps(sections))
    out = tmp_path / "runs"
    words = ("sweep", path, "--out", out, "--jobs", "2", "--ranks", "1")
    short, long = ([out / arm / f"seed-{seed}" for seed in (0, 1)] for arm in ("short", "long"))

    process = onehour(*words, ONEHOUR_TEST=str(tmp_path))
    try:
        deadline = time.monotonic() + 200
        # both: the second of the short ones may still be at it when the first of the others has saved
        while not (
            (saved := [run for run in long if events(run / "metrics.jsonl", "checkpoint")])
            and all(events(run / "metrics.jsonl", "finished") for run in short)
        ):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in short]
        assert not any(events(run / "metrics.jsonl", "finished") for run in long), "that was not half-way"

        output = output_of(onehour(*words, ONEHOUR_TEST=str(tmp_path)))
    finally:
        kill_everything(f"ONEHOUR_TEST={tmp_path}")

    assert "4 runs: 2 finished, " in output and "to resume at epoch" in output
    assert "4 of 4 runs have finished" in output and "Traceback" not in output
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in short] == before
    assert [len(events(run / "metrics.jsonl", "start")) for run in (*short, *saved)] == [1, 1, *(2 for _ in saved)]
    assert all(RunRecord.read(run).start["resumed_from"] for run in saved), "it went on where it was saved"
    started = [event["run"] for event in events(out / LOG_FILE, STARTED)]
    assert sorted(started[:4]) == ["long/seed-0", "long/seed-1", "short/seed-0", "short/seed-1"]
    assert sorted(started[4:]) == ["long/seed-0", "long/seed-1"]
    ended = [event["run"] for event in events(out / LOG_FILE, ENDED) if event["how"] == "finished"]
    assert sorted(ended) == sorted(started[:4])
    assert [(run.parent / f"{run.name}.log").read_text().count("== ") for run in (*short, *long)] == [1, 1, 2, 2]

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["report", str(path), "--runs", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for row, runs in zip(answer["rows"], (short, long), strict=True):
        medians = []
        for run in runs:
            errors = [100 - event["top1"] for event in RunRecord.read(run).evaluations]
            medians.append(float(np.median(errors[-5:])))
        assert row["medians"] == pytest.approx(medians)
        assert row["top1_error"] == pytest.approx(np.mean(medians))
        assert row["std"] == pytest.approx(np.std(medians, ddof=1))
        assert row["seeds"] == [0, 1] and row["images"] == [VAL]
    assert answer["rows"][0]["paper"]["error"] == 23.6
    for name in ("report.html", "figure-1.png", "figure-2.png"):
        assert (out / name).stat().st_size > 5_000, name


def test_an_arm_that_diverges_has_ended_and_the_report_says_so(tiny_shards: Path, tmp_path: Path, capsys, monkeypatch):
    """Its rate is absurd from the second epoch on, so that there is a save to go on from: nobody does."""
    changes = {"recipe.epochs": 2, "recipe.checkpoint.every_epochs": 1, "scheduler.params.milestones": [1]}
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config(tiny_shards, Path("elsewhere"), **changes)))
    arms = [
        {"name": "sober", "paper": {"error": 23.6}},
        {"name": "absurd", "set": {"train_batch_size": 16, "scheduler.params.gamma": 1e30}},
    ]
    figures = [{"kind": "curves"}, {"kind": "minibatch"}]
    path, out = tmp_path / "toy.yaml", tmp_path / "runs"
    path.write_text(json.dumps({"title": "A toy", "base": "tiny.json", "seeds": [0], "arms": arms, "figures": figures}))
    words = ("sweep", path, "--out", out, "--jobs", "1", "--ranks", "1")

    output = output_of(onehour(*words))
    run = out / "absurd" / "seed-0"
    end = read_metrics(run / "metrics.jsonl")[-1]
    assert end["event"] == "diverged" and end["epoch"] > 1 and events(run / "metrics.jsonl", "checkpoint")
    assert f"diverged absurd/seed-0   at epoch {end['epoch']:.2f}   " in output
    assert "1 of 2 runs have finished, 1 has diverged" in output
    log = run.with_name("seed-0.log").read_text()
    assert "The training has diverged. Lower" in log and "continues from the last checkpoint" not in log
    assert {event["run"]: event["how"] for event in events(out / LOG_FILE, ENDED)} == {
        "sober/seed-0": "finished",
        "absurd/seed-0": "diverged",
    }
    again = output_of(onehour(*words))
    assert "2 runs: 1 finished, 1 diverged" in again and "started" not in again
    assert len(events(out / LOG_FILE, STARTED)) == 2

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["report", str(path), "--runs", str(out), "--json"]) == 0
    sober, absurd = json.loads(capsys.readouterr().out)["rows"]
    assert sober["finished"] and sober["diverged"] == {}
    assert absurd["diverged"] == {"absurd/seed-0": pytest.approx(end["epoch"])} and absurd["top1_error"] is None
    for name in ("report.html", "figure-1.png", "figure-2.png"):
        assert (out / name).stat().st_size > 5_000, name
