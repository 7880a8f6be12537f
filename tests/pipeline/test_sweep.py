"""`onehour sweep` without training: what it refuses, which runs it starts and with what, and how it tells of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, config, plan, sweep, sweep_file, sweep_screen
from pipeline.experiment import open_run
from pipeline.fault import FAILED, FINISHED, MISTAKE, STOPPED
from pipeline.metrics import read_metrics
from pipeline.sweep_state import ENDED, LOG_FILE, STARTED, State, state_of
from shards.errors import UserError
from shards.files import exclusive
from tests.conftest import TINY_CLASSES, TINY_TRAIN, tiny_config

N = TINY_TRAIN * len(TINY_CLASSES)
# what `onehour train` would leave: a record and the resolved configuration, of which a part of the updates were done
TRAINER = """
import json, os, sys
from pathlib import Path
from pipeline import config
_, path, how, *overrides = sys.argv
loaded = config.load(path, [override for override in overrides if override != "--fresh"])
folder = loaded.run_folder
print("updates", *overrides)
if how in ("fail", "mistake"):
    print("onehour: rank 1 broke"); print("  its disk is full")
    sys.exit(2 if how == "mistake" else 1)
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.resolved.json").write_text(json.dumps(loaded.resolved()))
facts = {"seed": loaded.recipe.seed, "train_samples": 130, "train_batch_size": 32, "resumed_from": None}
events = [{"event": "start", **facts}, {"event": "evaluation", "samples": 130, "epoch": 1.0, "top1": 75.0}]
events += [{"event": "finished", "samples": 130}] if how == "finish" else []
why = {"step": 13, "samples": 416, "epoch": 3.2, "why": "the loss is nan at update 13 (epoch 3.20)"}
events += [{"event": "diverged", **why, "pid": os.getpid()}] if how == "diverge" else []
with (folder / "metrics.jsonl").open("a") as file:
    file.writelines(json.dumps(event) + "\\n" for event in events)
sys.exit({"finish": 0, "stop": 75, "lie": 0, "diverge": 2}[how])
"""


@pytest.fixture
def write_sweep(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a sweep of two arms and two seeds over the tiny configuration, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def write(arms: Sequence[dict[str, Any]] = ({"name": "a"}, {"name": "b"}), **sections: Any) -> Path:
        base = tiny_config(tiny_shards, Path("elsewhere"))
        (tmp_path / "tiny.json").write_text(json.dumps(base))
        path = Path("toy.yaml")
        sections = {"title": "A toy", "base": "tiny.json", "seeds": [0, 1], "arms": list(arms), **sections}
        path.write_text(json.dumps(sections))  # JSON is YAML
        return path

    return write


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """`onehour train` without training: how each run ends, by name; "finish" by default."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    ways: dict[str, str] = {}

    def command(resolved: sweep.Resolved, machine: Any) -> tuple[str, ...]:
        run = resolved.run
        return (sys.executable, str(script), str(run.config), ways.get(run.name, "finish"), *run.overrides)

    monkeypatch.setattr(sweep, "_command", command)
    return ways


def events(kind: str, folder: str = "runs/toy") -> list[dict[str, Any]]:
    path = Path(folder) / LOG_FILE
    return [event for event in read_metrics(path) if event["event"] == kind] if path.exists() else []


def started() -> list[str]:
    return [event["run"] for event in events(STARTED)]


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert cli.main(["sweep", *map(str, words)]) == MISTAKE
    captured = capsys.readouterr()
    assert captured.err.startswith("onehour: ")
    return captured.err


# ---------------------------------------------------------------- before the first run


