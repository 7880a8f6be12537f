"""`onehour report`: where it writes, what it prints, and what it says of mistakes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import report
from pipeline.record import median_last_epochs
from shards.errors import UserError
from tests.pipeline.report.conftest import VAL, Run, whole


def command(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(word) for word in words]))


def test_one_runs_report_goes_into_the_run(paper: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = paper["folders"][0]
    assert command(folder, folder) == 0
    out = capsys.readouterr().out
    assert (folder / "report.html").is_file()
    assert str(folder / "report.html") in out.replace("\n", "")
    assert f"{paper['small'][0].expected():.2f}" in out


@pytest.mark.usefixtures("no_pictures")
def test_json_holds_the_tables_numbers(paper: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [paper["folders"][0], paper["folders"][3]]
    assert command(*folders, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["report"]) == folders[0].parent / "report-imagenet_256-0-imagenet_2k-0" / "report.html"
    first, second = answer["rows"]
    assert first["top1_error"] == pytest.approx(paper["small"][0].expected())
    assert second["difference"] == pytest.approx(second["top1_error"] - first["top1_error"])
    assert second["std"] is None
    assert second["difference_95"] is None
    assert second["images"] == [VAL]
    assert first["seconds"] == 431.5


@pytest.mark.usefixtures("no_pictures")
def test_terminal_table_takes_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "[bold]x[red]").begin().train_to(6).finish()
    assert command(run.save(), "--out", tmp_path / "out") == 0
    assert "[bold]x[red]" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_given_twice_counts_once_and_the_first_stays_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (Run(tmp_path / name, kn=kn).begin().train_to(6).finish().save() for name, kn in (("a", 256), ("b", 2048)))
    assert command(b, a, b, "--json") == 0
    assert [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["b", "a"]


def test_the_argument_parser_is_light() -> None:
    code = "import sys, pipeline.report; print(*{'torch', 'matplotlib', 'jinja2', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "\n"


def test_many_runs_get_a_short_folder(tmp_path: Path) -> None:
    folder = report.default_folder([tmp_path / f"imagenet_8k-with-a-long-name-{n}" for n in range(12)])
    assert folder == tmp_path / "report-imagenet_8k-with-a-long-name-0-and-11-more"


@pytest.mark.usefixtures("no_pictures")
def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        command(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metrics\.jsonl in it"):
        command(tmp_path)
    with pytest.raises(UserError, match="no run given"):
        report.write_report([], tmp_path)
    run = Run(tmp_path / "a").begin().train_to(1)
    with pytest.raises(UserError, match="no process recorded its start"):
        run.events = run.events[1:]
        command(run.save())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        command(whole(tmp_path / "b").save(), "--out", tmp_path / "file")


def test_the_median_is_importable_where_it_is_looked_for() -> None:
    assert report.median_last_epochs is median_last_epochs
