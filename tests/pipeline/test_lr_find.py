"""The range test: its rates, its rule, the same curve on any number of ranks, and nothing written but in its folder."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, config
from pipeline.engine import World
from pipeline.experiment import open_run
from pipeline.lr_curve import Curve, Sweep, has_diverged
from pipeline.lr_find import draw, sentences, suggestion
from pipeline.lr_range import LrRange
from pipeline.metrics import read_metrics
from pipeline.prepared import prepare
from shards.errors import UserError
from tests.conftest import fork_ranks
from tests.forked import train_ranks
from tests.training import onehour, output_of, run_of

# ---------------------------------------------------------------- the curve


def test_rates_grow_by_one_factor_from_end_to_end():
    sweep = Sweep(0.001, 10.0, 41)
    rates = [sweep.rate(update) for update in range(41)]
    assert rates[0] == 0.001 and rates[-1] == pytest.approx(10) and rates[20] == pytest.approx(0.1)
    factors = {round(after / before, 9) for before, after in pairwise(rates)}
    assert len(factors) == 1
    assert Sweep.read(sweep.text()) == sweep
    assert Sweep.read(Sweep(1 / 3, 2 / 3, 20).text()) == Sweep(1 / 3, 2 / 3, 20)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((1, 2, 19), "--updates 19"), ((1, 1, 50), "must grow"), ((0, 1, 50), "must grow"), ((1, math.inf, 50), "grow")],
)
def test_a_range_that_is_none_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        Sweep(*arguments)


def curve(loss: Any, *, diverged: bool = True, updates: int = 101, low: float = 1e-4, high: float = 10.0) -> Curve:
    rates = tuple(Sweep(low, high, updates).rate(update) for update in range(updates))
    return Curve(rates, tuple(loss(rate) for rate in rates), diverged)


def valley(rate: float) -> float:
    """2.3 at low rates, lowest at 1, and far up beyond it: a parabola over four decades and a half."""
    return 2.3 - 1.5 * max(0.0, 1 - math.log10(rate) ** 2 / 4)


def test_smoothing_keeps_lines_and_moves_no_valley():
    straight = curve(lambda rate: 3 + math.log10(rate))
    inside = slice(6, -6)
    assert straight.smoothed[inside] == pytest.approx(straight.losses[inside])
    found = curve(valley)
    assert found.rates[found.minimum] == pytest.approx(1, rel=0.12)
    noisy = curve(lambda rate: valley(rate) + 0.2 * math.sin(1e5 * rate))
    assert max(abs(a - b) for a, b in zip(noisy.smoothed, found.smoothed, strict=True)) < 0.12


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    found = curve(valley)
    assert found.problem is None
    assert found.suggested == found.rates[found.minimum] / 10
    # of a parabola in the logarithm the slope is greatest where it begins, two decades below the valley
    assert math.log10(found.rates[found.steepest]) == pytest.approx(-2, abs=0.35)
    shown = dict(found.table())
    assert shown[found.minimum] == "lowest" and shown[found.steepest] == "falls fastest"
    [nearest] = [update for update, note in shown.items() if note == "suggested"]
    assert found.rates[nearest] == pytest.approx(found.suggested, rel=0.07)
    assert 12 <= len(shown) <= 18


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (curve(lambda rate: 2.3), "does not fall"),
        (curve(lambda rate: 2.3 + rate), "does not fall"),
        (curve(lambda rate: 2.3 - math.log10(rate / 1e-4) / 4, diverged=False), "raise --to"),
        (curve(valley, low=0.5), "lower --from"),
    ],
)
def test_a_curve_that_shows_nothing_suggests_nothing_and_says_what_to_try(found, said):
    assert found.suggested is None and said in found.problem
    assert "suggested" not in dict(found.table()).values()


def test_a_first_loss_that_is_not_finite_is_told(write_config):
    record = Curve((0.1,), (math.nan,), True).record()
    with pytest.raises(UserError, match=r"first update, at a rate of 0.1, is not finite\n.*Lower --from"):
        suggestion(Curve.restore(record), open_run(config.load(write_config("plan")), 1)[0])


def test_a_training_that_comes_apart_is_seen_and_noise_is_not():
    falling = [2.3 * 0.97**update for update in range(60)]
    assert not any(has_diverged(falling[: end + 1]) for end in range(60))
    assert not has_diverged([*falling, 3 * falling[-1]]), "one bad minibatch"
    assert has_diverged([*falling, *[9.0] * 5])
    assert has_diverged([2.3, math.nan]) and has_diverged([math.inf])


def test_a_curve_that_ends_in_infinity_is_kept_as_json():
    found = Curve((0.1, 0.2, 0.4), (2.0, 1.0, math.nan), True)
    text = json.dumps(found.record(), allow_nan=False)
    again = Curve.restore(json.loads(text))
    assert again.smoothed == found.smoothed and len(again.smoothed) == 2 and math.isnan(again.losses[2])


def test_the_setting_is_of_the_reference_batch_by_the_configuration_s_rule(write_config):
    """kn = 32 at reference 16: a peak of 0.1 is 0.05 per reference batch, or 0.1 / √2, or 0.1."""
    found = curve(valley)
    for scaling, factor in (("linear", 2), ("square_root", math.sqrt(2)), ("none", 1)):
        planned = open_run(config.load(write_config(scaling, {"recipe.scaling": scaling})), 1)[0]
        answer = suggestion(found, planned)
        assert answer["suggested_lr"] == pytest.approx(found.suggested / factor)
        [line] = [line for line in sentences(found, planned, 0) if "suggested peak" in line]
        assert f"--set optimizer.params.lr={found.suggested / factor:.2g}" in line and f"scaling {scaling}" in line
    assert any("3 updates were withheld" in line for line in sentences(found, planned, 3))
    assert draw(found, planned).startswith(b"\x89PNG")


# ---------------------------------------------------------------- the ranks


def sweep_rank(world: World, path: str, sweep: Sweep, stop: bool = False) -> bool:
    with LrRange(prepare(path, [], world), world, sweep) as test:
        if stop:
            world.watch.stop.may_begin = lambda update: update < 3  # type: ignore[method-assign]
        return test.train()


def measured(path: Path) -> dict[str, Any]:
    return json.loads((run_of(path) / "lr_range.json").read_text())


def test_the_updates_are_those_of_a_training_at_the_same_rate(write_config):
    """At a rate that does not grow, the losses are a run's, update by update."""
    still = {
        "scheduler.params": {"warmup": "none", "decay": "constant"},
        "recipe.logging": {"every_steps": 1},
        "recipe.epochs": 5,
    }
    trained, swept = write_config("trained", still), write_config("swept", still)
    train_ranks(trained, 1)
    losses = [event["loss"] for event in read_metrics(run_of(trained) / "metrics.jsonl") if event["event"] == "train"]
    fork_ranks(sweep_rank, 1, str(swept), Sweep(0.04, 0.04 * (1 + 1e-12), 20))
    assert measured(swept)["losses"] == pytest.approx(losses[:20], rel=1e-5)


