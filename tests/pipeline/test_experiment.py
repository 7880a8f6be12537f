"""What is checked around a plan: the monitors' packages, and what `onehour evaluate` is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline import assess, checkpoint, cli, config, experiment
from pipeline.evaluate import Result
from shards.errors import UserError


@pytest.mark.parametrize(
    ("section", "module", "package"),
    [("tensorboard", "tensorboard", "tensorboard"), ("wandb", "wandb", "wandb"), ("comet", "comet_ml", "comet_ml>=")],
)
def test_an_enabled_monitor_without_its_package_is_refused(write_config, monkeypatch, section, module, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else object())
    path = write_config()
    experiment.check_monitors(config.load(path))
    experiment.check_monitors(config.load(path, [f"{section}.enabled=false"]))
    enabled = config.load(path, [f"{section}.enabled=true"])
    with pytest.raises(UserError, match=f"{section} is enabled, and the package {module} is not installed") as error:
        experiment.check_monitors(enabled)
    assert "pip install" in str(error.value) and package in str(error.value)
    experiment.open_run(enabled, 1)  # a plan needs no monitor


def test_an_installed_monitor_is_accepted(write_config):
    experiment.check_monitors(config.load(write_config(), ["tensorboard.enabled=true", "csv_monitor.enabled=true"]))


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_evaluate_names_the_configuration_that_is_not_there(capsys, tmp_path):
    (tmp_path / checkpoint.WEIGHTS_FILE).write_bytes(b"x")
    (tmp_path / config.RESOLVED_FILE).write_text("{}")
    message = refusal(capsys, "evaluate", tmp_path, "--config", tmp_path / "nope.json")
    assert "nope.json: there is no such configuration file" in message
    assert config.RESOLVED_FILE not in message.splitlines()[0]


def test_evaluate_says_that_a_run_has_no_configuration(capsys, tmp_path):
    (tmp_path / checkpoint.WEIGHTS_FILE).write_bytes(b"x")
    message = refusal(capsys, "evaluate", tmp_path)
    assert f"there is no {config.RESOLVED_FILE} beside the weights" in message and "--config" in message


@pytest.mark.parametrize("as_json", [True, False])
def test_evaluate_says_that_it_computes_in_fp32(capsys, as_json):
    result = Result(top1=50.0, top5=90.0, loss=1.0, images=8, seconds=1.0)
    assess._print(Path("m.safetensors"), "val", result, as_json=as_json)
    assert "fp32" in capsys.readouterr().out
