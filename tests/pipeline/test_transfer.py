"""Fine-tuning by configuration: what is loaded, what is new, what is frozen, and at which rate the rest learns."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import cli, config, model, schema, transfer
from pipeline.batch_norm import average_statistics
from pipeline.engine import Engine, World
from pipeline.experiment import open_run
from pipeline.metrics import read_metrics
from pipeline.prepared import Prepared, prepare
from pipeline.schedule import GradualWarmupLR
from shards.cli import main as shards_main
from shards.errors import UserError
from tests.conftest import fork_ranks, tiny_config
from tests.forked import train_ranks
from tests.training import TOLERANCE, assert_close, run_of, weights
from tests.updates import make_plan, network, physical_batches

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}
CLASSIFIER = ("fc.weight", "fc.bias")


def recipe(**section: Any) -> schema.Model:
    return schema.Model(**{"name": "resnet18", "args": SMALL, **section})


def filled(classes: int, seed: int = 9, name: str = "resnet18", **arguments: Any) -> nn.Module:
    """A network whose every number is another than those of an initialisation."""
    arguments = SMALL if name == "resnet18" and not arguments else arguments
    built = model.create(schema.Model(name=name, args=arguments), classes, seed=0)
    torch.manual_seed(seed)
    for tensor in built.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return built


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Weights of ten classes as a run exports them."""
    path = tmp_path / "ten.safetensors"
    model.export(filled(10), path, recipe(), 10)
    return path


def started(section: schema.Model, classes: int, seed: int = 1) -> tuple[dict[str, torch.Tensor], transfer.Start]:
    built = model.create(section, classes, seed)
    start = transfer.prepare(built, section, resumes=False)
    assert start is not None
    return built.state_dict(), start


# ---------------------------------------------------------------- what is loaded


def test_everything_but_the_classifier_is_the_file_s_where_the_classes_differ(exported):
    state, start = started(recipe(start_from=str(exported)), 5)
    theirs, fresh = load_file(exported), model.create(recipe(), 5, seed=1).state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, fresh[name] if name in CLASSIFIER else theirs[name]), name
    assert start.classifier == "fc new, 5 classes; that of the weights has 10"
    other, _ = started(recipe(start_from=str(exported)), 5, seed=2)
    assert not torch.equal(other["fc.weight"], state["fc.weight"]), "the new classifier is drawn from the seed"


def test_a_classifier_that_fits_is_taken_unless_a_new_one_is_asked_for(exported):
    theirs = load_file(exported)
    state, start = started(recipe(start_from=str(exported)), 10)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())
    assert start.classifier == "fc of the weights, 10 classes"
    state, start = started(recipe(start_from=str(exported), new_head=True), 10)
    different = {name for name, tensor in state.items() if not torch.equal(tensor, theirs[name])}
    assert different == set(CLASSIFIER) and "fc new" in start.classifier


def test_weights_without_a_classifier_are_a_body(exported, tmp_path):
    body = {name: tensor for name, tensor in load_file(exported).items() if name not in CLASSIFIER}
    save_file(body, tmp_path / "body.safetensors")
    state, start = started(recipe(start_from=str(tmp_path / "body.safetensors")), 5)
    assert torch.equal(state["conv1.weight"], body["conv1.weight"]) and start.classifier == "fc new, 5 classes"


@pytest.mark.parametrize(
    "content",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {"state_dict": {name: tensor + 1 for name, tensor in state.items()}, "state_dict_ema": state},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
    ],
    ids=["plain", "timm", "torchvision", "average", "distributed", "without-counts"],
)
def test_checkpoints_of_other_libraries_are_read(tmp_path, content):
    theirs = filled(10).state_dict()
    torch.save(content(dict(theirs)), tmp_path / "theirs.pth.tar")
    state, _ = started(recipe(start_from=str(tmp_path / "theirs.pth.tar")), 5)
    for name, tensor in theirs.items():
        assert name in CLASSIFIER or torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    ("name", "arguments", "heads"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}, 2),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}, 4),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}, 2),
        ("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8}, 2),
    ],
)
def test_the_classifier_is_found_whatever_a_network_calls_it(tmp_path, name, arguments, heads):
    theirs = filled(7, name=name, **arguments)
    section = schema.Model(name=name, args=arguments, start_from=str(tmp_path / "x.safetensors"))
    model.export(theirs, tmp_path / "x.safetensors", section, 7)
    state, _ = started(section, 3)
    before = theirs.state_dict()
    differing = [
        key for key in state if state[key].shape != before[key].shape or not torch.equal(state[key], before[key])
    ]
    assert len(differing) == heads and len(transfer.classifier_parameters(theirs)) == heads