def test_every_arms_mistakes_are_told_at_once_and_nothing_starts(capsys, write_sweep, trainer):
    path = write_sweep(
        [
            {"name": "good"},
            {"name": "key", "set": {"recipe.epoch": 3}},
            {"name": "batch", "set": {"train_batch_size": 33}},
            {"name": "model", "set": {"recipe.model.name": "resnet17"}},
            {"name": "another", "set": {"recipe.model.name": "resnet17", "recipe.epochs": 4}},
            {"name": "file", "config": "tyni.json"},
            {"name": "data", "set": {"recipe.data": "nowhere"}},
        ]
    )
    message = refusal(capsys, path)
    assert message.startswith(f"onehour: {path}: 6 of 7 arms cannot be trained as they are")
    for part in (
        'key: tiny.json: recipe: unknown key "epoch"; did you mean "epochs"?',
        "batch: tiny.json: train_batch_size 33 is not a multiple of train_micro_batch_size_per_gpu 8",
        "model, another: recipe.model.name: timm has no model 'resnet17'",
        "file: tyni.json: there is no such configuration file",
        "data: nowhere: no such folder",
    ):
        assert message.count(part) == 1, message
    assert not Path("runs").exists()


def test_a_mistake_of_all_arms_is_told_once(capsys, write_sweep):
    message = refusal(capsys, write_sweep(), "--data", "nowhere")
    assert "2 of 2 arms" in message and message.count("nowhere") == 1 and "all arms: nowhere" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", "130"], "--samples are for a look at runs that are not started: add --dry-run"),
        (["--dry-run", "--samples", "0"], "--samples 0: a training set has at least one image"),
        (["--dry-run", "--world-size", "0"], "world size 0: at least one rank is needed"),
        (["--ranks", "0"], "--ranks 0: at least one rank is needed"),
        (["--ranks", "3"], "train_batch_size 32 cannot be split over 3 ranks"),
        (["--only", "c"], "there is no arm c"),
        (["--set", "recipe.seed=4"], "the seeds of a sweep are its seeds"),
        (["--include", "a"], "--include and --exclude filter a hostfile"),
        (["--hostfile", "hosts", "--ranks", "2"], "with --hostfile the slots are the ranks"),
        (["--hostfile", "hosts", "--jobs", "2"], "with --hostfile every run takes all slots"),
        (["--fast"], "neither onehour train nor the launcher under it takes such an option"),
    ],
)
def test_contradictions_are_refused(capsys, write_sweep, words, expected):
    path = write_sweep()
    Path("hosts").write_text("x slots=2\n")
    assert expected in refusal(capsys, path, *words)
    assert not Path("runs").exists()


