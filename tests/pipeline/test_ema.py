"""The average of the weights: against arithmetic, on any number of ranks, saved, resumed, measured and exported."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint, cli, config, model, resume, saves
from pipeline.engine import Engine, World
from pipeline.experiment import open_run
from pipeline.metrics import read_metrics
from pipeline.record import RunRecord
from pipeline.report.answers import remarks
from pipeline.report.rows import compare
from shards.errors import UserError
from tests.conftest import fork_ranks
from tests.forked import train_ranks
from tests.pipeline.test_engine import Synchronisations
from tests.training import TOLERANCE, assert_close, run_of
from tests.updates import make_plan, network, physical_batches

UPDATES = 5


def averaged(world: World, path: Path, section: dict[str, Any] | None, updates: int = UPDATES) -> dict[str, Any]:
    """The model's state after each update, and the average at the end; averaged over ranks, as a save would."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    changes = {"recipe.model.ema": section} if section is not None else {}
    resolved = make_plan(folder / "c.json", world.size, **changes)
    engine = Engine(network(batch_norm=True), resolved, world)
    states = [clone(engine.model.state_dict())]
    for update in range(updates):
        engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * 32)
        states.append(clone(engine.model.state_dict()))
    engine.average_statistics()
    found: dict[str, Any] = {"states": states, "last": clone(engine.model.state_dict())}
    if engine.average is not None:
        found["average"] = clone(engine.average.model.state_dict())
        with engine.averaged_weights():
            found["shown"] = clone(engine.model.state_dict())
        found["back"] = clone(engine.model.state_dict())
    return found


def clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("section", "decays"),
    [
        ({"decay": 0.7, "warmup": False}, [0.7] * UPDATES),
        ({"decay": 0.5}, [0, 1 - 2 ** (-2 / 3), 0.5, 0.5, 0.5]),
    ],
    ids=["plain", "warmup"],
)
def test_it_is_the_average_of_the_weights_and_statistics_after_each_update(tmp_path, section, decays):
    [answer] = fork_ranks(averaged, 1, tmp_path, section)
    expected = {name: tensor.double() for name, tensor in answer["states"][0].items()}
    for decay, state in zip(decays, answer["states"][1:], strict=True):
        expected = {name: decay * value + (1 - decay) * state[name].double() for name, value in expected.items()}
    for name, tensor in answer["average"].items():
        if "num_batches" in name:
            assert tensor == answer["last"][name]
        else:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
            assert not torch.equal(tensor, answer["last"][name]), name


def test_the_page_and_timm_agree_on_the_decay():
    from timm.utils import ModelEmaV3
    from torch import nn

    from pipeline.options_schema import Ema

    for section in (Ema(decay=0.9), Ema(decay=0.99, warmup=False)):
        theirs = ModelEmaV3(nn.Linear(1, 1), decay=section.decay, use_warmup=section.warmup)
        for update in (1, 2, 3, 10, 31, 32, 1000):
            assert section.decay_at(update) == pytest.approx(theirs.get_decay(update if section.warmup else None))