def test_weights_of_another_network_are_refused_by_name(exported, tmp_path):
    wider = recipe(args={**SMALL, "channels": [8, 8, 12, 16]}, start_from=str(exported))
    with pytest.raises(UserError, match=r"the weights do not fit resnet18 with") as error:
        started(wider, 10)
    assert "layer3.0.conv1.weight is (8, 8, 3, 3), the network's (12, 8, 3, 3)" in str(error.value)
    assert "others" in str(error.value) and "recipe.model.name and args" in str(error.value)
    with pytest.raises(UserError, match=r"missing: layer1\.0\.conv3\.weight"):
        started(schema.Model(name="resnet50", args=SMALL, start_from=str(exported)), 10)
    more = {**load_file(exported), "extra.weight": torch.ones(2)}
    save_file(more, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"unknown: extra\.weight \(2,\)"):
        started(recipe(start_from=str(tmp_path / "more.safetensors")), 10)


def test_files_that_hold_no_weights_are_user_errors(exported, tmp_path):
    broken = load_file(exported)
    broken["bn1.running_var"][2] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(exported.read_bytes()[:-7])
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"state_dict": {"conv1.weight": "a text"}}, tmp_path / "strange.pth")
    (tmp_path / "run").mkdir()
    shutil.copy(exported, tmp_path / "run" / "model.safetensors")
    for name, said in {
        "nan.safetensors": "bn1.running_var is not finite",
        "cut.safetensors": "cannot be read as weights",
        "text.pth": "cannot be read as weights",
        "strange.pth": "conv1.weight is no tensor",
        "absent.pth": "there is no such file",
        "run": f"that a run exported are {tmp_path / 'run' / 'model.safetensors'}",
    }.items():
        with pytest.raises(UserError) as error:
            started(recipe(start_from=str(tmp_path / name)), 10)
        assert str(tmp_path / name) in str(error.value) and said in str(error.value)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    witness = tmp_path / "was-run"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (witness,))

    torch.save({"state_dict": filled(10).state_dict(), "args": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        started(recipe(start_from=str(tmp_path / "hostile.pth")), 10)
    assert not witness.exists()


# ---------------------------------------------------------------- timm's own weights


def test_timms_own_weights_come_with_their_classifier_or_get_a_new_one(monkeypatch):
    theirs = filled(1000)
    asked = []

    def create(name: str, **arguments: Any) -> nn.Module:
        if not arguments.pop("pretrained", False):
            return original(name, **arguments)
        asked.append((name, arguments))
        return theirs

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    state, start = started(recipe(start_from="timm"), 1000)
    assert torch.equal(state["fc.weight"], theirs.state_dict()["fc.weight"]) and start.source == "timm"
    state, _ = started(recipe(start_from="timm", args={**SMALL, "num_classes": 12}), 10)
    assert state["fc.weight"].shape == (12, 16) and torch.equal(state["conv1.weight"], theirs.conv1.weight)
    assert asked == [("resnet18", SMALL)] * 2, "with the number of classes that the weights are for"


def test_the_page_says_how_timms_weights_want_their_images():
    theirs = schema.Model(name="vit_tiny_patch16_224", start_from="timm")
    network = model.create(theirs, 10, seed=0)
    start = transfer.Start("timm", "ab" * 32, "head of the weights, 10 classes")
    [_, (_, line)] = transfer.describe(network, start, schema.Transform())
    assert "--set 'recipe.transform.mean=[0.5, 0.5, 0.5]' --set 'recipe.transform.std=[0.5, 0.5, 0.5]'" in line
    half = schema.Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert len(transfer.describe(network, start, half)) == 1
    of_a_run = transfer.Start("runs/a/model.safetensors", start.digest, start.classifier)
    assert len(transfer.describe(network, of_a_run, schema.Transform())) == 1, "whose images were whatever they were"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("no route to huggingface.co"), "cannot be fetched: no route"),
        (RuntimeError("No pretrained weights exist for this model."), "timm has no weights of resnet18"),
    ],
)
def test_where_timms_weights_cannot_be_had_the_error_says_what_is_needed(monkeypatch, error, said):
    def create(name: str, **arguments: Any) -> nn.Module:
        if arguments.pop("pretrained", False):
            raise error
        return original(name, **arguments)

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=said) as caught:
        started(recipe(start_from="timm"), 10)
    assert "recipe.model.start_from" in str(caught.value)
    if isinstance(error, OSError):
        assert "Hugging Face Hub" in str(caught.value) and "Without a network" in str(caught.value)


