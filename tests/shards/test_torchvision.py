"""Data sets of torchvision, written here in their own formats on disk and read by torchvision's own classes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.cli import main
from shards.errors import UserError
from shards.index import load_split
from shards.sources.torchvision import Torchvision
from shards.sources.torchvision_class import cannot_open, open_dataset
from shards.sources.torchvision_items import check_same_picture, locate_picture, noting_pictures

datasets = pytest.importorskip("torchvision.datasets")


def samples(out: Path, name: str) -> dict[str, tuple[int, bytes]]:
    """Label and bytes by key."""
    split = load_split(out, name)
    found = {}
    for i, sample in enumerate(split.samples):
        with split.shards[sample["shard"]].path.open("rb") as file:
            data = os.pread(file.fileno(), int(sample["size"]), int(sample["offset"]))
        found[split.key(i)] = (int(sample["label"]), data)
    assert len(found) == len(split)
    return found


def class_names(out: Path) -> list[str]:
    return [entry.get("wnid") or entry["name"] for entry in json.loads((out / "classes.json").read_text())]


def record(out: Path) -> dict:
    return json.loads((out / "index.json").read_text())["onehour"]


def pixels_of(data: bytes) -> np.ndarray:
    assert data.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(data)))


# ---- arrays


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    """The files of MNIST: magic number, shape, bytes (yann.lecun.com/exdb/mnist)."""
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
        struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes()
    )


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    root = tmp_path_factory.mktemp("fashion")
    random = np.random.default_rng(3)
    parts = {}
    for split, prefix, count in (("train", "train", 50), ("val", "t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        parts[split] = images, random.permutation(np.arange(count) % 10).astype(np.uint8)
        write_idx(root / "FashionMNIST" / "raw", prefix, *parts[split])
    return root, parts


@pytest.fixture(scope="module")
def fashion_out(fashion, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fashion_out") / "out"
    assert main(["prepare", "torchvision:FashionMNIST", str(fashion[0]), str(out), "--workers", "1"]) == 0
    return out


def test_fashion_mnist(fashion, fashion_out):
    for split, (images, labels) in fashion[1].items():
        found = samples(fashion_out, split)
        assert found.keys() == {f"{split}_{i:06d}" for i in range(len(images))}
        for i in range(len(images)):
            label, data = found[f"{split}_{i:06d}"]
            assert label == labels[i]
            np.testing.assert_array_equal(pixels_of(data), images[i])
    assert class_names(fashion_out) == list(datasets.FashionMNIST.classes)
    assert record(fashion_out)["source"] == "torchvision:FashionMNIST"
    assert record(fashion_out)["options"] == {"encoding": "png"}


def test_bytes_do_not_depend_on_the_place(fashion, fashion_out, tmp_path, tree, run):
    (tmp_path / "link").symlink_to(fashion[0])
    code, said, _ = run("prepare", "torchvision:FashionMNIST", tmp_path / "link", tmp_path / "out")
    assert code == 0
    assert "reading   torchvision:FashionMNIST   10 classes · 50 train / 20 val images" in said
    assert "written as PNG, without loss" in said
    assert tree(tmp_path / "out") == tree(fashion_out)
    code, said, _ = run("prepare", "torchvision:FashionMNIST", fashion[0], tmp_path / "out")
    assert code == 0 and "nothing to do" in said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(fashion, fashion_out, tmp_path, tree, run, workers):
    code, _, message = run("prepare", "torchvision:FashionMNIST", fashion[0], tmp_path / "out", "--workers", workers)
    assert code == 0, message
    assert tree(tmp_path / "out") == tree(fashion_out)


def test_the_source_pickles_small_and_a_copy_reads_the_same(fashion):
    source = Torchvision("FashionMNIST", fashion[0])
    entries = list(source.entries("val"))
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    for entry in entries:
        assert copy.read(entry.locator) == source.read(entry.locator)
        assert len(copy.read(entry.locator)) == entry.size


def test_pictures_that_change_while_they_are_written_are_refused(fashion, tmp_path):
    shutil.copytree(fashion[0], tmp_path / "in")
    source = Torchvision("FashionMNIST", tmp_path / "in")
    entry = next(source.entries("train"))
    images, labels = fashion[1]["train"]
    write_idx(tmp_path / "in" / "FashionMNIST" / "raw", "train", images ^ 1, labels)
    open_dataset.cache_clear()  # another process reads the new file
    with pytest.raises(UserError, match="FashionMNIST: train item 0: is not the picture that was listed"):
        source.read(entry.locator)


def test_png_files_hold_their_pixels_undeflated(fashion, fashion_out):
    """So that no build of zlib has a say: one block of RFC 1951 that is stored as it is."""
    _, data = samples(fashion_out, "train")["train_000000"]
    start = data.index(b"IDAT") + 4
    stream = data[start : start + struct.unpack(">I", data[start - 8 : start - 4])[0]]
    rows = zlib.decompress(stream)
    assert len(rows) == 28 * (1 + 28), "a filter's number before each row"
    assert stream[2] == 1, "the last block, of type 00"
    assert stream[3:7] == struct.pack("<2H", len(rows), 0xFFFF - len(rows)) and stream[7:-4] == rows


def test_other_pixels_under_the_same_labels_are_other_data(fashion, fashion_out, tmp_path, refuse, tree):
    shutil.copytree(fashion_out, tmp_path / "out")
    images, labels = fashion[1]["train"]
    shutil.copytree(fashion[0], tmp_path / "in")
    changed = images.copy()
    changed[7, 3, 3] ^= 1
    write_idx(tmp_path / "in" / "FashionMNIST" / "raw", "train", changed, labels)
    message = refuse("prepare", "torchvision:FashionMNIST", tmp_path / "in", tmp_path / "out")
    assert "splits.train.listing_sha256" in message
    assert tree(tmp_path / "out") == tree(fashion_out)


def test_emnist_needs_its_argument(tmp_path, run, refuse):
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (30, 28, 28), np.uint8)
    labels = (np.arange(30) % 26 + 1).astype(np.uint8)
    write_idx(tmp_path / "EMNIST" / "raw", "emnist-letters-train", images, labels)
    write_idx(tmp_path / "EMNIST" / "raw", "emnist-letters-test", images[:9], labels[:9])
    message = refuse("prepare", "torchvision:EMNIST", tmp_path, tmp_path / "out")
    assert "needs the argument split" in message
    assert "--arg split=VALUE: byclass, bymerge, balanced, letters, digits, mnist" in message
    assert "Unknown value" in refuse("prepare", "torchvision:EMNIST", tmp_path, tmp_path / "out", "--arg", "split=x")
    options = ("--arg", "split=letters")
    code, _, message = run("prepare", "torchvision:EMNIST", tmp_path, tmp_path / "out", *options)
    assert code == 0, message
    assert class_names(tmp_path / "out") == ["N/A", *"abcdefghijklmnopqrstuvwxyz"]
    found = samples(tmp_path / "out", "train")
    assert [found[f"train_{i:06d}"][0] for i in range(30)] == labels.tolist()
    assert len(samples(tmp_path / "out", "val")) == 9
    assert record(tmp_path / "out")["options"] == {"encoding": "png", "arguments": {"split": "letters"}}


def test_cifar10(tmp_path, run, refuse, monkeypatch):
    """The pickled batches of CIFAR-10; the sums in torchvision's list are replaced by those of the files made here."""
    random = np.random.default_rng(7)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    written: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "val": []}
    sums = {}
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = random.integers(0, 256, (12, 3, 32, 32), np.uint8)
        labels = random.integers(0, 10, 12).tolist()
        document = pickle.dumps({"data": data.reshape(12, -1), "labels": labels})
        (folder / file).write_bytes(document)
        sums[file] = hashlib.md5(document).hexdigest()
        split = "val" if file == "test_batch" else "train"
        written[split] += zip(data.transpose(0, 2, 3, 1), labels, strict=True)
    meta = pickle.dumps({"label_names": names})
    (folder / "batches.meta").write_bytes(meta)
    message = refuse("prepare", "torchvision:CIFAR10", tmp_path, tmp_path / "out")
    assert "Dataset not found or corrupted" in message, "torchvision compares the sums before it loads a pickle"
    for attribute in ("train_list", "test_list"):
        files = [[name, sums[name]] for name, _ in getattr(datasets.CIFAR10, attribute)]
        monkeypatch.setattr(datasets.CIFAR10, attribute, files)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", hashlib.md5(meta).hexdigest())
    code, _, message = run("prepare", "torchvision:CIFAR10", tmp_path, tmp_path / "out")
    assert code == 0, message
    assert class_names(tmp_path / "out") == names
    for split, part in written.items():
        found = samples(tmp_path / "out", split)
        assert len(found) == len(part) == {"train": 60, "val": 12}[split]
        for i, (pixels, label) in enumerate(part):
            assert found[f"{split}_{i:06d}"][0] == label
            np.testing.assert_array_equal(pixels_of(found[f"{split}_{i:06d}"][1]), pixels)


