"""What more ranks were worth, from records by arithmetic, and from two real runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics import MetricsWriter, read_metrics
from pipeline.record import RunRecord
from pipeline.report import text
from pipeline.report.scaling import Scaling, find_scalings
from tests.conftest import tiny_config
from tests.pipeline.report.conftest import text_of
from tests.pipeline.report.test_command import command
from tests.training import onehour, output_of

FACTS: dict[str, Any] = {"model": "resnet50", "precision": "fp32", "micro_batch": 32, "train_samples": 1000}


def run(folder: Path, ranks: int, rates: list[float], *, accumulation: int = 1, **facts: Any) -> Path:
    """A run with an epoch event for each rate; `facts` are of its start, but for `event` and `communication`."""
    event, communication = facts.pop("event", "epoch"), facts.pop("communication", 0.1)
    start = {**FACTS, "world_size": ranks, "accumulation": accumulation, "device": f"{ranks} × EPYC"}
    start |= {"train_batch_size": ranks * 32 * accumulation, "resumed_from": None, **facts}
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write("start", **start)
        for epoch, rate in enumerate(rates, start=1):
            shares = {"communication": communication, "data_wait": 0.02 * epoch}
            shares["compute"] = 1 - sum(shares.values()) if communication is not None else None
            writer.write(event, epoch=epoch, samples=1000 * epoch, images_per_second=rate, **shares)
    return folder


def scalings(*folders: Path) -> list[Scaling]:
    return find_scalings([RunRecord.read(folder) for folder in folders])


def test_weak_scaling_is_the_median_after_the_first_epoch_per_rank(tmp_path):
    two = run(tmp_path / "2", 2, [1.0, 150.0, 190.0, 170.0])
    one = run(tmp_path / "1", 1, [1.0, 100.0, 102.0, 95.0])
    eight = run(tmp_path / "8", 8, [900.0, 400.0, 420.0])
    (found,) = scalings(two, one, eight)
    assert found.heading == "Weak scaling: 32 micro-batch × 1 accumulation on every rank"
    assert [(size.world_size, size.train_batch_size) for size in found.sizes] == [(1, 32), (2, 64), (8, 256)]
    assert [size.images_per_second for size in found.sizes] == [100, 170, 410]
    assert [found.efficiency(size) for size in found.sizes] == pytest.approx([1, 0.85, 410 / 100 / 8])
    assert [len(size.events) for size in found.sizes] == [3, 3, 2]
    first = found.sizes[0]
    assert [first.share(field) for field in ("compute", "communication", "data_wait")] == pytest.approx(
        [1 - 0.1 - 0.06, 0.1, 0.06]
    )


def test_strong_scaling_is_the_same_minibatch_on_more_ranks(tmp_path):
    two = run(tmp_path / "2", 2, [1.0, 100.0], accumulation=4)
    eight = run(tmp_path / "8", 8, [1.0, 300.0], accumulation=1)
    (found,) = scalings(two, eight)
    assert (found.kind, found.heading) == ("strong", "Strong scaling: 256 images per update")
    assert found.efficiency(found.sizes[1]) == pytest.approx(3 / 4)


def test_three_runs_can_be_both(tmp_path):
    one = run(tmp_path / "1", 1, [1.0, 100.0], accumulation=2)
    two = run(tmp_path / "2", 2, [1.0, 190.0], accumulation=2)
    four = run(tmp_path / "4", 4, [1.0, 300.0], accumulation=1)
    weak, strong = scalings(one, four, two)
    assert [size.world_size for size in weak.sizes] == [1, 2] and weak.kind == "weak"
    assert [size.world_size for size in strong.sizes] == [2, 4] and strong.kind == "strong"


@pytest.mark.parametrize(
    "facts",
    [
        {"model": "resnet18"},
        {"precision": "float16"},
        {"device": "2 × H100"},
        {"micro_batch": 16},
        {"accumulation": 2},
        {"world_size": 1},
        {"world_size": None},
    ],
    ids=str,
)
def test_what_is_not_the_same_work_is_not_compared(tmp_path, facts):
    one = run(tmp_path / "1", 1, [1.0, 100.0])
    assert scalings(one, run(tmp_path / "2", 2, [1.0, 190.0], **facts)) == []
    assert len(scalings(one, run(tmp_path / "3", 2, [1.0, 190.0]))) == 1


def test_images_of_another_size_are_not_the_same_work(tmp_path):
    folders = [run(tmp_path / str(ranks), ranks, [1.0, 100.0]) for ranks in (1, 2)]
    for folder, size in zip(folders, (224, 160), strict=True):
        (folder / "config.resolved.json").write_text(json.dumps({"recipe": {"transform": {"size": size}}}))
    assert scalings(*folders) == []
    (folders[1] / "config.resolved.json").write_text((folders[0] / "config.resolved.json").read_text())
    assert len(scalings(*folders)) == 1


def test_runs_on_as_many_ranks_are_one_line(tmp_path):
    (found,) = scalings(
        run(tmp_path / "a", 1, [1.0, 100.0, 110.0]),
        run(tmp_path / "b", 1, [1.0, 90.0]),
        run(tmp_path / "c", 2, [1.0, 200.0]),
    )
    assert [(size.runs, len(size.events), size.images_per_second) for size in found.sizes] == [(2, 3, 100), (1, 1, 200)]


def test_a_run_of_one_epoch_is_measured_by_its_reports_unless_others_have_epochs(tmp_path):
    one = run(tmp_path / "1", 1, [1.0, 100.0, 80.0], event="train")
    two = run(tmp_path / "2", 2, [1.0, 120.0])
    (found,) = scalings(one, two)
    assert [(size.unit, size.images_per_second) for size in found.sizes] == [("report", 90), ("epoch", 120)]
    (found,) = scalings(one, run(tmp_path / "3", 1, [1.0, 70.0]), two)
    assert [size.images_per_second for size in found.sizes] == [70, 120]
    assert scalings(run(tmp_path / "short", 1, [50.0]), two) == []


def test_a_resumed_run_is_what_its_last_process_was(tmp_path):
    folder = run(tmp_path / "2", 1, [1.0, 2.0, 3.0])
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write("start", **FACTS, world_size=2, accumulation=1, device="2 × EPYC", train_batch_size=64,
                     resumed_from=3000)  # fmt: skip
        for epoch, rate in ((4, 50.0), (5, 160.0)):
            writer.write("epoch", epoch=epoch, samples=1000 * epoch, images_per_second=rate)
    (found,) = scalings(folder, run(tmp_path / "1", 1, [1.0, 100.0]))
    assert [size.images_per_second for size in found.sizes] == [100, 160]


def test_shares_that_were_not_measured_are_not_made_up(tmp_path):
    (found,) = scalings(run(tmp_path / "1", 1, [1.0, 100.0]), run(tmp_path / "2", 2, [1.0, 190.0], communication=None))
    assert found.sizes[1].share("communication") is None and found.sizes[1].share("data_wait") == 0.04
    assert found.cells()[1] == ["2", "64", "190.0", "95.0 %", "–", "–", "4.0 %", "1 epoch"]


# ---------------------------------------------------------------- two real runs


@pytest.mark.slow
@pytest.mark.launcher
def test_two_real_runs(tiny_shards, tmp_path, capsys):
    folders = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks-{ranks}"
        path = tmp_path / f"ranks-{ranks}.json"
        content = tiny_config(tiny_shards, folder) | {"gradient_accumulation_steps": 2}
        del content["train_batch_size"]
        path.write_text(json.dumps(content))
        output_of(onehour("train", path, "--ranks", str(ranks)))
        folders.append(folder)
        events = read_metrics(folder / "metrics.jsonl")
        timed = [event for event in events if event["event"] in ("train", "epoch")]
        assert len(timed) >= 6
        for event in timed:
            assert event["compute"] + event["communication"] + event["data_wait"] == pytest.approx(1)
            assert all(0 <= event[field] <= 1 for field in ("compute", "communication", "data_wait"))
            assert (event["communication"] > 0) == (ranks > 1)
    assert command(*folders, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    (found,) = answer["scaling"]
    one, two = found["sizes"]
    assert (found["kind"], one["world_size"], two["world_size"]) == ("weak", 1, 2)
    rates = [
        statistics.median(
            event["images_per_second"]
            for event in read_metrics(folder / "metrics.jsonl")
            if event["event"] == "epoch" and event["epoch"] > 1
        )
        for folder in folders
    ]
    assert [one["images_per_second"], two["images_per_second"]] == pytest.approx(rates)
    assert (one["efficiency"], two["efficiency"]) == (1, pytest.approx(rates[1] / rates[0] / 2))
    assert two["communication"] > one["communication"]
    page = text_of(Path(answer["report"]))
    assert "Weak scaling: 8 micro-batch × 2 accumulation on every rank" in page
    assert text.percent(two["efficiency"]) in page
    assert f"{text.percent(answer['rows'][1]['compute'])} compute, " in page
    assert command(*folders) == 0
    out = capsys.readouterr().out
    assert "Weak scaling: 8 micro-batch × 2 accumulation on every rank" in out and "communication" in out
