"""Saving and finding checkpoints: whole or not at all, the right one, and only for the run that made them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, cli, config, model, plan, resume, saves, schema
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
    return checkpoint.save(planned, network(step).state_dict(), state, samples=step * 32, step=step, classes=5)


def newest(planned: Plan) -> resume.Checkpoint:
    """The newest save, which must be whole."""
    found = resume.find_latest(planned.config.run_folder, pytest.fail)
    assert found is not None
    return found


def test_what_is_saved_is_loaded(planned):
    folder = save(planned, 7)
    found = newest(planned)
    assert (found.folder, found.samples, found.step) == (folder, 224, 7)
    resume.check(found, planned)
    loaded = network(0)
    state = checkpoint.load(found, loaded)
    assert torch.equal(state["optimizer"][0]["momentum_buffer"], torch.full((2,), 7.0))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network(7).parameters(), strict=True))


def test_only_the_newest_are_kept(planned):
    for step in range(1, 7):
        save(planned, step)
    assert [step for step, _ in saves.saved_steps(planned.config.run_folder)] == [4, 5, 6]


def test_latest_decides_and_its_loss_does_not_start_anew(planned):
    for step in (3, 4, 5):
        save(planned, step)
    run = planned.config.run_folder
    latest = saves.checkpoints_folder(run) / "latest"
    latest.write_text("step-4")
    assert newest(planned).step == 4
    for content in ("step-99", "", "../../elsewhere"):
        latest.write_text(content)
        assert newest(planned).step == 5
    latest.unlink()
    assert newest(planned).step == 5


def test_an_interrupted_save_is_never_seen_and_is_swept_up(planned):
    save(planned, 3)
    folder = saves.checkpoints_folder(planned.config.run_folder)
    partial = folder / ".partial-step-4-12345"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert newest(planned).step == 3
    save(planned, 4)
    assert not partial.exists()


def test_saving_the_same_step_again_replaces_it(planned):
    save(planned, 3)
    assert save(planned, 3).is_dir()
    assert newest(planned).step == 3


def test_no_checkpoint_is_no_checkpoint(planned):
    assert resume.find_latest(planned.config.run_folder, pytest.fail) is None


def assert_loads(found: resume.Checkpoint, step: int) -> None:
    """The state that `save` made for a step, to the last bit."""
    loaded = network(0)
    state = checkpoint.load(found, loaded)
    assert found.step == step and found.samples == step * 32
    assert torch.equal(state["optimizer"][0]["momentum_buffer"], torch.full((2,), float(step)))
    ours, theirs = loaded.state_dict(), network(step).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def falls_back(planned: Plan) -> tuple[resume.Checkpoint, str]:
    """What is found where the newest save is damaged, and what is said of it."""
    said: list[str] = []
    found = resume.find_latest(planned.config.run_folder, said.append)
    assert found is not None and len(said) == 1
    return found, said[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_save_is_named_and_the_one_before_it_is_taken(planned, name, damage):
    save(planned, 2)
    folder = save(planned, 3)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-1])
    found, message = falls_back(planned)
    assert str(folder) in message and name in message and "PASSED OVER" in message and "step-2" in message
    assert_loads(found, 2)
    with pytest.raises(saves.DamagedError, match=name):
        checkpoint.load(resume.Checkpoint(folder, 96, 3, found.facts, {}), network(0))


def test_a_save_cut_off_anywhere_is_never_loaded(planned):
    """At 100 positions of the other files, and every one of state.json; there a flipped bit of every byte too."""
    save(planned, 1)
    folder = save(planned, 2)
    generator = random.Random(5)
    tried = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name == "state.json":
            cuts = list(range(len(content)))
            flipped = [
                content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :] for at in cuts
            ]
        else:
            cuts, flipped = [len(content) * number // 49 for number in range(49)] + [len(content) - 1], []
        for data in [*(content[:cut] for cut in cuts), *flipped]:
            path.write_bytes(data)
            found, message = falls_back(planned)
            assert found.step == 1 and path.name in message, (path, len(data))
        assert_loads(found, 1)
        path.write_bytes(content)
        tried += len(cuts)
    assert tried > 100 + 500
    assert_loads(newest(planned), 2)


def test_of_several_damaged_saves_each_is_named(planned):
    folders = [save(planned, step) for step in (1, 2, 3)]
    for folder in folders[1:]:
        (folder / "optimizer.pt").write_bytes(b"")
    found, message = falls_back(planned)
    assert found.folder == folders[0]
    assert all(str(folder) in message for folder in folders)


def test_where_all_are_damaged_the_run_is_refused_and_never_starts_anew(planned):
    folders = [save(planned, 1), save(planned, 2)]
    (folders[0] / "state.json").unlink()
    (folders[1] / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of the saves is whole") as error:
        resume.find_latest(planned.config.run_folder, pytest.fail)
    assert "--fresh" in str(error.value) and all(str(folder) in str(error.value) for folder in folders)


def test_a_save_after_the_one_that_latest_names_is_better_than_none(planned):
    """As after a kill between a save's rename and the pointer, where the one before it is damaged."""
    save(planned, 1)
    later = save(planned, 2)
    (later.parent / "latest").write_text("step-1")
    (later.parent / "step-1" / "optimizer.pt").unlink()
    assert falls_back(planned)[0].folder == later


