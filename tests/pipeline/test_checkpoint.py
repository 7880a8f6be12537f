"""Saving and finding checkpoints: whole or not at all, the right one, and only for the run that made them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, config, model, plan, resume, schema
from pipeline.experiment import open_run
from pipeline.plan import Plan
from pipeline.window import WindowOrder
from shards.errors import UserError

RECIPE = schema.Model(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})


@pytest.fixture
def planned(write_config) -> Plan:
    return open_run(config.load(write_config()), 2)[0]


def network(seed: int) -> torch.nn.Module:
    return model.create(RECIPE, 5, seed)


def save(planned: Plan, step: int) -> Path:
    state = {"optimizer": {0: {"momentum_buffer": torch.full((2,), float(step))}}, "loss_scaler": None}
    return checkpoint.save(planned, network(step), state, samples=step * 32, step=step, classes=5)


def test_what_is_saved_is_loaded(planned):
    folder = save(planned, 7)
    found = resume.find_latest(planned.config.run_folder)
    assert found is not None and (found.folder, found.samples, found.step) == (folder, 224, 7)
    resume.check(found, planned)
    loaded = network(0)
    state = checkpoint.load(found, loaded)
    assert torch.equal(state["optimizer"][0]["momentum_buffer"], torch.full((2,), 7.0))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network(7).parameters(), strict=True))


def test_only_the_newest_are_kept(planned):
    for step in range(1, 7):
        save(planned, step)
    assert [step for step, _ in resume.saved_steps(planned.config.run_folder)] == [4, 5, 6]


def test_latest_decides_and_its_loss_does_not_start_anew(planned):
    for step in (3, 4, 5):
        save(planned, step)
    run = planned.config.run_folder
    latest = resume.checkpoints_folder(run) / "latest"
    latest.write_text("step-4")
    assert resume.find_latest(run).step == 4
    for content in ("step-99", "", "../../elsewhere"):
        latest.write_text(content)
        assert resume.find_latest(run).step == 5
    latest.unlink()
    assert resume.find_latest(run).step == 5


def test_an_interrupted_save_is_never_seen_and_is_swept_up(planned):
    save(planned, 3)
    folder = resume.checkpoints_folder(planned.config.run_folder)
    partial = folder / ".partial-step-4-12345"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert resume.find_latest(planned.config.run_folder).step == 3
    save(planned, 4)
    assert not partial.exists()


def test_saving_the_same_step_again_replaces_it(planned):
    save(planned, 3)
    assert save(planned, 3).is_dir()
    assert resume.find_latest(planned.config.run_folder).step == 3


def test_no_checkpoint_is_no_checkpoint(planned):
    assert resume.find_latest(planned.config.run_folder) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_refused_and_named(planned, name, damage):
    path = save(planned, 3) / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-1])
    found = resume.find_latest(planned.config.run_folder)
    with pytest.raises(UserError, match=name) as error:
        checkpoint.load(found, network(0))
    assert "Remove" in str(error.value)


def test_damaged_facts_are_refused_and_named(planned):
    path = save(planned, 3) / "state.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=r"state\.json: damaged"):
        resume.find_latest(planned.config.run_folder)


def test_loading_runs_no_code_out_of_the_file(planned, tmp_path):
    """A pickle that would touch a file when loaded, under a digest that fits."""
    folder = save(planned, 3)
    witness = tmp_path / "was-run"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (witness,))

    torch.save({"optimizer": Hostile(), "loss_scaler": None}, folder / "optimizer.pt")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.pt"] = checkpoint._sha256(folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(resume.find_latest(planned.config.run_folder), network(0))
    assert not witness.exists()


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"recipe.seed": 1}, "seed"),
        ({"train_batch_size": 64}, "train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, "micro_batch"),
        ({"recipe.model.name": "resnet34"}, "model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(planned, write_config, changes, fact):
    save(planned, 3)
    other = open_run(config.load(write_config("tiny", changes)), 2)[0]
    with pytest.raises(UserError, match=f"{fact} differs") as error:
        resume.check(resume.find_latest(planned.config.run_folder), other)
    assert "--fresh" in str(error.value)


@pytest.mark.parametrize(
    ("section", "fact"),
    [
        ({"recipe.transform.color_jitter": {"hue": 0.1}}, "image_augment"),
        ({"recipe.mixing": {"mixup_alpha": 0.2}}, "mixing"),
    ],
)
def test_a_run_may_switch_augmentations_but_not_go_on_with_other_draws(
    planned, write_config, section, fact, monkeypatch
):
    switched = open_run(config.load(write_config("tiny", section)), 2)[0]
    save(planned, 3)
    resume.check(resume.find_latest(planned.config.run_folder), switched)
    save(switched, 4)
    found = resume.find_latest(planned.config.run_folder)
    assert getattr(found.facts, fact).endswith("-v1")
    resume.check(found, switched)
    resume.check(found, planned)
    monkeypatch.setattr(resume, {"mixing": "MIXING_NAME", "image_augment": "IMAGE_AUGMENT_NAME"}[fact], "other-v2")
    with pytest.raises(UserError, match=f"{fact} differs.*\n.*other-v2.*another way"):
        resume.check(found, switched)
    resume.check(found, planned)


def test_a_checkpoint_from_before_augmentations_is_read(planned):
    path = save(planned, 3) / "state.json"
    state = json.loads(path.read_text())
    del state["facts"]["image_augment"], state["facts"]["mixing"]
    path.write_text(json.dumps(state))
    resume.check(resume.find_latest(planned.config.run_folder), planned)


def test_a_checkpoint_of_other_shards_or_another_order_is_refused(planned):
    save(planned, 3)
    found = resume.find_latest(planned.config.run_folder)
    moved = plan.Plan(**{**vars(planned), "digest": "0" * 64})
    with pytest.raises(UserError, match="index_digest differs"):
        resume.check(found, moved)
    grown = plan.Plan(**{**vars(planned), "train_samples": 131})
    with pytest.raises(UserError, match="train_samples differs"):
        resume.check(found, grown)
    windowed = plan.Plan(
        **{**vars(planned), "order": WindowOrder([66, 64], 0, window=10, streams=1, update=32, logical_workers=4)}
    )
    with pytest.raises(UserError, match="order differs"):
        resume.check(found, windowed)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_number_of_ranks_is_no_fact(planned, write_config, world_size):
    save(planned, 3)
    resume.check(
        resume.find_latest(planned.config.run_folder), open_run(config.load(write_config("tiny")), world_size)[0]
    )