# ---- files


def write_folders(root: Path, make_image, classes, count: int, extension: str = "jpg", first: int = 0) -> dict:
    """``root/<class>/<i>.<extension>``: bytes and label by path without extension."""
    written = {}
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count + label):
            number = first + 100 * label + i
            data = make_image(number, "PNG" if number % 4 == 0 or extension == "png" else "JPEG")
            (root / name / f"{name}_{i}.{extension}").write_bytes(data)
            written[f"{name}_{name}_{i}"] = (label, data)
    return written


def with_prefix(prefix: str, written: dict) -> dict:
    return {f"{prefix}_{key}": value for key, value in written.items()}


def test_sets_of_files_keep_their_bytes_and_the_valid_split_is_val(tmp_path, run, make_image):
    written = {
        split: with_prefix(
            f"country211_{split}",
            write_folders(tmp_path / "country211" / split, make_image, ("AD", "AE", "AF"), 3, first=1000 * n),
        )
        for n, split in enumerate(("train", "valid", "test"))
    }
    code, said, message = run("prepare", "torchvision:Country211", tmp_path, tmp_path / "out")
    assert code == 0, message
    assert "written as PNG" not in said
    assert samples(tmp_path / "out", "train") == written["train"]
    assert samples(tmp_path / "out", "val") == written["valid"]
    assert samples(tmp_path / "out", "test") == written["test"]
    assert class_names(tmp_path / "out") == ["AD", "AE", "AF"]
    assert record(tmp_path / "out")["options"] == {}