def test_a_damaged_save_is_none_of_those_that_are_kept(planned):
    assert planned.config.recipe.checkpoint.keep == 3
    for step in (1, 2, 3):
        folder = save(planned, step)
    (folder / "optimizer.pt").write_bytes(b"")
    save(planned, 4)
    assert [step for step, _ in saves.saved_steps(planned.config.run_folder)] == [1, 2, 3, 4]
    save(planned, 5)
    assert [step for step, _ in saves.saved_steps(planned.config.run_folder)] == [2, 3, 4, 5]
    save(planned, 6)
    assert [step for step, _ in saves.saved_steps(planned.config.run_folder)] == [4, 5, 6]


def test_one_that_waits_to_be_replaced_is_a_save_until_it_is(planned):
    """A kill between the two renames of a replacement."""
    folder = save(planned, 3)
    aside = folder.with_name(".replaced-step-3")
    folder.rename(aside)
    assert_loads(newest(planned), 3)
    assert save(planned, 3) == folder
    assert newest(planned).folder == folder
    save(planned, 4)
    assert not aside.exists()


def test_a_digest_is_computed_once_and_again_when_the_file_has_changed(tmp_path, monkeypatch):
    computed = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: computed.append(args) or original(*args))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    fresh = [saves.sha256(path) for _ in range(2)]
    assert len(computed) == 2, "written just now, it may be written again within the clock's resolution"
    os.utime(path, (1e9, 1e9))
    assert [saves.sha256(path) for _ in range(3)] == [fresh[0]] * 3 and len(computed) == 3
    path.write_bytes(b"two")
    assert saves.sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_the_ranks_that_saved_are_told_and_older_saves_do_not_tell(planned):
    path = save(planned, 3) / "state.json"
    assert newest(planned).world_size == 2
    state = json.loads(path.read_text())
    del state["world_size"], state["digest"]
    path.write_text(json.dumps(state))
    assert newest(planned).world_size is None
    assert_loads(newest(planned), 3)


def test_a_save_of_a_later_version_is_refused_and_not_passed_over(planned):
    save(planned, 2)
    path = save(planned, 3) / "state.json"
    state = json.loads(path.read_text())
    del state["digest"]
    path.write_text(saves.seal({**state, "format": 2}))
    with pytest.raises(UserError, match="format 2 cannot be read"):
        resume.find_latest(planned.config.run_folder, pytest.fail)


KILLS = 60


def save_for_ever(planned: Plan, first: int, done) -> None:
    """Saves step after step, and tells of each that it is on disk."""
    with done.makefile("wb", buffering=0) as told:
        for step in range(first, first + 10_000):
            save(planned, step)
            told.write(f"{step}\n".encode())


