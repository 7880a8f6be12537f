"""BN's statistics recomputed before an evaluation: exact means over logical workers, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import cli, config, dataset, transfer
from pipeline.batch_norm import LogicalWorkerStatistics, average_statistics, batch_norms, make_ghosts
from pipeline.engine import Engine, World
from pipeline.experiment import open_run
from pipeline.metrics import read_metrics
from pipeline.precise_bn import recompute
from pipeline.prepared import prepare
from pipeline.run import Run
from pipeline.samples import read_samples
from shards.errors import UserError
from tests.conftest import fork_ranks
from tests.forked import train_ranks
from tests.training import TOLERANCE, assert_close, run_of, weights
from tests.updates import N_MICRO, K, make_plan, micro_batch, network, physical_batches

UPDATES = (5, 6)  # whose images the statistics are of


def statistics(world: World, path: Path, changes: dict[str, Any], freeze: bool) -> dict[str, Any]:
    """Those of a network with dropout after some updates, recomputed twice, and what comes of the next update."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    model = network(batch_norm=True)
    if resolved.batch.together == 1:  # workers that go through the model at once must not drop anything out
        model.insert(3, nn.Dropout(0.5))
    if freeze:
        transfer.freeze(model, ["1.*"])
    engine = Engine(model, resolved, world)

    def batches(update: int) -> list:
        return physical_batches(update, world.rank, resolved.batch)

    for update in range(3):
        engine.update(iter(batches(update)), update * 32)
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    found = []
    for _ in range(2):
        engine.recompute_statistics(batch for update in UPDATES for batch in batches(update))
        average_statistics(engine.model)
        found.append([buffer.clone() for layer in batch_norms(engine.model) for buffer in running(layer)])
    modes = [module.training for module in engine.model.modules()]
    unchanged = [torch.equal(p, before[name]) for name, p in engine.model.named_parameters()]
    sums, _ = engine.update(iter(batches(3)), 3 * 32)
    average_statistics(engine.model)
    after = [buffer.clone() for layer in batch_norms(engine.model) for buffer in running(layer)]
    return {"found": found, "modes": modes, "unchanged": unchanged, "loss": sums[0].item(), "after": after} | {
        "before": before
    }


def running(layer: nn.Module) -> list[torch.Tensor]:
    return [layer.running_mean, layer.running_var]


