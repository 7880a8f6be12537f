"""Which runs share a row, and the rows' numbers against independent arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.deepspeed_schema import DeepSpeedBlocks
from pipeline.identity import NOT_TRAINING
from pipeline.schema import Recipe
from shards.errors import UserError
from tests.pipeline.report.conftest import TRAIN, Run, rows_of, whole


def test_seeds_share_a_row_and_its_mean_and_std_are_over_the_medians(paper: dict[str, Any]) -> None:
    first, second = rows_of(paper["folders"])
    for row, runs in ((first, paper["small"]), (second, paper["large"])):
        medians = [run.expected() for run in runs]
        assert row.seeds == [0, 1, 2]
        assert row.error == pytest.approx(np.mean(medians), abs=1e-12)
        assert row.std == pytest.approx(np.std(medians, ddof=1), abs=1e-12)
    assert first.label == "imagenet_256"
    assert second.difference == pytest.approx(second.error - first.error, abs=1e-12)
    assert first.difference is None


def test_the_interval_is_welchs(paper: dict[str, Any]) -> None:
    _, second = rows_of(paper["folders"])
    a, b = ([run.expected() for run in paper[key]] for key in ("large", "small"))
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 3
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
    quantile = {2: 4.303, 3: 3.182, 4: 2.776}[int(freedom)]
    margin = quantile * math.sqrt(va + vb)
    assert second.interval == pytest.approx((np.mean(a) - np.mean(b) - margin, np.mean(a) - np.mean(b) + margin))


def test_a_resumed_runs_superseded_evaluations_do_not_count(tmp_path: Path) -> None:
    run = Run(tmp_path / "r", kn=2048).begin().train_to(7)
    for event in run.events:  # would move the median if they were still there
        if event["event"] == "evaluation" and event["epoch"] > 5:
            event["top1"] = 1.0
    run.begin(math.ceil(5 * TRAIN / 2048) * 2048).train_to(7).finish().save()
    (row,) = rows_of([run.folder])
    assert [math.floor(epoch) for epoch in row.medians[0].epochs] == [3, 4, 5, 6, 7]
    assert row.error == pytest.approx(run.expected())
    assert row.error < 60


def test_reference_goes_first_and_must_be_given(paper: dict[str, Any]) -> None:
    rows = rows_of(paper["folders"], paper["folders"][-1])
    assert rows[0].label == "imagenet_2048"
    assert rows[1].difference < 0
    with pytest.raises(UserError, match="not among the runs"):
        rows_of(paper["folders"], paper["out"])


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [whole(tmp_path / parent / "run", kn=kn).save() for parent, kn in (("a", 256), ("b", 2048))]
    assert [row.label for row in rows_of(folders)] == ["a/run", "b/run"]


def test_overrides_other_than_the_seed_make_another_row(tmp_path: Path) -> None:
    runs = [
        whole(tmp_path / f"{lr}-{seed}", seed=seed, overrides=[f"optimizer.params.lr={lr}", f"recipe.seed={seed}"])
        for lr in (0.05, 0.1)
        for seed in (0, 1)
    ]
    rows = rows_of([run.save() for run in runs])
    assert [row.label for row in rows] == [
        "imagenet_256 · optimizer.params.lr=0.05",
        "imagenet_256 · optimizer.params.lr=0.1",
    ]


def test_the_resolved_configuration_tells_edited_files_apart(tmp_path: Path) -> None:
    folders = [whole(tmp_path / f"r{seed}", seed=seed).save() for seed in range(3)]
    for seed, folder in enumerate(folders):
        resolved = {
            "optimizer": {"params": {"weight_decay": 1e-4 if seed < 2 else 5e-5}},
            "gradient_accumulation_steps": seed + 1,
            "recipe": {"seed": seed, "run": str(folder)},
        }
        (folder / "config.resolved.json").write_text(json.dumps(resolved))
    assert [len(row.runs) for row in rows_of(folders)] == [2, 1]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"recipe": {"watchdog": {"withheld_updates": 5}}}, 1),
        ({"recipe": {"cache": {"folder": "/elsewhere"}}}, 1),
        ({"flops_profiler": {"enabled": True}, "log_level": "info", "timers": {"throughput": {"enabled": True}}}, 1),
        ({"recipe": {"cache": {"gigabytes": 1}}}, 2),  # the order of a window depends on it
        ({"recipe": {"step": {"tf32": True}}}, 2),
        ({"optimizer": {"params": {"momentum": 0.8}}}, 2),
    ],
    ids=json.dumps,
)
def test_what_changes_nothing_that_is_learned_makes_no_other_row(
    tmp_path: Path, change: dict[str, Any], rows: int
) -> None:
    folders = [whole(tmp_path / f"r{seed}", seed=seed).save() for seed in range(2)]
    for folder, resolved in zip(folders, ({}, change), strict=True):
        (folder / "config.resolved.json").write_text(json.dumps({"train_batch_size": 256, **resolved}))
    assert len(rows_of(folders)) == rows


def test_what_is_no_part_of_the_training_is_named_as_a_configuration_names_it() -> None:
    for path in NOT_TRAINING:
        ours = path.startswith("recipe.")
        fields: Any = (Recipe if ours else DeepSpeedBlocks).model_fields
        for name in path.removeprefix("recipe.").split("."):
            assert name in fields, path
            fields = getattr(fields[name].annotation, "model_fields", {})
