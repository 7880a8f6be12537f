"""`shards index` on tars that other tools made, and readers of other projects on ours."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.index import load_split


def tar_with(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """As other tools write them: by tarfile, with owners and times."""
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
        ([("a.jpg", b"j"), ("a.cls", b"cat")], "key a: label b'cat'"),
        ([("a.jpg", b"j"), ("a.cls", b"-1")], "key a: label b'-1'"),
        ([("a.jpg", b"j"), ("a.cls", b"9" * 40)], "key a: label"),
        ([("a.jpg", b"j"), ("a.cls", b"")], "key a: label b''"),
        ([("a.jpg", b"j"), ("a.cls", b"0")] * 2 + [("b.jpg", b"j"), ("b.cls", b"0")], "two members of this key"),
        ([("a.jpg", b"j"), ("b.jpg", b"j"), ("a.cls", b"0"), ("b.cls", b"0")], "has no label"),
        ([("a b.jpg", b"j"), ("a b.cls", b"0")], "contains a blank"),
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
