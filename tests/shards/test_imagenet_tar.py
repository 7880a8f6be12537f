"""ImageNet's official archives, built small but as the real ones are: a tar of tars, a flat tar, a devkit."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from shards.errors import UserError
from shards.sources import imagenet_archives, imagenet_tar
from shards.sources.imagenet_tar import ImageNetTar

WNIDS = ("n02105855", "n01440764", "n01751748", "n03710637")
"""In the order of the archive; not sorted."""
SORTED = ("n01440764", "n01751748", "n02105855", "n03710637")
TRUTH = ("n01751748", "n03710637", "n01440764", "n03710637", "n02105855", "n01751748")
"""Class of each validation image."""


def encode(picture: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def noise(number: int, mode: str = "RGB") -> Image.Image:
    depth = {"RGB": (9, 8, 3), "L": (9, 8), "CMYK": (9, 8, 4)}[mode]
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, depth, np.uint8), mode)


def odd_images() -> dict[str, bytes]:
    """One of each kind that ImageNet is known for."""
    plain = encode(noise(4))
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xf0" + bytes(range(40))  # a directory far behind the end
    return {
        "n02105855_2933": encode(noise(1), "PNG"),
        "n02105855_17": encode(noise(2, "CMYK")),
        "n02105855_4": encode(noise(3, "L")),
        "n02105855_10026": plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:],
    }


def train_images() -> dict[str, dict[str, bytes]]:
    """Bytes by class and file stem; each class another number of images."""
    images = {wnid: {f"{wnid}_{i}": encode(noise(100 * c + i)) for i in range(3 + c)} for c, wnid in enumerate(WNIDS)}
    images["n02105855"] |= odd_images()
    return images


def val_images(count: int = len(TRUTH)) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}": encode(noise(1000 + i)) for i in range(1, count + 1)}


def tar_of(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT, compression: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(data), 1339564800, "imagenet"
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def jpegs(images: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{stem}.JPEG": data for stem, data in images.items()}


def write_train(path: Path, images: dict[str, dict[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    path.write_bytes(tar_of({f"{wnid}.tar": tar_of(jpegs(part), format) for wnid, part in images.items()}, format))
    return path


def write_train_by_gnu_tar(path: Path, images: dict[str, dict[str, bytes]]) -> Path:
    """As the archive was made: GNU tar over files, then over the tars."""
    folder = path.parent / "classes"
    for wnid, part in images.items():
        (folder / wnid).mkdir(parents=True)
        for name, data in jpegs(part).items():
            (folder / wnid / name).write_bytes(data)
        tar = ["tar", "--format=gnu", "-cf", str(folder / f"{wnid}.tar"), "-C", str(folder / wnid)]
        subprocess.run([*tar, *jpegs(part)], check=True)
    tar = ["tar", "--format=gnu", "-cf", str(path), "-C", str(folder)]
    subprocess.run([*tar, *(f"{wnid}.tar" for wnid in images)], check=True)
    return path


def make_devkit(truth: tuple[str, ...], leaves: tuple[str, ...], numbers: list[int] | None = None) -> dict[str, bytes]:
    """The two files of the devkit that matter; by default ids run against the sorted order of WNIDs."""
    ids = dict(zip(sorted(leaves), numbers or range(len(leaves), 0, -1), strict=True))
    rows = [(ids[wnid], wnid, f"{wnid} as a word, its synonym", 0, np.zeros((0, 0)), 0, 1300) for wnid in leaves]
    rows.sort()
    rows += [(1001, "n00001740", "entity", 2, np.array([[1002, 1]]), 18, 0)]
    rows += [(1002, "n00002137", "abstraction", 1, np.array([[2]]), 17, 0)]
    fields = "ILSVRC2012_ID WNID words num_children children wordnet_height num_train_images".split()
    table = np.zeros((len(rows), 1), [(name, object) for name in (*fields[:3], "gloss", *fields[3:])])
    for i, row in enumerate(rows):
        table[i, 0] = (*row[:3], "what it means", *row[3:])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table}, do_compression=True)
    return {
        "ILSVRC2012_devkit_t12/readme.txt": b"Introduction\n",
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{ids[wnid]}\n" for wnid in truth
        ).encode(),
        "ILSVRC2012_devkit_t12/evaluation/demo.val.pred.txt": b"1 2 3\n",
    }


def contents(out: Path, split: str) -> dict[str, tuple[int, str, bytes]]:
    """Label, extension and bytes of every sample in the finished shards, as the standard library reads them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    found = {}
    for key, parts in samples.items():
        label = int(parts.pop("cls"))
        [(extension, data)] = parts.items()
        found[key] = (label, extension, data)
    return found