def test_it_does_not_depend_on_the_ranks_and_the_training_not_on_it(tmp_path):
    by_world = {size: fork_ranks(averaged, size, tmp_path / "with", {"decay": 0.6}) for size in (1, 2, 4)}
    for size in (2, 4):
        for answer in by_world[size]:
            for name, tensor in by_world[1][0]["average"].items():
                if "num_batches" not in name:
                    torch.testing.assert_close(answer["average"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    [without] = fork_ranks(averaged, 1, tmp_path / "without", None)
    assert all(torch.equal(tensor, by_world[1][0]["last"][name]) for name, tensor in without["last"].items())


def test_in_place_of_the_weights_and_back_to_the_last_bit(tmp_path):
    [answer] = fork_ranks(averaged, 1, tmp_path, {"decay": 0.6})
    for name, tensor in answer["last"].items():
        assert torch.equal(answer["shown"][name], answer["average"][name]), name
        assert torch.equal(answer["back"][name], tensor), name


def synchronisations(world: World, path: Path) -> list[str]:
    """What the device is waited for in the third update."""
    resolved = make_plan(path / "c.json", world.size, **{"recipe.model.ema": {"decay": 0.999}})
    engine = Engine(network(batch_norm=True), resolved, world)
    counted = Synchronisations()
    for update in range(3):
        with counted if update == 2 else contextlib.nullcontext():
            engine.update(iter(physical_batches(update, 0, resolved.batch)), update * 32)
    return counted.found


def test_averaging_waits_for_nothing(tmp_path):
    [found] = fork_ranks(synchronisations, 1, tmp_path)
    assert found == []


# ---------------------------------------------------------------- saves

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


@pytest.fixture
def saved(write_config) -> Path:
    """A run folder whose first save has averaged weights, and whose second one has not."""
    planned = open_run(config.load(write_config("saved", {"recipe.model.args": SMALL})), 2)[0]
    recipe = planned.config.recipe.model
    weights, average = (model.create(recipe, 5, seed=seed).state_dict() for seed in (1, 2))
    state = {"optimizer": {}, "loss_scaler": None}
    checkpoint.save(planned, weights, {**state, checkpoint.AVERAGE: average}, samples=32, step=1, classes=5)
    checkpoint.save(planned, weights, state, samples=64, step=2, classes=5)
    return planned.config.run_folder


def test_averaged_weights_have_a_file_of_their_own_in_a_save(saved):
    recipe = resume.read(saved / "checkpoints" / "step-1").facts.model
    assert recipe.startswith("resnet18")
    built = model.create(config.schema.Model(name="resnet18", args=SMALL), 5, seed=3)
    state = checkpoint.load(resume.read(saved / "checkpoints" / "step-1"), built)
    expected = model.create(config.schema.Model(name="resnet18", args=SMALL), 5, seed=2).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state[checkpoint.AVERAGE].items())
    assert checkpoint.AVERAGE not in checkpoint.load(resume.read(saved / "checkpoints" / "step-2"), built)
    pickled = torch.load(saved / "checkpoints" / "step-1" / "optimizer.pt", weights_only=True)
    assert set(pickled) == {"optimizer", "loss_scaler"}


def test_damaged_averages_are_a_damaged_save(saved):
    path = saved / "checkpoints" / "step-1" / "model_ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(saves.DamagedError, match="model_ema"):
        saves.verify(path.parent)
    path.unlink()
    with pytest.raises(saves.DamagedError, match=r"model_ema.safetensors is missing"):
        saves.verify(path.parent)


def test_averaged_weights_of_a_save_are_exported_by_name(saved, tmp_path, capsys):
    arguments = ["checkpoints", str(saved), "--export"]
    assert cli.main([*arguments, "1", str(tmp_path / "average.safetensors"), "--ema"]) == 0
    assert "the averaged weights of step 1" in capsys.readouterr().out
    expected = load_file(saved / "checkpoints" / "step-1" / "model_ema.safetensors")
    ours = load_file(tmp_path / "average.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    assert cli.main([*arguments, "2", str(tmp_path / "none.safetensors"), "--ema"]) == 2
    assert "does not average its weights" in capsys.readouterr().err
    assert cli.main(["checkpoints", str(saved), "--ema"]) == 2


# ---------------------------------------------------------------- whole runs

OFTEN = {"recipe.checkpoint.every_epochs": 0.5}
BESIDE = {**OFTEN, "recipe.model.ema": {"decay": 0.8}}
INSTEAD = {**OFTEN, "recipe.model.ema": {"decay": 0.8, "evaluate": "instead"}}


def evaluations(path: Path) -> list[dict]:
    return [event for event in read_metrics(run_of(path) / "metrics.jsonl") if event["event"] == "evaluation"]


def measured(capfd: pytest.CaptureFixture, weights: Path) -> dict:
    capfd.readouterr()
    assert cli.main(["evaluate", str(weights), "--json"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_it_is_measured_exported_and_the_same_after_a_resume_on_other_ranks(write_config, capfd):
    unbroken, resumed, plain = (
        write_config(name, changes) for name, changes in (("unbroken", BESIDE), ("resumed", BESIDE), ("plain", OFTEN))
    )
    train_ranks(unbroken, 1)
    out = capfd.readouterr().out
    assert "of all weights, decay 0.8 per update, less at first · evaluated beside the weights" in out
    assert " % top-5  (35 images)   average " in out
    train_ranks(resumed, 2, stop_at=7)
    train_ranks(resumed, 1)
    train_ranks(plain, 1)
    assert_close(run_of(resumed), run_of(unbroken), TOLERANCE)
    averages = [load_file(run_of(path) / "model_ema.safetensors") for path in (resumed, unbroken)]
    for name, tensor in averages[1].items():
        if "num_batches" not in name:
            torch.testing.assert_close(averages[0][name], tensor, rtol=2e-3, atol=2e-3, msg=name)
    ours, theirs = (load_file(run_of(path) / "model.safetensors") for path in (unbroken, plain))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), "the training is the same"
    assert not (run_of(plain) / "model_ema.safetensors").exists()

    last = evaluations(unbroken)[-1]
    for name, prefix in (("model.safetensors", ""), ("model_ema.safetensors", "ema_")):
        answer = measured(capfd, run_of(unbroken) / name)
        assert answer["loss"] == pytest.approx(last[f"{prefix}loss"], rel=1e-4)
        assert answer["top1"] == pytest.approx(last[f"{prefix}top1"])
    assert last["loss"] != pytest.approx(last["ema_loss"], rel=1e-4)
    finished = read_metrics(run_of(unbroken) / "metrics.jsonl")[-1]
    assert (finished["top1"], finished["ema_top1"]) == (last["top1"], last["ema_top1"])
    [row] = compare([RunRecord.read(run_of(unbroken))])
    assert any("exponential average of its weights has error" in remark for remark in remarks(row))


@pytest.mark.slow
def test_instead_of_the_weights_all_figures_and_the_export_are_the_average_s(write_config, capfd):
    beside, instead = write_config("beside", BESIDE), write_config("instead", INSTEAD)
    precise = write_config("precise", {**INSTEAD, "recipe.evaluation.precise_bn": 64})
    for path in (beside, instead, precise):
        train_ranks(path, 2)
    pairs = zip(evaluations(instead), evaluations(beside), strict=True)
    assert all(ours["weights"] == "ema" and ours["loss"] == theirs["ema_loss"] for ours, theirs in pairs)
    ours, theirs = (
        load_file(run_of(instead) / "model.safetensors"),
        load_file(run_of(beside) / "model_ema.safetensors"),
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not (run_of(instead) / "model_ema.safetensors").exists()
    [row] = compare([RunRecord.read(run_of(instead))])
    assert any("figures are those of the exponential average" in remark for remark in remarks(row))
    # statistics are then those of the averaged weights, and exported with them
    answer = measured(capfd, run_of(precise))
    assert answer["loss"] == pytest.approx(evaluations(precise)[-1]["loss"], rel=1e-4)
    assert answer["loss"] != pytest.approx(evaluations(instead)[-1]["loss"], rel=1e-3)


def test_a_run_that_goes_on_may_begin_and_end_averaging(write_config):
    """It begins with the weights of that moment."""
    path = write_config("begins", OFTEN)
    train_ranks(path, 1, stop_at=5)
    weights = load_file(saves.newest_whole(run_of(path)) / "model.safetensors")
    values = json.loads(path.read_text())
    values["recipe"]["model"]["ema"] = {"decay": 1 - 2**-24, "warmup": False}
    path.write_text(json.dumps(values))
    train_ranks(path, 1, stop_at=9)
    average = load_file(saves.newest_whole(run_of(path)) / "model_ema.safetensors")
    for name in ("conv1.weight", "fc.weight", "bn1.running_var"):
        torch.testing.assert_close(average[name], weights[name], rtol=1e-4, atol=1e-6)
    values["recipe"]["model"]["ema"] = None
    path.write_text(json.dumps(values))
    train_ranks(path, 1)
    assert not (saves.newest_whole(run_of(path)) / "model_ema.safetensors").exists()


def test_the_plan_says_what_is_left_of_the_first_weights(write_config, capsys):
    path = write_config("plain-decay", {"recipe.model.ema": {"decay": 0.9, "warmup": False}})
    assert cli.main(["plan", str(path), "--ranks", "1"]) == 0
    assert f"decay 0.9 per update, {0.9**13:.1%} of the first weights left at the end" in capsys.readouterr().out


@pytest.mark.parametrize(("section", "said"), [({"decay": 1}, "ema.decay"), ({"decai": 0.9}, 'did you mean "decay"')])
def test_nonsense_is_refused(write_config, section, said):
    with pytest.raises(UserError, match=r"recipe\.model\.ema") as error:
        config.load(write_config("refused", {"recipe.model.ema": section}))
    assert said in str(error.value)
