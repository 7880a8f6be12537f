"""`shards index` on tars that other tools made, and readers of other projects on ours."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from shards.index import load_split


def tar_with(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """As other tools write them: by tarfile, with owners and times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.5e9 + 0.25, "somebody"
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def samples(make_image):
    def make(start: int, count: int, classes: int = 4) -> list[tuple[str, bytes]]:
        """Image first, label and another component after it, as img2dataset and timm order them."""
        members = []
        for i in range(start, start + count):
            members += [(f"s{i:03d}.jpg", make_image(i)), (f"s{i:03d}.cls", b"%d\n" % (i % classes))]
            members += [(f"s{i:03d}.json", b"{}")]
        return members

    return make


def test_tars_of_another_tool(tmp_path, samples, run, make_image):
    for shard in range(3):
        tar_with(tmp_path / f"imagenet1k-train-{shard:04d}.tar", samples(shard * 10, 10))
    tar_with(tmp_path / "imagenet1k-validation-00.tar", samples(100, 7), tarfile.GNU_FORMAT)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    code, said, _ = run("index", tmp_path, "--workers", 2)
    assert code == 0 and "train     3 shards · 30 images" in said and "4 classes" in said
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    split = load_split(tmp_path, "train")
    assert [split.key(i) for i in range(30)] == [f"s{i:03d}" for i in range(30)]
    assert split.samples["label"].tolist() == [i % 4 for i in range(30)]
    for i in (0, 13, 29):
        sample = split.samples[i]
        with split.shards[sample["shard"]].path.open("rb") as file:
            file.seek(sample["offset"])
            assert file.read(sample["size"]) == make_image(i)
    assert len(load_split(tmp_path, "val")) == 7
    assert run("verify", tmp_path, "--digests", "--decode")[0] == 0


def test_classes_from_a_number_a_list_or_json(tmp_path, samples, run, refuse):
    tar_with(tmp_path / "a.tar", samples(0, 5))
    (tmp_path / "names.txt").write_text("ant\nbee\n\ncow\ndog\n")
    (tmp_path / "few.json").write_text('["ant", "bee"]')
    assert run("index", tmp_path, "--classes", 1000)[0] == 0
    assert len(load_split(tmp_path, "train").classes) == 1000
    assert run("index", tmp_path, "--classes", tmp_path / "names.txt")[0] == 0
    assert load_split(tmp_path, "train").classes == ("ant", "bee", "cow", "dog")
    assert run("index", tmp_path)[0] == 0
    assert load_split(tmp_path, "train").classes == ("ant", "bee", "cow", "dog"), "classes.json is kept"
    message = refuse("index", tmp_path, "--classes", tmp_path / "few.json")
    assert "label 3" in message and "a.tar" in message and "2 classes" in message
    assert "nothing.txt" in refuse("index", tmp_path, "--classes", tmp_path / "nothing.txt")


def test_indexing_again_changes_nothing_and_keeps_the_record(prepared, tmp_path, tree, run, two_splits):
    shutil.copytree(prepared, tmp_path / "copy")
    (tmp_path / "copy" / "train-00001.idx").write_text("damaged")
    assert run("index", tmp_path / "copy")[0] == 0
    assert tree(tmp_path / "copy") == tree(prepared)
    code, said, _ = run("prepare", "imagefolder", two_splits, tmp_path / "copy")
    assert code == 0 and "nothing to do" in said


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"j"), ("b.jpg", b"j"), ("b.cls", b"0")], "key a: has no label"),
        ([("a.cls", b"0"), ("a.txt", b"t")], "key a: has no image"),
        ([("a.jpg", b"j"), ("a.cls", b"cat")], "key a: label 'cat'"),
        ([("a.jpg", b"j"), ("a.cls", b"-1")], "key a: label '-1'"),
        ([("a.jpg", b"j"), ("a.cls", b"9" * 40)], "key a: label"),
        ([("a.jpg", b"j"), ("a.cls", b"")], "key a: label ''"),
        ([("a.jpg", b"j"), ("a.cls", b"0")] * 2 + [("b.jpg", b"j"), ("b.cls", b"0")], "two members of this key"),
        ([("a.jpg", b"j"), ("b.jpg", b"j"), ("a.cls", b"0"), ("b.cls", b"0")], "has no label"),
        ([("a b.jpg", b"j"), ("a b.cls", b"0")], "shards prepare webdataset DIR OUT"),
        ([("noextension", b"j")], "no samples"),
        ([], "no samples"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path, refuse, members, message):
    tar_with(tmp_path / "shard.tar", members)
    said = refuse("index", tmp_path)
    assert str(tmp_path / "shard.tar") in said and message in said
    assert not (tmp_path / "index.json").exists()