def test_a_set_without_splits_and_one_of_samples(tmp_path, run, make_image):
    written = write_folders(tmp_path / "eurosat" / "2750", make_image, ("Forest", "River"), 8)
    assert run("prepare", "torchvision:EuroSAT", tmp_path, tmp_path / "euro")[0] == 0
    assert samples(tmp_path / "euro", "train") == with_prefix("eurosat_2750", written)
    assert list(record(tmp_path / "euro")["splits"]) == ["train"]
    for folder in ("train", "valid", "test"):
        written = write_folders(
            tmp_path / "rendered-sst2" / folder, make_image, ("negative", "positive"), 4, "png", first=len(folder)
        )
    assert run("prepare", "torchvision:RenderedSST2", tmp_path, tmp_path / "sst2")[0] == 0
    assert samples(tmp_path / "sst2", "test") == with_prefix("rendered-sst2_test", written)
    assert list(record(tmp_path / "sst2")["splits"]) == ["train", "val", "test"]


def test_pictures_opened_by_path_and_classes_without_names(tmp_path, run):
    """GTSRB: PPM files, labels from folder names and from a table, no class names."""
    random = np.random.default_rng(1)

    def ppm() -> bytes:
        return b"P6\n5 4\n255\n" + random.bytes(60)

    expected = {"train": {}, "val": {}}
    for label in range(3):
        folder = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for i in range(4):
            data = ppm()
            (folder / f"0000{i}.ppm").write_bytes(data)
            expected["train"][f"gtsrb_GTSRB_Training_{label:05d}_0000{i}"] = (label, data)
    folder = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    lines = ["Filename;ClassId"]
    for i, label in enumerate([2, 0, 3]):
        data = ppm()
        (folder / f"{i:05d}.ppm").write_bytes(data)
        expected["val"][f"gtsrb_GTSRB_Final_Test_Images_{i:05d}"] = (label, data)
        lines.append(f"{i:05d}.ppm;{label}")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines))
    code, _, message = run("prepare", "torchvision:GTSRB", tmp_path, tmp_path / "out")
    assert code == 0, message
    assert {split: samples(tmp_path / "out", split) for split in expected} == expected
    assert class_names(tmp_path / "out") == ["0", "1", "2", "3"]


