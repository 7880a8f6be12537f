"""Opening data sets whose shards lie at URLs, against the same data opened as files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shards.cache import ShardCache
from shards.errors import UserError
from shards.index import load_split
from shards.manifest import Manifest, read_manifest, write_classes, write_manifest
from shards.remote import has_remote_shards, open_remote
from tests.shards.faulty_server import Fault, serve

CAPACITY = 1 << 30


@pytest.fixture
def served(prepared, tmp_path):
    """A copy of a prepared data set, which tests may change, and a server over it."""
    folder = shutil.copytree(prepared, tmp_path / "served")
    with serve(folder) as server:
        yield server


def rewrite(folder: Path, change) -> None:
    path = folder / "index.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def test_remote_and_local_are_one_data_set(served, prepared, tmp_path):
    cache = ShardCache(tmp_path / "cache", CAPACITY)
    for name in ("train", "val"):
        local, remote = load_split(prepared, name), open_remote(served.url, name, tmp_path / "cache")
        assert (len(remote), remote.classes, remote.digest) == (len(local), local.classes, local.digest)
        assert [shard.sha256 for shard in remote.shards] == [shard.sha256 for shard in local.shards]
        assert remote.first.dtype == np.int64
        for sample in range(len(local)):
            expected = local.samples[sample]
            shard, row = remote.locate(sample)
            assert shard == expected["shard"]
            with remote.pin(cache, shard) as pin:
                found = pin.samples[row]
                assert (found["offset"], found["size"], found["label"]) == (
                    expected["offset"], expected["size"], expected["label"]
                )  # fmt: skip
            assert remote.key(sample) == local.key(sample)


def test_a_local_folder_that_lists_urls(served, prepared, tmp_path):
    """Opened without network; a shard is fetched when it is asked for."""
    local = load_split(prepared, "train")
    here = tmp_path / "here"
    here.mkdir()
    (here / "classes.json").write_bytes((prepared / "classes.json").read_bytes())
    document = json.loads((prepared / "index.json").read_bytes())
    for dataset in document["datasets"]:
        for shard in dataset["shardlist"]:
            shard["url"] = f"{served.url}/{shard['url']}"
    (here / "index.json").write_text(json.dumps(document))
    assert has_remote_shards(here)
    assert not has_remote_shards(prepared)
    assert not has_remote_shards(tmp_path)
    split = open_remote(str(here), "train", tmp_path / "cache")
    assert split.digest == local.digest
    assert not served.traffic
    with split.pin(ShardCache(tmp_path / "cache", CAPACITY), 1) as pin:
        assert pin.path.read_bytes() == local.shards[1].path.read_bytes()
    with pytest.raises(UserError, match="lists shards at URLs"):
        read_manifest(here)
    with pytest.raises(UserError, match="lists shards at URLs"):
        load_split(here, "train")


def test_an_index_of_urls_is_written_as_it_was_read(served, tmp_path):
    remote = open_remote(served.url, "train", tmp_path / "cache")
    out = tmp_path / "out"
    out.mkdir()
    write_classes(out, remote.classes)
    write_manifest(Manifest(out, "data", {"train": remote.shards}, {"source": "test"}))
    assert not (out / "_info.json").exists()
    again = open_remote(str(out), "train", tmp_path / "cache")
    assert (again.shards, again.classes, again.digest) == (remote.shards, remote.classes, remote.digest)


def test_other_back_ends(prepared, tmp_path):
    local = load_split(prepared, "val")
    memory = fsspec.filesystem("memory")
    for path in prepared.iterdir():
        if path.is_file():
            memory.pipe_file(f"/remote/set/{path.name}", path.read_bytes())
    cache = ShardCache(tmp_path / "cache", CAPACITY)
    for url in ("memory://remote/set/", f"file://{prepared}"):
        split = open_remote(url, "val", tmp_path / "cache")
        assert split.digest == local.digest
        with split.pin(cache, 0) as pin:
            assert pin.path.read_bytes() == local.shards[0].path.read_bytes()


def test_places_in_messages(served, tmp_path):
    split = open_remote(served.url.replace("//", "//me:secret@") + "/?token=secret", "train", tmp_path / "cache")
    assert split.describe(0) == f"shard {served.url.replace('//', '//***@')}/train-00000.tar?***, sample 0"
    key = load_split(served.folder, "train").key(0)
    split.pin(ShardCache(tmp_path / "cache", CAPACITY), 0).close()
    assert split.describe(0).endswith(f"train-00000.tar?***, key {key}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"/index\.json: no such file\n.*shards index URL OUT"),
        (lambda folder: (folder / "classes.json").unlink(), r"/classes\.json: no such file\n.*classes\.json"),
        (lambda folder: (folder / "index.json").write_text("<html>"), r"/index\.json: no valid JSON"),
        (lambda folder: (folder / "index.json").write_text("[" * 100_000), r"/index\.json: no valid JSON"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"/index\.json: is no shard index"),
        (lambda folder: (folder / "classes.json").write_text("7"), r"/classes\.json: is not a list of class names"),
        (lambda folder: rewrite(folder, lambda index: index["datasets"].pop(0)), r"has no split 'train'"),
    ],
    ids=["no index", "no classes", "a web page", "too deep", "no index", "no list", "no split"],
)
def test_what_is_wrong_with_the_folder(served, tmp_path, change, message):
    change(served.folder)
    with pytest.raises(UserError, match=message) as caught:
        open_remote(served.url, "train", tmp_path / "cache")
    assert str(caught.value).startswith(served.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("../../etc/passwd", "not a file inside this folder, nor a URL"),
        ("/etc/passwd", "not a file inside this folder, nor a URL"),
        ("pipe:curl https://host/x.tar", "is a command"),
        ("file:///etc/passwd", "lists a file of this host"),
        ("htps://host/x.tar", r"unknown scheme htps://\n  Did you mean https://\?"),
        (7, "not a file inside this folder, nor a URL"),
    ],
)
def test_shard_addresses_that_are_refused(served, tmp_path, url, message):
    rewrite(served.folder, lambda index: index["datasets"][0]["shardlist"][1].update(url=url))
    with pytest.raises(UserError, match=message):
        open_remote(served.url, "train", tmp_path / "cache")
    assert not [name for name in served.traffic if name.endswith(".tar")]


@pytest.mark.parametrize("digest", ["../" * 21 + "x", "x" * 64, "a" * 63, 1, "a" * 64 + "\n"])
def test_digests_that_are_none(served, tmp_path, digest):
    rewrite(served.folder, lambda index: index["datasets"][0]["shardlist"][1].update(sha256=digest))
    with pytest.raises(UserError, match="sha256 must be 64 hexadecimal digits"):
        open_remote(served.url, "train", tmp_path / "cache")


def test_files_and_urls_in_one_local_split(served, prepared, tmp_path):
    here = shutil.copytree(prepared, tmp_path / "here")
    rewrite(here, lambda index: index["datasets"][0]["shardlist"][1].update(url=f"{served.url}/train-00001.tar"))
    with pytest.raises(UserError, match=r"lists train-00000\.tar as a file and other shards at URLs"):
        open_remote(str(here), "train", tmp_path / "cache")


def test_another_count_than_announced(served, tmp_path):
    rewrite(served.folder, lambda index: index["datasets"][0]["shardlist"][0].update(nsamples=3))
    split = open_remote(served.url, "train", tmp_path / "cache")
    with pytest.raises(UserError, match=rf"{served.url}/train-00000\.tar: holds \d+ samples, index\.json says 3"):
        split.pin(ShardCache(tmp_path / "cache", CAPACITY), 0)


def test_a_label_outside_the_classes(served, tmp_path):
    """As on the first pin, so on every later one."""
    (served.folder / "classes.json").write_text('["only one"]')
    split = open_remote(served.url, "train", tmp_path / "cache")
    local = load_split_with_all_classes(served.folder)
    worst = int(np.argmax(local.samples["label"][: split.first[1]]))
    cache = ShardCache(tmp_path / "cache", split.shards[0].size)
    label = local.samples["label"][worst]
    for _ in range(2):
        with pytest.raises(UserError, match=rf"key {local.key(worst)}: label {label} is outside the 1 classes"):
            split.pin(cache, 0)
    assert (tmp_path / "cache" / f"{split.shards[0].sha256}.tar").exists()


def load_split_with_all_classes(folder: Path):
    (folder / "classes.json").write_text('["a", "b", "c"]')
    return load_split(folder, "train")


def test_a_shard_that_is_no_shard(served, tmp_path, write_tar):
    """Right by its digest, wrong inside: the message names the address, not the cache's name for it."""
    import hashlib

    tar = write_tar(served.folder / "train-00000.tar", [("a.jpg", b"x"), ("b.cls", b"1")])
    rewrite(
        served.folder,
        lambda index: index["datasets"][0]["shardlist"][0].update(
            sha256=hashlib.sha256(tar.read_bytes()).hexdigest(), filesize=tar.stat().st_size, nsamples=2
        ),
    )
    split = open_remote(served.url, "train", tmp_path / "cache")
    with pytest.raises(UserError, match=rf"^{served.url}/train-00000\.tar: key a: has no label"):
        split.pin(ShardCache(tmp_path / "cache", CAPACITY), 0)


def test_the_index_survives_passing_faults(served, tmp_path):
    served.fault = lambda request: Fault(status=503) if request.number == 0 else None
    assert len(open_remote(served.url, "train", tmp_path / "cache")) == 60


def test_a_process_that_ends_with_pins_ends_quietly(served, tmp_path):
    script = """
import sys
from pathlib import Path
from shards.cache import ShardCache
from shards.remote import open_remote
split = open_remote(sys.argv[1], "train", Path(sys.argv[2]))
pins = [split.pin(ShardCache(Path(sys.argv[2]), 1 << 30), number) for number in range(3)]
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script, served.url, tmp_path / "cache"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert (done.returncode, done.stderr) == (0, "")
