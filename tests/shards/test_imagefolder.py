"""Layouts of class folders, and what must not be in them."""

from __future__ import annotations

import os

import pytest

from shards.errors import UserError
from shards.index import load_split
from shards.sources.base import is_valid_key, make_key
from shards.sources.imagefolder import ImageFolder


def keys(root, name) -> set[str]:
    split = load_split(root, name)
    return {split.key(i) for i in range(len(split))}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_names_of_the_validation_folder(tmp_path, write_class_folders, run, name):
    write_class_folders(tmp_path / "in" / "train")
    write_class_folders(tmp_path / "in" / name, per_class=2)
    code, said, _ = run("prepare", "imagefolder", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert code == 0 and "15 train / 6 val images · 3 classes" in said


def test_no_folder_of_a_root_is_left_out_without_a_word(tmp_path, write_class_folders, make_image, run):
    for number, name in enumerate(("train", "val", "test", "extra", "valid")):
        write_class_folders(tmp_path / "in" / name, per_class=5 - number)
    code, said, _ = run("prepare", "imagefolder", tmp_path / "in", tmp_path / "out")
    assert code == 0 and "15 train / 12 val / 9 test images" in said
    assert "note      left out extra/: neither train, val nor test" in said
    assert f"note      left out valid/: the validation split is {tmp_path / 'in' / 'val'}" in said
    assert len(load_split(tmp_path / "out", "test")) == 9
    (tmp_path / "in" / "test" / "unlabelled.jpg").write_bytes(make_image(1))
    code, said, _ = run("prepare", "imagefolder", tmp_path / "in", tmp_path / "flat")
    assert code == 0 and "15 train / 12 val images" in said and "note      left out test/: " in said


def test_two_folders_by_name_and_options_anywhere(tmp_path, write_class_folders, run):
    write_class_folders(tmp_path / "a")
    write_class_folders(tmp_path / "b", per_class=1)
    arguments = ("--train", tmp_path / "a", "--workers", 1, tmp_path / "out", "--val", tmp_path / "b")
    code, said, error = run("prepare", "imagefolder", *arguments)
    assert code == 0 and "15 train / 3 val" in said, error
    code, said, error = run("prepare", "imagefolder", tmp_path / "a", "--workers", 1, tmp_path / "out2")
    assert code == 0 and "15 train images" in said, error


def test_single_root_with_and_without_held_out_images(tmp_path, write_class_folders, run):
    write_class_folders(tmp_path / "in", per_class=10)
    assert run("prepare", "imagefolder", tmp_path / "in", tmp_path / "all", "--workers", 1)[0] == 0
    assert len(load_split(tmp_path / "all", "train")) == 30
    parts = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(parts)}"
        options = ("--val-fraction", 0.2, "--seed", seed, "--workers", 1)
        assert run("prepare", "imagefolder", tmp_path / "in", out, *options)[0] == 0
        parts.append(keys(out, "val"))
        assert sorted(load_split(out, "val").samples["label"]) == [0, 0, 1, 1, 2, 2]
        assert keys(out, "train") | parts[-1] == keys(tmp_path / "all", "train")
        assert not keys(out, "train") & parts[-1]
    assert parts[0] == parts[1] != parts[2]


def test_labels_follow_sorted_names_and_folders_are_searched(tmp_path, make_image, run):
    for number, path in enumerate(("n02/n02_1.JPEG", "n01/images/n01_2.JPEG", "n01/3.jpg", "N3/x y.z.jpeg")):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(make_image(number))
    assert run("prepare", "imagefolder", tmp_path / "in", tmp_path / "out", "--shards", 1)[0] == 0
    split = load_split(tmp_path / "out", "train")
    assert split.classes == ("N3", "n01", "n02")
    found = {split.key(i): int(split.samples[i]["label"]) for i in range(4)}
    assert found == {"N3_x_y_z": 0, "n01_3": 1, "n01_images_n01_2": 1, "n02_1": 2}


def test_a_class_may_be_called_train(tmp_path, make_image, run):
    for name in ("car", "train"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(make_image(1))
    assert run("prepare", "imagefolder", tmp_path / "in", tmp_path / "out")[0] == 0
    assert load_split(tmp_path / "out", "train").classes == ("car", "train")


def test_junk_is_skipped_and_counted(tmp_path, write_class_folders, run):
    root = write_class_folders(tmp_path / "in")
    for name in (".DS_Store", "Thumbs.db", "._image.jpg"):
        (root / "class_0" / name).write_bytes(b"junk")
    (root / "class_1" / ".ipynb_checkpoints").mkdir()
    (root / ".hidden").mkdir()
    code, said, _ = run("prepare", "imagefolder", root, tmp_path / "out")
    assert code == 0 and "15 train images · 3 classes" in said and "skipped 4 " in said


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["notes.txt", "no_extension", "empty.jpg", "text.jpg"])
def test_file_that_is_no_image(tmp_path, write_class_folders, refuse, name, workers):
    root = write_class_folders(tmp_path / "in")
    (root / "class_1" / name).write_bytes(b"" if name == "empty.jpg" else b"BMW is no bitmap, nor anything else")
    message = refuse("prepare", "imagefolder", root, tmp_path / "out", "--workers", workers)
    assert str(root / "class_1" / name) in message and "not an image" in message
    assert not (tmp_path / "out" / "index.json").exists()