def by_hand(path: Path, weights: dict[str, torch.Tensor], updates: tuple[int, ...]) -> list[torch.Tensor]:
    """In float64: the mean over all workers of the mean, and of the unbiased variance, of what each BN gets."""
    transform = make_plan(path / "reference.json", 1).config.recipe.transform
    mean = torch.tensor(transform.mean).view(1, 3, 1, 1).double() * 255
    std = torch.tensor(transform.std).view(1, 3, 1, 1).double() * 255
    model = network(batch_norm=True).double()
    model.load_state_dict(weights)
    seen: list[list[list[torch.Tensor]]] = [[], []]
    for number, index in enumerate((1, 4)):

        def note(module: nn.Module, inputs: tuple[torch.Tensor], number: int = number) -> None:
            x = inputs[0].transpose(0, 1).flatten(1)
            seen[number].append([x.mean(1), x.var(1, correction=1)])

        model[index].register_forward_pre_hook(note)
    with torch.no_grad():
        for update in updates:
            for worker in range(K):
                model.train()((micro_batch(update, worker).images.double() - mean) / std)
    return [torch.stack(values).mean(0) for layer in seen for values in zip(*layer, strict=True)]


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state with the names of a network that has no dropout in it."""
    if "8.weight" not in state:
        return state
    return {f"{int(key[0]) - (int(key[0]) > 3)}{key[1:]}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize("changes", [{}, {"recipe.step.ghost_batches": 2}], ids=["in-turn", "ghosts"])
def test_they_are_the_mean_over_the_workers_whatever_the_ranks(tmp_path, changes):
    for size in (1, 2) if changes else (1, 2, 4):
        for answer in fork_ranks(statistics, size, tmp_path, changes, False):
            expected = by_hand(tmp_path, plain(answer["before"]), UPDATES)
            first, second = answer["found"]
            for ours, again, theirs in zip(first, second, expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
                assert torch.equal(ours, again), "nothing is random in it"
            assert answer["modes"] == [False] * len(answer["modes"]) and all(answer["unchanged"])


def test_the_training_goes_on_as_without_and_its_statistics_from_the_recomputed_ones(tmp_path):
    [answer] = fork_ranks(statistics, 1, tmp_path, {"recipe.step.ghost_batches": 4}, False)
    state = answer["before"]
    batch_statistics = by_hand(tmp_path, state, (3,))
    for ours, precise, new in zip(answer["after"], answer["found"][1], batch_statistics, strict=True):
        torch.testing.assert_close(ours.double(), 0.9 * precise.double() + 0.1 * new, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # a minute of compilation
def test_a_compiled_model_has_the_same_ones(tmp_path):
    """Its momentum is a tensor, and it is compiled once more for a pass in which BN alone is in training."""
    changes = {"recipe.step.ghost_batches": 2}
    [eager] = fork_ranks(statistics, 1, tmp_path / "eager", changes, False)
    [compiled] = fork_ranks(
        statistics, 1, tmp_path / "compiled", {**changes, "recipe.step.compile": True}, False, timeout=280
    )
    for ours, theirs in zip(compiled["found"][1], eager["found"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)


def test_frozen_layers_keep_theirs(tmp_path):
    [answer] = fork_ranks(statistics, 1, tmp_path, {}, True)
    state = plain(answer["before"])
    frozen_mean, frozen_variance, *others = answer["found"][0]
    assert torch.equal(frozen_mean, state["1.running_mean"]) and torch.equal(frozen_variance, state["1.running_var"])
    assert not torch.allclose(others[0], state["4.running_mean"], rtol=1e-3)


def test_what_was_there_before_leaves_no_trace():
    """Not even where it is huge: the difference from it is not what is added."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0)).eval()
    model[0].running_mean.fill_(1e8)
    batch = micro_batch(0, 0)
    recompute(model, lambda images: model(images.float()), [batch])
    torch.testing.assert_close(model[0].running_mean, batch.images.float().mean((0, 2, 3)), rtol=1e-6, atol=0)
    assert len(batch.images) == N_MICRO


@pytest.mark.parametrize("groups", [1, 2])
def test_a_pass_that_overflows_in_a_channel_is_left_out_of_it_alone(groups):
    """Of a float16 training; in others it shows, and the run is ended."""
    found = {}
    for leave_out in (True, False):
        model = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0)).eval()
        make_ghosts(model, groups)
        good, bad = micro_batch(0, 0), micro_batch(0, 1)

        def forward(images: torch.Tensor, model: nn.Module = model, bad: torch.Tensor = bad.images) -> torch.Tensor:
            images, overflows = images.float(), images is bad
            images[0, 1, 0, 0] = torch.inf if overflows else images[0, 1, 0, 0]
            return model(images)

        with LogicalWorkerStatistics(model, 1).single_passes():
            recompute(model, forward, [good, bad], leave_out_overflows=leave_out)
        found[leave_out] = model[0].running_mean.clone(), model[0].running_var.clone()
    of_the_good = good.images.float().mean((0, 2, 3))[1]
    torch.testing.assert_close(found[True][0][1], of_the_good, rtol=1e-6, atol=0)
    assert found[True][1].isfinite().all() and not found[False][0][1].isfinite() and not found[False][1][1].isfinite()
    both = torch.stack([batch.images.float().mean((0, 2, 3)) for batch in (good, bad)]).mean(0)
    for leave_out in (True, False):
        torch.testing.assert_close(found[leave_out][0][::2], both[::2], rtol=1e-6, atol=0)


# ---------------------------------------------------------------- whole runs

PRECISE = {"recipe.evaluation.precise_bn": 50, "recipe.checkpoint.every_epochs": 0.5}