# ---------------------------------------------------------------- what is trained


def test_a_pattern_freezes_what_it_matches_and_the_bn_layers_that_are_all_frozen():
    built = model.create(recipe(), 5, seed=0)
    transfer.freeze(built, ["layer1.*", "layer2.*.weight", "conv1.weight"])
    frozen = {name for name, parameter in built.named_parameters() if not parameter.requires_grad}
    everything = [name for name, _ in built.named_parameters()]
    assert frozen == {
        name
        for name in everything
        if name == "conv1.weight" or name.startswith("layer1.") or (name.startswith("layer2.") and "weight" in name)
    }
    names = {id(layer): name for name, layer in built.named_modules()}
    layers = {names[id(layer)] for layer in transfer.frozen_norms(built)}
    assert layers == {"layer1.0.bn1", "layer1.0.bn2", "layer1.0.downsample.1"}, "layer2's have a β that is trained"
    rows = dict(transfer.describe(built, None, schema.Transform()))
    assert rows["trained"].startswith(f"{len(everything) - len(frozen)} of {len(everything)} parameters")
    assert "3 of 13 BN layers in evaluation mode" in rows["trained"]
    spared = sum(len(group["params"]) for group in model.parameter_groups(built))
    assert spared == len(everything) - len(frozen), "what is frozen is no optimizer's"


def test_patterns_that_match_nothing_or_everything_are_user_errors():
    built = model.create(recipe(), 5, seed=0)
    with pytest.raises(UserError, match=r'freeze: "layer9\.\*" matches no parameter') as error:
        transfer.freeze(built, ["layer1.*", "layer9.*"])
    assert "conv1.*, bn1.*, layer1.*" in str(error.value)
    with pytest.raises(UserError, match=r'"layer1" matches no parameter'):
        transfer.freeze(built, ["layer1"])
    with pytest.raises(UserError, match="match all parameters"):
        transfer.freeze(built, ["*"])


def test_a_body_rate_without_a_trained_classifier_is_a_user_error():
    built = model.create(recipe(), 5, seed=0)
    with pytest.raises(UserError, match="the classifier is frozen"):
        transfer.prepare(built, recipe(freeze=["fc.*"], body_lr=0.1), resumes=False)
    transfer.prepare(built, recipe(freeze=["fc.*"]), resumes=False)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"new_head": True}, "new_head is for start_from"),
        ({"start_from": ""}, "recipe.model.start_from"),
        ({"body_lr": 0}, "recipe.model.body_lr"),
        ({"freeze": "fc.*"}, "recipe.model.freeze"),
        ({"args": {"pretrained": True}}, "weights to start from are recipe.model.start_from"),
    ],
)
def test_sections_that_say_nothing_or_nonsense_are_refused(write_config, section, said):
    changes = {f"recipe.model.{key}": value for key, value in section.items()}
    with pytest.raises(UserError) as error:
        config.load(write_config("refused", changes))
    assert said in str(error.value)


def test_a_group_can_have_a_part_of_the_rate():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.25}], lr=9.0)
    schedule = GradualWarmupLR(
        optimizer, lr=0.1, reference_batch=256, train_batch_size=8192, samples_per_epoch=81_920, epochs=9, warmup="none"
    )
    assert schedule.get_last_lr() == [3.2, 0.8]
    schedule.load_state_dict({"samples": 81_920})
    assert schedule.get_last_lr() == [3.2, 0.8]


def headed(*, batch_norm: bool) -> nn.Module:
    """The network of `tests.updates` with a classifier that timm would find."""
    built = network(batch_norm=batch_norm)
    built.get_classifier = lambda: built[7]
    return built


