"""A file that extends others is the same experiment as one that says all of it; circles and gaps are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, config_file, sweep_file
from shards.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_sections_are_merged_and_values_replaced(tmp_path):
    write(tmp_path / "base.json", {"a": 1, "b": {"c": [1, 2], "d": {"e": 1, "f": 2}}, "g": {"h": 1}})
    path = write(
        tmp_path / "sub" / "leaf.json", {"extends": "../base.json", "b": {"c": [3], "d": {"f": 5}}, "g": 7, "i": {}}
    )
    raw, files = config_file.read(path, ["b.d.e=9", "j.k=text"])
    assert raw == {"a": 1, "b": {"c": [3], "d": {"e": 9, "f": 5}}, "g": 7, "i": {}, "j": {"k": "text"}}
    assert [file.name for file in files] == ["base.json", "leaf.json"]


def test_null_takes_away_what_the_base_says_and_stays_where_it_says_nothing(tmp_path):
    write(tmp_path / "base.json", {"fp16": {"enabled": True}, "recipe": {"mixing": {"a": 1}, "epochs": 3}})
    leaf = {"extends": "base.json", "fp16": None, "wandb": None, "recipe": {"mixing": None}}
    path = write(tmp_path / "leaf.json", leaf)
    assert config_file.read(path)[0] == {"wandb": None, "recipe": {"epochs": 3}}
    of_the_command_line = config_file.read(path, ["recipe.epochs=null", "recipe.seed=null"])[0]
    assert of_the_command_line == {"wandb": None, "recipe": {"seed": None}}


def test_what_is_extended_may_extend(tmp_path):
    write(tmp_path / "a.json", {"x": 1, "y": 1, "z": 1})
    write(tmp_path / "b.json", {"extends": "a.json", "y": 2, "z": 2})
    path = write(tmp_path / "c.json", {"extends": "b.json", "z": 3})
    raw, files = config_file.read(path)
    assert raw == {"x": 1, "y": 2, "z": 3} and [file.stem for file in files] == ["a", "b", "c"]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as told:
        config_file.read(path)
    return str(told.value)


def test_a_circle_is_refused_and_shown(tmp_path):
    a = write(tmp_path / "a.json", {"extends": "b.json"})
    write(tmp_path / "b.json", {"extends": "sub/../c.json"})
    write(tmp_path / "sub" / "x.json", {})
    write(tmp_path / "c.json", {"extends": "a.json"})
    text = refusal(a)
    assert "c.json: extends leads back" in text
    assert [part in text for part in ("a.json → ", "b.json → ", "c.json → ")] == [True] * 3
    assert "leads back" in refusal(write(tmp_path / "self.json", {"extends": "self.json"}))


def test_a_base_that_is_not_there_is_named_with_who_wants_it(tmp_path):
    write(tmp_path / "imagenet_256.json", {})
    text = refusal(write(tmp_path / "leaf.json", {"extends": "imagenet_265.json"}))
    assert "imagenet_265.json: there is no such configuration file, which" in text and "leaf.json extends" in text
    assert f"Did you mean {tmp_path / 'imagenet_256.json'}?" in text


@pytest.mark.parametrize("value", ["", 3, ["a.json"], {"a": 1}, True])
def test_what_is_no_name_of_a_file_is_refused(tmp_path, value):
    assert "extends must be the name of a file" in refusal(write(tmp_path / "leaf.json", {"extends": value}))


def test_a_mistake_in_a_base_names_the_base(tmp_path):
    write(tmp_path / "base.json", '{"a": 1, "a": 2}')
    assert "base.json: the key" in refusal(write(tmp_path / "leaf.json", {"extends": "base.json"}))


def test_a_wrong_value_says_what_the_file_extends(tmp_path):
    base = write(tmp_path / "base.json", {"extends": str(CONFIGS / "imagenet_256.json"), "recipe": {"epoch": 9}})
    with pytest.raises(UserError) as told:
        config.load(write(tmp_path / "leaf.json", {"extends": "base.json"}))
    assert 'leaf.json: recipe: unknown key "epoch"' in told.value.headline
    assert told.value.details[-1] == f"leaf.json extends {base} → {CONFIGS / 'imagenet_256.json'}."
    with pytest.raises(UserError) as told:
        config.load(CONFIGS / "imagenet_256.json", ["recipe.epoch=9"])
    assert "extends" not in str(told.value)


def test_another_decay_takes_the_milestones_away_by_null():
    """As an arm of a sweep would write it, over a file that has them."""
    overrides = ["scheduler.params.decay=cosine", "scheduler.params.milestones=null", "scheduler.params.gamma=null"]
    params = config.load(CONFIGS / "imagenet_256.json", overrides).blocks.scheduler.params
    assert (params.decay, params.milestones) == ("cosine", [])


def test_a_sweep_is_not_taken_for_a_configuration(tmp_path):
    path = CONFIGS / "sweeps" / "table1.yaml"
    assert refusal(path) == f"{path} is a sweep, not a configuration\n  Train its arms with: onehour sweep {path}"


@pytest.mark.parametrize("name", ["imagenet_256.json", "cifar10_small.json"])
def test_a_configuration_is_not_taken_for_a_sweep(name):
    """One that YAML can read as well (it has no comments), and one that it cannot."""
    path = CONFIGS / name
    with pytest.raises(UserError) as told:
        sweep_file.load(path)
    assert str(told.value) == f"{path} is a configuration, not a sweep\n  Train it with: onehour train {path}"


def test_an_extended_configuration_is_the_one_written_out(tmp_path):
    path = write(tmp_path / "leaf.json", {"extends": str(CONFIGS / "imagenet_256.json"), "train_batch_size": 8192})
    loaded, written_out = config.load(path), config.load(CONFIGS / "imagenet_8k.json")
    assert loaded.raw == written_out.raw and loaded.recipe == written_out.recipe
    assert loaded.bases == (CONFIGS / "imagenet_256.json",) and written_out.bases == ()
    again = config.load(write(tmp_path / "resolved.json", loaded.resolved()))
    assert again.recipe == loaded.recipe and "extends" not in again.raw
