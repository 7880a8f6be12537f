"""`onehour doctor`: what a host decodes with, what its data is like, and an exit code that a script can use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import rungs
from pipeline.cli import main
from shards import jpeg
from shards.index import load_split

has_extension = pytest.mark.skipif(rungs.missing("native") is not None, reason="the C extension was not built")


def doctor(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[dict]]:
    code = main(["doctor", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)["findings"]


def about(findings: list[dict], name: str) -> list[dict]:
    return [finding for finding in findings if finding["about"] == name]


@pytest.fixture
def copied(tiny_shards: Path, tmp_path: Path) -> Path:
    root = tmp_path / "copied"
    shutil.copytree(tiny_shards, root)
    for path in root.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


def test_a_host_alone(capsys: pytest.CaptureFixture) -> None:
    code, findings = doctor(capsys)
    assert code == 0
    assert [finding["about"] for finding in findings if finding["about"]] == ["versions", "decode", "threads"]
    assert "torch" in findings[0]["text"] and "pillow" in findings[0]["text"]


def test_it_is_one_screen_for_people(capsys: pytest.CaptureFixture, write_config: Callable[..., Path]) -> None:
    assert main(["doctor", str(write_config())]) == 0
    text = capsys.readouterr().out
    assert text.startswith("doctor   ") and text.endswith("nothing is wrong\n")
    assert "130 images in 4 shards" in text and "35 images in 2 shards" in text
    assert len(text.splitlines()) < 24


@has_extension
def test_the_best_rung_and_the_crop_index(capsys: pytest.CaptureFixture, write_config: Callable[..., Path]) -> None:
    code, findings = doctor(capsys, write_config())
    assert code == 0
    assert findings[1]["text"] == f"{jpeg.describe()}, then simplejpeg, Pillow" and findings[1]["verdict"] == "good"
    train, val = about(findings, "crop index")
    assert train["text"] == "train: 4 of 4 shards have one" and val["text"] == "val: 2 of 2 shards have one"
    train, val = about(findings, "images")
    assert train["text"] == "train: 130 decoded of 130: 130 by C extension, 130 of them from their crop index"
    assert "35 decoded of 35" in val["text"]


def test_why_there_is_nothing_faster(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "unavailable", lambda: "was not built: there was no C compiler")
    code, findings = doctor(capsys)
    assert code == 0, "training works, slower"
    assert findings[1]["text"] == "simplejpeg, then Pillow"
    assert findings[2]["verdict"] == "slow" and "no C compiler" in findings[2]["text"]
    assert any("compiler" in line for line in findings[2]["mend"])
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    _, findings = doctor(capsys)
    assert findings[1]["text"] == "Pillow" and "pip install simplejpeg" in findings[3]["mend"][0]


def test_a_rung_that_a_configuration_asks_for_and_is_missing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, write_config: Callable[..., Path]
) -> None:
    monkeypatch.setattr(jpeg, "unavailable", lambda: "was not built")
    code, findings = doctor(capsys, write_config(changes={"recipe.loader.decoder": "native"}))
    assert code == 1
    (decode,) = about(findings, "decode")
    assert decode["verdict"] == "wrong" and "recipe.loader.decoder" in decode["text"]
    assert about(findings, "shards") and not about(findings, "images")


def test_a_slower_rung_that_a_configuration_asks_for(
    capsys: pytest.CaptureFixture, write_config: Callable[..., Path]
) -> None:
    code, findings = doctor(capsys, write_config(), "--set", "recipe.loader.decoder=pillow")
    assert code == 0
    assert findings[1]["text"] == "Pillow" and "nothing faster" in findings[2]["text"]
    assert "130 by Pillow" in about(findings, "images")[0]["text"]


def test_missing_shards(capsys: pytest.CaptureFixture, write_config: Callable[..., Path], tmp_path: Path) -> None:
    code, findings = doctor(capsys, write_config(), "--data", tmp_path / "nothing")
    assert code == 1
    assert about(findings, "shards")[0]["verdict"] == "wrong" and about(findings, "shards")[0]["mend"]


def test_a_damaged_image(capsys: pytest.CaptureFixture, write_config: Callable[..., Path], copied: Path) -> None:
    record = load_split(copied, "train").samples[50]
    path = load_split(copied, "train").shards[int(record["shard"])].path
    with path.open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(bytes(int(record["size"])))
    code, findings = doctor(capsys, write_config(), "--data", copied)
    assert code == 1
    train, val = about(findings, "images")
    assert train["verdict"] == "wrong" and path.name in train["text"] and val["verdict"] == "good"


@has_extension
def test_crop_indexes_that_are_missing_or_of_another_shard(
    capsys: pytest.CaptureFixture, write_config: Callable[..., Path], copied: Path
) -> None:
    (copied / "train-00001.cropindex").unlink()
    code, findings = doctor(capsys, write_config(), "--data", copied)
    assert code == 0
    (train, _) = about(findings, "crop index")
    assert train["text"] == "train: 3 of 4 shards have one" and train["verdict"] == "slow"
    assert train["mend"] == [f"shards index {copied} --decode"]
    shutil.copy(copied / "train-00000.cropindex", copied / "train-00001.cropindex")
    code, findings = doctor(capsys, write_config(), "--data", copied)
    assert code == 1
    assert about(findings, "crop index")[0]["verdict"] == "wrong"


def test_a_host_is_looked_at_without_waiting_for_torch() -> None:
    code = "import sys; from pipeline.cli import main; main(['doctor']); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_split_is_decoded_as_it_will_be_with_the_configuration_s_threads(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, write_config: Callable[..., Path]
) -> None:
    from pipeline import loader

    seen = []

    class Watched(loader.Loader):
        def __init__(self, reader, decoder, requests, *, threads, prefetch) -> None:
            seen.append((reader.split.name, requests[0].epochs is None, requests[0].size, threads))
            super().__init__(reader, decoder, requests, threads=threads, prefetch=prefetch)

    monkeypatch.setattr(loader, "Loader", Watched)
    changes = {"recipe.loader.threads": 3, "recipe.transform.progressive": [{"from_epoch": 0, "size": 24}]}
    assert doctor(capsys, write_config(changes=changes))[0] == 0
    assert seen == [("train", False, 24, 3), ("val", True, 32, 3)]