def test_two_files_with_one_key(tmp_path, write_class_folders, make_image, refuse):
    root = write_class_folders(tmp_path / "in")
    (root / "class_1" / "a.jpg").write_bytes(make_image(1))
    (root / "class_1" / "a.png").write_bytes(make_image(2, "PNG"))
    message = refuse("prepare", "imagefolder", root, tmp_path / "out")
    assert str(root / "class_1" / "a.jpg") in message and str(root / "class_1" / "a.png") in message


def test_classes_of_the_splits_must_be_the_same(tmp_path, write_class_folders, refuse):
    write_class_folders(tmp_path / "in" / "train")
    write_class_folders(tmp_path / "in" / "val", classes=2)
    message = refuse("prepare", "imagefolder", tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in" / "val" / "class_2") in message
    (tmp_path / "in" / "val" / "class_2").mkdir()
    (tmp_path / "in" / "val" / "classe_1").mkdir()
    message = refuse("prepare", "imagefolder", tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in" / "val" / "classe_1") in message and "not in the training split" in message


def test_missing_and_empty_folders(tmp_path, write_class_folders, make_image, refuse):
    out = tmp_path / "out"
    assert str(tmp_path / "absent") in refuse("prepare", "imagefolder", tmp_path / "absent", out)
    (tmp_path / "empty").mkdir()
    assert "no class folders" in refuse("prepare", "imagefolder", tmp_path / "empty", out)
    root = write_class_folders(tmp_path / "in")
    (root / "class_9").mkdir()
    assert str(root / "class_9") in refuse("prepare", "imagefolder", root, out)
    (root / "class_9").rmdir()
    (root / "stray.jpg").write_bytes(make_image(1))
    assert str(root / "stray.jpg") in refuse("prepare", "imagefolder", root, out)
    write_class_folders(tmp_path / "only" / "val")
    assert "no training split" in refuse("prepare", "imagefolder", tmp_path / "only", out)
    assert "either ROOT or --train" in refuse("prepare", "imagefolder", out)
    assert "--val-fraction 1.5" in refuse("prepare", "imagefolder", root, out, "--val-fraction", 1.5)


def test_broken_link_link_in_a_circle_and_fifo(tmp_path, write_class_folders, refuse):
    root = write_class_folders(tmp_path / "in")
    odd = root / "class_0" / "odd.jpg"
    odd.symlink_to("nowhere.jpg")
    assert str(odd) in refuse("prepare", "imagefolder", root, tmp_path / "out")
    odd.unlink()
    os.mkfifo(odd)
    assert str(odd) in refuse("prepare", "imagefolder", root, tmp_path / "out")
    odd.unlink()
    odd.symlink_to(root)
    assert str(odd) in refuse("prepare", "imagefolder", root, tmp_path / "out")


def test_image_that_vanishes_or_changes_while_it_is_read(tmp_path, write_class_folders):
    source = ImageFolder(write_class_folders(tmp_path / "in"))
    entry = next(source.entries("train"))
    (tmp_path / "in" / "class_0" / "image 0000.JPEG").unlink()
    with pytest.raises(UserError, match=r"class_0/image 0000\.JPEG: cannot be read"):
        source.read(entry.locator)


def test_file_names_that_are_not_utf_8(tmp_path, write_class_folders, make_image, run):
    root = write_class_folders(tmp_path / "in")
    (root / "class_0" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(make_image(5))
    assert run("prepare", "imagefolder", root, tmp_path / "out")[0] == 0
    assert "class_0_caf" in keys(tmp_path / "out", "train")


def test_keys_are_valid_whatever_the_names():
    assert make_key("n01", "a b.c/d") == "n01_a_b_c_d"
    for text in ("...", " ", "\udce9", "a\u2028b", "名前"):
        assert is_valid_key(make_key(text)), text


def test_a_share_that_holds_out_nothing_says_so(tmp_path, write_class_folders, refuse):
    write_class_folders(tmp_path / "in", per_class=1)
    message = refuse("prepare", "imagefolder", tmp_path / "in", tmp_path / "out", "--val-fraction", 0.1)
    assert "--val-fraction 0.1" in message and "--val" in message
