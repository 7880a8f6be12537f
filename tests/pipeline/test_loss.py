"""What training minimises: smoothed and binary targets, by hand; evaluation is not touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline import config
from pipeline.engine import Engine, World
from pipeline.experiment import open_run
from pipeline.loss import training_loss
from pipeline.metrics import read_metrics
from pipeline.options_schema import Loss
from pipeline.record import RunRecord
from pipeline.report.answers import remarks
from pipeline.report.rows import compare
from shards.errors import UserError
from tests.conftest import fork_ranks
from tests.forked import train_ranks
from tests.training import run_of
from tests.updates import CLASSES, make_plan, network, physical_batches

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 3.0, -4.0], [1.0, 1.0, 1.0, 1.0]])
LABELS = torch.tensor([0, 3, 2])
SHARES = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 1.0], [0.1, 0.15, 0.75, 0.0]])


def smoothed(share: float) -> torch.Tensor:
    return (1 - share) * F.one_hot(LABELS, 4).double() + share / 4


def binary(targets: torch.Tensor) -> float:
    """Each class of each image as a question of its own, in float64."""
    probability = 1 / (1 + torch.exp(-LOGITS.double()))
    terms = targets * probability.log() + (1 - targets) * (1 - probability).log()
    return -terms.mean().item()


def many(targets: torch.Tensor) -> float:
    log_probability = LOGITS.double() - LOGITS.double().exp().sum(1, keepdim=True).log()
    return -(targets * log_probability).sum(1).mean().item()


@pytest.mark.parametrize(
    ("section", "targets", "expected"),
    [
        ({}, LABELS, many(smoothed(0))),
        ({"label_smoothing": 0.1}, LABELS, many(smoothed(0.1))),
        ({}, SHARES, many(SHARES.double())),
        ({"kind": "binary_cross_entropy"}, LABELS, binary(smoothed(0))),
        ({"kind": "binary_cross_entropy", "label_smoothing": 0.1}, LABELS, binary(smoothed(0.1))),
        ({"kind": "binary_cross_entropy"}, SHARES, binary(SHARES.double())),
        ({"kind": "binary_cross_entropy", "target_threshold": 0.2}, SHARES, binary((SHARES > 0.2).double())),
    ],
)
def test_the_loss_is_that_of_its_definition(section, targets, expected):
    assert training_loss(Loss(**section))(LOGITS, targets).item() == pytest.approx(expected, rel=1e-6)


def losses(world: World, path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Two updates: summed losses, the type of what the loss is computed of, and the last weights."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    built = network(batch_norm=False)
    built.num_classes = CLASSES
    engine = Engine(built, resolved, world)
    types: set[torch.dtype] = set()
    original = engine._loss

    def watched(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = original(logits, targets)
        types.update((logits.dtype, loss.dtype))
        return loss

    engine._loss = watched
    found = []
    for update in range(2):
        sums, _ = engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * 32)
        found.append(sums[0].item())
    return {"losses": found, "types": types, "weights": [p.detach().clone() for p in engine.model.parameters()]}


@pytest.mark.parametrize(
    "section", [{"label_smoothing": 0.2}, {"kind": "binary_cross_entropy"}], ids=["smoothed", "binary"]
)
def test_it_is_computed_in_float32_and_the_same_on_any_number_of_ranks(tmp_path, section):
    changes = {"recipe.loss": section}
    [single] = fork_ranks(losses, 1, tmp_path / "one", changes)
    several = fork_ranks(losses, 2, tmp_path / "two", changes)
    assert sum(answer["losses"][1] for answer in several) == pytest.approx(single["losses"][1], rel=1e-5)
    for ours, theirs in zip(several[0]["weights"], single["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    [half] = fork_ranks(losses, 1, tmp_path / "half", {**changes, "bf16.enabled": True})
    assert half["types"] == single["types"] == {torch.float32}
    [plain] = fork_ranks(losses, 1, tmp_path / "plain", {})
    assert single["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-3)


def test_mixed_images_have_a_binary_loss(tmp_path):
    mixing = {"recipe.mixing": {"mixup_alpha": 0.4, "label_smoothing": 0.1}}
    [many_classes] = fork_ranks(losses, 1, tmp_path / "many", mixing)
    [each] = fork_ranks(losses, 1, tmp_path / "each", {**mixing, "recipe.loss": {"kind": "binary_cross_entropy"}})
    assert 0 < each["losses"][0] < many_classes["losses"][0], "a mean over classes, and not their sum"


def test_a_run_says_it_and_its_evaluations_are_of_plain_cross_entropy(write_config, capfd):
    """At a rate that moves nothing, two losses must evaluate alike."""
    still = {"optimizer.params.lr": 1e-12, "recipe.epochs": 1}
    paths = [
        write_config(name, {**still, **changes})
        for name, changes in (("smoothed", {"recipe.loss": {"label_smoothing": 0.3}}), ("plain", {}))
    ]
    for path in paths:
        train_ranks(path, 1)
    out = capfd.readouterr().out
    assert out.count("cross entropy, label smoothing 0.3 · in training alone") == 1
    records = [RunRecord.read(run_of(path)) for path in paths]
    ours, theirs = (record.evaluations[-1] for record in records)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert [record.start["loss"] for record in records] == ["cross entropy, label smoothing 0.3", None]
    trained = [read_metrics(run_of(path) / "metrics.jsonl")[1]["loss"] for path in paths]
    assert trained[0] != pytest.approx(trained[1], rel=1e-4)
    rows = compare(records)
    assert [any("training loss is not comparable" in remark for remark in remarks(row)) for row in rows] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe.loss.label_smoothing": 1}, "recipe.loss.label_smoothing"),
        ({"recipe.loss.target_threshold": 0.2}, "target_threshold is for binary_cross_entropy"),
        ({"recipe.loss.kind": "mse"}, "recipe.loss.kind"),
        ({"recipe.loss.label_smoothing": 0.1, "recipe.mixing": {"mixup_alpha": 0.2}}, "write mixing.label_smoothing"),
    ],
)
def test_what_says_nothing_or_nonsense_is_refused(write_config, changes, said):
    with pytest.raises(UserError) as error:
        config.load(write_config("refused", changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"recipe.mixing": {"mixup_alpha": 0.2, "label_smoothing": 0.1}}, "cross entropy, label smoothing 0.1"),
        (
            {"recipe.loss": {"kind": "binary_cross_entropy", "target_threshold": 0.2}},
            "binary cross entropy, targets above 0.2 are 1",
        ),
    ],
)
def test_the_plan_names_it(write_config, changes, said):
    assert open_run(config.load(write_config("named", changes)), 1)[0].loss == said