@pytest.mark.slow
def test_a_run_measures_and_exports_them_on_any_ranks_and_after_a_resume(write_config, tmp_path, capfd):
    running_ones = write_config("running", {"recipe.checkpoint.every_epochs": 0.5})
    paths = {size: write_config(f"ranks-{size}", PRECISE) for size in (1, 2)}
    train_ranks(running_ones, 2)
    capfd.readouterr()
    for size, path in paths.items():
        train_ranks(path, size)
        assert (
            "recomputed before it over the 64 training images of the last 2 updates, and kept" in capfd.readouterr().out
        )
    resumed = write_config("resumed", PRECISE)
    train_ranks(resumed, 1, stop_at=7)
    train_ranks(resumed, 2)
    assert_close(run_of(paths[2]), run_of(paths[1]), TOLERANCE)
    assert_close(run_of(resumed), run_of(paths[1]), TOLERANCE)

    ours, theirs = weights(run_of(paths[2])), weights(run_of(running_ones))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) != ("running_" in name), f"{name}: only statistics are others"
    events = [read_metrics(run_of(path) / "metrics.jsonl") for path in (paths[2], running_ones)]
    losses = [[event["loss"] for event in found if event["event"] == "train"] for found in events]
    assert losses[0] == losses[1], "the training does not depend on them"
    evaluations = [event for event in events[0] if event["event"] == "evaluation"]
    assert all(event["precise_bn"] == 64 and event["precise_bn_seconds"] > 0 for event in evaluations)
    assert not any("precise_bn" in event for event in events[1] if event["event"] == "evaluation")

    capfd.readouterr()
    assert cli.main(["evaluate", str(run_of(paths[2])), "--json"]) == 0
    answer = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert answer["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-4), "what is exported was measured"
    other = [event for event in events[1] if event["event"] == "evaluation"][-1]
    assert answer["loss"] != pytest.approx(other["loss"], rel=1e-3)


def ids_seen(world: World, path: str) -> tuple[list[list[int]], int]:
    """Sample ids of every batch that statistics are recomputed over, evaluation by evaluation."""
    seen: list[list[int]] = []

    class Watching(Engine):
        def recompute_statistics(self, batches: Any) -> None:
            listed = list(batches)
            seen.append([int(number) for batch in listed for number in batch.ids])
            super().recompute_statistics(listed)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.run.Engine", Watching)
        with Run(prepare(path, [], world), world) as run:
            run.train()
    return seen, world.rank


def test_they_are_of_the_images_of_the_last_updates(write_config):
    path = write_config("watched", PRECISE)
    answers = fork_ranks(ids_seen, 2, str(path))
    updates = read_samples(run_of(path))
    ends = [-(-epoch * 130 // 32) for epoch in (1, 2, 3)]
    for number, end in enumerate(ends):
        ours = sorted(sample for seen, _ in answers for sample in seen[number])
        theirs = np.concatenate([updates[end - 2].ids, updates[end - 1].ids])
        assert ours == sorted(theirs.tolist())


def test_more_images_than_there_are_or_nothing_to_recompute_is_a_user_error(write_config):
    path = write_config("many", {"recipe.evaluation.precise_bn": 131})
    with pytest.raises(UserError, match="precise_bn 131 is more than the 130 training images"):
        open_run(config.load(path), 1)
    without = {"recipe.model": {"name": "vit_tiny_patch16_224", "args": {"img_size": 32, "depth": 1}}}
    path = write_config("vit", {**without, "recipe.evaluation.precise_bn": 32})

    class OneRank:
        size, local_ranks = 1, range(1)

    with pytest.raises(UserError, match="no BN layer whose statistics move"):
        prepare(str(path), [], OneRank())  # type: ignore[arg-type]


def test_a_cache_must_hold_the_windows_that_are_read_again(write_config):
    from pipeline.window import WindowOrder

    class Shard:
        def __init__(self) -> None:
            self.samples, self.size = 10, 1000

    class Remote(list):
        shards: list[Shard]

    split = Remote(range(100))
    split.shards = [Shard() for _ in range(10)]
    order = WindowOrder([10] * 10, 0, window=20, streams=1, update=4, logical_workers=1)
    totals = []
    for images in (0, 32):
        recipe = config.load(write_config(f"c{images}", {"recipe.evaluation.precise_bn": images})).recipe
        residence = dataset.residence(recipe, order, split, split, range(1), 1)  # type: ignore[arg-type]
        assert residence is not None
        totals.append(residence.total - residence.evaluation_bytes)
    assert totals[1] == 2 * totals[0] > 0
