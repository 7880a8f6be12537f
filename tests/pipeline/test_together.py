"""Ranks that would train different things stop before the first update, and every rank with the same message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint, config, model
from pipeline.experiment import open_run
from pipeline.prepared import FACT_MENDS, prepare
from pipeline.together import _raise_differences, prepare_together
from shards.errors import UserError
from tests.conftest import fork_ranks, tiny_config


def outcome(prepare, facts=lambda prepared: {}) -> str:
    try:
        return f"prepared {prepare_together(prepare, facts)}"
    except UserError as error:
        return str(error)


def fail_on_one(world, failing: int) -> str:
    def prepare() -> str:
        if world.rank == failing:
            raise UserError("/data/x: there are no shards", "Prepare them.")
        return "all"

    return outcome(prepare)


def test_a_mistake_on_any_rank_stops_all_of_them():
    for failing in (0, 2):
        answers = fork_ranks(fail_on_one, 3, failing)
        assert len(set(answers)) == 1
        assert "/data/x: there are no shards" in answers[0] and "Prepare them." in answers[0]
        assert "only; 3 ranks stop with it" in answers[0]
    assert set(fork_ranks(fail_on_one, 3, 5)) == {"prepared all"}


def differing_facts(world) -> str:
    return outcome(lambda: world.rank, lambda rank: {"shards": "abc", "checkpoint": "step 3" if rank else "none"})


def test_differing_facts_stop_all_ranks_and_are_named():
    answers = fork_ranks(differing_facts, 2)
    assert len(set(answers)) == 1
    assert "do not agree" in answers[0] and "checkpoint" in answers[0] and "step 3" in answers[0]
    assert "abc" not in answers[0]


def test_a_fact_with_a_mend_of_its_own_names_it():
    every = [{"host": host, "facts": {"decoder": rung}} for host, rung in (("a", "native"), ("b", "pillow"))]
    with pytest.raises(UserError) as error:
        _raise_differences(every, FACT_MENDS)
    assert "decoder: a has native, b has pillow\n" in str(error.value)
    assert "recipe.loader.decoder" in str(error.value)


def prepare_in_own_folder(world, data: Path, folder: Path, saved_by: set[int], damaged_for: int | None = None) -> str:
    """Each rank has a run folder of its own, as on hosts that share none; some hold two saves, one a damaged one."""
    path = folder / f"c{world.rank}.json"
    run = folder / f"run-{world.rank}"
    path.write_text(json.dumps(tiny_config(data, run)))
    if world.rank in saved_by:
        planned = open_run(config.load(path), world.size)[0]
        weights = model.create(planned.config.recipe.model, 5, seed=0).state_dict()
        state: dict[str, Any] = {"optimizer": {}, "loss_scaler": None}
        for step in (1, 2):
            saved = checkpoint.save(planned, weights, state, samples=32 * step, step=step, classes=5)
        if world.rank == damaged_for:
            (saved / "optimizer.pt").write_bytes(b"")
    torch.distributed.barrier()
    # the folders differ in name here; on real hosts only in content
    facts = lambda prepared: {k: v for k, v in prepared.facts().items() if k != "configuration"}  # noqa: E731
    return outcome(lambda: prepare(str(path), [], world), facts)


def test_hosts_that_would_resume_differently_are_refused(tiny_shards, tmp_path):
    for number, (saved_by, damaged_for) in enumerate([({0}, None), ({1}, None), ({0, 1}, 0), ({0, 1}, 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        answers = fork_ranks(prepare_in_own_folder, 2, tiny_shards, folder, saved_by, damaged_for)
        assert all("do not agree" in answer and "checkpoint: " in answer for answer in answers)
    folder = tmp_path / "none"
    folder.mkdir()
    answers = fork_ranks(prepare_in_own_folder, 2, tiny_shards, folder, set())
    assert all(answer.startswith("prepared Prepared(") for answer in answers)
