"""One history of a run, whatever a resume superseded, and the median that is reported."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from pipeline.record import RunRecord, median_last_epochs


def train(samples: int, **fields: Any) -> dict[str, Any]:
    return {"event": "train", "samples": samples, "epoch": samples / 1000, **fields}


def evaluation(epoch: float, top1: float, images: int = 500) -> dict[str, Any]:
    return {"event": "evaluation", "samples": round(epoch * 1000), "epoch": epoch, "top1": top1, "images": images}


def start(resumed_from: int | None = None, **fields: Any) -> dict[str, Any]:
    return {"event": "start", "train_samples": 1000, "resumed_from": resumed_from, **fields}


def test_a_resume_drops_what_was_done_again(tmp_path: Path) -> None:
    events = [start(), *map(train, (500, 1000)), evaluation(1, 50), *map(train, (1500, 2000)), evaluation(2, 99)]
    events += [start(1000), {"event": "resume", "samples": 1000}, train(1600), train(2100), evaluation(2.1, 60)]
    record = RunRecord.fold(events, tmp_path)
    assert [event["samples"] for event in record.train] == [500, 1000, 1600, 2100]
    assert [event["top1"] for event in record.evaluations] == [50, 60]
    assert record.repeated == 1000
    assert record.samples == 2100
    assert record.epoch == 2.1
    assert record.finished is None


def test_several_resumes_equal_a_replay_of_the_last_writer(tmp_path: Path) -> None:
    """Against a model: after any kills and resumes, position p was last written by the process that did it last."""
    for seed in range(200):
        rng = random.Random(seed)
        events, truth, position = [start(serial=0)], {}, 0
        for serial in range(rng.randint(1, 6)):
            if serial:
                position = rng.choice([0, *truth]) if truth else 0
                events += [start(position, serial=serial), {"event": "resume", "samples": position}]
                truth = {samples: by for samples, by in truth.items() if samples <= position}
            for _ in range(rng.randint(0, 5)):
                position += 100
                events.append(train(position, by=serial))
                truth[position] = serial
        record = RunRecord.fold(events, tmp_path)
        assert {event["samples"]: event["by"] for event in record.train} == truth
        assert len(record.train) == len(truth)
        assert record.samples == position


def test_a_start_from_nothing_drops_everything_and_finished_needs_the_last_process(tmp_path: Path) -> None:
    done = {"event": "finished", "samples": 1000, "seconds": 9.0}
    events = [start(), train(1000), evaluation(1, 50), done]
    assert RunRecord.fold(events, tmp_path).finished is done
    again = RunRecord.fold([*events, start(), train(200)], tmp_path)
    assert again.finished is None
    assert [event["samples"] for event in again.train] == [200]
    assert again.evaluations == []


def test_time_is_the_runs_own_or_the_sum_of_its_sessions(tmp_path: Path) -> None:
    def at(minute: int, event: dict[str, Any]) -> dict[str, Any]:
        return event | {"time": f"2026-11-01T08:{minute:02}:00.000Z"}

    done = at(50, {"event": "finished", "samples": 2000, "seconds": 77.0})
    one = [at(0, start()), at(10, train(1000))]
    assert RunRecord.fold([*one, done], tmp_path).seconds == 77.0
    two = [*one, at(40, start(1000)), done]
    assert RunRecord.fold(two, tmp_path).seconds == (10 + 10) * 60  # and not the half hour between


def test_a_divergence_is_that_of_the_last_process(tmp_path: Path) -> None:
    end = {"event": "diverged", "step": 11, "samples": 1100, "epoch": 1.1, "why": "the loss is nan"}
    record = RunRecord.fold([start(), train(1000), train(1100), end], tmp_path)
    assert record.diverged == end and record.finished is None
    again = RunRecord.fold([start(), train(1000), train(1100), end, start(1000)], tmp_path)
    assert again.diverged is None and again.repeated == 100
    assert RunRecord.fold([start(), train(1000)], tmp_path).diverged is None


def test_time_survives_clocks_that_are_set_and_has_no_part_in_what_the_launcher_wrote(tmp_path: Path) -> None:
    def at(hour: int, minute: int, event: dict[str, Any]) -> dict[str, Any]:
        return event | {"time": f"2026-11-01T{hour:02}:{minute:02}:00.000Z"}

    back = [at(8, 0, start()), at(8, 10, train(1000)), at(3, 0, train(1100)), at(3, 5, train(1200))]
    assert RunRecord.fold(back, tmp_path).seconds == (10 + 5) * 60
    fault = {"event": "fault", "kind": "silent", "step": 12, "message": "rank 1 is gone"}
    launch = {"event": "launch", "hosts": ["a"], "step": 12, "code": 1, "message": "rank 1 is gone"}
    again = [*back, at(4, 0, fault), at(4, 30, launch), at(1, 0, start(1000)), at(1, 20, train(1300))]
    assert RunRecord.fold(again, tmp_path).seconds == (10 + 5 + 20) * 60
    assert [len(session) for session in RunRecord.fold(again, tmp_path).sessions] == [4, 2]


def test_speed_is_all_images_over_all_time(tmp_path: Path) -> None:
    events = [start(), train(1000, images_per_second=100.0, data_wait=0.0)]
    events += [train(4000, images_per_second=1000.0, data_wait=0.5)]
    record = RunRecord.fold(events, tmp_path)
    assert record.mean_over_time("images_per_second") == pytest.approx(4000 / (10 + 3))
    assert record.mean_over_time("data_wait") == pytest.approx(0.5 * 3 / 13)
    assert RunRecord.fold([start()], tmp_path).mean_over_time("data_wait") is None


def test_the_median_is_over_the_final_five_epochs() -> None:
    errors = [80.0, 60, 50, 30, 23.9, 23.2, 24.4, 23.1, 23.6]
    result = median_last_epochs([evaluation(n + 1.0006, 100 - error) for n, error in enumerate(errors)])
    assert result is not None
    assert result.error == pytest.approx(statistics.median(errors[-5:])) == pytest.approx(23.6)
    assert result.accuracy == pytest.approx(76.4)
    assert (result.used, result.wanted) == (5, 5)
    assert result.epochs == pytest.approx((5.0006, 6.0006, 7.0006, 8.0006, 9.0006))
    assert result.images == (500,)


def test_fewer_evaluations_are_said_and_none_is_none() -> None:
    result = median_last_epochs([evaluation(1, 40), evaluation(2, 50)])
    assert result is not None
    assert (result.error, result.used) == (55.0, 2)
    assert median_last_epochs([]) is None


def test_evaluations_within_an_epoch_and_before_training_do_not_count() -> None:
    within = [evaluation(epoch / 2, 90 if epoch % 2 else epoch) for epoch in range(15)]
    result = median_last_epochs(reversed(within), n=3)
    assert result is not None
    assert result.epochs == (5, 6, 7)
    assert result.error == 100 - 12
    rounded = median_last_epochs([evaluation(0, 1), evaluation(0.9999, 50)])
    assert rounded is not None
    assert rounded.epochs == (0.9999,)


def test_a_run_of_part_of_an_epoch_reports_its_last_evaluation() -> None:
    result = median_last_epochs([evaluation(0, 1), evaluation(0.25, 20)])
    assert result is not None
    assert (result.error, result.epochs) == (80, (0.25,))