def expected_train() -> dict[str, tuple[int, str, bytes]]:
    return {
        stem: (SORTED.index(wnid), "png" if stem == "n02105855_2933" else "jpg", data)
        for wnid, part in train_images().items()
        for stem, data in part.items()
    }


def expected_val() -> dict[str, tuple[int, str, bytes]]:
    images = val_images().items()
    return {stem: (SORTED.index(wnid), "jpg", data) for (stem, data), wnid in zip(images, TRUTH, strict=True)}


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with the three archives under their official names; tests must not change it."""
    root = tmp_path_factory.mktemp("imagenet")
    write_train(root / "ILSVRC2012_img_train.tar", train_images())
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(jpegs(val_images())))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(make_devkit(TRUTH, WNIDS), compression="gz"))
    return root


@pytest.mark.parametrize("built_by", ["gnu tar", "gnu", "ustar", "pax"])
def test_labels_counts_and_bytes_from_the_archives(tmp_path, run, archives, built_by):
    train = tmp_path / "ILSVRC2012_img_train.tar"
    if built_by == "gnu tar":
        write_train_by_gnu_tar(train, train_images())
    else:
        write_train(train, train_images(), getattr(tarfile, f"{built_by.upper()}_FORMAT"))
    options = ("--val", archives / "ILSVRC2012_img_val.tar", "--val-labels", archives / "ILSVRC2012_devkit_t12.tar.gz")
    code, said, error = run("prepare", "imagenet-tar", train, tmp_path / "out", *options)
    assert code == 0, error
    assert "4 classes · 22 train / 6 val images" in said and "4 classes, not ILSVRC2012's 1,000" in said
    assert contents(tmp_path / "out", "train") == expected_train()
    assert contents(tmp_path / "out", "val") == expected_val()
    assert run("verify", tmp_path / "out", "--decode")[0] == 0
    classes = json.loads((tmp_path / "out" / "classes.json").read_bytes())
    assert [entry["wnid"] for entry in classes] == list(SORTED)
    assert classes[0]["name"] == "tench, Tinca tinca"


def test_archives_by_their_official_names_in_a_folder(tmp_path, run, archives, tree):
    assert run("prepare", "imagenet-tar", archives, tmp_path / "a", "--workers", 2)[0] == 0
    assert contents(tmp_path / "a", "val") == expected_val()
    # elsewhere, with the devkit unpacked: the same shards
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (tmp_path / name).hardlink_to(archives / name)
    with tarfile.open(archives / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    assert run("prepare", "imagenet-tar", tmp_path, tmp_path / "b")[0] == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    code, said, _ = run("prepare", "imagenet-tar", archives / "ILSVRC2012_img_train.tar", tmp_path / "c")
    assert code == 0 and "no validation archive, so no validation split" in said


def as_pairs(name: str, label: dict[str, str]) -> str:
    stems = random.Random(0).sample(list(val_images()), len(TRUTH))  # in no order
    wnids = dict(zip(val_images(), TRUTH, strict=True))
    return "".join(f"{name.format(stem)} {label[wnids[stem]]}\n" for stem in stems)


def write_form(form: str, root: Path) -> Path:
    """One set of labels in one of the forms that exist."""
    devkit = make_devkit(TRUTH, WNIDS)
    path = root / "labels"
    same = {wnid: wnid for wnid in WNIDS}
    if form == "devkit, plain tar":
        path.write_bytes(tar_of(devkit))
    elif form == "devkit, compressed":
        path.write_bytes(tar_of(devkit, compression="gz"))
    elif form.startswith("devkit folder"):
        inside = {"data": "data", "itself": "", "above": "ILSVRC2012_devkit_t12/data"}[form.split()[-1]]
        (path / inside).mkdir(parents=True)
        for name, data in devkit.items():
            (path / inside / Path(name).name).write_bytes(data)
    elif form == "WNID folders":
        for stem, wnid in zip(val_images(), TRUTH, strict=True):
            (path / wnid).mkdir(parents=True, exist_ok=True)
            (path / wnid / f"{stem}.JPEG").touch()
        (path / "n01440764" / ".DS_Store").touch()
    elif form == "file and WNID":
        path.write_text(as_pairs("{}.JPEG", same))
    elif form == "path and WNID, Windows":
        path.write_bytes(b"\xef\xbb\xbf" + as_pairs("val/{}.JPEG", same).replace("\n", "\r\n").encode())
    elif form == "Kaggle":
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("ImageId", "PredictionString"))
            for line in as_pairs("{}", same).splitlines():
                stem, wnid = line.split()
                rows.writerow((stem, f"{wnid} 85 1 499 272 {wnid} 3 4 5 6 "))
    elif form == "WNID per line":
        path.write_text("\n".join(TRUTH))
    return path


FORMS = [
    *("devkit, plain tar", "devkit, compressed", "devkit folder data", "devkit folder itself", "devkit folder above"),
    *("WNID folders", "file and WNID", "path and WNID, Windows", "Kaggle", "WNID per line"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels(tmp_path, archives, form):
    labels = write_form(form, tmp_path)
    source = ImageNetTar(archives / "ILSVRC2012_img_train.tar", archives / "ILSVRC2012_img_val.tar", labels)
    found = {entry.key: (entry.label, "jpg", source.read(entry.locator)) for entry in source.entries("val")}
    assert found == expected_val()


def test_source_is_small_for_the_workers_and_names_places(archives):
    source = ImageNetTar(
        archives / "ILSVRC2012_img_train.tar",
        archives / "ILSVRC2012_img_val.tar",
        archives / "ILSVRC2012_devkit_t12.tar.gz",
    )
    entries = list(source.entries("train"))
    assert source.read(entries[0].locator) == train_images()["n01440764"]["n01440764_0"]  # and now a file is open
    data = pickle.dumps(source)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert [copy.read(entry.locator) for entry in entries] == [source.read(entry.locator) for entry in entries]
    assert copy.place(entries[0].locator) == f"{archives}/ILSVRC2012_img_train.tar: n01440764.tar/n01440764_0.JPEG"
    assert str(archives) not in entries[0].locator
    with pytest.raises(UserError, match=r"n01440764\.tar/n01440764_0\.JPEG: cut off after 0 of 10 bytes"):
        copy.read("train:99999999:10:n01440764.tar/n01440764_0.JPEG")


def test_names_from_the_devkit_where_timm_has_none(tmp_path, run):
    wnids = ("n99999999", "n01440764")
    train = write_train(tmp_path / "t.tar", {wnid: {f"{wnid}_1": encode(noise(1))} for wnid in wnids})
    (tmp_path / "v.tar").write_bytes(tar_of(jpegs(val_images(2))))
    (tmp_path / "d.tgz").write_bytes(tar_of(make_devkit(wnids, wnids), compression="gz"))
    options = ("--val", tmp_path / "v.tar", "--val-labels", tmp_path / "d.tgz")
    assert run("prepare", "imagenet-tar", train, tmp_path / "out", *options)[0] == 0
    assert json.loads((tmp_path / "out" / "classes.json").read_bytes()) == [
        {"wnid": "n01440764", "name": "tench, Tinca tinca"},
        {"wnid": "n99999999", "name": "n99999999 as a word, its synonym"},
    ]


def test_part_of_the_classes_takes_its_part_of_the_validation_images(tmp_path, run, archives):
    part = {wnid: train_images()[wnid] for wnid in ("n03710637", "n01751748")}
    train = write_train(tmp_path / "train.tar", part)
    options = ("--val", archives / "ILSVRC2012_img_val.tar", "--val-labels", archives / "ILSVRC2012_devkit_t12.tar.gz")
    code, said, error = run("prepare", "imagenet-tar", train, tmp_path / "out", *options)
    assert code == 0, error
    assert "left out 2 validation images of classes without training images" in said
    old = {1: 0, 3: 1}
    assert contents(tmp_path / "out", "val") == {
        key: (old[label], kind, data) for key, (label, kind, data) in expected_val().items() if label in old
    }


def test_hidden_files_are_skipped_and_folders_inside_accepted(tmp_path, run):
    images = jpegs(train_images()["n01440764"])
    inner = {
        "n01440764/._n01440764_0.JPEG": b"Mac OS X",
        **{f"n01440764/{name}": data for name, data in images.items()},
    }
    train = tmp_path / "train.tar"
    train.write_bytes(tar_of({"./._n01440764.tar": b"Mac OS X", "./n01440764.tar": tar_of(inner)}))
    code, said, error = run("prepare", "imagenet-tar", train, tmp_path / "out")
    assert code == 0 and "skipped 1 hidden files" in said, error
    assert set(contents(tmp_path / "out", "train")) == set(train_images()["n01440764"])


# the 1,000 classes


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """All 1,000 classes with an image each, and a validation image of each class in a mixed order."""
    root = tmp_path_factory.mktemp("thousand")
    package = Path(importlib.util.find_spec("timm").origin).parent
    wnids = (package / "data/_info/imagenet_synsets.txt").read_text().split()
    image = encode(noise(5))
    write_train(root / "ILSVRC2012_img_train.tar", {wnid: {f"{wnid}_7": image} for wnid in wnids})
    truth = [wnid for wnid in wnids if wnid != "n01751748"]
    random.Random(1).shuffle(truth)
    truth.insert(0, "n01751748")
    (root / "wnids.txt").write_text("\n".join(truth))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 1001)]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict.fromkeys(names, image)))
    (root / "caffe.txt").write_text(
        "".join(f"{name} {wnids.index(wnid)}\n" for name, wnid in zip(names, truth, strict=True))
    )
    numbers = [*range(1, 1001)]
    random.Random(2).shuffle(numbers)
    swap = numbers.index(490)
    numbers[65], numbers[swap] = numbers[swap], numbers[65]
    devkit = make_devkit(tuple(truth), tuple(wnids), numbers)
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit, compression="gz"))
    ground_truth = devkit["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"]
    assert ground_truth.startswith(b"490\n")
    (root / "ground_truth.txt").write_bytes(ground_truth)
    (root / "devkit_ids.txt").write_text(
        "".join(f"{name} {int(number) - 1}\n" for name, number in zip(names, ground_truth.split(), strict=True))
    )
    return root


def thousand_labels(root: Path, labels: str) -> dict[str, int]:
    source = ImageNetTar(
        root / "ILSVRC2012_img_train.tar", root / "ILSVRC2012_img_val.tar", root / labels, incomplete=True
    )
    return {entry.key: entry.label for entry in source.entries("val")}


def test_class_numbers_are_positions_in_the_sorted_wnids(thousand):
    by_number = {line.split(".")[0]: int(line.split()[1]) for line in (thousand / "caffe.txt").open()}
    assert by_number["ILSVRC2012_val_00000001"] == 65
    assert thousand_labels(thousand, "caffe.txt") == by_number
    assert thousand_labels(thousand, "wnids.txt") == by_number
    assert thousand_labels(thousand, "ILSVRC2012_devkit_t12.tar.gz") == by_number


def test_numbers_that_count_otherwise_are_refused(thousand, tmp_path):
    with pytest.raises(UserError, match=r"devkit_ids\.txt: says that ILSVRC2012_val_00000001 is n\d+ \(class 489\)"):
        thousand_labels(thousand, "devkit_ids.txt")
    with pytest.raises(UserError, match=r"ground_truth\.txt: holds numbers alone"):
        thousand_labels(thousand, "ground_truth.txt")
    path = tmp_path / "from_1.txt"
    lines = [line.split() for line in (thousand / "caffe.txt").open()]
    path.write_text("".join(f"{name} {int(number) + 1}\n" for name, number in lines))
    with pytest.raises(UserError, match="labels run from 1 to 1000, as if counted from 1"):
        thousand_labels(thousand, str(path))
    path.write_text(
        "".join(f"{name} {number}\n" for (name, _), (_, number) in zip(lines, reversed(lines), strict=True))
    )
    with pytest.raises(UserError, match=r"from_1\.txt: says that ILSVRC2012_val_00000001 is"):
        thousand_labels(thousand, str(path))
    path.write_text((thousand / "wnids.txt").read_text().replace("n01440764", "n00000001"))
    with pytest.raises(UserError, match="label n00000001 is none of ILSVRC2012's 1,000 classes"):
        thousand_labels(thousand, str(path))


def test_numbers_without_the_image_that_tells_how_they_count_are_refused(thousand, tmp_path):
    lines = [line.split() for line in (thousand / "caffe.txt").open()]
    for shift in (0, 1):  # none of them is 999, so that those counted from 1 are in range
        kept = [(name, int(number) + shift) for name, number in lines[1:] if int(number) < 999]
        (tmp_path / "part.txt").write_text("".join(f"{name} {number}\n" for name, number in kept))
        with pytest.raises(UserError, match=r"part\.txt: has class numbers, but none for ILSVRC2012_val_00000001"):
            thousand_labels(thousand, str(tmp_path / "part.txt"))


def test_totals_of_the_whole_set(thousand, refuse, run, monkeypatch, tmp_path):
    archives = (thousand / "ILSVRC2012_img_train.tar", thousand / "ILSVRC2012_img_val.tar")

    def refused(split: str, labels: str = "wnids.txt") -> str:
        with pytest.raises(UserError) as error:
            list(ImageNetTar(*archives, thousand / labels).entries(split))
        return str(error.value)

    what = "1,000 {} images of the 1,000 classes; the whole set has {}"
    assert f"ILSVRC2012_img_train.tar: holds {what.format('train', '1,281,167')}" in refused("train")
    assert f"ILSVRC2012_img_val.tar: holds {what.format('val', '50,000')}" in refused("val")
    assert "accept it with --incomplete" in refuse("prepare", "imagenet-tar", thousand, tmp_path / "out")
    code, said, _ = run("prepare", "imagenet-tar", thousand, tmp_path / "out", "--incomplete")
    assert code == 0 and what.format("train", "1,281,167") in said and what.format("val", "50,000") in said

    # take this for the whole set: it then passes, and labels that are not even over the classes do not
    for split in ("train", "val"):
        monkeypatch.setitem(imagenet_tar.TOTALS, split, 1000)
    assert "ILSVRC2012_img_val.tar: 1 images of class n01440764; every class has 50" in refused("val")
    monkeypatch.setattr(imagenet_tar, "VAL_PER_CLASS", 1)
    source = ImageNetTar(*archives, thousand / "wnids.txt")
    assert [len(list(source.entries(split))) for split in source.splits] == [1000, 1000]
    assert source.notes() == ()
    wnids = (thousand / "wnids.txt").read_text().split()
    (tmp_path / "uneven.txt").write_text("\n".join([*wnids[:-1], wnids[-2]]))
    assert "every class has 1" in refused("val", str(tmp_path / "uneven.txt"))


# refusals


def test_wrong_archives(archives, tmp_path, refuse):
    train, val = archives / "ILSVRC2012_img_train.tar", archives / "ILSVRC2012_img_val.tar"
    image = encode(noise(1))

    def refused(*arguments: object) -> str:
        return refuse("prepare", "imagenet-tar", *arguments, tmp_path / "out")

    def tar(files: dict[str, bytes], compression: str = "") -> Path:
        path = tmp_path / "odd.tar"
        path.write_bytes(tar_of(files, compression=compression))
        return path

    labels = ("--val-labels", archives / "ILSVRC2012_devkit_t12.tar.gz")
    assert "no such file" in refused(tmp_path / "absent.tar")
    assert f"{val}: holds validation images" in refused(val)
    assert "holds test images" in refused(tar({"test/ILSVRC2012_test_00000001.JPEG": image}))
    assert "holds images (n01440764/n01440764_1.JPEG)" in refused(tar({"n01440764/n01440764_1.JPEG": image}))
    assert "readme.txt is no tar of a class" in refused(tar({"readme.txt": b"hello"}))
    assert "holds no tars" in refused(tar({}))
    assert "two tars of one class" in refused(tar({"n01440764.tar": b"", "a/n01440764.tar": b""}))
    for compression, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
        assert f"compressed with {name}" in refused(tar({"n01440764.tar": b""}, compression))
    assert "not a tar header" in refused(tar({"n01440764.tar": random.Random(0).randbytes(2000)}))
    assert "n01440764.tar: holds no images" in refused(tar({"n01440764.tar": tar_of({})}))
    assert "n01440764.tar/readme.txt: not an image" in refused(tar({"n01440764.tar": tar_of({"readme.txt": b"1"})}))
    assert "n01440764.tar/a.JPEG: the file is empty" in refused(tar({"n01440764.tar": tar_of({"a.JPEG": b""})}))
    message = refused(tar({"n01440764.tar": tar_of({"a.JPEG": b"<html>404</html>"})}))
    assert "odd.tar: n01440764.tar/a.JPEG" in message and "not an image" in message
    assert "no ILSVRC2012_img_train.tar" in refused(tmp_path)
    assert f"{train}: holds tars (n02105855.tar)" in refused(train, "--val", train, *labels)
    assert "holds test images" in refused(train, "--val", tar({"ILSVRC2012_test_00000001.JPEG": image}), *labels)
    assert "holds no images" in refused(train, "--val", tar({}), *labels)
    assert "compressed with gzip" in refused(train, "--val", tar(jpegs(val_images()), "gz"), *labels)
    assert "this archive holds no labels" in refused(train, "--val", val)
    assert "there is no validation archive" in refused(train, *labels)
    assert not (tmp_path / "out" / "index.json").exists()


def test_labels_and_images_must_be_the_same_ones(archives, tmp_path, refuse, run):
    def prepare(command, images: dict[str, bytes], truth: tuple[str, ...], *options: str):
        (tmp_path / "val.tar").write_bytes(tar_of(jpegs(images)))
        (tmp_path / "wnids.txt").write_text("\n".join(truth))
        arguments = ("--val", tmp_path / "val.tar", "--val-labels", tmp_path / "wnids.txt", *options)
        return command("prepare", "imagenet-tar", archives / "ILSVRC2012_img_train.tar", tmp_path / "out", *arguments)

    message = prepare(refuse, val_images(), TRUTH[:-1])
    assert "val.tar: ILSVRC2012_val_00000006.JPEG: has no label in" in message
    message = prepare(refuse, val_images(5), TRUTH)
    assert "val.tar: 1 images that" in message and "The first is ILSVRC2012_val_00000006" in message
    code, said, _ = prepare(run, val_images(5), TRUTH, "--incomplete")
    assert code == 0 and "1 labels have no validation image" in said
    message = prepare(refuse, val_images(), ("n00000001",) * 6)
    assert "none of its labels is a class of the training images" in message


def spoiled_devkit(**files: bytes | None) -> bytes:
    devkit = make_devkit(TRUTH, WNIDS)
    for name, data in files.items():
        path = (
            f"ILSVRC2012_devkit_t12/data/{'meta.mat' if name == 'meta' else 'ILSVRC2012_validation_ground_truth.txt'}"
        )
        if data is None:
            del devkit[path]
        else:
            devkit[path] = data
    return tar_of(devkit, compression="gz")


def linked_devkit() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("data/meta.mat")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    return buffer.getvalue()


def mat(value: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": value})
    return buffer.getvalue()


BAD_LABELS = {
    "empty": (lambda: b"\n", "is empty"),
    "binary": (lambda: bytes(range(256)), "neither text nor a devkit"),
    "numbers alone": (lambda: b"490\n361\n171\n", "holds numbers alone"),
    "class numbers for a part of the classes": (
        lambda: as_pairs("{}", dict.fromkeys(WNIDS, "1")),
        "labels are class num",
    ),
    "names of classes": (lambda: "tench\n", "line 1: 'tench' is no WNID"),
    "mixed": (lambda: "ILSVRC2012_val_00000001 n01440764\nILSVRC2012_val_00000002 5\n", "line 2: label '5' is no WNID"),
    "three words": (lambda: "a n01440764\nb n01440764 1\n", "line 2: is not 'file label'"),
    "twice": (lambda: "x/a.JPEG n01440764\ny/a.png n01440764\n", "line 2: a has a label already, n01440764"),
    "csv without labels": (lambda: "ImageId,PredictionString\n", "has a header and no labels"),
    "csv with a gap": (lambda: "ImageId,PredictionString\na,\n", "line 2: is not 'image,label'"),
    "other tar": (lambda: tar_of({"a.JPEG": b"1"}), "has no data/meta.mat"),
    "devkit without meta": (lambda: spoiled_devkit(meta=None), "has no data/meta.mat"),
    "devkit without ground truth": (
        lambda: spoiled_devkit(truth=None),
        "has no data/ILSVRC2012_validation_ground_truth",
    ),
    "unknown id": (lambda: spoiled_devkit(truth=b"1\n2\n5\n"), "line 3: '5' is no ILSVRC2012_ID"),
    "id of an inner synset": (lambda: spoiled_devkit(truth=b"1001\n"), "line 1: '1001' is no ILSVRC2012_ID"),
    "no ids": (lambda: spoiled_devkit(truth=b""), "is empty"),
    "meta of text": (lambda: spoiled_devkit(meta=b"synsets = 5" * 20), "not the devkit's table of synsets"),
    "meta of something else": (lambda: spoiled_devkit(meta=mat(np.eye(3))), "not the devkit's table of synsets"),
    "truncated meta": (
        lambda: spoiled_devkit(meta=make_devkit(TRUTH, WNIDS)["ILSVRC2012_devkit_t12/data/meta.mat"][:-60]),
        "not the devkit's table of synsets",
    ),
    "truncated archive": (lambda: spoiled_devkit()[:-30], "damaged"),
    "archive with a link": (linked_devkit, "data/meta.mat is a symbolic link"),
    "archive bomb": (lambda: tar_of({"a": bytes(65 << 20)}, compression="gz"), "unpacks to more than 64 MiB"),
}


@pytest.mark.parametrize("what", BAD_LABELS)
def test_bad_labels(archives, tmp_path, refuse, what):
    make, message = BAD_LABELS[what]
    data = make()
    path = tmp_path / "labels"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    options = ("--val", archives / "ILSVRC2012_img_val.tar", "--val-labels", path)
    said = refuse("prepare", "imagenet-tar", archives / "ILSVRC2012_img_train.tar", tmp_path / "out", *options)
    assert said.startswith(f"shards: {path}") and message in said
    assert not list(tmp_path.glob("out/*"))


def test_bad_label_folders(archives, tmp_path):
    def refused() -> str:
        with pytest.raises(UserError) as error:
            ImageNetTar(archives / "ILSVRC2012_img_train.tar", archives / "ILSVRC2012_img_val.tar", tmp_path / "labels")
        return str(error.value)

    assert "labels: cannot be read: No such file" in refused()
    (tmp_path / "labels").mkdir()
    assert "neither a devkit (meta.mat) nor WNID folders" in refused()
    (tmp_path / "labels" / "n01440764").mkdir()
    assert "WNID folders are empty" in refused()
    (tmp_path / "labels" / "tench").mkdir()
    assert "labels/tench: is no WNID" in refused()
    for name, data in make_devkit(TRUTH, WNIDS).items():
        (tmp_path / "labels" / Path(name).name).write_bytes(data)
    assert "holds a devkit and WNID folders" in refused()


def test_devkit_without_scipy_says_what_to_install(archives, tmp_path, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install 'onehour[imagenet]'" in refuse("prepare", "imagenet-tar", archives, tmp_path / "out")


def test_published_md5s(archives, tmp_path, refuse, run, monkeypatch):
    official = dict(imagenet_archives.OFFICIAL)
    # torchvision's table, read as text: its import takes seconds
    published = Path(importlib.util.find_spec("torchvision").origin).with_name("datasets") / "imagenet.py"
    for kind, (name, digest) in official.items():
        assert f'"{kind}": ("{name}", "{digest}")' in published.read_text()
    message = refuse("prepare", "imagenet-tar", archives, tmp_path / "out", "--md5")
    assert f"ILSVRC2012_img_train.tar has {official['train'][1]}" in message
    for kind, (name, _) in official.items():
        digest = hashlib.md5((archives / name).read_bytes()).hexdigest()
        monkeypatch.setitem(imagenet_archives.OFFICIAL, kind, (name, digest))
    code, said, _ = run("prepare", "imagenet-tar", archives, tmp_path / "out", "--md5")
    assert code == 0 and "the archives have the published MD5s" in said
    monkeypatch.setitem(imagenet_archives.OFFICIAL, "devkit", official["devkit"])
    assert "ILSVRC2012_devkit_t12.tar.gz: MD5 is" in refuse(
        "prepare", "imagenet-tar", archives, tmp_path / "b", "--md5"
    )