def updates(world: World, path: Path, section: dict[str, Any], count: int = 3) -> dict[str, Any]:
    """Some updates of the network with a section of the recipe; the state before and after, and the losses."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    changes = {f"recipe.model.{key}": value for key, value in section.items()}
    resolved = make_plan(folder / "c.json", world.size, **changes)
    built = headed(batch_norm=True)
    transfer.prepare(built, resolved.config.recipe.model, resumes=False)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    engine = Engine(built, resolved, world)
    losses = []
    for update in range(count):
        sums, _ = engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * 32)
        losses.append(sums[0].item())
    average_statistics(engine.model)
    after = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    return {"before": before, "after": after, "losses": losses, "lr": engine.lr_used}


FROZEN = {"freeze": ["0.*", "1.*"]}


@pytest.mark.parametrize("section", [FROZEN, {**FROZEN, "body_lr": 0.1}], ids=["frozen", "frozen-and-slow"])
def test_frozen_layers_stay_as_they_are_on_any_number_of_ranks(tmp_path, section):
    by_world = {size: fork_ranks(updates, size, tmp_path, section) for size in (1, 2, 4)}
    [single] = by_world[1]
    for name, tensor in single["after"].items():
        moved = not torch.equal(tensor, single["before"][name])
        assert moved != name.startswith(("0.", "1.")), f"{name}: statistics of frozen BN stay, of the other move"
    for size in (2, 4):
        for answer in by_world[size]:
            for name, tensor in single["after"].items():
                if "num_batches" not in name:
                    torch.testing.assert_close(answer["after"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_bn_normalises_by_its_running_statistics_in_training(tmp_path):
    """The first loss is that of a network whose first BN is in evaluation mode, and of no other."""
    [answer] = fork_ranks(updates, 1, tmp_path, FROZEN, 1)
    resolved = make_plan(tmp_path / "reference.json", 1)
    transform = resolved.config.recipe.transform
    mean = torch.tensor(transform.mean).view(1, 3, 1, 1) * 255
    std = torch.tensor(transform.std).view(1, 3, 1, 1) * 255

    def loss(frozen: bool) -> float:
        total = 0.0
        for batch in physical_batches(0, 0, resolved.batch):
            built = network(batch_norm=True).train()
            built[1].train(not frozen)
            logits = built((batch.images.float() - mean) / std)
            total += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        return total

    assert answer["losses"][0] == pytest.approx(loss(frozen=True), rel=1e-5)
    assert answer["losses"][0] != pytest.approx(loss(frozen=False), rel=1e-3)


def test_the_body_moves_by_its_part_of_the_rate(tmp_path):
    """After one update from the same gradients, the body has gone a quarter of the way and the classifier all of it."""
    [whole] = fork_ranks(updates, 1, tmp_path / "whole", {}, 1)
    [slow] = fork_ranks(updates, 1, tmp_path / "slow", {"body_lr": 0.25}, 1)
    assert slow["lr"] == whole["lr"], "the rate on record is the classifier's"
    for name in ("0.weight", "1.weight", "1.bias", "3.weight", "7.weight", "7.bias"):
        ways = [answer["after"][name] - answer["before"][name] for answer in (slow, whole)]
        factor = 1.0 if name.startswith("7.") else 0.25
        torch.testing.assert_close(ways[0], factor * ways[1], rtol=1e-4, atol=1e-7, msg=name)


def resumed(world: World, path: Path, sections: list[dict[str, Any]], split: int) -> dict[str, torch.Tensor]:
    """Four updates, the first of them by one engine and the others by another that goes on from its state."""
    state: dict[str, Any] | None = None
    built = headed(batch_norm=True)
    for number, section in enumerate(sections):
        changes = {f"recipe.model.{key}": value for key, value in section.items()}
        path.mkdir(exist_ok=True)
        resolved = make_plan(path / f"{number}.json", world.size, **changes)
        transfer.prepare(built, resolved.config.recipe.model, resumes=number > 0)
        engine = Engine(built, resolved, world)
        first, last = (0, split) if number == 0 and len(sections) > 1 else (split if number else 0, 4)
        if state is not None:
            engine.restore(state, samples=first * 32, step=first)
        for update in range(first, last):
            engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * 32)
        state = engine.state()
        kept = headed(batch_norm=True)
        kept.load_state_dict(engine.model.state_dict())
        built = kept
    return built.state_dict()


def test_a_resumed_fine_tuning_is_the_unbroken_one(tmp_path):
    section = {**FROZEN, "body_lr": 0.1}
    [unbroken] = fork_ranks(resumed, 1, tmp_path / "a", [section], 2)
    [broken] = fork_ranks(resumed, 1, tmp_path / "b", [section, section], 2)
    assert all(torch.equal(tensor, broken[name]) for name, tensor in unbroken.items())


def test_momentum_follows_its_parameter_when_a_resumed_run_trains_other_ones(tmp_path):
    """Unfrozen, or divided into other groups, whose numbers are others."""
    for first, then in (({}, {"body_lr": 0.5}), (FROZEN, {}), ({}, FROZEN)):
        [(saved, restored)] = fork_ranks(handed_over, 1, tmp_path, first, then, True)
        assert {"3.weight", "4.bias", "7.bias"} <= saved.keys() & restored.keys()
        assert all(torch.equal(saved[name], restored[name]) for name in saved.keys() & restored.keys())
        assert restored.keys() <= saved.keys(), "what was not trained before has no momentum yet"


def handed_over(
    world: World, path: Path, first: dict[str, Any], then: dict[str, Any], named: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The momentum of each parameter as one engine had it, and as another has it that was given its state."""
    engines = []
    for section in (first, then):
        changes = {f"recipe.model.{key}": value for key, value in section.items()}
        resolved = make_plan(path / "c.json", world.size, **changes)
        built = headed(batch_norm=True)
        transfer.prepare(built, resolved.config.recipe.model, resumes=bool(engines))
        engines.append(Engine(built, resolved, world))
        if len(engines) == 1:
            engines[0].update(iter(physical_batches(0, 0, resolved.batch)), 0)
    state = engines[0].state()
    if not named:
        del state["parameters"]
    engines[1].restore(state, samples=32, step=1)
    found = []
    for engine in engines:
        names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
        momenta = {names[id(p)]: values.get("momentum_buffer") for p, values in engine.optimizer.state.items()}
        found.append({name: momentum for name, momentum in momenta.items() if momentum is not None})
    return found[0], found[1]