def test_wordnet_ids_name_the_classes_of_imagenette(tmp_path, run, make_image):
    wnids = sorted(datasets.Imagenette._WNID_TO_CLASS)
    for split in ("train", "val"):
        write_folders(tmp_path / "imagenette2" / split, make_image, wnids, 1, "JPEG")
    code, _, message = run("prepare", "torchvision:Imagenette", tmp_path, tmp_path / "out")
    assert code == 0, message
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes[0] == {"wnid": "n01440764", "name": "tench, Tinca tinca"}
    assert [entry["wnid"] for entry in classes] == wnids


def test_splits_named_by_the_user(tmp_path, run, refuse, make_image):
    written = write_folders(tmp_path / "country211" / "test", make_image, ("AD", "AE"), 3)
    assert "train" in refuse("prepare", "torchvision:Country211", tmp_path, tmp_path / "out")
    options = ("--split", "train:split=test")
    assert run("prepare", "torchvision:Country211", tmp_path, tmp_path / "out", *options)[0] == 0
    assert samples(tmp_path / "out", "train") == with_prefix("country211_test", written)
    assert record(tmp_path / "out")["options"] == {"splits": {"train": {"split": "test"}}}
    for wrong in ("train", "train:split", "Train 1:split=test", "train:=test"):
        message = refuse("prepare", "torchvision:Country211", tmp_path, tmp_path / "o", "--split", wrong)
        assert f"--split {wrong}: must be SPLIT:NAME=VALUE" in message


def test_a_test_split_without_labels_is_left_out(tmp_path, run, monkeypatch):
    """FER2013 in the form of the competition: the test file has no emotions."""
    folder = tmp_path / "fer2013"
    folder.mkdir()
    random = np.random.default_rng(2)
    pictures = random.integers(0, 256, (9, 48 * 48))
    text = ["emotion,pixels", *(f"{i % 7},{' '.join(map(str, row))}" for i, row in enumerate(pictures))]
    (folder / "train.csv").write_text("\n".join(text))
    (folder / "test.csv").write_text("\n".join(["pixels", " ".join(map(str, pictures[0]))]))
    resources = dict(datasets.FER2013._RESOURCES)
    for split in ("train", "test"):
        data = (folder / f"{split}.csv").read_bytes()
        resources[split] = (f"{split}.csv", hashlib.md5(data).hexdigest())
    monkeypatch.setattr(datasets.FER2013, "_RESOURCES", resources)
    code, said, message = run("prepare", "torchvision:FER2013", tmp_path, tmp_path / "out")
    assert code == 0, message
    assert "left out split 'val': its images have no labels" in said
    found = samples(tmp_path / "out", "train")
    np.testing.assert_array_equal(pixels_of(found["train_000008"][1]).ravel(), pictures[8])
    assert list(record(tmp_path / "out")["splits"]) == ["train"]


