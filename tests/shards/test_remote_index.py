"""`shards index URL OUT`: shards on a server, indexed without a copy of them in the data set folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from shards.cache import ShardCache
from shards.index import load_split
from shards.remote import open_remote
from tests.shards.faulty_server import Fault, serve


@pytest.fixture
def served(prepared, tmp_path):
    """Tars and classes of a prepared data set, without any index, on a server."""
    folder = tmp_path / "served"
    folder.mkdir()
    for path in prepared.iterdir():
        if path.suffix == ".tar" or path.name == "classes.json":
            shutil.copy(path, folder)
    with serve(folder) as server:
        yield server


@pytest.fixture
def index(run, tmp_path):
    def run_index(*arguments):
        return run("index", *arguments, "--cache", tmp_path / "cache", "--workers", 3)

    return run_index


@pytest.mark.parametrize("form", ["listing", "braces"])
def test_indexed_by_url_is_indexed_by_file(served, prepared, index, tmp_path, form):
    shards = len(list(served.folder.glob("train-*.tar")))
    location = served.url if form == "listing" else f"{served.url}/{{train-{{00000..{shards - 1:05d}}},val-00000}}.tar"
    classes = () if form == "listing" else ("--classes", prepared / "classes.json")
    code, out, _ = index(location, tmp_path / "out", *classes)
    assert code == 0
    assert f"train     {shards:,} shards · 60 images" in out
    names = ("train", "val") if form == "listing" else ("train",)
    for name in names:
        local, remote = load_split(prepared, name), open_remote(str(tmp_path / "out"), name, tmp_path / "cache")
        assert (remote.digest, remote.classes) == (local.digest, local.classes)
        assert [shard.url for shard in remote.shards] == [f"{served.url}/{shard.path.name}" for shard in local.shards]
    asked = {name: traffic.requests for name, traffic in served.traffic.items()}
    with remote.pin(ShardCache(tmp_path / "cache", 1 << 30), 0) as pin:  # is in the cache already
        assert pin.path.read_bytes() == local.shards[0].path.read_bytes()
    assert {name: traffic.requests for name, traffic in served.traffic.items()} == asked


def test_a_killed_run_fetches_nothing_twice(served, start, tmp_path, index):
    last = sorted(path.name for path in served.folder.glob("*.tar"))[-1]
    served.fault = lambda request: Fault(stall=60) if request.name == last else None
    arguments = (served.url, tmp_path / "out", "--cache", tmp_path / "cache", "--workers", 3)
    process = start("index", *arguments)
    records = tmp_path / "out" / ".index"
    wanted = len(list(served.folder.glob("*.tar"))) - 1
    end = time.monotonic() + 30
    while not (records.is_dir() and len(list(records.glob("*.json"))) == wanted):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    served.fault = lambda request: None
    served.traffic.clear()
    assert index(*arguments[:2])[0] == 0
    assert {name for name, traffic in served.traffic.items() if traffic.sent and name.endswith(".tar")} == {last}
    assert not records.exists()
    document = json.loads((tmp_path / "out" / "index.json").read_bytes())
    assert sum(len(dataset["shardlist"]) for dataset in document["datasets"]) == wanted + 1


def test_img2dataset_names_and_labels_elsewhere(tmp_path, index, write_tar):
    folder = tmp_path / "served"
    for shard in range(2):
        members = [(f"{shard}{i}.{extension}", data) for i in range(3)
                   for extension, data in (("jpg", b"x" * 50), ("json", b'{"target": %d}' % i))]  # fmt: skip
        write_tar(folder / f"{shard:05d}.tar", members)
    with serve(folder) as server:
        code, _, message = index(server.url, tmp_path / "out")
        assert code == 2
        assert f"{server.url}/0000" in message
        assert "--label json:target" in message
        assert index(server.url, tmp_path / "out", "--label", "json:target")[0] == 0
        split = open_remote(str(tmp_path / "out"), "train", tmp_path / "cache")
        assert split.classes == ("0", "1", "2")
        with split.pin(ShardCache(tmp_path / "cache", 1 << 30), 1) as pin:
            assert pin.samples["label"].tolist() == [0, 1, 2]


def test_labels_that_are_too_large_or_counted_from_one(tmp_path, index, write_tar):
    for name, last in (("one", 2), ("large", 30_000_000)):
        members = [("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"%d" % last)]
        write_tar(tmp_path / name / "0.tar", members)
        with serve(tmp_path / name) as server:
            code, said, message = index(server.url, tmp_path / f"{name}_out")
            if name == "one":
                assert code == 0 and "note      class 0 has no image; are the labels counted from 1?" in said
            else:
                assert code == 2 and f"{server.url}/0.tar: label 30,000,000 is no class number" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("URL",), "nothing can be written there; where should the index go?"),
        (("URL", "OUT", "--classes", "2"), "is outside the 2 classes"),
        (("URL", "OUT", "--classes", "from-labels"), "not for shards at URLs"),
        (("URL/nothing", "OUT"), "no such file"),
        (("URL/missing-{0..3}.tar", "OUT"), "no such file"),
        (("URL/{0..", "OUT"), "Write the shards as"),
        (("http://me:secret@localhost/x", "OUT"), "would be written into index.json"),
        (("htps://localhost/x", "OUT"), "Did you mean https://?"),
        (("PREPARED", "OUT"), "OUT is for shards at a URL"),
        (("URL", "PREPARED"), "holds a data set of its own"),
    ],
)
def test_refused(served, prepared, refuse, tmp_path, arguments, message):
    places = {"URL": served.url, "OUT": str(tmp_path / "out"), "PREPARED": str(prepared)}
    for name, place in places.items():
        arguments = tuple(argument.replace(name, place) for argument in arguments)
    found = refuse("index", *arguments, "--cache", tmp_path / "cache")
    assert message in found
    assert "secret" not in found


def test_a_key_in_two_shards(tmp_path, refuse, write_tar):
    folder = tmp_path / "served"
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", [("same.jpg", b"%d" % shard), ("same.cls", b"0")])
    with serve(folder) as server:
        message = refuse("index", server.url, tmp_path / "out", "--cache", tmp_path / "cache")
    assert f"{server.url}/0.tar and {server.url}/1.tar: two samples of split 'train' have the key same" in message
