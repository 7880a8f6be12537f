"""Saving beside the training: of the moment, one at a time, the same as without; failures are met in the loop."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import checkpoint, config, model, resume, saves, schema
from pipeline.engine import World
from pipeline.experiment import open_run
from pipeline.metrics import read_metrics
from pipeline.plan import Plan
from pipeline.prepared import Prepared, prepare
from pipeline.run import Run
from pipeline.saver import Saved, Saver, Snapshot
from pipeline.together import prepare_together
from shards.errors import UserError
from tests.conftest import fork_ranks, kill_everything

RECIPE = schema.Model(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})


@pytest.fixture
def planned(write_config) -> Plan:
    return open_run(config.load(write_config()), 2)[0]


@pytest.fixture
def network() -> nn.Module:
    return model.create(RECIPE, 5, seed=0).to(memory_format=torch.channels_last)


def fill(network: nn.Module, value: int) -> dict:
    """Set every weight and statistic, in place, and the optimizer's state that belongs to it."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(value)
    momentum = torch.full((3, 4, 2, 2), float(value)).to(memory_format=torch.channels_last)
    return {"optimizer": {0: {"momentum_buffer": momentum, "step": value}}, "loss_scaler": None}


def load(planned: Plan) -> tuple[dict[str, torch.Tensor], dict]:
    found = resume.find_latest(planned.config.run_folder, pytest.fail)
    assert found is not None
    loaded = model.create(RECIPE, 5, seed=1)
    state = checkpoint.load(found, loaded)
    return loaded.state_dict(), state


def assert_holds(planned: Plan, value: int) -> None:
    weights, state = load(planned)
    assert all((tensor == value).all() for tensor in weights.values())
    assert (state["optimizer"][0]["momentum_buffer"] == value).all() and state["optimizer"][0]["step"] == value


