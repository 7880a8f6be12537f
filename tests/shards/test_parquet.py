"""Parquet files as the Hugging Face hub keeps them: content, columns, splits, staging and its interruption."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from shards.index import load_split
from shards.sources.parquet import Parquet

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["tench, Tinca tinca", "crane", "crane"]  # names repeat, as ImageNet's do


def write_parquet(
    path: Path, rows: list[dict], *, names=CLASSES, label_type=None, compression="snappy", group=4, plain=False
) -> Path:
    """Rows {image, path, label} as `datasets` writes them: struct, metadata, several row groups."""
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [("image", pyarrow.binary() if plain else image_type), ("label", label_type or pyarrow.int64())]
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        schema = schema.with_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    table = pyarrow.Table.from_pylist(
        [
            {
                "image": row["image"] if plain else {"bytes": row["image"], "path": row.get("path")},
                "label": row["label"],
            }
            for row in rows
        ],
        schema=schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression=compression, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def rows(make_image):
    """A maker of rows whose pictures differ by number; every fifth is a PNG named JPEG."""

    def make(start: int, stop: int, label=lambda i: i % 3, path="n0144076{c}_{i}.v1.JPEG") -> list[dict]:
        return [
            {
                "image": make_image(i, "PNG" if i % 5 == 0 else "JPEG"),
                "path": path and path.format(i=i, c=i % 3),
                "label": label(i),
            }
            for i in range(start, stop)
        ]

    return make


@pytest.fixture(scope="module")
def hub(tmp_path_factory, rows) -> tuple[Path, dict[str, list[dict]]]:
    """A download of ImageNet's shape: data/train-… in two files, validation-…, and test-… labelled -1."""
    root = tmp_path_factory.mktemp("hub")
    parts = {
        "train-00000-of-00002": rows(0, 21),
        "train-00001-of-00002": rows(21, 38),
        "validation-00000-of-00001": rows(38, 51),
        "test-00000-of-00001": rows(51, 60, label=lambda i: -1),
    }
    for number, (name, part) in enumerate(parts.items()):
        write_parquet(root / "data" / f"{name}.parquet", part, compression=["snappy", "zstd", "none"][number % 3])
    (root / ".cache" / "huggingface").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "train-x.parquet").write_bytes(b"not finished")
    return root, {"train": [*parts["train-00000-of-00002"], *parts["train-00001-of-00002"]], "val": rows(38, 51)}


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory, start) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start("prepare", "parquet", hub[0], out, "--workers", 1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return out


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


def by_stem(part: list[dict]) -> dict[str, tuple[int, bytes]]:
    return {row["path"].removesuffix(".JPEG").replace(".", "_"): (row["label"], row["image"]) for row in part}


def test_every_image_verbatim_under_its_label(hub, whole):
    for split, part in hub[1].items():
        assert samples(whole, split) == by_stem(part)
    classes = json.loads((whole / "classes.json").read_text())
    assert [entry["name"] for entry in classes] == ["tench, Tinca tinca", "crane (1)", "crane (2)"]
    assert json.loads((whole / "index.json").read_text())["onehour"]["options"] == {
        "image_column": "image",
        "label_column": "label",
    }


def test_nothing_of_the_staging_is_left(whole):
    assert not (whole / ".prepare").exists()


def test_bytes_depend_neither_on_workers_nor_on_the_place(hub, whole, tmp_path, tree, run):
    shutil.copytree(hub[0], tmp_path / "moved")
    code, said, message = run("prepare", "parquet", tmp_path / "moved", tmp_path / "out", "--workers", 2)
    assert code == 0, message
    assert "left out split 'test': its 9 images have no labels" in said
    assert "staging" in said and "removed at the end" in said
    assert tree(tmp_path / "out") == tree(whole)


def test_a_finished_data_set_is_not_staged_again(hub, whole, tmp_path, tree, run):
    shutil.copytree(whole, tmp_path / "out")
    code, said, _ = run("prepare", "parquet", hub[0], tmp_path / "out")
    assert code == 0 and "nothing to do" in said and "staging" not in said
    (tmp_path / "out" / "train-00001.tar").unlink()
    assert run("prepare", "parquet", hub[0], tmp_path / "out")[0] == 0
    assert tree(tmp_path / "out") == tree(whole)


@pytest.mark.parametrize(
    "names",
    [
        ["part-1.parquet", "part-2.parquet"],
        ["train.parquet", "my-validation.parquet"],
        ["train/0000.parquet", "validation/0000.parquet"],
        ["default/train/0000.parquet", "default/test/0000.parquet"],
        ["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"],
    ],
)
def test_layouts(tmp_path, rows, run, names):
    parts = [rows(0, 8), rows(8, 12)]
    for name, part in zip(names, parts, strict=True):
        write_parquet(tmp_path / "in" / name, part)
    code, _, message = run("prepare", "parquet", tmp_path / "in", tmp_path / "out")
    assert code == 0, message
    if names[0].startswith("part"):
        assert samples(tmp_path / "out", "train") == by_stem(parts[0] + parts[1])
    else:
        assert samples(tmp_path / "out", "train") == by_stem(parts[0])
        assert samples(tmp_path / "out", "val") == by_stem(parts[1])


def test_one_file_with_plain_binary_and_names_of_its_own(tmp_path, rows, run):
    part = rows(0, 9)
    table = pyarrow.table(
        {
            "id": pyarrow.array(range(9), pyarrow.int32()),
            "thumbnail": pyarrow.array([b"x"] * 9, pyarrow.binary()),
            "photo": pyarrow.array([row["image"] for row in part], pyarrow.large_binary()),
            "species": pyarrow.array([row["label"] + 1 for row in part], pyarrow.uint8()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    options = ("--image-column", "photo", "--label-column", "species")
    code, said, message = run("prepare", "parquet", tmp_path / "in.parquet", tmp_path / "out", *options)
    assert code == 0, message
    assert "keys of split 'train' are row numbers" in said
    # no names: labels keep their numbers, so class 0 exists and is empty
    assert samples(tmp_path / "out", "train") == {
        f"train_{i:08d}": (row["label"] + 1, row["image"]) for i, row in enumerate(part)
    }
    assert [c["name"] for c in json.loads((tmp_path / "out" / "classes.json").read_text())] == ["0", "1", "2", "3"]


def test_string_labels_are_numbered_in_sorted_order_over_all_splits(tmp_path, rows, run):
    names = ["zebra", "ant", "Mole"]
    dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    for split, first, last, kind in (("train", 0, 9, pyarrow.string()), ("test", 9, 14, dictionary)):
        part = rows(first, last, label=lambda i: names[i % 3])
        write_parquet(tmp_path / "in" / f"{split}.parquet", part, names=None, label_type=kind)
    assert run("prepare", "parquet", tmp_path / "in", tmp_path / "out")[0] == 0
    assert [c["name"] for c in json.loads((tmp_path / "out" / "classes.json").read_text())] == ["Mole", "ant", "zebra"]
    found = samples(tmp_path / "out", "train") | samples(tmp_path / "out", "val")
    expected = {
        f"n0144076{i % 3}_{i}_v1": (["Mole", "ant", "zebra"].index(names[i % 3]), row["image"])
        for i, row in enumerate(rows(0, 14))
    }
    assert found == expected


def test_numbers_written_as_text_are_class_numbers(tmp_path, rows, run):
    part = rows(0, 13, label=str)
    write_parquet(tmp_path / "in" / "train.parquet", part, names=None, label_type=pyarrow.string())
    assert run("prepare", "parquet", tmp_path / "in", tmp_path / "out")[0] == 0
    assert [c["name"] for c in json.loads((tmp_path / "out" / "classes.json").read_text())] == [*map(str, range(13))]
    expected = {f"n0144076{i % 3}_{i}_v1": (i, row["image"]) for i, row in enumerate(part)}
    assert samples(tmp_path / "out", "train") == expected


@pytest.mark.parametrize("as_text", [False, True])
def test_labels_that_cannot_be_class_numbers(tmp_path, rows, refuse, as_text):
    part = rows(0, 5, label=lambda i: (str if as_text else int)(2_000_000_000 * (i == 3)))
    kind = pyarrow.string() if as_text else pyarrow.int64()
    path = write_parquet(tmp_path / "in" / "train.parquet", part, names=None, label_type=kind)
    message = refuse("prepare", "parquet", tmp_path / "in", tmp_path / "out")
    assert f"{path}: label 2,000,000,000 is no class number: there are 5 images" in message
    assert "--label-column" in message


def test_labels_counted_from_one_are_pointed_out(tmp_path, rows, run):
    for name, first in (("one", 1), ("zero", 0)):
        part = rows(0, 6, label=lambda i, first=first: i % 3 + first)
        write_parquet(tmp_path / name / "train.parquet", part, names=None)
        code, said, _ = run("prepare", "parquet", tmp_path / name, tmp_path / f"{name}_out")
        assert code == 0 and ("counted from 1?" in said) == (first == 1)


@pytest.mark.parametrize("path", [None, "same.jpg"])
def test_paths_absent_or_repeated_give_keys_of_row_numbers(tmp_path, rows, run, path):
    part = rows(0, 11, path=path)
    write_parquet(tmp_path / "in" / "train-00000-of-00002.parquet", part[:5])
    write_parquet(tmp_path / "in" / "train-00001-of-00002.parquet", part[5:])
    code, said, _ = run("prepare", "parquet", tmp_path / "in", tmp_path / "out")
    assert code == 0 and "row numbers" in said
    assert samples(tmp_path / "out", "train") == {
        f"train_{i:08d}": (row["label"], row["image"]) for i, row in enumerate(part)
    }


def test_newer_label_column_names_and_the_fine_label_of_cifar100(tmp_path, rows, run):
    part = rows(0, 6)
    table = pyarrow.table(
        {
            "img": [{"bytes": row["image"], "path": None} for row in part],
            "fine_label": [row["label"] for row in part],
            "coarse_label": [0] * 6,
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    assert run("prepare", "parquet", tmp_path / "train.parquet", tmp_path / "out")[0] == 0
    assert Counter(label for label, _ in samples(tmp_path / "out", "train").values()) == {0: 2, 1: 2, 2: 2}


# ---- mistakes


def refused(tmp_path, refuse, *options) -> str:
    message = refuse("prepare", "parquet", tmp_path / "in", tmp_path / "out", *options)
    assert not list((tmp_path / "out").glob("*.tar"))
    return message


@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_row_without_label_is_named(tmp_path, rows, refuse, where):
    write_parquet(tmp_path / "in" / "train.parquet", rows(0, 9))
    part = rows(9, 20, label=lambda i: -1 if i == 16 else 0)
    write_parquet(tmp_path / "in" / f"{where}-2.parquet", part)
    message = refused(tmp_path, refuse)
    assert f"{where}-2.parquet: row 7: has no label: label is -1" in message


def test_a_null_label_and_one_outside_the_classes_are_named(tmp_path, rows, refuse):
    write_parquet(tmp_path / "in" / "train.parquet", rows(0, 9, label=lambda i: None if i == 5 else 0))
    assert "train.parquet: row 5: has no label: label is None" in refused(tmp_path, refuse)
    write_parquet(tmp_path / "in" / "train.parquet", rows(0, 9, label=lambda i: 3 if i == 6 else 0))
    assert "train.parquet: row 6: label 3 is outside the 3 classes" in refused(tmp_path, refuse)


@pytest.mark.parametrize("statistics", [True, False])
def test_images_that_are_not_embedded(tmp_path, rows, refuse, statistics):
    part = rows(0, 9)
    part[5]["image"] = None
    path = write_parquet(tmp_path / "in" / "train.parquet", part)
    if not statistics:
        pq.write_table(pq.read_table(path), path, write_statistics=False)
    message = refused(tmp_path, refuse)
    assert ("1 of 9 rows have no image" if statistics else "train.parquet: row 5: image.bytes is null") in message
    assert "not in the parquet files" in message
    assert not (tmp_path / "out" / ".prepare").exists(), "nothing was staged, so nothing is kept"


def test_columns_that_cannot_be_told_apart_are_listed(tmp_path, rows, refuse):
    (tmp_path / "in").mkdir()
    image = rows(0, 1)[0]["image"]
    table = pyarrow.table({"left": [image], "right": [image], "score": [0.5], "label": [0]})
    pq.write_table(table, tmp_path / "in" / "train.parquet")
    message = refused(tmp_path, refuse)
    assert "more than one column could hold the images" in message and "--image-column" in message
    assert "left (binary), right (binary), score (double), label (int64)" in message
    message = refused(tmp_path, refuse, "--image-column", "left", "--label-column", "score")
    assert "--label-column score" in message and "holds no labels" in message
    assert "--image-column middle" in refused(tmp_path, refuse, "--image-column", "middle")
    pq.write_table(table.select(["left", "score"]), tmp_path / "in" / "train.parquet")
    assert "no column could hold the labels" in refused(tmp_path, refuse)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no parquet files"),
        (["train-00000-of-00003", "train-00002-of-00003"], "1 of 3 files are missing"),
        (["a/train", "b/train"], "more than one data set"),
        (["train", "extra"], "its name says no split"),
        (["validation"], "no training split"),
        (["train-00000-of-00001", "train-00000-of-00001-0a1b2c"], "both are part 00000"),
    ],
)
def test_files_that_make_no_data_set(tmp_path, rows, refuse, names, message):
    (tmp_path / "in").mkdir()
    for number, name in enumerate(names):
        write_parquet(tmp_path / "in" / f"{name}.parquet", rows(number, number + 2))
    assert message in refused(tmp_path, refuse)


def test_files_of_different_data_sets(tmp_path, rows, refuse):
    write_parquet(tmp_path / "in" / "train-1.parquet", rows(0, 4))
    write_parquet(tmp_path / "in" / "train-2.parquet", rows(4, 8), names=["a", "b", "c"])
    assert "train-2.parquet: its class names are not those of" in refused(tmp_path, refuse)
    write_parquet(tmp_path / "in" / "train-2.parquet", rows(4, 8), plain=True)
    assert "train-2.parquet: its columns are not those of" in refused(tmp_path, refuse)
    write_parquet(tmp_path / "in" / "train-2.parquet", rows(4, 8, label=str), names=None, label_type=pyarrow.string())
    assert "train-2.parquet: its class names are not those of" in refused(tmp_path, refuse)


def test_damaged_files(tmp_path, rows, refuse):
    path = write_parquet(tmp_path / "in" / "train.parquet", rows(0, 9))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "train.parquet: not a parquet file, or damaged" in refused(tmp_path, refuse)
    path.write_bytes(b"")
    assert "train.parquet: not a parquet file, or damaged" in refused(tmp_path, refuse)


def test_pyarrow_missing(tmp_path, rows, refuse, monkeypatch):
    write_parquet(tmp_path / "in" / "train.parquet", rows(0, 2))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'onehour[parquet]'" in refused(tmp_path, refuse)


def test_too_little_space_is_said_before_anything_is_staged(hub, tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 20_000))
    message = refuse("prepare", "parquet", hub[0], tmp_path / "out")
    assert "not enough space: staging needs" in message and "as much for the shards" in message
    assert not (tmp_path / "out" / ".prepare").exists()


# ---- staging that is interrupted


@pytest.fixture
def staged(hub, tmp_path) -> tuple[Parquet, Path]:
    from rich.console import Console

    source = Parquet(hub[0])
    source.stage(tmp_path / "staged", 1, Console(quiet=True))
    return source, tmp_path / "staged"


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_finished_spools_are_used_again_and_changed_files_staged_again(staged, hub, tmp_path):
    from rich.console import Console

    source, folder = staged
    before = state(folder)
    assert len(before) == 9  # three files of images, each with offsets and a record
    (folder / ".00002.images.99999.tmp").write_bytes(b"of a killed worker")
    (folder / "00002.json").unlink()
    source.stage(folder, 1, Console(quiet=True))
    after = state(folder)
    assert set(after) == set(before)
    assert {name for name in after if after[name][0] != before[name][0]} == {f"00002.{part}" for part in PARTS}
    moved = tmp_path / "moved"
    shutil.copytree(hub[0], moved)
    os.utime(moved / "data" / "train-00001-of-00002.parquet")
    Parquet(moved).stage(folder, 1, Console(quiet=True))
    assert {name for name in after if state(folder)[name][0] != after[name][0]} == {f"00001.{part}" for part in PARTS}
    assert {name: data for name, (_, data) in state(folder).items() if not name.endswith("json")} == {
        name: data for name, (_, data) in before.items() if not name.endswith("json")
    }


PARTS = ("images", "offsets", "json")


def test_a_file_that_changes_after_the_listing_is_refused(hub, tmp_path, rows):
    from rich.console import Console

    from shards.errors import UserError

    shutil.copytree(hub[0], tmp_path / "in")
    source = Parquet(tmp_path / "in")
    write_parquet(tmp_path / "in" / "data" / "train-00000-of-00002.parquet", rows(100, 121))
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet: changed since it was listed"):
        source.stage(tmp_path / "staged", 1, Console(quiet=True))


BIG = 1500


@pytest.fixture(scope="module")
def big(tmp_path_factory, make_image) -> Path:
    """Three files, large enough that a kill meets the staging."""
    root = tmp_path_factory.mktemp("big")
    kinds = [make_image(i, side=100) for i in range(40)]
    for number in range(3):
        part = [
            {"image": kinds[i % 40] + b"%d" % i, "path": f"{number}_{i}.jpg", "label": i % 3} for i in range(BIG // 3)
        ]
        write_parquet(root / f"train-{number:05d}-of-00003.parquet", part, group=50)
    return root


@pytest.fixture(scope="module")
def big_whole(big, tmp_path_factory, start, tree) -> dict[str, str]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    process = start("prepare", "parquet", big, out, "--workers", 1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return tree(out)


@pytest.mark.parametrize(
    ("how", "finished", "workers"),
    [
        (signal.SIGKILL, 1, 2),
        pytest.param(signal.SIGINT, 1, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_interrupted_staging_goes_on_and_gives_the_same_bytes(
    big, big_whole, tmp_path, start, tree, how, finished, workers
):
    out = tmp_path / "out"
    folder = out / ".prepare" / "staged"
    process = start("prepare", "parquet", big, out, "--workers", 1)
    wait_for(process, lambda: len(list(folder.glob("*.json"))) >= finished and any(folder.glob(".*.images.*.tmp")))
    os.killpg(process.pid, how)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -how), said
    assert not list(out.glob("*.tar")), "stopped too late to show anything"
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(kept) >= finished
    process = start("prepare", "parquet", big, out, "--workers", workers)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (f"{len(kept)} of 3 files are there from an earlier run" in said) == bool(kept)
    assert tree(out) == big_whole
    assert not (out / ".prepare").exists()


@pytest.mark.slow
def test_killed_many_times_at_any_moment(big, big_whole, tmp_path, start, tree):
    out = tmp_path / "out"
    moments = random.Random(5)
    for number in range(12):
        process = start("prepare", "parquet", big, out, "--workers", 1 + number % 3)
        time.sleep(moments.uniform(0.3, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start("prepare", "parquet", big, out, "--workers", 2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert tree(out) == big_whole
    assert not (out / ".prepare").exists()


def test_other_data_are_refused_after_an_interruption(big, tmp_path, start, refuse, rows):
    shutil.copytree(big, tmp_path / "in")
    out = tmp_path / "out"
    process = start("prepare", "parquet", tmp_path / "in", out, "--workers", 1, "--samples-per-shard", 50)
    wait_for(process, lambda: any(out.glob("train-*.tar")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "index.json").exists()
    write_parquet(tmp_path / "in" / "train-00001-of-00003.parquet", rows(0, 20))
    message = refuse("prepare", "parquet", tmp_path / "in", out, "--samples-per-shard", 50)
    assert "made from other data" in message and "listing_sha256" in message


def wait_for(process: subprocess.Popen, condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


@pytest.mark.slow
def test_memory_stays_flat_in_the_size_of_a_row_group(tmp_path, make_image):
    """One row group of 60 MB is staged in much less than that."""
    code = """
import resource, sys
from pathlib import Path
from rich.console import Console
from shards.sources.parquet import Parquet
source = Parquet(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.stage(Path(sys.argv[2]), 1, Console(quiet=True))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = []
    for number, count in enumerate((200, 4000)):
        part = [{"image": os.urandom(20_000), "path": f"{i}.jpg", "label": 0} for i in range(count)]
        path = write_parquet(tmp_path / f"{number}.parquet", part, group=10**6, compression="none")
        assert pq.ParquetFile(path).metadata.num_row_groups == 1
        done = subprocess.run(
            [sys.executable, "-c", code, path, tmp_path / f"staged{number}"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        )
        grown.append(int(done.stdout))
    assert (tmp_path / "staged1" / "00000.images").stat().st_size == 80_000_000
    assert grown[1] - grown[0] < 80_000_000 * 0.6, grown