def test_a_save_from_before_parameters_had_names_is_read(tmp_path):
    [(saved, restored)] = fork_ranks(handed_over, 1, tmp_path, {}, {}, False)
    assert len(saved) == 8 and saved.keys() == restored.keys()
    assert all(torch.equal(momentum, restored[name]) for name, momentum in saved.items())


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards with all five classes, and with the first two."""
    from tests.conftest import TINY_TRAIN, TINY_VAL, write_images

    images = tmp_path_factory.mktemp("images")
    write_images(images / "train", TINY_TRAIN, seed=1)
    write_images(images / "val", TINY_VAL, seed=2)
    folders = {}
    for name, options in (("all", []), ("half", ["--limit-classes", "2"])):
        folders[name] = tmp_path_factory.mktemp("shards") / name
        arguments = ["prepare", "imagefolder", str(images), str(folders[name]), "--samples-per-shard", "33"]
        assert shards_main([*arguments, "--workers", "1", *options]) == 0
    return folders


def write(folder: Path, name: str, data: Path, changes: dict[str, Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tiny_config(data, folder / "runs" / name, **changes)))
    return path


FINE_TUNE = {"recipe.model.freeze": ["conv1.*", "bn1.*", "layer1.*"], "recipe.model.body_lr": 0.1}


def test_fine_tuning_on_half_of_the_classes_is_configuration_alone(halves, tmp_path, capfd):
    """From exported weights, on one and two ranks alike; a run that goes on does not read them again."""
    base = write(tmp_path, "base", halves["all"], {})
    train_ranks(base, 2)
    source = run_of(base) / "model.safetensors"
    changes = {"recipe.model.start_from": str(source), "recipe.epochs": 2, **FINE_TUNE}
    capfd.readouterr()
    paths = [write(tmp_path, f"tuned-{size}", halves["half"], changes) for size in (1, 2)]
    for path, size in zip(paths, (1, 2), strict=True):
        train_ranks(path, size)
    out = capfd.readouterr().out
    for said in (
        f"start       {source} · a new classifier where its shape is another",
        "× 0.1 for everything but the classifier",
        "frozen      conv1.*, bn1.*, layer1.* · BN layers",
        "classifier  fc new, 2 classes; that of the weights has 5 · weights sha256",
        "of 13 BN layers in evaluation mode",
    ):
        assert said in out, out
    assert_close(run_of(paths[1]), run_of(paths[0]), TOLERANCE)
    tuned, theirs = weights(run_of(paths[0])), weights(run_of(base))
    for name, tensor in tuned.items():
        frozen = name.startswith(("conv1.", "bn1.", "layer1."))
        assert name in CLASSIFIER or torch.equal(tensor, theirs[name]) == frozen, name
    assert tuned["fc.weight"].shape == (2, 16)

    stopped = write(tmp_path, "stopped", halves["half"], {**changes, "recipe.checkpoint.every_epochs": 0.5})
    train_ranks(stopped, 2, stop_at=1)
    source.unlink()
    train_ranks(stopped, 1)
    events = read_metrics(run_of(stopped) / "metrics.jsonl")
    assert [event["event"] for event in events].count("resume") == 1
    assert_close(run_of(stopped), run_of(paths[0]), TOLERANCE)


def test_hosts_with_other_weights_to_start_from_do_not_agree(halves, tmp_path, exported):
    path = write(tmp_path, "c", halves["half"], {"recipe.model.start_from": str(exported), "recipe.model.args": SMALL})

    class OneRank:
        size, local_ranks = 1, range(1)

    def facts() -> dict[str, Any]:
        return Prepared.facts(prepare(str(path), [], OneRank()))  # type: ignore[arg-type]

    here = facts()
    assert here["start weights"] != "none" and facts() == here
    model.export(filled(10, seed=10), exported, recipe(), 10)
    there = facts()
    assert [name for name in here if here[name] != there[name]] == ["start weights"]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_file_that_is_not_there_is_found_before_anything_starts(
    write_config: Callable[..., Path], tmp_path, capsys, command
):
    path = write_config("absent", {"recipe.model.start_from": str(tmp_path / "absent.safetensors")})
    assert cli.main([command, str(path), "--ranks", "1"]) == 2
    said = capsys.readouterr()
    assert f"recipe.model.start_from: {tmp_path / 'absent.safetensors'}: there is no such file" in said.err
    assert not (tmp_path / "runs").exists()


def test_the_plan_says_it_and_the_built_model_says_more(write_config, exported, capsys):
    section = {"start_from": str(exported), "args": SMALL, "freeze": ["layer1.*"], "body_lr": 0.5}
    path = write_config("planned", {f"recipe.model.{key}": value for key, value in section.items()})
    assert cli.main(["plan", str(path), "--ranks", "2", "--build-model"]) == 0
    out = capsys.readouterr().out
    assert f"{exported} · a new classifier where its shape is another" in out
    assert "fc new, 5 classes; that of the weights has 10" in out
    assert "× 0.5 for everything but the classifier" in out and "32 of 41 parameters" in out
    plain = open_run(config.load(write_config("plain")), 2)[0]
    assert not {"start", "frozen"} & {label for label, _ in plain.page()}


@pytest.mark.slow
def test_the_demo_goes_on_with_half_of_its_classes(tmp_path):
    """The shipped configurations on the shipped data; what starts anew is far behind after as many epochs."""
    configs = Path(__file__).parents[2] / "ds_configs"
    for name, options in (("demo", []), ("half", ["--limit-classes", "5"])):
        assert shards_main(["prepare", "demo", str(tmp_path / name), *options]) == 0
    anew = {"start_from": None, "freeze": [], "body_lr": 1}
    last = {}
    for name, extended, data, section in (
        ("base", "demo.json", "demo", {}),
        ("tuned", "demo_finetune.json", "half", {"start_from": str(tmp_path / "runs/base/model.safetensors")}),
        ("anew", "demo_finetune.json", "half", anew),
    ):
        recipe = {"data": str(tmp_path / data), "run": str(tmp_path / "runs" / name), "model": section}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"extends": str(configs / extended), "recipe": recipe}))
        train_ranks(path, 2)
        last[name] = read_metrics(run_of(path) / "metrics.jsonl")[-1]["top1"]
    assert last["tuned"] > 97 and last["anew"] < 60, last