def test_the_curve_is_the_same_on_any_number_of_ranks_and_its_rates_were_used(write_config):
    paths = {size: write_config(f"ranks-{size}") for size in (1, 2)}
    sweep = Sweep(1e-4, 0.02, 24)
    for size, path in paths.items():
        assert fork_ranks(sweep_rank, size, str(path), sweep) == [True] * size
    ours, theirs = measured(paths[2]), measured(paths[1])
    assert ours["rates"] == theirs["rates"] == [sweep.rate(update) for update in range(24)]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=5e-3) and len(set(ours["losses"])) == 24
    assert sorted(file.name for file in run_of(paths[1]).iterdir()) == [".lock", "lr_range.json"]


def test_it_ends_where_the_loss_comes_apart(write_config):
    path = write_config("apart")
    fork_ranks(sweep_rank, 2, str(path), Sweep(1e-2, 1e12, 40))
    found = measured(path)
    assert found["diverged"] and len(found["losses"]) < 40


def test_a_test_that_is_stopped_writes_no_curve(write_config):
    path = write_config("stopped")
    assert fork_ranks(sweep_rank, 1, str(path), Sweep(1e-3, 1, 20), True) == [False]
    assert not (run_of(path) / "lr_range.json").exists()


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--updates", "5"], "--updates 5: a curve needs at least 20"),
        (["--from", "1", "--to", "0.1"], "rates must grow"),
        (["--set", "recipe.model.start_from=absent"], "there is no such file"),
        (["--ranks", "3"], "cannot be split over 3 ranks"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(write_config, tmp_path, capsys, arguments, said):
    assert cli.main(["lr-find", str(write_config("mistaken")), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_a_run_is_left_alone(write_config, capfd):
    path = write_config("run")
    train_ranks(path, 1)
    before = sorted(file.name for file in run_of(path).rglob("*"))
    assert cli.main(["lr-find", str(path), "--run", str(run_of(path))]) == 2
    assert "is a run's folder" in capfd.readouterr().err
    assert sorted(file.name for file in run_of(path).rglob("*")) == before


@pytest.mark.slow  # two launches
@pytest.mark.launcher
def test_the_command_shows_a_curve_and_writes_nothing_but_its_folder(write_config, tmp_path):
    monitors = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "monitors")}}
    path = write_config("found", monitors)
    output = output_of(onehour("lr-find", path, "--ranks", "2", "--updates", "60", "--to", "1000"))
    folder = tmp_path / "runs" / "found-lr-find"
    assert "lr-find found   resnet18 · SGD · 60 updates of 32 images = 15 epochs · rate 4e-05 → 1e+03" in output
    assert "update 30/60   rate " in output and "← lowest" in output and "Traceback" not in output
    assert sorted(file.name for file in folder.iterdir()) == [".lock", "lr_range.csv", "lr_range.json", "lr_range.png"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["found.json", "runs"]
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["found-lr-find"]
    rows = (folder / "lr_range.csv").read_text().splitlines()
    record = json.loads((folder / "lr_range.json").read_text())
    assert rows[0] == "update,rate,loss,smoothed" and len(rows) == 1 + len(record["rates"])
    assert record["problem"] is None or record["suggested_lr"] is None
    # again, for a script
    answer = output_of(onehour("lr-find", path, "--ranks", "1", "--updates", "20", "--to", "0.1", "--json"))
    last = json.loads(answer[answer.index('{"rates"') :].splitlines()[0])
    assert len(last["rates"]) == 20 and last["world_size"] == 1