def test_killed_at_any_moment_of_a_save_what_is_found_is_whole(planned):
    """SIGKILL at random moments: the newest save that was reported, or the one that was being written, is found."""
    seed = 20
    print(f"seed {seed}")
    generator = random.Random(seed)
    began = time.monotonic()
    save(planned, 1)
    seconds = time.monotonic() - began  # of a save
    reached, within = 1, 0
    for _ in range(KILLS):
        reader, writer = socket.socketpair()
        # the last one is saved again: replacing it must not lose it
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(planned, reached, writer))
        child.start()
        writer.close()
        time.sleep(generator.uniform(0, 4 * seconds))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reported = [int(line) for line in reader.makefile("rb").read().split()]
        reader.close()
        done = reported[-1] if reported else reached
        folder = saves.checkpoints_folder(planned.config.run_folder)
        within += bool(list(folder.glob(".partial-*")))
        found = newest(planned)
        assert found.step in (done, done + 1)
        assert_loads(found, found.step)
        assert all(saves.is_whole(path) for _, path in saves.saved_steps(planned.config.run_folder))
        reached = found.step
    assert within > KILLS / 4, f"only {within} of {KILLS} kills were within the writing of a save"
    save(planned, reached + 1)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "all leftovers are gone"


def test_loading_runs_no_code_out_of_the_file(planned, tmp_path):
    """A pickle that would touch a file when loaded, under a digest that fits."""
    folder = save(planned, 3)
    witness = tmp_path / "was-run"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (witness,))

    torch.save({"optimizer": Hostile(), "loss_scaler": None}, folder / "optimizer.pt")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.pt"] = saves.sha256(folder / "optimizer.pt")
    del state["digest"]
    (folder / "state.json").write_text(saves.seal(state))
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(newest(planned), network(0))
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
        resume.check(newest(planned), other)
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
    resume.check(newest(planned), switched)
    save(switched, 4)
    found = newest(planned)
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
    del state["facts"]["image_augment"], state["facts"]["mixing"], state["world_size"], state["digest"]
    path.write_text(json.dumps(state))
    resume.check(newest(planned), planned)


def test_a_checkpoint_of_other_shards_or_another_order_is_refused(planned):
    save(planned, 3)
    found = newest(planned)
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
    resume.check(newest(planned), open_run(config.load(write_config("tiny")), world_size)[0])


# ---------------------------------------------------------------- what the plan says of going on


def test_the_plan_says_what_other_hosts_change_and_what_they_do_not(planned, write_config, tmp_path, capsys):
    path = str(write_config())
    assert cli.main(["plan", path, "--ranks", "4"]) == 0
    assert "resume" not in capsys.readouterr().out, "a new run"
    save(planned, 5)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    assert cli.main(["plan", path, "--hostfile", str(tmp_path / "hosts")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "resume     from update 5 (epoch 1.23) · ranks 2 → 4, accumulation 2 → 1 · "
        "batch 32, rates, order and BN's n are those of any number of ranks"
    )
    assert cli.main(["plan", path, "--world-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resume"] == "from update 5 (epoch 1.23) · on 2 ranks as before"
    assert cli.main(["plan", path, "--world-size", "1", "--samples", "130"]) == 0
    assert "resume" not in capsys.readouterr().out, "of no data set, nothing is known"


def test_the_plan_says_that_training_would_refuse(planned, write_config, capsys):
    folders = [save(planned, step) for step in (4, 5)]
    path = str(write_config())
    assert cli.main(["plan", path, "--ranks", "2", "--set", "recipe.seed=1"]) == 0
    refused = f"resume     refused: {folders[1]}: the checkpoint is from another run: seed differs · another folder: "
    assert refused in capsys.readouterr().out
    (folders[1] / "model.safetensors").write_bytes(b"")
    assert cli.main(["plan", path, "--ranks", "2"]) == 0
    said = capsys.readouterr()
    assert "resume     from update 4" in said.out and "PASSED OVER" in said.err
    (folders[0] / "model.safetensors").write_bytes(b"")
    assert cli.main(["plan", path, "--ranks", "2"]) == 0
    assert "none of the saves is whole" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_its_ranks_and_one_of_the_end(planned):
    save(planned, 5)
    old = replace(newest(planned), world_size=None)
    assert resume.describe(old, planned) == "from update 5 (epoch 1.23) · on 2 ranks"
    done = replace(old, step=planned.steps)
    assert resume.describe(done, planned) == "nothing is left to do: all 13 updates are done"
