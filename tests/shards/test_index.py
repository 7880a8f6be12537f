"""Opening a split: what it holds, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from shards import table
from shards.errors import UserError
from shards.index import SAMPLE_DTYPE, Split, load_split


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A data set folder that the test may damage, without the cache of its table."""
    shutil.copytree(prepared, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    return tmp_path / "copy"


def refusal(root: Path, name: str = "train") -> str:
    with pytest.raises(UserError) as error:
        load_split(root, name)
    return str(error.value)


def edit_json(path: Path, change) -> None:
    document = json.loads(path.read_bytes())
    document = change(document) or document
    path.write_text(json.dumps(document))


def test_split_is_complete_and_describes_its_samples(prepared):
    split = load_split(prepared, "train")
    assert isinstance(split, Split) and len(split) == 60
    assert split.samples.dtype == SAMPLE_DTYPE and not split.samples.flags.writeable
    assert split.classes == ("class_0", "class_1", "class_2")
    assert split.key(0) == split.key(-60) and split.key(59) == split.key(-1)
    last = split.samples[59]
    assert split.describe(59) == f"shard train-00007.tar, key {split.key(59)}, byte {last['offset']}"
    keys = [split.key(i) for i in range(60)]
    assert len(set(keys)) == 60 and all(key.startswith("class_") and " " not in key for key in keys)
    labels = [int(key.split("_")[1]) for key in keys]
    assert split.samples["label"].tolist() == labels


def test_table_is_the_same_from_prepare_from_scratch_and_from_cache(prepared, copy):
    made = load_split(prepared, "train")
    assert (prepared / ".cache" / f"train-{made.digest}.npy").exists(), "prepare writes it"
    built = load_split(copy, "train")
    cached = load_split(copy, "train")
    assert isinstance(cached.samples, np.memmap)
    for split in (built, cached):
        np.testing.assert_array_equal(split.samples, made.samples)
        assert split.digest == made.digest


def test_digest_depends_on_data_not_on_names(prepared, copy, run, two_splits, tmp_path):
    for path in sorted(copy.glob("train-*")):
        path.rename(copy / path.name.replace("train-", "other_train-"))
    assert run("index", copy)[0] == 0
    digest = load_split(prepared, "train").digest
    assert load_split(copy, "train").digest == digest
    assert run("prepare", "imagefolder", two_splits, tmp_path / "seeded", "--seed", 3)[0] == 0
    assert load_split(tmp_path / "seeded", "train").digest != digest


@pytest.mark.parametrize("damage", ["truncated", "other length", "garbage", "pickle"])
def test_damaged_cache_is_built_again(copy, damage):
    split = load_split(copy, "train")
    expected = np.array(split.samples)
    (cache,) = (copy / ".cache").glob("train-*.npy")
    if damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:-7])
    elif damage == "other length":
        np.save(cache, expected[:10])
    elif damage == "garbage":
        cache.write_bytes(b"garbage")
    else:
        np.save(cache, np.array([print, {}], object), allow_pickle=True)
    again = load_split(copy, "train")
    np.testing.assert_array_equal(again.samples, expected)
    assert np.load(cache).shape == (60,)


