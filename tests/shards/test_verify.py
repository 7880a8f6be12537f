"""`shards verify` finds everything that is wrong; and the command line itself."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shards.cli import main
from shards.errors import UserError
from shards.findings import print_report, report_as_json
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


# ---- remarks: what may be meant so


def shards_of(root: Path, tar_members: dict[str, list[tuple[str, bytes]]], write_tar, run, classes: int = 4) -> Path:
    for name, members in tar_members.items():
        write_tar(root / name, members)
    assert run("index", root, "--classes", classes)[0] == 0
    return root


def test_label_histogram(tmp_path, write_tar, make_image, run):
    def members(start: int, labels: list[int]) -> list[tuple[str, bytes]]:
        return [
            member
            for i, label in enumerate(labels, start)
            for member in ((f"k{i}.cls", b"%d" % label), (f"k{i}.jpg", make_image(i)))
        ]

    root = shards_of(
        tmp_path / "set",
        {"train-0.tar": members(0, [0, 0, 3]), "train-1.tar": members(5, [0, 3, 1]), "val-0.tar": members(9, [1])},
        write_tar,
        run,
    )
    code, said, _ = run("verify", root)
    assert code == 0, "a class without images is no problem"
    assert "3 of 4         1 … 2 … 3" in said and "1 of 4                 1" in said
    assert "remark    train: 1 of 4 classes have no image: 2" in said
    assert "remark    val: 3 of 4 classes have no image: 0, 2, 3" in said
    code, said, _ = run("verify", root, "--json")
    document = json.loads(said)
    assert code == 0 and document["ok"] and document["problems"] == []
    train = document["splits"]["train"]
    assert train["histogram"] == [3, 1, 0, 2] and train["images_per_class"] == {"min": 1, "median": 2.0, "max": 3}
    assert train["classes_missing"] == [2] and train["classes_seen"] == 3
    assert train["images"] == 6 and train["bytes"] == sum(path.stat().st_size for path in root.glob("train-*.tar"))
    assert [remark["kind"] for remark in document["remarks"]] == ["missing-classes"] * 2


def test_duplicate_content(tmp_path, write_tar, make_image, run):
    def members(*samples: tuple[str, int, int]) -> list[tuple[str, bytes]]:
        return [m for k, label, i in samples for m in ((f"{k}.cls", b"%d" % label), (f"{k}.jpg", make_image(i)))]

    root = shards_of(
        tmp_path / "set",
        {
            "train-0.tar": members(("a", 0, 1), ("b", 1, 2), ("c", 2, 3), ("d", 3, 4)),
            "train-1.tar": members(("e", 0, 1), ("f", 1, 5), ("g", 2, 6)),
            "val-0.tar": members(("h", 2, 2), ("i", 2, 3), ("j", 0, 7), ("k", 1, 8), ("l", 2, 9), ("m", 3, 10)),
        },
        write_tar,
        run,
    )
    assert "remark" not in run("verify", root)[1]
    for workers in (1, 2):
        code, said, _ = run("verify", root, "--duplicates", "--workers", workers)
        assert code == 0
        assert [line for line in said.splitlines() if line.startswith("remark")] == [
            "remark    3 images stand under more than one key: 2 in more than one split, 1 with different labels",
            "remark    labels 1 and 2 for one image: train-0.tar: key b, val-0.tar: key h",
            "remark    one image in train and val: train-0.tar: key c, val-0.tar: key i",
            "remark    one image: train-0.tar: key a, train-1.tar: key e",
        ]
    (conflict,) = [
        remark
        for remark in json.loads(run("verify", root, "--duplicates", "--json")[1])["remarks"]
        if remark["kind"] == "label-conflict"
    ]
    assert conflict["samples"] == [
        {"split": "train", "shard": "train-0.tar", "key": "b", "label": 1},
        {"split": "val", "shard": "val-0.tar", "key": "h", "label": 2},
    ]


def test_samples_that_cannot_be_read_are_all_reported(copy, write_tar, make_image, run):
    members = [
        ("a.jpg", make_image(1)),
        ("b.cls", b"0"),
        ("c.cls", b"x"),
        ("c.jpg", b"j"),
        ("d.cls", b"1"),
        ("d.jpg", b"j"),
    ]
    write_tar(copy / "val-00001.tar", members)
    code, said, _ = run("verify", copy, "--duplicates", "--decode", "--json")
    problems = {(problem["place"], problem["key"]) for problem in json.loads(said)["problems"]}
    assert code == 1
    assert problems >= {("val-00001.tar", "a"), ("val-00001.tar", "b"), ("val-00001.tar", "c"), ("val-00001.tar", "d")}
    assert problems >= {("val-00001.tar", None), ("val-00001.idx", None)}


def test_long_lists_are_cut_on_the_screen_only(copy, run):
    (copy / "classes.json").write_text('["a"]')
    for folder in ("train-0000", "val-0000"):
        assert list(copy.glob(f"{folder}*.tar"))
    code, said, _ = run("verify", copy, "--json")
    problems = json.loads(said)["problems"]
    assert code == 1 and len(problems) == 54
    report = verify(copy)
    many = replace(report, problems=report.problems * 3)
    console = Console(file=io.StringIO(), width=200)
    print_report(many, console)
    lines = console.file.getvalue().splitlines()
    assert sum(line.startswith("problem") for line in lines) == 101
    assert lines[-2] == "problem   … and 62 more, all of them with --json" and lines[-1].startswith("162 problems")


# ---- damage of any kind: everything is reported, nothing crashes or hangs


@pytest.mark.parametrize("seed", range(24))
def test_random_damage(prepared, tmp_path, seed):
    """One to three files are cut, flipped, emptied, removed or swapped; the digests must tell, for files of data."""
    shutil.copytree(prepared, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    random = np.random.default_rng(seed)
    files = sorted(path for path in (tmp_path / "copy").iterdir())
    damaged = set()
    for path in random.choice(np.array(files, object), random.integers(1, 4), replace=False):
        before = path.read_bytes()
        damage(path, random, files)
        if not path.is_file() or path.read_bytes() != before:
            damaged.add(path.name)
    try:
        report = verify(tmp_path / "copy", digests=True, decode=True, duplicates=True, workers=1)
    except UserError as error:
        assert "index.json" in error.headline and "index.json" in damaged
        return
    json.loads(report_as_json(report))
    found = {problem.place for problem in report.problems}
    optional = {name for name in damaged if name.endswith(".cropindex") and not (tmp_path / "copy" / name).exists()}
    for name in damaged - {"index.json", "_info.json", "classes.json"} - optional:
        tar = Path(name).with_suffix(".tar").name
        unknown = tar != name and tar in damaged and (tmp_path / "copy" / name).is_file()  # nothing to compare with
        assert name in found or unknown, (name, report.problems)
    assert report.problems or damaged <= {"index.json", "_info.json", "classes.json", *optional}
    assert not optional or report.remarks


def damage(path: Path, random: np.random.Generator, files: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    kind = random.choice(
        ["cut", "flip bits", "zeros", "empty", "remove", "other", "header", "append", "folder", "fifo"]
    )
    position = int(random.integers(len(data))) if data else 0
    if kind == "cut":
        del data[position:]
    elif kind == "flip bits":
        for i in random.integers(len(data), size=8):
            data[i] ^= 1 << int(random.integers(8))
    elif kind == "zeros":
        data[position : position + 700] = bytes(len(data[position : position + 700]))
    elif kind == "header":
        data[int(random.integers(min(512, len(data))))] ^= 0xFF
    elif kind == "append":
        data += random.bytes(100)
    elif kind == "other":
        other = files[int(random.integers(len(files)))]
        data = bytearray(other.read_bytes()) if other.is_file() else data[:-1]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo" and path.suffix in (".tar", ".idx"):
        os.mkfifo(path)
    elif kind != "remove":
        path.write_bytes(b"" if kind == "empty" else data)
