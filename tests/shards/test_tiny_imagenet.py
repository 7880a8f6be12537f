"""Tiny ImageNet's layout, as a folder and as the zip."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.sources.tiny_imagenet import TinyImageNet

WNIDS = ("n02124075", "n01443537", "n04067472")
"""In the order of wnids.txt, which is not sorted."""
SORTED = ("n01443537", "n02124075", "n04067472")
TRUTH = ("n04067472", "n01443537", "n02124075", "n01443537", "n04067472")


def write_tiny(root: Path, make_image) -> dict[str, dict[str, tuple[int, bytes]]]:
    """Write a Tiny ImageNet of 3 classes; returns label and bytes by key and split."""
    expected: dict[str, dict[str, tuple[int, bytes]]] = {"train": {}, "val": {}}
    (root / "test" / "images").mkdir(parents=True)
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (root / "words.txt").write_text("n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\n")
    for c, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        boxes = []
        for i in range(4 + c):
            data = make_image(10 * c + i)
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(data)
            boxes.append(f"{wnid}_{i}.JPEG\t0\t10\t63\t58\n")
            expected["train"][f"{wnid}_{i}"] = (SORTED.index(wnid), data)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))
    for i, wnid in enumerate(TRUTH):
        data = make_image(100 + i)
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(data)
        expected["val"][f"val_{i}"] = (SORTED.index(wnid), data)
    annotations = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(TRUTH)]
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    (root / "test" / "images" / "test_0.JPEG").write_bytes(make_image(200))
    return expected


@pytest.fixture
def tiny(tmp_path, make_image) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    write_tiny(root, make_image)
    return root


def write_zip(root: Path) -> Path:
    """The folder as a zip with folder entries, photos stored and texts deflated."""
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for item in sorted(root.rglob("*")):
            kind = zipfile.ZIP_DEFLATED if item.suffix == ".txt" else zipfile.ZIP_STORED
            file.write(item, item.relative_to(root.parent), kind)
    return path


def contents(out: Path, split: str) -> dict[str, tuple[int, bytes]]:
    labels, images = {}, {}
    for path in out.glob(f"{split}-*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                (labels if extension == "cls" else images)[key] = tar.extractfile(member).read()
    assert labels.keys() == images.keys()
    return {key: (int(label), images[key]) for key, label in labels.items()}


@pytest.mark.parametrize("form", ["folder", "folder above", "zip"])
def test_labels_counts_and_bytes(tmp_path, make_image, run, form):
    root = tmp_path / "in" / "tiny-imagenet-200"
    expected = write_tiny(root, make_image)
    given = {"folder": root, "folder above": root.parent, "zip": write_zip(root)}[form]
    if form == "zip":
        shutil.rmtree(root)
    code, said, error = run("prepare", "tiny-imagenet", given, tmp_path / "out", "--workers", 2 if form == "zip" else 1)
    assert code == 0, error
    assert "3 classes · 15 train / 5 val images" in said
    assert "left out 1 test images" in said
    for split in ("train", "val"):
        assert contents(tmp_path / "out", split) == expected[split]
    classes = json.loads((tmp_path / "out" / "classes.json").read_bytes())
    assert [entry["wnid"] for entry in classes] == list(SORTED)
    assert classes[0]["name"] == "goldfish, Carassius auratus"
    assert run("verify", tmp_path / "out", "--decode")[0] == 0


def test_folder_and_zip_give_the_same_shards(tmp_path, tiny, run, tree):
    assert run("prepare", "tiny-imagenet", tiny, tmp_path / "a")[0] == 0
    assert run("prepare", "tiny-imagenet", write_zip(tiny), tmp_path / "b")[0] == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


FAULTS = {
    "no class list": (lambda root: (root / "wnids.txt").unlink(), "wnids.txt"),
    "empty class list": (lambda root: (root / "wnids.txt").write_text("\n"), "wnids.txt: lists no classes"),
    "a name for a class": (lambda root: (root / "wnids.txt").write_text("goldfish\n"), "'goldfish' is no WNID"),
    "a class twice": (lambda root: (root / "wnids.txt").write_text(f"{WNIDS[0]}\n" * 2), "lists a class twice"),
    "a class without images": (
        lambda root: shutil.rmtree(root / "train" / WNIDS[1]),
        f"train/{WNIDS[1]}/images: holds no image of this class",
    ),
    "a training image is missing": (
        lambda root: (root / "train" / WNIDS[1] / "images" / f"{WNIDS[1]}_2.JPEG").unlink(),
        f"{WNIDS[1]}_2.JPEG: no such image, but it is listed in train/{WNIDS[1]}/{WNIDS[1]}_boxes.txt",
    ),
    "a validation image is missing": (
        lambda root: (root / "val" / "images" / "val_3.JPEG").unlink(),
        "val_3.JPEG: no such image, but it is listed in val/val_annotations.txt",
    ),
    "a validation image has no label": (
        lambda root: shutil.copy(root / "val" / "images" / "val_3.JPEG", root / "val" / "images" / "val_9.JPEG"),
        "val/images/val_9.JPEG: has no label",
    ),
    "no annotations": (lambda root: (root / "val" / "val_annotations.txt").unlink(), "shards prepare imagefolder"),
    "unknown label": (
        lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn00000001\t0\t0\t1\t1\n"),
        "line 1: 'n00000001' is no class of wnids.txt",
    ),
    "annotated twice": (
        lambda root: (root / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{WNIDS[0]}\n" * 2),
        "line 2: val_0.JPEG has a label already",
    ),
    "text among the images": (
        lambda root: (root / "val" / "images" / "readme.txt").write_text("hello"),
        "val/images/readme.txt: not an image",
    ),
    "annotations are no text": (
        lambda root: (root / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00"),
        "val_annotations.txt: is no UTF-8 text",
    ),
}


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("what", FAULTS)
def test_faults(tmp_path, tiny, refuse, what, form):
    fault, message = FAULTS[what]
    fault(tiny)
    given = write_zip(tiny) if form == "zip" else tiny
    said = refuse("prepare", "tiny-imagenet", given, tmp_path / "out")
    assert message in said and str(given) in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_damaged_zips(tmp_path, tiny, refuse, make_image):
    path = write_zip(tiny)
    whole = path.read_bytes()

    def refused(data: bytes | None = None) -> str:
        if data is not None:
            path.write_bytes(data)
        return refuse("prepare", "tiny-imagenet", path, tmp_path / "out")

    assert "neither a folder nor a zip" in refused(whole[:-200])
    assert "neither a folder nor a zip" in refused(b"")
    image = (tiny / "val" / "images" / "val_2.JPEG").read_bytes()
    assert whole.count(image) == 1
    message = refused(whole.replace(image, image[:-30] + bytes(30)))
    assert "val/images/val_2.JPEG" in message and "CRC" in message
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tiny-imagenet-200/wnids.txt", bytes(65 << 20))
    assert "no file of Tiny ImageNet is that large" in refused()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/wnids.txt", "n01443537\n")
        file.writestr("b/wnids.txt", "n01443537\n")
    assert "holds 2 files wnids.txt" in refused()
    path.unlink()
    assert "No such file" in refused()
    os.mkfifo(path)
    assert "neither a folder nor a zip" in refused()


def test_source_is_small_for_the_workers(tmp_path, tiny):
    for given in (tiny, write_zip(tiny)):
        source = TinyImageNet(given)
        entries = list(source.entries("train"))
        data = pickle.dumps(source)
        assert len(data) < 1000
        copy = pickle.loads(data)
        assert [copy.read(entry.locator) for entry in entries] == [source.read(entry.locator) for entry in entries]
        assert str(given) in copy.place(entries[0].locator) and str(given) not in entries[0].locator


def test_output_inside_the_images_is_refused(tiny, refuse):
    assert "lies inside the folder" in refuse("prepare", "tiny-imagenet", tiny, tiny / "train" / "out")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_among_the_images_does_not_hang(tmp_path, tiny, refuse, make):
    path = tiny / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_99.JPEG"
    make(path)
    assert f"{path}: not a file" in refuse("prepare", "tiny-imagenet", tiny, tmp_path / "out")
    with pytest.raises(UserError, match="not a file"):
        TinyImageNet(tiny).read(str(path.relative_to(tiny)))