def test_two_samples_with_one_key_in_one_split(tmp_path, samples, refuse, run):
    tar_with(tmp_path / "train-0.tar", samples(0, 5))
    tar_with(tmp_path / "train-1.tar", samples(4, 5))
    message = refuse("index", tmp_path)
    assert "train-0.tar and " in message and "train-1.tar" in message and "the key s004" in message
    (tmp_path / "train-1.tar").rename(tmp_path / "val-1.tar")
    assert run("index", tmp_path)[0] == 0, "one key in two splits is no conflict"


def test_folders_that_cannot_be_indexed(tmp_path, samples, refuse):
    assert str(tmp_path / "absent") in refuse("index", tmp_path / "absent")
    assert "no tars" in refuse("index", tmp_path)
    tar_with(tmp_path / "train-0.tar", samples(0, 2))
    tar_with(tmp_path / "other.tar", samples(5, 2))
    assert "other.tar: its name says no split" in refuse("index", tmp_path)
    (tmp_path / "other.tar").unlink()
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(whole[:3000])
    assert "train-0.tar: byte" in (message := refuse("index", tmp_path)) and "truncated" in message


# ---- other projects' readers on our shards


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_idx_is_what_wds2idx_computes(prepared):
    """wds2idx takes names, offsets and sizes from GNU tar's listings; so does this check."""
    for shard in prepared.glob("*.tar"):
        blocks = subprocess.check_output(["tar", "--list", "--block-number", "--file", shard], text=True).splitlines()
        sizes = subprocess.check_output(["tar", "--list", "--verbose", "--file", shard], text=True).splitlines()
        lines: dict[str, list[str]] = {}
        for block, size in zip(blocks, sizes, strict=False):
            number, _, name = block.removeprefix("block ").partition(": ")
            if not name or name.startswith("**"):
                continue
            key, _, extension = name.partition(".")
            lines.setdefault(key, []).append(f"{extension} {(int(number) + 1) * 512} {size.split()[2]} {name}")
        expected = [f"v1.2 {len(lines)}", *(" ".join(parts) for parts in lines.values()), ""]
        assert shard.with_suffix(".idx").read_text() == "\n".join(expected)


def read_by_index(root: Path, name: str) -> dict[str, tuple[int, bytes]]:
    split = load_split(root, name)
    found = {}
    for i, sample in enumerate(split.samples):
        with split.shards[sample["shard"]].path.open("rb") as file:
            file.seek(sample["offset"])
            found[split.key(i)] = (int(sample["label"]), file.read(sample["size"]))
    return found


def test_stock_webdataset_reads_the_same(prepared):
    import webdataset

    for name in ("train", "val"):
        urls = [str(path) for path in sorted(prepared.glob(f"{name}-*.tar"))]
        found = {
            sample["__key__"]: (int(sample["cls"]), sample.get("jpg") or sample.get("png"))
            for sample in webdataset.WebDataset(urls, shardshuffle=False)
        }
        assert found == read_by_index(prepared, name)


def test_timm_reads_the_same(prepared):
    from PIL import Image
    from timm.data.readers.reader_wds import ReaderWds

    for name in ("train", "val"):
        reader = ReaderWds(str(prepared), split=name, is_training=False)
        assert len(reader) == len(load_split(prepared, name))
        expected = [
            (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes(), label)
            for label, data in read_by_index(prepared, name).values()
        ]
        assert [(np.asarray(image).tobytes(), label) for image, label in reader] == expected


# ---- labels elsewhere than in .cls


@pytest.fixture
def by_name(tmp_path, make_image) -> Path:
    """Two shards whose labels are names in a text file."""
    for shard in range(2):
        members = []
        for i in range(6):
            members += [
                (f"k{shard}{i}.jpg", make_image(10 * shard + i)),
                (f"k{shard}{i}.txt", b"cat\n" if i % 3 else b"ox"),
            ]
        tar_with(tmp_path / "named" / f"{shard:05d}.tar", members)
    return tmp_path / "named"