class Gate:
    """Lets the writing thread go no further than to where everything is written, and nothing is in its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.threads, self.most, self._inside = threading.Event(), set(), 0, 0
        original = checkpoint._put_in_place

        def waiting(*folders: Path) -> None:
            self._inside += 1
            self.most = max(self.most, self._inside)
            self.threads.add(threading.current_thread())
            assert self.open.wait(20)
            original(*folders)
            self._inside -= 1

        monkeypatch.setattr(checkpoint, "_put_in_place", waiting)


def test_what_is_saved_is_of_the_moment(planned, network, monkeypatch):
    """Everything is overwritten in place as soon as `save` has returned, while nothing is in place on disk."""
    gate = Gate(monkeypatch)
    done: list[Saved] = []
    with Saver(planned, 5, done.append) as saver:
        state = fill(network, 7)
        saver.save(network, state, samples=32, step=1)
        state["optimizer"][0]["momentum_buffer"].fill_(8)
        state["optimizer"][0]["step"] = 8
        fill(network, 8)
        saver.poll()
        assert done == [] and not saves.saved_steps(planned.config.run_folder)
        gate.open.set()
        saver.wait()
        assert_holds(planned, 7)
        # the memory is used again, and nothing of the first save stays in it
        saver.save(network, state, samples=64, step=2)
        fill(network, 9)
    assert_holds(planned, 8)
    assert [(saved.step, saved.samples, saved.folder.name) for saved in done] == [(1, 32, "step-1"), (2, 64, "step-2")]
    assert all(saved.held > 0 and saved.seconds > 0 for saved in done)
    assert threading.main_thread() not in gate.threads


def test_a_snapshot_uses_its_memory_again_and_keeps_layouts():
    snapshot = Snapshot()
    tensor = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    first = snapshot.take({"a": [tensor, 3], "b": None})
    assert torch.equal(first["a"][0], tensor) and first["a"][0].stride() == tensor.stride() and first["a"][1] == 3
    address = first["a"][0].data_ptr()
    assert address != tensor.data_ptr()
    tensor += 1
    assert not torch.equal(first["a"][0], tensor)
    assert snapshot.take({"a": [tensor, 3], "b": None})["a"][0].data_ptr() == address
    grown = snapshot.take({"a": [torch.ones(9, dtype=torch.float64), 3], "b": None})
    assert torch.equal(grown["a"][0], torch.ones(9, dtype=torch.float64))


def test_one_save_is_in_flight_and_the_next_waits_for_it(planned, network, monkeypatch):
    gate = Gate(monkeypatch)
    done: list[Saved] = []
    with Saver(planned, 5, done.append) as saver:
        saver.save(network, fill(network, 1), samples=32, step=1)
        threading.Timer(0.4, gate.open.set).start()
        began = time.perf_counter()
        saver.save(network, fill(network, 2), samples=64, step=2)
        assert time.perf_counter() - began > 0.3 and [saved.step for saved in done] == [1]
    assert gate.most == 1 and [saved.step for saved in done] == [1, 2]
    assert done[1].held > 0.3 > done[0].held
    assert_holds(planned, 2)


def test_without_background_it_is_on_disk_when_save_returns(write_config, network):
    planned = open_run(config.load(write_config("blocking", {"recipe.checkpoint.background": False})), 2)[0]
    done: list[Saved] = []
    with Saver(planned, 5, done.append) as saver:
        saver.save(network, fill(network, 3), samples=32, step=1)
        assert [saved.step for saved in done] == [1] and done[0].held >= done[0].seconds
        assert_holds(planned, 3)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, in memory."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def short_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def meets_failure(saver: Saver) -> str:
    """What the next updates of a loop meet, within a time that a save surely takes."""
    deadline = time.monotonic() + 20
    with pytest.raises(UserError) as error:
        while time.monotonic() < deadline:
            saver.poll()
            time.sleep(0.001)
    saver.poll()  # once
    return str(error.value)


def assert_only_the_first_save_is_there(planned: Plan, message: str) -> None:
    run = planned.config.run_folder
    assert f"{run}/checkpoints/step-2: the checkpoint cannot be saved" in message
    assert "free there" in message and f"Safe is the save before it: {run}/checkpoints/step-1" in message
    assert "same command continues" in message
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1", "latest"}
    assert_holds(planned, 1)


def test_a_disk_that_is_full_is_met_in_the_loop_and_the_save_before_is_safe(write_config, network, tmp_path):
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    with small_disk(tmp_path / "disk", int(2.2 * size) + 40_000) as disk:
        planned = open_run(config.load(write_config("full", {"recipe.run": str(disk / "run")})), 2)[0]
        with Saver(planned, 5, lambda saved: None) as saver:
            saver.save(network, fill(network, 1), samples=32, step=1)
            saver.wait()
            filler = disk / "filler"
            filler.write_bytes(bytes(int(0.9 * size)))
            saver.save(network, fill(network, 2), samples=64, step=2)
            message = meets_failure(saver)
            assert "No space left" in message or "there is no space for it" in message
            assert_only_the_first_save_is_there(planned, message)
            filler.unlink()
            saver.save(network, fill(network, 3), samples=96, step=3)
        assert_holds(planned, 3)


@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_in_its_middle_is_met_in_the_loop(write_config, network, background):
    planned = open_run(config.load(write_config("full", {"recipe.checkpoint.background": background})), 2)[0]
    with Saver(planned, 5, lambda saved: None) as saver:
        saver.save(network, fill(network, 1), samples=32, step=1)
        saver.wait()
        with short_files(20_000):
            if background:
                saver.save(network, fill(network, 2), samples=64, step=2)
                message = meets_failure(saver)
            else:
                with pytest.raises(UserError) as error:
                    saver.save(network, fill(network, 2), samples=64, step=2)
                message = str(error.value)
        assert "File too large" in message
        assert_only_the_first_save_is_there(planned, message)


def test_a_failure_is_raised_by_the_next_save_or_at_the_end(planned, network):
    saver = Saver(planned, 5, lambda saved: None)
    with short_files(20_000):
        saver.save(network, fill(network, 1), samples=32, step=1)
        with pytest.raises(UserError, match="step-1: the checkpoint cannot be saved"):
            saver.save(network, fill(network, 2), samples=64, step=2)
        with pytest.raises(UserError, match=r"step-3.*\n  There is no earlier save"), saver:
            saver.save(network, fill(network, 3), samples=96, step=3)


def test_an_exception_is_not_hidden_by_a_save_that_fails_and_one_that_does_not_is_finished(planned, network, capsys):
    with pytest.raises(ZeroDivisionError), Saver(planned, 5, lambda saved: None) as saver:
        saver.save(network, fill(network, 1), samples=32, step=1)
        raise ZeroDivisionError
    assert_holds(planned, 1)
    with (
        short_files(20_000),
        pytest.raises(ZeroDivisionError),
        Saver(planned, 5, lambda saved: None) as saver,
    ):
        saver.save(network, fill(network, 2), samples=64, step=2)
        raise ZeroDivisionError
    assert "step-2: the checkpoint cannot be saved" in capsys.readouterr().err
    assert_holds(planned, 1)


# ---------------------------------------------------------------- whole runs, without the launcher

OFTEN = {"recipe.checkpoint.every_epochs": 0.2, "recipe.checkpoint.keep": 20, "recipe.epochs": 1}


def train_rank(world: World, path: Path) -> None:
    prepared = prepare_together(lambda: prepare(str(path), [], world), Prepared.facts)
    with Run(prepared, world) as run:
        run.train()


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = load_file(path), load_file(other)  # the order of what is in the files' headers is not fixed
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_is_the_same_to_the_last_bit_with_background_saves_and_without(write_config, capfd):
    paths = {
        background: write_config(f"background-{background}", {**OFTEN, "recipe.checkpoint.background": background})
        for background in (True, False)
    }
    runs = {background: path.parent / "runs" / path.stem for background, path in paths.items()}
    for background, path in paths.items():
        fork_ranks(train_rank, 2, path)
        events = [event for event in read_metrics(runs[background] / "metrics.jsonl") if event["event"] == "checkpoint"]
        assert [event["samples"] for event in events] == [32, 64, 96, 128, 160]
        assert all(event["seconds"] > 0 and event["held"] > 0 for event in events)
        out = capfd.readouterr().out
        assert all(f"saved {runs[background]}/…/step-{step}" in out for step in range(1, 6))
    found = {background: dict(saves.saved_steps(run)) for background, run in runs.items()}
    assert list(found[True]) == list(found[False]) == [1, 2, 3, 4, 5]
    for step, folder in found[True].items():
        other = found[False][step]
        assert (folder / "optimizer.pt").read_bytes() == (other / "optimizer.pt").read_bytes()
        assert_same(folder / "model.safetensors", other / "model.safetensors")
    assert_same(*(run / "model.safetensors" for run in runs.values()))


def start(path: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONEHOUR_TEST": str(path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", str(path)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow  # the parts are tested above
def test_a_run_whose_disk_is_full_ends_with_code_2_and_a_damaged_save_is_loud(write_config, tmp_path):
    """And the same command continues, from the save before the one that was damaged meanwhile."""
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        path = write_config("full", {**OFTEN, "recipe.run": str(disk / "run"), "recipe.epochs": 4})
        process = start(path)
        try:
            out, err = process.communicate(timeout=200)
        finally:
            kill_everything(f"ONEHOUR_TEST={path}")
        assert process.returncode == 1, out + err
        assert "the checkpoint cannot be saved" in err and "free there" in err and "Traceback" not in err
        folders = [folder for _, folder in saves.saved_steps(disk / "run")]
        assert len(folders) > 2 and all(map(saves.is_whole, folders))
        assert f"Safe is the save before it: {folders[-1]}" in err
        (folders[-1] / "optimizer.pt").write_bytes(b"")
        subprocess.run(["mount", "-o", "remount,size=100000000", disk], check=True)
        process = start(path)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
        assert f"{folders[-1]}: damaged" in out and "PASSED OVER" in out
        events = read_metrics(disk / "run" / "metrics.jsonl")
        [warning] = [event for event in events if event["event"] == "warning" and event["kind"] == "checkpoint"]
        assert str(folders[-1]) in warning["message"]
        [resumed] = [event for event in events if event["event"] == "resume"]
        assert resumed["samples"] == 32 * int(folders[-2].name.removeprefix("step-"))
        assert events[-1]["event"] == "finished"
