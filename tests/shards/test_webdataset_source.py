"""Shards of other tools, in the layouts that they write: indexed in place, and shuffled anew."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shards.index import load_split
from shards.sources.base import make_distinct
from shards.sources.webdataset import WebDataset

WNIDS = ("n01440764", "n01443537", "n01484850")

Truth = dict[str, dict[str, tuple[int, bytes]]]
"""Label and image by key, by split."""


@dataclass
class Foreign:
    root: Path
    truth: Truth
    options: tuple[object, ...] = ()
    """That `shards index` and `shards prepare webdataset` need to understand it."""


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uname, info.mode = len(data), 1.7e9, "somebody", 0o644
    tar.addfile(info, io.BytesIO(data))


def timm_imagenet(root: Path, make_image) -> Foreign:
    """timm/imagenet-1k-wds: .cls, .jpg, .json; `_info.json` calls the second split "validation"."""
    root.mkdir()
    truth: Truth = {"train": {}, "val": {}}
    splits = {}
    for split, name, ours, lengths in (
        ("train", "train-{:04d}", "train", (6, 6, 5)),
        ("validation", "validation-{:02d}", "val", (4,)),
    ):
        for shard, length in enumerate(lengths):
            with tarfile.open(root / f"imagenet1k-{name.format(shard)}.tar", "w") as tar:
                for i in range(length):
                    number = 100 * (ours == "val") + 10 * shard + i
                    key, label, image = f"{WNIDS[i % 3]}_{number}", i % 3, make_image(number)
                    add(tar, f"{key}.cls", b"%d" % label)
                    add(tar, f"{key}.jpg", image)
                    add(tar, f"{key}.json", json.dumps({"filename": f"{key}.JPEG", "label": label}).encode())
                    truth[ours][key] = (label, image)
        filenames = [f"imagenet1k-{name.format(shard)}.tar" for shard in range(len(lengths))]
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": filenames, "shard_lengths": lengths}
    (root / "_info.json").write_text(json.dumps({"name": "imagenet1k", "splits": splits}))
    return Foreign(root, truth)


def img2dataset(root: Path, make_image) -> Foreign:
    """img2dataset: a .json and a caption beside every image, no .cls; statistics and a table beside every shard."""
    root.mkdir()
    truth: Truth = {"train": {}}
    for shard in range(3):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for i in range(5):
                key, label, image = f"{shard:05d}{i:04d}", (shard + i) % 3, make_image(10 * shard + i)
                about = {"url": "http://x/y", "key": key, "status": "success", "error_message": None}
                about |= {"width": 12, "exif": "{}", "meta": {"class": WNIDS[label]}}
                add(tar, f"{key}.jpg", image)
                add(tar, f"{key}.txt", f"a photo of number {label}".encode())
                add(tar, f"{key}.json", json.dumps(about, indent=4).encode())
                truth["train"][key] = (label, image)
        (root / f"{shard:05d}_stats.json").write_text('{"count": 5}')
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return Foreign(root, truth, ("--label", "json:meta.class", "--classes", "from-labels"))


def webdataset_writer(root: Path, make_image) -> Foreign:
    """webdataset.ShardWriter: members in the order of their extensions, keys in folders, a folder for each split."""
    import webdataset

    truth: Truth = {"train": {}, "val": {}}
    for split, count in (("train", 17), ("val", 4)):
        (root / split).mkdir(parents=True)
        with webdataset.ShardWriter(str(root / split / "%06d.tar"), maxcount=6, verbose=0) as writer:
            for i in range(count):
                number = i + 50 * (split == "val")
                image = make_image(number, "PNG")
                writer.write({"__key__": f"deep/sample-{number}", "png": image, "cls": i % 3, "seg.png": b"mask"})
                truth[split][f"deep_sample-{number}"] = (i % 3, image)
    return Foreign(root, truth)


def gnu_tar(root: Path, make_image) -> Foreign:
    """GNU tar of a folder: directories as members, every name with ``./``, the label by name in a text file."""
    root.mkdir()
    truth: Truth = {"train": {}}
    for shard in range(2):
        folder = root / "unpacked" / "samples"
        folder.mkdir(parents=True)
        for i in range(7):
            key, image = f"{shard}-{i}", make_image(10 * shard + i)
            (folder / f"{key}.JPEG").write_bytes(image)
            (folder / f"{key}.cls.txt").write_text(("cat", "dog", "eel")[i % 3] + "\n")
            truth["train"][f"samples_{key}"] = (i % 3, image)
        subprocess.run(
            ["tar", "--sort=name", "-cf", root / f"part-{shard}.tar", "-C", root / "unpacked", "."], check=True
        )
        shutil.rmtree(root / "unpacked")
    (root / "names.txt").write_text("cat\ndog\neel\n")
    return Foreign(root, truth, ("--label", "cls.txt", "--classes", root / "names.txt"))


@pytest.fixture(params=[timm_imagenet, img2dataset, webdataset_writer, gnu_tar], ids=lambda build: build.__name__)
def foreign(request, tmp_path, make_image) -> Foreign:
    return request.param(tmp_path / "foreign", make_image)


def content(root: Path, split: str, name: Callable[[str], str] = str) -> dict[str, tuple[int, bytes]]:
    """Label and image of every sample, through the index."""
    found = {}
    opened = load_split(root, split)
    for i, sample in enumerate(opened.samples):
        with opened.shards[sample["shard"]].path.open("rb") as file:
            image = os.pread(file.fileno(), int(sample["size"]), int(sample["offset"]))
        found[name(opened.key(i))] = (int(sample["label"]), image)
    return found


def flattened(key: str) -> str:
    return key.removeprefix("./").replace("/", "_")


def test_indexed_in_place(foreign, run, tree):
    before = tree(foreign.root)
    assert run("index", foreign.root, *foreign.options)[0] == 0
    for split, samples in foreign.truth.items():
        assert content(foreign.root, split, flattened) == samples
    shutil.rmtree(foreign.root / ".cache")  # and once more from the shards, as on a host that has only these
    for split, samples in foreign.truth.items():
        assert content(foreign.root, split, flattened) == samples
    after = tree(foreign.root)
    assert before.items() <= after.items(), "the files of the other tool stay, _info.json as well"
    assert run("verify", foreign.root, "--digests", "--decode")[0] == 0
    assert run("index", foreign.root)[0] == 0, "the rule and the classes are known by now"
    assert tree(foreign.root) == after


def test_shuffled_anew(foreign, tmp_path, run):
    code, _, error = run("prepare", "webdataset", foreign.root, tmp_path / "out", *foreign.options)
    assert code == 0, error
    for split, samples in foreign.truth.items():
        assert content(tmp_path / "out", split) == samples, "labels, keys and bytes"
    assert run("verify", tmp_path / "out", "--digests", "--decode")[0] == 0


def test_order_depends_on_the_seed_alone(tmp_path, make_image, run):
    foreign = timm_imagenet(tmp_path / "foreign", make_image)
    orders = []
    for folder, *options in (("a",), ("b", "--workers", 2), ("c", "--seed", 1)):
        assert run("prepare", "webdataset", foreign.root, tmp_path / folder, *options)[0] == 0
        orders.append(list(content(tmp_path / folder, "train")))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != list(foreign.truth["train"])


def test_listing_follows_the_tars_with_and_without_index(tmp_path, make_image, run):
    foreign = timm_imagenet(tmp_path / "foreign", make_image)
    scanned = list(WebDataset(foreign.root).entries("train"))
    assert [entry.key for entry in scanned] == list(foreign.truth["train"])
    assert [entry.label for entry in scanned] == [label for label, _ in foreign.truth["train"].values()]
    assert [entry.size for entry in scanned] == [len(image) for _, image in foreign.truth["train"].values()]
    assert run("index", foreign.root)[0] == 0
    source = WebDataset(foreign.root)
    assert list(source.entries("train")) == scanned
    assert len(pickle.dumps(source)) < 1000
    # a tar that was written to after its .idx is scanned, whatever the .idx says
    tar = foreign.root / "imagenet1k-train-0001.tar"
    tar.with_suffix(".idx").write_text("v1.2 6\n")
    os.utime(tar, ns=(2**62, 2**62))
    assert list(WebDataset(foreign.root).entries("train")) == scanned


def test_notes_say_what_is_not_carried_over(tmp_path, make_image, run):
    foreign = img2dataset(tmp_path / "foreign", make_image)
    code, said, _ = run("prepare", "webdataset", foreign.root, tmp_path / "out", *foreign.options)
    assert code == 0 and "only image and label are carried over; left out: .txt of 15 samples" in said
    record = json.loads((tmp_path / "out" / "index.json").read_bytes())["onehour"]
    assert record["options"]["label"] == "json:meta.class" and "label" not in record
    other = webdataset_writer(tmp_path / "writer", make_image)
    _, said, _ = run("prepare", "webdataset", other.root, tmp_path / "out2")
    assert ".seg.png of 21 samples" in said and "21 keys had dots, slashes or blanks" in said


def test_own_shards_keep_their_names_and_labels(prepared, tmp_path, run):
    code, _, error = run("prepare", "webdataset", prepared, tmp_path / "out", "--seed", 5, "--samples-per-shard", 9)
    assert code == 0, error
    for split in ("train", "val"):
        assert content(tmp_path / "out", split) == content(prepared, split)
    assert load_split(tmp_path / "out", "val").classes == ("class_0", "class_1", "class_2")


def test_mistakes(tmp_path, make_image, refuse, run):
    foreign = img2dataset(tmp_path / "foreign", make_image)
    out = tmp_path / "out"
    message = refuse("prepare", "webdataset", foreign.root, out)
    assert "00000.tar: key 000000000: has no label (.cls)" in message and "--label json:meta.class" in message
    assert "inside the folder" in refuse("prepare", "webdataset", foreign.root, foreign.root / "o", *foreign.options)
    assert "no such folder" in refuse("prepare", "webdataset", tmp_path / "absent", out)
    assert "'a photo of number 0'" in refuse(
        "prepare", "webdataset", foreign.root, out, "--label", "txt", "--classes", 3
    )
    (foreign.root / "00001.tar").rename(foreign.root / "00001.tar.gz")
    message = refuse("prepare", "webdataset", foreign.root, out, *foreign.options)
    assert "00001.tar.gz: compressed" in message and "gunzip" in message
    (foreign.root / "00001.tar.gz").unlink()
    assert run("index", foreign.root, *foreign.options)[0] == 0
    shutil.copy(foreign.root / "00000.tar", foreign.root / "00009.tar")
    assert "00009.tar: is not listed" in refuse("prepare", "webdataset", foreign.root, out)
    (foreign.root / "00009.tar").unlink()
    (foreign.root / "00002.tar").write_bytes(b"")
    assert "00002.tar: truncated or rewritten" in refuse("prepare", "webdataset", foreign.root, out)


def test_keys_that_become_equal(tmp_path, make_image, refuse):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("x/1", "x_1"):
            add(tar, f"{key}.jpg", make_image(1))
            add(tar, f"{key}.cls", b"0")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "in" / "a.tar")
    message = refuse("prepare", "webdataset", tmp_path / "in", tmp_path / "out")
    assert message.count("a.tar: byte ") == 2 and "the key x_1" in message


def test_listing_takes_memory_that_does_not_grow(tmp_path, write_tar):
    """One tar of 5,000 samples: the listing is streamed."""
    import tracemalloc

    members = [
        member for i in range(5_000) for member in ((f"k{i}.cls", b"%d" % (i % 10)), (f"k{i}.jpg", b"\xff\xd8\xff"))
    ]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", members)
    source = WebDataset(tmp_path / "in", classes="10")
    tracemalloc.start()
    labels = np.fromiter((entry.label for entry in source.entries("train")), np.int64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(labels) == 5_000 and peak < 300_000


def test_an_index_of_an_older_tar_is_not_believed(tmp_path, make_image, run):
    """`cp -p` of another tar: as large, as many samples, and older than the .idx."""
    images = {key: make_image(number) for number, key in enumerate("abc")}
    length = max(map(len, images.values()))
    images = {key: image.ljust(length, b"\0") for key, image in images.items()}
    root = tmp_path / "in"
    root.mkdir()
    for name, keys in (("in/train-0.tar", "abc"), ("other.tar", "cab")):
        with tarfile.open(tmp_path / name, "w") as tar:
            for key in keys:
                add(tar, f"{key}.jpg", images[key])
                add(tar, f"{key}.cls", b"%d" % ord(key))
    assert run("index", root)[0] == 0
    os.utime(tmp_path / "other.tar", (1, 1))
    shutil.copy2(tmp_path / "other.tar", root / "train-0.tar")
    source = WebDataset(root)
    found = {entry.key: (entry.label, source.read(entry.locator)) for entry in source.entries("train")}
    assert found == {key: (ord(key), image) for key, image in images.items()}


def with_masks(path: Path, make_image) -> Truth:
    """A mask before each image, which both have extensions of images."""
    path.parent.mkdir()
    truth: Truth = {"train": {}}
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            add(tar, f"{i}.png", b"mask")
            add(tar, f"{i}.JPG", make_image(i))
            add(tar, f"{i}.cls", b"%d" % (i % 2))
            truth["train"][str(i)] = (i % 2, make_image(i))
    return truth


def test_which_of_two_images_must_be_said(tmp_path, make_image, run, refuse):
    truth = with_masks(tmp_path / "in" / "a.tar", make_image)
    for command in (("index", tmp_path / "in"), ("prepare", "webdataset", tmp_path / "in", tmp_path / "out")):
        message = refuse(*command)
        assert "a.tar: key 0: has 2 images: .png and .jpg" in message
        assert "shards prepare webdataset DIR OUT --image png" in message
    options = ("prepare", "webdataset", tmp_path / "in", tmp_path / "out", "--image")
    assert "--image cls: must be an extension of images" in refuse(*options, "cls")
    assert "key 0: has no image (.webp)" in refuse(*options, "webp")
    code, said, error = run(*options, "jpg")
    assert code == 0 and ".png of 6 samples" in said, error
    assert content(tmp_path / "out", "train") == truth["train"]
    assert json.loads((tmp_path / "out" / "index.json").read_bytes())["onehour"]["options"]["image"] == "jpg"


def numbered(path: Path, make_image, labels: list[int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            add(tar, f"{i}.jpg", make_image(i))
            add(tar, f"{i}.cls", b"%d" % label)
    return path.parent


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 1, 2]])
def test_labels_counted_from_one_are_pointed_out(tmp_path, make_image, run, labels):
    folder = numbered(tmp_path / "in" / "a.tar", make_image, labels)
    note = "class 0 has no image; are the labels counted from 1?"
    for command in (("prepare", "webdataset", folder, tmp_path / "out"), ("index", folder)):
        code, said, _ = run(*command)
        assert code == 0 and (note in said) == (labels[0] == 1), command


def test_a_label_too_large_for_a_class_number(tmp_path, make_image, refuse, run):
    folder = numbered(tmp_path / "in" / "a.tar", make_image, [0, 30_000_000, 1])
    for command in (("prepare", "webdataset", folder, tmp_path / "out"), ("index", folder)):
        message = refuse(*command)
        assert "a.tar" in message and "label 30,000,000 is no class number: there are 3 images" in message
        assert "--classes" in message
    assert "at most" in refuse("index", folder, "--classes", 2_000_000_000)
    for number in ("²", "9" * 30):
        assert "neither a number nor a readable file" in refuse("index", folder, "--classes", number)


def test_extension_in_capitals_is_not_passed_over(tmp_path, make_image, refuse):
    folder = numbered(tmp_path / "in" / "train-0.tar", make_image, [0, 1])
    numbered(folder / "val-0.TAR", make_image, [0, 1])
    assert "val-0.TAR: shards are found by the extension .tar" in refuse("index", folder)
    (folder / "val-0.TAR").rename(folder / "val-0.TAR.GZ")
    assert "val-0.TAR.GZ: compressed" in refuse("index", folder)


def test_names_made_distinct():
    assert make_distinct(["a", "crane", "crane"]) == ("a", "crane (1)", "crane (2)")
    names = ["crane", "crane", "crane (0)", "crane (1) (1)"]
    assert len(set(make_distinct(names))) == 4 and make_distinct(names)[3] == names[3]
    assert len(set(make_distinct(["x", "x", "x (0)", "x (0) (0)"]))) == 4