def labels_of(root: Path) -> list[int]:
    return load_split(root, "train").samples["label"].tolist()


def test_rule_is_recorded_and_holds_when_the_table_is_built_anew(by_name, run, refuse):
    message = refuse("index", by_name)
    assert "key k00: has no label (.cls)" in message and "--label txt   ('ox')" in message
    message = refuse("index", by_name, "--label", "txt")
    assert "label 'ox' (.txt) is no class number" in message and "--classes from-labels" in message
    code, said, _ = run("index", by_name, "--label", "txt", "--classes", "from-labels")
    assert code == 0 and "labels    .txt, looked up by name" in said
    expected = [1, 0, 0] * 4
    assert load_split(by_name, "train").classes == ("cat", "ox") and labels_of(by_name) == expected
    shutil.rmtree(by_name / ".cache")
    assert labels_of(by_name) == expected
    digest = load_split(by_name, "train").digest
    (by_name / "names.txt").write_text("ox\ncow\ncat\n")
    assert run("index", by_name, "--classes", by_name / "names.txt")[0] == 0, "the rule is kept"
    assert labels_of(by_name) == [0, 2, 2] * 4
    assert load_split(by_name, "train").digest != digest, "other labels are other data"
    assert run("verify", by_name)[0] == 0


def test_classes_that_change_after_names_were_looked_up(by_name, run):
    assert run("index", by_name, "--label", "txt", "--classes", "from-labels")[0] == 0
    (by_name / "classes.json").write_text('["ox", "cat"]')
    with pytest.raises(UserError, match=r"classes.json: has changed since the names"):
        load_split(by_name, "train")
    code, said, _ = run("verify", by_name)
    assert code == 1 and "problem   classes.json: has changed" in said
    assert run("index", by_name)[0] == 0
    assert labels_of(by_name) == [0, 1, 1] * 4


def test_names_from_labels_must_be_names(tmp_path, make_image, refuse):
    def index(*labels: bytes) -> str:
        members = [m for i, label in enumerate(labels) for m in ((f"{i}.jpg", make_image(i)), (f"{i}.cls", label))]
        tar_with(tmp_path / "a.tar", members)
        return refuse("index", tmp_path, "--classes", "from-labels")

    assert "some labels are class numbers and some names" in index(b"1", b"cat")
    assert "label '-1' (.cls) is neither" in index(b"cat", b"-1")
    assert "label '' (.cls) is neither" in index(b"cat", b"")


# ---- which tars, and what is read of them again


def test_folders_for_splits(tmp_path, samples, run, refuse):
    tar_with(tmp_path / "training" / "00000.tar", samples(0, 4))
    tar_with(tmp_path / "training" / "part" / "00000.tar", samples(4, 4))
    tar_with(tmp_path / "validation" / "00000.tar", samples(0, 4))
    tar_with(tmp_path / "raw" / "00000.tar", samples(90, 4))
    code, said, _ = run("index", tmp_path)
    assert code == 0 and f"left out the tars in {tmp_path / 'raw'}" in said
    assert [split["url"] for split in shard_list(tmp_path, 0)] == ["training/00000.tar", "training/part/00000.tar"]
    assert len(load_split(tmp_path, "train")) == 8 and len(load_split(tmp_path, "val")) == 4
    assert run("verify", tmp_path, "--digests")[0] == 0
    (tmp_path / "training" / "part" / "00000.idx").unlink()
    with pytest.raises(UserError, match=f"shards index {tmp_path}$"):
        load_split(tmp_path, "train")
    code, said, _ = run("verify", tmp_path)
    assert code == 1 and "problem   training/part/00000.idx: is missing" in said
    (tmp_path / "training").rename(tmp_path / "elsewhere")
    (tmp_path / "validation").rename(tmp_path / "other")
    assert f"There are some in {tmp_path / 'elsewhere'}, " in refuse("index", tmp_path)


