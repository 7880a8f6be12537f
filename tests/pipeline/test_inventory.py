"""`onehour checkpoints`: lists, verifies, exports and prunes; on saves that were really made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint, cli, config, model, saves
from pipeline.experiment import open_run
from shards.files import exclusive


@pytest.fixture
def run(write_config) -> Path:
    """A run folder with saves of steps 3, 6, 9, by 2 ranks."""
    planned = open_run(config.load(write_config()), 2)[0]
    for step in (3, 6, 9):
        weights = model.create(planned.config.recipe.model, 5, seed=step).state_dict()
        checkpoint.save(
            planned, weights, {"optimizer": {}, "loss_scaler": None}, samples=step * 32, step=step, classes=5
        )
    return planned.config.run_folder


def checkpoints(capsys: pytest.CaptureFixture, *arguments: object, code: int = 0) -> str:
    assert cli.main(["checkpoints", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


def damage(run: Path, step: int, name: str = "optimizer.pt") -> Path:
    path = saves.checkpoints_folder(run) / f"step-{step}" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.parent


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in output.splitlines() if line.split()[0].isdecimal()}


def test_it_lists_what_there_is(capsys, run):
    output = checkpoints(capsys, run)
    listed = rows(output)
    assert list(listed) == ["3", "6", "9"]
    assert listed["6"][1:3] == ["1.48", "192"]  # 192 of 130 images
    assert listed["9"][-3:] == ["2", "←", "latest"] and "latest" not in listed["6"]
    assert "--verify" in output


def test_verifying_names_what_is_damaged_and_says_so_to_scripts(capsys, run):
    assert checkpoints(capsys, run, "--verify").count("whole") == 3
    folder = damage(run, 9)
    checkpoints(capsys, run)  # only state.json is looked at
    output = checkpoints(capsys, run, "--verify", code=1)
    assert f"{folder}: damaged: the sha256 of optimizer.pt" in output
    assert "DAMAGED" in rows(output)["9"] and "whole" in rows(output)["6"] and "continues from step 6" in output
    damage(run, 6, "state.json")
    output = checkpoints(capsys, run, code=1)
    assert rows(output)["6"][1] == "?"


def test_json_has_every_figure(capsys, run):
    damage(run, 3)
    answer = json.loads(checkpoints(capsys, run, "--verify", "--json", code=1))
    assert answer["continues_from"] == 9 and answer["removed"] == []
    assert [row["whole"] for row in answer["checkpoints"]] == [False, True, True]
    assert [row["latest"] for row in answer["checkpoints"]] == [False, False, True]
    first, *_, last = answer["checkpoints"]
    assert "optimizer.pt" in first["damage"] and last["damage"] is None
    folder = Path(last["path"])
    assert last["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (last["step"], last["samples"], last["epoch"], last["world_size"]) == (9, 288, 288 / 130, 2)
    assert [row["whole"] for row in json.loads(checkpoints(capsys, run, "--json"))["checkpoints"]] == [None] * 3


def test_an_export_is_the_weights_and_overwrites_nothing(capsys, run, tmp_path):
    out = tmp_path / "out.safetensors"
    assert str(out) in checkpoints(capsys, run, "--export", 6, out)
    theirs = model.create(config.load(tmp_path / "tiny.json").recipe.model, 5, seed=6).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_file(out).items())
    content = out.read_bytes()
    assert "is there already" in checkpoints(capsys, run, "--export", 9, out, code=2)
    assert out.read_bytes() == content
    assert "Steps that are saved: 3, 6, 9" in checkpoints(capsys, run, "--export", 7, tmp_path / "x", code=2)
    assert "no such folder" in checkpoints(capsys, run, "--export", 6, tmp_path / "no" / "x", code=2)
    damage(run, 6)
    assert "damaged" in checkpoints(capsys, run, "--export", 6, tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()


def test_pruning_keeps_the_newest_that_are_whole(capsys, run):
    damage(run, 9)
    output = checkpoints(capsys, run, "--prune", 1)
    assert "removed" in output and "step-3" in output
    assert [step for step, _ in saves.saved_steps(run)] == [6, 9]
    damage(run, 6)
    checkpoints(capsys, run, "--prune", 1)
    assert [step for step, _ in saves.saved_steps(run)] == [6, 9], "none is whole: none is removed"


def test_pruning_spares_the_one_that_the_run_continues_from(capsys, run):
    (saves.checkpoints_folder(run) / "latest").write_text("step-3")
    checkpoints(capsys, run, "--prune", 1)
    assert [step for step, _ in saves.saved_steps(run)] == [3, 9]


def test_pruning_is_refused_while_a_training_writes_and_for_none(capsys, run):
    with exclusive(run, "training"):
        assert "another training is writing" in checkpoints(capsys, run, "--prune", 1, code=2)
    assert "at least one" in checkpoints(capsys, run, "--prune", 0, code=2)
    assert len(saves.saved_steps(run)) == 3


def test_a_folder_without_saves_and_none_at_all(capsys, tmp_path):
    assert "nothing is saved" in checkpoints(capsys, tmp_path)
    assert "no such run folder" in checkpoints(capsys, tmp_path / "none", code=2)


def test_it_works_without_torch(run):
    """In an interpreter that cannot import it."""
    code = """
import sys
sys.modules["torch"] = None
from pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "checkpoints", str(run), "--verify", "--json"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["continues_from"] == 9
