"""Ranks that would train different things stop before the first update, and every rank with the same message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint, config, model, train
from pipeline.experiment import open_run
from pipeline.run import FACT_MENDS
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


def prepare_in_own_folder(world, data: Path, folder: Path, saved_by: int | None) -> str:
    """Each rank has a run folder of its own, as on hosts that share none; one of them may hold a checkpoint."""
    path = folder / f"c{world.rank}.json"
    run = folder / f"run-{world.rank}"
    path.write_text(json.dumps(tiny_config(data, run)))
    if world.rank == saved_by:
        planned = open_run(config.load(path), world.size)[0]
        network = model.create(planned.config.recipe.model, 5, seed=0)
        state: dict[str, Any] = {"optimizer": {}, "loss_scaler": None}
        checkpoint.save(planned, network, state, samples=32, step=1, classes=5)
    torch.distributed.barrier()
    # the folders differ in name here; on real hosts only in content
    facts = lambda prepared: {k: v for k, v in prepared.facts().items() if k != "configuration"}  # noqa: E731
    return outcome(lambda: train.prepare(str(path), [], world), facts)[:60]


def test_hosts_that_would_resume_differently_are_refused(tiny_shards, tmp_path):
    for saved_by, folder in ((0, tmp_path / "a"), (1, tmp_path / "b")):
        folder.mkdir()
        answers = fork_ranks(prepare_in_own_folder, 2, tiny_shards, folder, saved_by)
        assert all("do not agree" in answer for answer in answers)
    folder = tmp_path / "c"
    folder.mkdir()
    answers = fork_ranks(prepare_in_own_folder, 2, tiny_shards, folder, None)
    assert all(answer.startswith("prepared Prepared(") for answer in answers)