def shard_list(root: Path, split: int) -> list[dict]:
    return json.loads((root / "index.json").read_bytes())["datasets"][split]["shardlist"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar"])
def test_compressed_shards(tmp_path, samples, refuse, name):
    tar_with(tmp_path / "b.tar", samples(0, 2))
    data = gzip.compress((tmp_path / "b.tar").read_bytes())
    (tmp_path / name).write_bytes(data)
    message = refuse("index", tmp_path)
    assert f"{tmp_path / name}: compressed" in message and "unpack it with: " in message


def test_index_again_hashes_only_what_changed(tmp_path, samples, run):
    for shard in range(3):
        tar_with(tmp_path / f"{shard}.tar", samples(10 * shard, 4))
    assert run("index", tmp_path)[0] == 0
    settle(tmp_path)
    whole = (tmp_path / "index.json").read_bytes()
    assert "3 shards not hashed" in run("index", tmp_path)[1]
    assert "not hashed" not in run("index", tmp_path, "--rehash")[1]
    offset = int(load_split(tmp_path, "train").samples["offset"][5])
    with (tmp_path / "1.tar").open("r+b") as file:  # the same size, names and headers: only its time tells
        file.seek(offset + 20)
        file.write(b"!")
    os.utime(tmp_path / "1.tar")
    assert "2 shards not hashed" in run("index", tmp_path)[1]
    assert shard_list(tmp_path, 0)[1]["sha256"] == hashlib.sha256((tmp_path / "1.tar").read_bytes()).hexdigest()
    assert (tmp_path / "index.json").read_bytes() != whole
    (tmp_path / "2.idx").write_text("v1.2 4\n")  # newer than its tar, and wrong
    assert "2 shards not hashed" in run("index", tmp_path)[1]
    tar_with(tmp_path / "3.tar", samples(30, 4))
    assert "3 shards not hashed" in run("index", tmp_path)[1] and len(load_split(tmp_path, "train")) == 16
    assert run("verify", tmp_path, "--digests")[0] == 0


def settle(root: Path) -> None:
    """Let the tars be older than what was written after them, however coarse the file system's clock is."""
    for tar in root.glob("*.tar"):
        os.utime(tar, (1e9, 1e9))


@pytest.mark.parametrize("moment", [0.0, 0.15, 0.3])
def test_killed_index_counts_for_nothing_but_keeps_its_digests(tmp_path, samples, start, run, moment, tree):
    for shard in range(40):
        tar_with(tmp_path / f"{shard:02d}.tar", samples(10 * shard, 8))
    settle(tmp_path)
    process = start("index", tmp_path, "--workers", 2)
    while not list((tmp_path / ".index").glob("*.json")) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = len(list((tmp_path / ".index").glob("*.json"))) if not (tmp_path / "index.json").exists() else 40
    assert done
    if not (tmp_path / "index.json").exists():
        with pytest.raises(UserError, match=r"no index\.json"):
            load_split(tmp_path, "train")
    code, said, _ = run("index", tmp_path)
    assert code == 0 and f"{done} shards not hashed" in said
    assert not (tmp_path / ".index").exists() and not list(tmp_path.glob(".*.tmp"))
    after = tree(tmp_path)
    assert run("index", tmp_path, "--rehash")[0] == 0
    assert tree(tmp_path) == after


def test_index_that_no_longer_holds_is_removed_before_anything_else(tmp_path, samples, run, refuse):
    tar_with(tmp_path / "train-0.tar", samples(0, 4))
    tar_with(tmp_path / "train-1.tar", samples(10, 4))
    assert run("index", tmp_path)[0] == 0
    tar_with(tmp_path / "train-1.tar", [*samples(10, 4), ("x.jpg", bytes(10_000))])
    assert "key x: has no label" in refuse("index", tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_info_of_another_tool_is_compared(tmp_path, samples, run):
    tar_with(tmp_path / "a.tar", samples(0, 4))
    tar_with(tmp_path / "b.tar", samples(4, 4))
    info = {
        "splits": {"all": {"filenames": ["a.tar", "b.tar", "c.tar"], "shard_lengths": [4, 5, 4], "num_samples": 13}}
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    code, said, _ = run("index", tmp_path)
    assert code == 0
    assert "_info.json, now replaced: it says 5 samples in b.tar, which holds 4" in said
    assert "_info.json, now replaced: it lists shards that are not there: c.tar" in said
    assert json.loads((tmp_path / "_info.json").read_bytes())["splits"]["train"]["shard_lengths"] == [4, 4]
    assert run("verify", tmp_path)[0] == 0