def test_encoded_bytes_in_memory_are_taken_as_they_are(make_image):
    """As LSUN has them from its database, which needs a package of its own."""
    data = make_image(1)
    with noting_pictures() as noted:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    assert picture.size == (1, 1), "nothing was decoded"
    assert locate_picture("here", (picture, 0), noted) == data
    assert Image.open(io.BytesIO(data)).size == (12, 12), "Pillow is as it was"
    check_same_picture("here", data, Image.open(io.BytesIO(data)))
    with pytest.raises(UserError, match="here: shows another picture"):
        check_same_picture("here", data, Image.open(io.BytesIO(make_image(2))))


# ---- mistakes


def test_unknown_classes_get_suggestions(tmp_path, refuse):
    message = refuse("prepare", "torchvision:Cifar10", tmp_path, tmp_path / "out")
    assert "torchvision:Cifar10: no such class" in message and "Did you mean CIFAR10" in message
    assert "There are: CIFAR10" not in message
    assert "There are: " in refuse("prepare", "torchvision:xyzzy", tmp_path, tmp_path / "out")
    for name in ("torchvision", "torchvision:"):
        message = refuse("prepare", name, tmp_path, tmp_path / "out")
        assert "say which class" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", ["LSUN", "LSUNClass"])
def test_classes_that_unpickle_what_lies_in_the_working_folder_are_refused(tmp_path, refuse, name):
    message = refuse("prepare", f"torchvision:{name}", tmp_path, tmp_path / "out")
    assert "unpickles" in message and "imagefolder" in message


def test_no_advice_to_load_any_pickle(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Path(), protocol=2))
    torch = pytest.importorskip("torch")
    with pytest.raises(pickle.UnpicklingError) as error:
        torch.load(path, weights_only=True)
    assert "weights_only" in str(error.value)
    message = str(cannot_open("torchvision:MNIST", tmp_path, error.value))
    assert "Weights only load failed" in message and "weights_only" not in message


def test_a_label_too_large_for_a_class_number(tmp_path, refuse):
    for part, names in (("Training/00000", ["0.ppm"]), ("Final_Test/Images", ["0.ppm", "1.ppm"])):
        folder = tmp_path / "gtsrb" / "GTSRB" / part
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(b"P6\n2 2\n255\n" + bytes(12))
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;0\n1.ppm;30000000")
    message = refuse("prepare", "torchvision:GTSRB", tmp_path, tmp_path / "out")
    assert "val item 1: label 30,000,000 is no class number: there are 3 images" in message


def test_a_pipe_among_the_pictures_does_not_hang(tmp_path, refuse, make_image):
    write_pets(tmp_path, make_image)
    path = tmp_path / "oxford-iiit-pet" / "images" / "beagle_2.jpg"
    path.unlink()
    os.mkfifo(path)
    message = refuse("prepare", "torchvision:OxfordIIITPet", tmp_path, tmp_path / "out")
    assert "beagle_2.jpg: not a file" in message
    with pytest.raises(UserError, match="not a file"):
        Torchvision("OxfordIIITPet", tmp_path).read(f"file/{path.relative_to(tmp_path)}")


def test_data_not_there(tmp_path, refuse):
    message = refuse("prepare", "torchvision:MNIST", tmp_path, tmp_path / "out")
    assert "Dataset not found" in message and str(tmp_path) in message and "--download" in message


def test_arguments_are_checked(fashion, tmp_path, refuse):
    def refused(*options):
        return refuse("prepare", "torchvision:FashionMNIST", fashion[0], tmp_path / "out", *options)

    assert "Did you mean train?" in refused("--arg", "trian=True")
    assert "no argument root" in refused("--arg", "root=elsewhere")
    assert "--arg train: must be NAME=VALUE" in refused("--arg", "train")


