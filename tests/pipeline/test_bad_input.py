"""Mistakes about data and hosts: one clear error with the mend, exit code 2, and no process is launched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import checkpoint, cli, config, launcher, model
from pipeline.experiment import open_run
from shards.cli import main as shards_main
from shards.files import exclusive
from tests.conftest import write_images


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    def refuse(command: list[str], *_: object, **__: object) -> int:
        raise AssertionError(f"launched {command}")

    monkeypatch.setattr(launcher, "run_launcher", refuse)


@pytest.fixture
def shards(tiny_shards, tmp_path) -> Path:
    """A copy that may be damaged; the files of the original are read-only by convention."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_shards, copy)
    shutil.rmtree(copy / ".cache", ignore_errors=True)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def refusal(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("onehour: ") and "Traceback" not in captured.err
    return captured.err


def train_refusal(capsys, write_config: Callable[..., Path], data: Path) -> str:
    return refusal(capsys, "train", write_config(), "--data", data, "--ranks", "1")


def test_a_hostfile_that_is_not_there(capsys, write_config, tmp_path):
    message = refusal(capsys, "train", write_config(), "--hostfile", tmp_path / "hosts")
    assert str(tmp_path / "hosts") in message and "slots=" in message


@pytest.mark.parametrize("options", [["--include", "a"], ["--hostfile", "HOSTS", "--ranks", "2"], ["--ranks", "0"]])
def test_contradicting_rank_options(capsys, write_config, tmp_path, options):
    (tmp_path / "hosts").write_text("a slots=2\n")
    refusal(capsys, "train", write_config(), *(option.replace("HOSTS", str(tmp_path / "hosts")) for option in options))


def test_a_forgotten_set(capsys, write_config):
    message = refusal(capsys, "train", write_config(), "optimizer.params.lr=0.4")
    assert "Did you mean --set optimizer.params.lr=0.4?" in message


@pytest.mark.parametrize("options", [["--num_gpus", "1"], ["--num_accel=1"], ["-H", "hosts"], ["--num_nodes=2"]])
def test_the_launchers_options_for_ranks(capsys, write_config, options):
    message = refusal(capsys, "train", write_config(), *options)
    assert "Use onehour's own --" in message


def test_gpus_by_name(capsys, write_config, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    assert "CUDA_VISIBLE_DEVICES=GPU-1234" in refusal(capsys, "train", write_config())


def test_a_launch_on_hosts_that_cannot_begin_sets_nothing_aside(capsys, saved, monkeypatch, tmp_path):
    """The launcher would fail after `--fresh` had renamed the earlier run."""
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=2\nb slots=2\n")
    Path(".deepspeed_env").write_text("NCCL_DEBUG=INFO\nexport A=1\n")
    assert ".deepspeed_env:2: 'export A=1'" in refusal(capsys, "train", saved, "--hostfile", "hosts", "--fresh")
    Path(".deepspeed_env").unlink()
    assert "2 of 2 hosts cannot start a rank: a, b" in refusal(capsys, "train", saved, "--hostfile", "hosts", "--fresh")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install pdsh" in refusal(capsys, "train", saved, "--hostfile", "hosts", "--fresh")
    assert "apt install pdsh" in refusal(capsys, "train", saved, "--ranks", "2", "--force_multi", "--fresh")
    spaced = saved.rename(saved.with_name("two words.json"))
    assert f"{spaced}: pdsh hands" in refusal(capsys, "train", spaced, "--hostfile", "hosts", "--run", "runs/saved")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["saved"]


def test_ranks_that_do_not_divide_the_logical_workers(capsys, write_config):
    message = refusal(capsys, "train", write_config(), "--ranks", "3")
    assert "4 / 3" in message and "2 or 4 ranks" in message


def test_a_configuration_that_is_not_there(capsys, write_config):
    path = write_config("experiment")
    assert "experiment.json?" in refusal(capsys, "train", path.with_name("experimnet.json"))


def test_a_shard_folder_that_is_not_there(capsys, write_config, tmp_path):
    message = train_refusal(capsys, write_config, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "prepare" in message


def test_an_empty_shard_folder(capsys, write_config, tmp_path):
    (tmp_path / "empty").mkdir()
    message = train_refusal(capsys, write_config, tmp_path / "empty")
    assert str(tmp_path / "empty") in message and "prepare" in message


def test_tars_without_an_index(capsys, write_config, shards):
    (shards / "index.json").unlink()
    assert "shards index" in train_refusal(capsys, write_config, shards)


def test_a_missing_shard(capsys, write_config, shards):
    (shards / "train-00001.tar").unlink()
    assert "train-00001.tar" in train_refusal(capsys, write_config, shards)


@pytest.mark.parametrize("change", [-512, +512])
def test_a_truncated_or_rewritten_tar(capsys, write_config, shards, change):
    path = shards / "train-00002.tar"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + change)
    message = train_refusal(capsys, write_config, shards)
    assert "train-00002.tar" in message and "shards verify" in message


def test_an_index_that_does_not_match_the_tars(capsys, write_config, shards):
    """The index says that a shard has one sample more than its .idx lists."""
    path = shards / "index.json"
    index = json.loads(path.read_text())
    index["datasets"][0]["shardlist"][1]["nsamples"] += 1
    path.write_text(json.dumps(index))
    assert "train-00001" in train_refusal(capsys, write_config, shards)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def first_sample(shards: Path, shard: str) -> list[str]:
    return (shards / f"{shard}.idx").read_text().splitlines()[1].split()


def test_a_label_outside_the_classes(capsys, write_config, shards):
    fields = first_sample(shards, "train-00000")
    label = fields.index("cls")
    overwrite(shards / "train-00000.tar", int(fields[label + 1]), b"9")
    message = train_refusal(capsys, write_config, shards)
    assert "train-00000.tar" in message and "9" in message and "5 classes" in message


def test_two_samples_with_one_key(capsys, write_config, shards):
    """One shard is a copy of another, and the index knows."""
    for suffix in ("tar", "idx"):
        shutil.copy(shards / f"train-00000.{suffix}", shards / f"train-00001.{suffix}")
    path = shards / "index.json"
    index = json.loads(path.read_text())
    first, second = index["datasets"][0]["shardlist"][:2]
    index["datasets"][0]["shardlist"][1] = {**first, "url": second["url"]}
    path.write_text(json.dumps(index))
    key = first_sample(shards, "train-00000")[3].split(".")[0]
    message = train_refusal(capsys, write_config, shards)
    assert key in message and "train-00000" in message and "train-00001" in message


def test_a_validation_split_that_is_not_there(capsys, write_config):
    message = refusal(capsys, "train", write_config(), "--set", "recipe.evaluation.split=validation", "--ranks", "1")
    assert "validation" in message and "val" in message


def test_evaluating_what_is_not_weights(capsys, tmp_path):
    assert str(tmp_path) in refusal(capsys, "evaluate", tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    assert "--config" in refusal(capsys, "evaluate", tmp_path / "w.safetensors")


def test_auditing_a_run_that_recorded_nothing(capsys, tmp_path):
    refusal(capsys, "audit", tmp_path)


@pytest.fixture
def saved(write_config) -> Path:
    """A configuration whose run folder has a checkpoint."""
    path = write_config("saved")
    planned = open_run(config.load(path), 1)[0]
    network = model.create(planned.config.recipe.model, 5, seed=0)
    state = {"optimizer": {}, "loss_scaler": None}
    checkpoint.save(planned, network.state_dict(), state, samples=32, step=1, classes=5)
    return path


def test_a_checkpoint_of_another_seed(capsys, saved):
    message = refusal(capsys, "train", saved, "--set", "recipe.seed=1", "--ranks", "1")
    assert "seed: saved 0, now 1" in message and "--fresh" in message


def test_a_checkpoint_of_another_data_set(capsys, saved, tmp_path):
    write_images(tmp_path / "images" / "train", 26, seed=7)
    write_images(tmp_path / "images" / "val", 7, seed=8)
    shards_main(["prepare", "imagefolder", str(tmp_path / "images"), str(tmp_path / "other"), "--workers", "1"])
    message = train_refusal(capsys, lambda: saved, tmp_path / "other")
    assert "index_digest: saved" in message


def test_fresh_keeps_the_earlier_run_beside_the_new_one(capsys, saved, monkeypatch):
    monkeypatch.setattr(
        launcher, "run_launcher", lambda *_, **__: launcher.Ended(3)
    )  # the launcher fails: its code is passed on
    assert cli.main(["train", str(saved), "--set", "recipe.seed=1", "--ranks", "1", "--fresh"]) == 3
    captured = capsys.readouterr()
    assert "the earlier run is kept as" in captured.out and "did not finish" in captured.err
    [kept] = (saved.parent / "runs").glob("saved-until-*")
    assert (kept / "checkpoints" / "step-1" / "model.safetensors").exists()


def test_a_launcher_that_ends_with_0_without_a_finished_run_is_a_failure(capsys, write_config, monkeypatch):
    monkeypatch.setattr(launcher, "run_launcher", lambda *_, **__: launcher.Ended(0))
    assert cli.main(["train", str(write_config()), "--ranks", "1"]) == 1
    assert "did not finish" in capsys.readouterr().err


def test_a_folder_in_which_a_training_runs(capsys, saved):
    run = saved.parent / "runs" / "saved"
    with exclusive(run, "training"):
        for option in ([], ["--fresh"]):
            message = refusal(capsys, "train", saved, "--ranks", "1", *option)
            assert str(run) in message and "another training is writing here" in message
    assert run.exists()