def test_a_dry_run_lists_all_and_writes_nothing(capsys, write_sweep, trainer):
    path = write_sweep([{"name": "a"}, {"name": "b", "set": {"train_batch_size": 64, "recipe.epochs": 2}}])
    assert cli.main(["sweep", str(path), "--dry-run", "--ranks", "2"]) == FINISHED
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "1", "32", "0.04", "13", "2", "missing"] in lines
    assert ["b", "0", "64", "0.08", "5", "2", "missing"] in lines
    assert lines[-2][:4] == ["4", "runs:", "4", "missing"]
    assert not Path("runs").exists()
    assert cli.main(["sweep", str(path), "--dry-run", "--samples", "64000", "--world-size", "4", "--data", "no"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["b", "1", "64", "0.08", "2,000", "4", "missing"] in lines


def test_a_folder_with_a_run_in_it_is_none_for_a_sweep(capsys, write_sweep, trainer):
    path = write_sweep()
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/metrics.jsonl").touch()
    assert "there is a run in it" in refusal(capsys, path)


def test_two_sweeps_in_one_folder_do_not_meet(capsys, write_sweep, trainer):
    path = write_sweep()
    Path("runs/toy").mkdir(parents=True)
    with exclusive(Path("runs/toy"), "sweep"):
        assert "another sweep is writing here" in refusal(capsys, path)
        assert cli.main(["sweep", str(path), "--out", "there", "--jobs", "2"]) == FINISHED
    assert started() == [] and len(events(ENDED, "there")) == 4


# ---------------------------------------------------------------- which runs, and how they end


def test_what_has_finished_is_not_trained_again_and_a_failure_ends_nothing(capsys, write_sweep, trainer):
    path = write_sweep()
    trainer.update({"a/seed-1": "fail", "b/seed-0": "lie"})
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == FAILED
    output = capsys.readouterr().out
    assert started() == ["a/seed-0", "a/seed-1", "b/seed-0", "b/seed-1"]
    ends = {event["run"]: (event["how"], event["code"]) for event in events(ENDED)}
    assert ends == {
        "a/seed-0": ("finished", 0),
        "a/seed-1": ("failed", 1),
        "b/seed-0": ("failed", 0),  # the record decides, and not the exit code
        "b/seed-1": ("finished", 0),
    }
    assert "finished a/seed-0   top-1 75.00 %" in output and "FAILED   a/seed-1   exit code 1 after" in output
    assert "a/seed-1 failed with exit code 1. The end of runs/toy/a/seed-1.log:" in output
    assert "  | onehour: rank 1 broke\n  |   its disk is full\n" in output
    assert "2 of 4 runs have finished" in output and "tries again what failed" in output
    assert "next:  onehour report" in output
    log = Path("runs/toy/a/seed-1.log").read_text()
    assert log.startswith("== ") and 'recipe.run="runs/toy/a/seed-1"' in log

    trainer.clear()
    untouched = Path("runs/toy/a/seed-0/metrics.jsonl").stat().st_mtime_ns
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == FINISHED
    output = capsys.readouterr().out
    assert started()[4:] == ["a/seed-1", "b/seed-0"]
    assert "4 runs: 2 finished, 1 to go on, 1 missing" in output and "4 of 4 runs have finished" in output
    assert Path("runs/toy/a/seed-0/metrics.jsonl").stat().st_mtime_ns == untouched
    assert cli.main(["sweep", str(path)]) == FINISHED
    assert len(started()) == 6


def test_a_run_that_diverged_has_ended_and_is_not_tried_again_unless_it_is_to_be_replaced(capsys, write_sweep, trainer):
    path = write_sweep()
    trainer["b/seed-1"] = "diverge"
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == FINISHED, "that is no failure"
    output = capsys.readouterr().out
    assert "diverged b/seed-1   at epoch 3.20   " in output and "   4 of 4 runs\n" in output
    assert "3 of 4 runs have finished, 1 has diverged\n" in output and "--restart" in output
    assert "failed" not in output and "exit code" not in output
    assert {event["run"]: event["how"] for event in events(ENDED)}["b/seed-1"] == "diverged"

    trainer.clear()
    untouched = Path("runs/toy/b/seed-1/metrics.jsonl").read_bytes()
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == FINISHED
    output = capsys.readouterr().out
    listed = next(line.split() for line in output.splitlines() if line.startswith("b") and " 1 " in line)
    assert listed[-4:] == ["diverged", "at", "epoch", "3.20"]
    assert "4 runs: 3 finished, 1 diverged\n" in output and "3 of 4 runs have finished, 1 has diverged\n" in output
    assert len(started()) == 4 and Path("runs/toy/b/seed-1/metrics.jsonl").read_bytes() == untouched

    assert cli.main(["sweep", str(path), "--jobs", "1", "--restart"]) == FINISHED
    output = capsys.readouterr().out
    assert started()[4:] == ["b/seed-1"] and events(STARTED)[-1]["command"][-1] == "--fresh"
    assert "4 of 4 runs have finished\n" in output and "1 has diverged" not in output


def test_a_run_that_was_to_be_replaced_and_did_not_begin_has_failed(capsys, write_sweep, trainer):
    """Its folder still tells of the divergence before: that is not what came of this try."""
    path = write_sweep(seeds=[0])
    trainer.update({"a/seed-0": "diverge", "b/seed-0": "fail"})
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == FAILED
    assert "0 of 2 runs have finished, 1 has diverged\n" in capsys.readouterr().out
    trainer.update({"a/seed-0": "mistake", "b/seed-0": "finish"})
    assert cli.main(["sweep", str(path), "--jobs", "1", "--restart"]) == FAILED
    assert "FAILED   a/seed-0   exit code 2" in capsys.readouterr().out
    trainer["a/seed-0"] = "diverge"
    assert cli.main(["sweep", str(path), "--jobs", "1", "--restart"]) == FINISHED
    assert "diverged a/seed-0" in capsys.readouterr().out, "and once more, at the same epoch, is news"


def test_a_run_that_diverged_does_not_hide_one_that_was_stopped(capsys, write_sweep, trainer):
    path = write_sweep(seeds=[0])
    trainer.update({"a/seed-0": "diverge", "b/seed-0": "stop"})
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == STOPPED
    assert "0 of 2 runs have finished, 1 has diverged\n" in capsys.readouterr().out


def test_a_run_that_was_stopped_is_no_failure(capsys, write_sweep, trainer):
    path = write_sweep(seeds=[0])
    trainer["a/seed-0"] = "stop"
    assert cli.main(["sweep", str(path), "--jobs", "1"]) == STOPPED
    output = capsys.readouterr().out
    assert "stopped  a/seed-0" in output and "1 of 2 runs have finished" in output and "failed" not in output


def test_one_arm_alone(write_sweep, trainer):
    assert cli.main(["sweep", str(write_sweep()), "--only", "b"]) == FINISHED
    assert sorted(started()) == ["b/seed-0", "b/seed-1"]


def test_a_run_of_another_training_is_refused_before_anything_starts_unless_it_is_to_be_replaced(
    capsys, write_sweep, trainer
):
    assert cli.main(["sweep", str(write_sweep()), "--only", "a"]) == FINISHED
    path = write_sweep([{"name": "a", "set": {"recipe.epochs": 4, "optimizer.params.lr": 0.5}}, {"name": "b"}])
    message = refusal(capsys, path)
    assert "2 runs in place are not what the sweep asks for" in message and "--restart" in message
    assert message.count("runs/toy/a/seed-0: optimizer.params.lr is 0.02, not 0.5") == 1 and "and 1 more" in message
    assert len(started()) == 2
    assert cli.main(["sweep", str(path), "--only", "b"]) == FINISHED, "the others are not held up"
    trainer["a/seed-1"] = "fail"
    assert cli.main(["sweep", str(path), "--restart"]) == FAILED
    commands = {event["run"]: event["command"] for event in events(STARTED)[4:]}
    assert sorted(commands) == ["a/seed-0", "a/seed-1"]
    assert all(command[-1] == "--fresh" for command in commands.values())


def test_what_each_run_is_started_with(write_sweep):
    """Read back by the parser of `onehour train`."""
    loaded = sweep_file.load(write_sweep([{"name": "a", "set": {"recipe.model.args": {"layers": [1, 1, 1, 1]}}}]))
    args = argparse.Namespace(ranks=2, jobs=None, hostfile=None, include="", exclude="", world_size=None, samples=130)
    machine = sweep.Machine.of(args, ["--master_port", "1"])
    resolved = sweep.resolve_all(loaded, loaded.runs(Path("out"), ['recipe.data="x y"']), machine, args)[1]
    command = sweep._command(resolved, machine)
    assert command[:4] == (sys.executable, "-P", "-m", "pipeline.cli")
    parsed, rest = cli._parser().parse_known_args(command[4:])
    assert (parsed.command, parsed.config, parsed.ranks, rest) == ("train", "tiny.json", 2, ["--master_port", "1"])
    again = config.load(parsed.config, parsed.set)
    assert again.recipe == resolved.plan.config.recipe
    assert (again.recipe.seed, again.recipe.data, again.recipe.run) == (1, "x y", "out/a/seed-1")


def test_progress_is_read_from_the_end_of_a_record_that_is_being_written(tmp_path):
    assert sweep_screen._progress(tmp_path) == ""
    lines = [{"event": "start"}, *({"event": "train", "epoch": number / 100} for number in range(900)), {"event": "x"}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"event": "train", "epo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert sweep_screen._progress(tmp_path) == "epoch 8.99"


# ---------------------------------------------------------------- how far a run is


@pytest.fixture
def asked(write_sweep, tmp_path) -> plan.Plan:
    write_sweep()
    return plan.resolve(config.load("tiny.json", ['recipe.run="run"', "recipe.seed=1"]), 2, samples=N)


def put(asked: plan.Plan, *kinds: str, **changes: Any) -> State:
    """The state of a run folder with these events, and a configuration with values changed by path."""
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    overrides = [f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in changes.items()]
    resolved = config.load("tiny.json", ['recipe.run="run"', "recipe.seed=1", *overrides]).resolved()
    (folder / "config.resolved.json").write_text(json.dumps(resolved | {"gradient_accumulation_steps": 4}))
    lines = [json.dumps({"event": kind, "train_samples": N, "samples": 416, "epoch": 3.2}) for kind in kinds]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return state_of(folder, asked)


def test_the_states_of_a_run(asked):
    assert state_of(Path("run"), asked).kind == "missing"
    assert put(asked).kind == "missing", "killed before it began"
    assert put(asked, "start") == State("begun", "to begin again: nothing was saved")
    assert put(asked, "start", "finished", "start").kind == "begun", "only the last process counts"
    assert put(asked, "start", "finished") == State("finished", "finished")
    assert put(asked, "start", "diverged") == State("diverged", "diverged at epoch 3.20")
    assert put(asked, "start", "diverged", "start").kind == "begun", "only the last process counts"
    assert put(asked, "start", "diverged", optimizer__params__lr=0.5).kind == "differs"
    Path("run/checkpoints/step-9").mkdir(parents=True)
    assert put(asked, "start") == State("begun", "to resume at epoch 2.22 of 3")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe__epochs": 2}, "recipe.epochs is 2, not 3"),
        ({"recipe__seed": 0}, "recipe.seed is 0, not 1"),
        ({"optimizer__params__lr": 0.5}, "optimizer.params.lr is 0.5, not 0.02"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, not absent"),
        ({"recipe__scaling": "none"}, "recipe.scaling is none, not linear"),
    ],
)
@pytest.mark.parametrize("kinds", [("start",), ("start", "finished")])
def test_another_training_does_not_count(asked, changes, reason, kinds):
    assert put(asked, *kinds, **changes) == State("differs", f"another training: {reason}", (reason,))


def test_what_changes_nothing_that_is_learned_does_count(asked):
    changes = {"recipe__loader__threads": 3, "recipe__logging__every_steps": 1, "recipe__checkpoint__keep": 1}
    assert put(asked, "start", "finished", recipe__data="moved", recipe__run="x", **changes).kind == "finished"


def test_what_cannot_be_read_is_not_the_run(asked):
    put(asked, "start", "finished")
    Path("run/config.resolved.json").write_text("{")
    assert state_of(Path("run"), asked).kind == "differs"
    Path("run/config.resolved.json").unlink()
    assert state_of(Path("run"), asked).kind == "differs"
    put(asked, "start", "finished")
    Path("run/metrics.jsonl").write_text("broken\n{}\n")
    assert "not a line of a run's record" in state_of(Path("run"), asked).reasons[0]


def test_other_shards_are_another_training(asked, tiny_shards):
    loaded = config.load("tiny.json", ['recipe.run="run"', "recipe.seed=1"])
    whole, _, _ = open_run(loaded, 2)
    put(asked, "start", "finished")
    facts = {"train_samples": N, "val_samples": 35, "index_digest": whole.digest, "order": whole.order.name}
    lines = [{"event": "start", **facts}, {"event": "finished"}]
    record = Path("run/metrics.jsonl")
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert state_of(Path("run"), whole).kind == "finished"
    for name, value in (("index_digest", "0" * 64), ("train_samples", 131), ("val_samples", 36), ("order", "x")):
        record.write_text("".join(json.dumps(line | {name: value}) + "\n" for line in lines))
        assert state_of(Path("run"), whole).reasons[0].startswith(f"{name} is {value}, not")


def test_shards_that_are_not_at_hand_are_a_users_mistake(write_sweep):
    with pytest.raises(UserError, match="no such folder"):
        sweep.run(cli._parser().parse_args(["sweep", str(write_sweep()), "--data", "gone"]), [])