def test_cache_goes_to_the_user_folder_where_shards_are_read_only(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (copy / ".cache").write_text("a file where the folder would be: cannot be written, even by root")
    split = load_split(copy, "train")
    (cache,) = (tmp_path / "home").rglob("*.npy")
    assert cache.name == f"train-{split.digest}.npy"
    assert isinstance(load_split(copy, "train").samples, np.memmap)


def test_works_where_no_cache_can_be_written(copy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (copy / ".cache").write_text("")
    assert len(load_split(copy, "train")) == 60


def _load_at_once(root: Path, barrier, queue) -> None:
    barrier.wait()
    split = load_split(root, "train")
    queue.put((len(split), split.samples.tobytes()))


def test_processes_build_the_cache_at_the_same_time(copy):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_load_at_once, args=(copy, barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(results) == 1
    assert len(list((copy / ".cache").iterdir())) == 1, "temporary files were left behind"


def test_a_million_samples_open_from_the_cache_in_no_time(tmp_path, write_tar, make_image, run):
    write_tar(tmp_path / "train-0.tar", [("a.cls", b"0"), ("a.jpg", make_image(1))])
    assert run("index", tmp_path)[0] == 0
    count = 1_281_167
    (tmp_path / "train-0.idx").write_text(f"v1.2 {count}\n")  # only the count is looked at, once there is a cache
    edit_json(tmp_path / "index.json", lambda d: d["datasets"][0]["shardlist"][0].update(nsamples=count))
    digest = table.split_digest(load_shards(tmp_path))
    np.save(tmp_path / ".cache" / f"train-{digest}.npy", np.zeros(count, SAMPLE_DTYPE))
    started = time.process_time()
    assert len(load_split(tmp_path, "train")) == count
    assert time.process_time() - started < 1


def load_shards(root: Path):
    from shards.manifest import read_manifest

    return read_manifest(root).splits["train"]


# ---- bad folders: each is one error that names the file and the mend


def test_missing_folder_empty_folder_and_folder_without_index(copy, tmp_path):
    assert f"{tmp_path / 'absent'}: no such folder" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no index.json" in (message := refusal(tmp_path / "empty")) and "shards prepare" in message
    (copy / "index.json").unlink()
    assert "no index.json" in (message := refusal(copy)) and f"shards index {copy}" in message
    (copy / ".prepare").mkdir()
    assert "run the same command again" in refusal(copy)
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("__kind__") and None, "no shard index"),
        (lambda d: d.pop("datasets") and None, "key 'datasets' is missing"),
        (lambda d: [1], "no shard index"),
        (lambda d: d["datasets"][0]["shardlist"][0].pop("sha256") and None, "key 'sha256' is missing"),
        (lambda d: d["datasets"][0]["shardlist"][0].update(url="../train-00000.tar"), "not a file inside"),
        (lambda d: d["datasets"][0]["shardlist"][0].update(url="/etc/passwd"), "not a file inside"),
        (lambda d: d["datasets"][0]["shardlist"][0].update(nsamples=-1), "nsamples"),
        (lambda d: d["datasets"][1].update(name="train"), "listed twice"),
    ],
)
def test_malformed_index(copy, change, message):
    edit_json(copy / "index.json", change)
    said = refusal(copy)
    assert "index.json" in said and message in said and "shards index" in said


def test_index_that_is_no_json(copy):
    (copy / "index.json").write_bytes((copy / "index.json").read_bytes()[:100])
    assert "index.json: no valid JSON" in refusal(copy)


def test_absent_and_empty_split(copy):
    assert "no split 'test'" in (message := refusal(copy, "test")) and "train, val" in message
    edit_json(copy / "index.json", lambda d: d["datasets"][1].update(shardlist=[]))
    assert "split 'val' is empty" in refusal(copy, "val")


def test_missing_truncated_and_grown_shard(copy):
    shard = copy / "train-00002.tar"
    whole = shard.read_bytes()
    for content in (whole[:-512], whole[: len(whole) // 2], whole + b"\0"):
        shard.write_bytes(content)
        message = refusal(copy)
        assert str(shard) in message and "truncated or rewritten" in message and "shards verify" in message
    shard.unlink()
    assert str(shard) in refusal(copy)
    assert len(load_split(copy, "val")) == 21, "the other split is not concerned"


def test_idx_missing_of_other_count_or_of_another_tar(copy):
    idx = copy / "train-00001.idx"
    content = idx.read_text()
    for damaged, message in (
        (content.replace("v1.2 7", "v1.2 8").replace("v1.2 8\n", "v1.2 9\n", 1), "lists 9 samples"),
        ((copy / "train-00002.idx").read_text(), ""),
        (content.replace(" 512 1 ", " 1024 1 "), "does not describe train-00001.tar"),
        ("nonsense\n", "does not begin with"),
    ):
        idx.write_text(damaged)
        said = refusal(copy)
        assert str(idx) in said and message in said and "shards index" in said
    idx.unlink()
    assert str(idx) in refusal(copy)


def test_classes_missing_malformed_or_too_few(copy):
    classes = copy / "classes.json"
    classes.write_text('[{"name": "a"}, {"name": "b"}]')
    message = refusal(copy)
    assert (
        "label 2" in message
        and "outside the 2 classes" in message
        and "train-0" in message
        and "key class_2" in message
    )
    for content in ("[]", "3", '{"1": "a"}', '[{"x": 1}]', "["):
        classes.write_text(content)
        assert str(classes) in refusal(copy)
    classes.unlink()
    assert str(classes) in refusal(copy)
    classes.write_text('{"1": {"wnid": "n2", "name": "x"}, "0": "zero", "2": {"name": "c"}}')
    assert load_split(copy, "train").classes == ("zero", "n2", "c")


def test_two_samples_with_one_key_once_the_folder_is_indexed(copy):
    for suffix in ("tar", "idx"):
        shutil.copy(copy / f"train-00000.{suffix}", copy / f"train-00001.{suffix}")

    def same_shard_twice(document):
        first, second = document["datasets"][0]["shardlist"][:2]
        second.update(first, url=second["url"])

    edit_json(copy / "index.json", same_shard_twice)
    message = refusal(copy)
    assert "train-00000.tar and " in message and "train-00001.tar" in message and "have the key class_" in message


def test_unreadable_as_user(copy):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (copy / "index.json").chmod(0)
    assert "index.json: cannot be read" in refusal(copy)
