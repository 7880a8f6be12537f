"""`shards verify` finds everything that is wrong; and the command line itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards.cli import main
from shards.index import load_split
from shards.verify import verify


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_whole_data_set(prepared, run):
    code, said, _ = run("verify", prepared, "--digests", "--decode", "--workers", 2)
    assert code == 0
    assert "ok        sizes, index, labels, keys, digests, every image decoded" in said
    assert "train       8      60" in said and "val         3      21" in said


def test_changed_byte_is_found_by_digest_and_broken_image_by_decoding(copy, run):
    split = load_split(copy, "train")
    sample = split.samples[11]
    shard = split.shards[sample["shard"]].path
    overwrite(shard, int(sample["offset"]) + 2, bytes(60))
    assert run("verify", copy)[0] == 0, "headers and sizes are as before"
    code, said, _ = run("verify", copy, "--digests")
    assert code == 1 and f"problem   {shard.name}: has sha256 " in said and "1 problem " in said
    code, said, _ = run("verify", copy, "--decode")
    assert code == 1 and f"{shard.name}: key {split.key(11)}: does not decode" in said


def test_all_problems_are_reported(copy):
    (copy / "train-00000.tar").unlink()
    with (copy / "train-00001.tar").open("r+b") as file:
        file.truncate(3000)
    (copy / "train-00002.idx").unlink()
    shutil.copy(copy / "train-00004.idx", copy / "train-00003.idx")
    overwrite(copy / "train-00005.tar", 0, b"xxxx")
    shutil.copy(copy / "val-00000.tar", copy / "val-00009.tar")
    (copy / "_info.json").write_text('{"splits": {}}')
    index = json.loads((copy / "index.json").read_bytes())
    index["datasets"][0]["shardlist"][6]["nsamples"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    problems = [str(problem) for problem in verify(copy, workers=2).problems]
    expected = [
        "_info.json: does not agree",
        "val-00009.tar: is not listed",
        "train-00000.tar: cannot be read",
        "train-00001.tar: has 3,000 bytes",
        "train-00001.tar: byte ",
        "train-00002.idx: is missing",
        "train-00003.idx: does not describe its tar",
        "train-00005.tar: byte 0: not a tar header",
        "train-00006.tar: holds ",
    ]
    assert [problem[: len(start)] for problem, start in zip(problems, expected, strict=True)] == expected


def test_labels_outside_the_classes_and_repeated_keys(copy, run):
    (copy / "classes.json").write_text('["a", "b"]')
    code, said, _ = run("verify", copy)
    assert code == 1 and said.count("label 2 is outside the 2 classes") == 27
    for suffix in ("tar", "idx"):
        shutil.copy(copy / f"val-00000.{suffix}", copy / f"val-00001.{suffix}")
    code, said, _ = run("verify", copy)
    assert code == 1 and "two samples of split 'val' have the key" in said


def test_no_data_set_at_all(tmp_path, refuse):
    assert str(tmp_path / "absent") in refuse("verify", tmp_path / "absent")
    assert "no index.json" in refuse("verify", tmp_path)
    assert "--workers 0" in refuse("verify", tmp_path, "--workers", 0)


@pytest.mark.parametrize(
    "command", [[], ["prepare"], ["prepare", "demo"], ["prepare", "imagefolder"], ["index"], ["verify"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["prepare"], ["prepare", "nosuch", "out"], ["prepare", "demo", "--shards", "x"]]
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: shards" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    code = "import sys, shards.cli, shards.prepare, shards.index, shards.verify, shards.foreign; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2]).split()
    assert not {"torch", "deepspeed", "webdataset", "sklearn", "scipy"} & set(loaded)