def write_pets(root: Path, make_image) -> None:
    base = root / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations" / "trimaps").mkdir(parents=True)
    names = [f"{kind}_{i}" for kind in ("Bengal", "beagle") for i in range(3)]
    for number, name in enumerate(names):
        (base / "images" / f"{name}.jpg").write_bytes(make_image(number))
        (base / "annotations" / "trimaps" / f"{name}.png").write_bytes(make_image(number, "PNG"))
    lines = "".join(f"{name} {1 + (name[0] == 'b')} 1 1\n" for name in names)
    for split in ("trainval", "test"):
        (base / "annotations" / f"{split}.txt").write_text(lines)


@pytest.mark.parametrize(
    ("dataset", "options", "reason"),
    [
        ("OxfordIIITPet", ["--arg", "target_types=segmentation"], "the target of an item is Image"),
        ("OxfordIIITPet", ["--arg", "target_types=['category', 'binary-category']"], "the target of an item is tuple"),
        ("FakeData", [], "takes no root folder"),
        ("VisionDataset", [], "cannot open it"),
        ("DatasetFolder", [], "needs the argument loader"),
        ("CocoDetection", [], "needs the argument annFile"),
        ("EuroSAT", ["--arg", "split=train"], "no argument split"),
        ("FER2013", ["--download"], "--download: torchvision cannot download FER2013"),
    ],
)
def test_sets_of_other_kinds_are_refused_with_the_reason(tmp_path, refuse, make_image, dataset, options, reason):
    write_pets(tmp_path, make_image)
    assert reason in refuse("prepare", f"torchvision:{dataset}", tmp_path, tmp_path / "out", *options)
    assert not list(tmp_path.glob("out/*"))


def test_pets_by_category_are_taken(tmp_path, run, make_image):
    write_pets(tmp_path, make_image)
    options = ("--arg", "target_types=['category']")
    code, _, message = run("prepare", "torchvision:OxfordIIITPet", tmp_path, tmp_path / "out", *options)
    assert code == 0, message
    code, said, message = run("prepare", "torchvision:OxfordIIITPet", tmp_path, tmp_path / "out", *options)
    assert code == 0 and "nothing to do" in said, message
    assert class_names(tmp_path / "out") == ["Bengal", "Beagle"]
    assert samples(tmp_path / "out", "train")["oxford-iiit-pet_images_beagle_1"] == (1, make_image(4))


def test_moving_pictures_and_boxes_are_refused(tmp_path, refuse, make_image):
    np.save(tmp_path / "x.npy", np.zeros((20, 4, 64, 64), np.uint8))
    (tmp_path / "MovingMNIST").mkdir()
    (tmp_path / "x.npy").rename(tmp_path / "MovingMNIST" / "mnist_test_seq.npy")
    message = refuse("prepare", "torchvision:MovingMNIST", tmp_path, tmp_path / "out")
    assert "an item is (Tensor of shape" in message
    folder = tmp_path / "Kitti" / "raw" / "training"
    (folder / "image_2").mkdir(parents=True)
    (folder / "label_2").mkdir()
    (folder / "image_2" / "000000.png").write_bytes(make_image(1, "PNG"))
    (folder / "label_2" / "000000.txt").write_text("Car 0.0 0 0 1 2 3 4 1 1 1 1 1 1 0\n")
    message = refuse("prepare", "torchvision:Kitti", tmp_path, tmp_path / "out")
    assert "not a set of labelled images: the target of an item is list" in message


def test_output_inside_an_image_folder_is_refused(tmp_path, refuse, make_image):
    write_folders(tmp_path / "in", make_image, ("a", "b"), 3)
    assert "inside the folder" in refuse("prepare", "torchvision:ImageFolder", tmp_path / "in", tmp_path / "in" / "out")


def test_a_picture_that_is_not_there(tmp_path, refuse, make_image):
    write_pets(tmp_path, make_image)
    (tmp_path / "oxford-iiit-pet" / "images" / "beagle_2.jpg").unlink()
    message = refuse("prepare", "torchvision:OxfordIIITPet", tmp_path, tmp_path / "out")
    assert "beagle_2.jpg: cannot be read" in message
