"""Training data that comes by network or through a command: the same samples, one download, a bounded cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from pipeline import config, dataset
from pipeline.cached import CachedReader
from pipeline.decode import make_decoder
from pipeline.experiment import open_run
from pipeline.loader import Loader, evaluation_requests, training_requests
from pipeline.metrics import read_metrics
from pipeline.reader import Encoded, ShardReader
from pipeline.readers import evaluation_reader, training_reader
from pipeline.samples import audit, read_samples
from pipeline.stream import StreamReader, _Shards
from pipeline.versions import versions
from shards.cli import main as shards_main
from shards.errors import UserError
from shards.index import load_split
from shards.labels import Labels
from tests.conftest import fork_ranks, tiny_config
from tests.shards.faulty_server import Fault, serve

TRAIN, VAL, KN = 130, 35, 32
BN_FREE = {
    "recipe.model.name": "vit_tiny_patch16_224",
    "recipe.model.args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "optimizer.params.lr": 0.005,
}
WINDOW = {"recipe.order.kind": "window", "recipe.order.window_shards": 1, "recipe.order.streams": 2}


@pytest.fixture(scope="module")
def many_shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `tiny_shards` in 13 + 4 shards."""
    out = tmp_path_factory.mktemp("many") / "shards"
    arguments = ["prepare", "webdataset", str(tiny_shards), str(out), "--samples-per-shard", "10", "--workers", "1"]
    assert shards_main(arguments) == 0
    return out


@pytest.fixture
def server(many_shards: Path):
    with serve(many_shards) as server:
        yield server


def load(tmp_path: Path, data: str | Path, name: str = "run", **changes) -> config.Config:
    path = tmp_path / f"{name}.json"
    cache = {"recipe.cache.folder": str(tmp_path / "cache"), "recipe.cache.gigabytes": 1}
    path.write_text(json.dumps(tiny_config(data, tmp_path / "runs" / name, **{**cache, **changes})))
    return config.load(path)


def read_as_ranks(experiment: config.Config, world_size: int, updates: range) -> dict[int, list[Encoded]]:
    """What every rank gets for `updates`, by rank; the ranks take turns, as they do when they wait for each other."""
    plan, train, _ = open_run(experiment, world_size, range(world_size))
    recipe, batch = experiment.recipe, plan.batch
    read: dict[int, list[Encoded]] = {}
    with contextlib.ExitStack() as opened:
        ranks = []
        for rank in range(world_size):
            reader = training_reader(
                train,
                recipe,
                plan.order,
                batch,
                rank=rank,
                local_ranks=range(world_size),
                position=updates.start * batch.train,
            )
            opened.enter_context(contextlib.closing(reader))
            ranks.append(
                (
                    reader,
                    training_requests(
                        plan.order, batch, plan.config.recipe.transform, rank, updates.start, updates.stop
                    ),
                )
            )
        for _ in range(len(updates) * batch.accumulation):
            for rank, (reader, requests) in enumerate(ranks):
                request = next(requests)
                reader.expect(request.last)
                read.setdefault(rank, []).extend(reader.read(int(sample)) for sample in request.ids)
                reader.passed(request.first)
    return read


def expected(experiment: config.Config, data: Path, world_size: int, updates: range) -> dict[int, list[Encoded]]:
    """The same through the index of the local copy."""
    plan, _, _ = open_run(experiment, world_size)
    with contextlib.closing(ShardReader(load_split(data, "train"))) as reader:
        return {
            rank: [
                reader.read(int(sample))
                for request in training_requests(
                    plan.order, plan.batch, plan.config.recipe.transform, rank, updates.start, updates.stop
                )
                for sample in request.ids
            ]
            for rank in range(world_size)
        }


def tar_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # removed at this moment
            total += path.stat().st_size
    return total


# ---------------------------------------------------------------- the order that the storage allows


def test_local_shards_keep_the_uniform_order_and_remote_ones_that_fit_get_it_after_the_first_epoch(
    tmp_path, many_shards, server
):
    local, remote = load(tmp_path, many_shards), load(tmp_path, server.url)
    assert open_run(local, 2)[0].order.name == "argsort-v1"
    name = open_run(remote, 2)[0].order.name
    assert name == "window-v1, 160 images × 4 streams in epoch 1, then argsort-v1"


def test_the_order_does_not_depend_on_the_ranks_and_the_index_digest_not_on_the_place(tmp_path, many_shards, server):
    plans = [open_run(load(tmp_path, data, **WINDOW), w)[0] for data in (many_shards, server.url) for w in (1, 2, 4)]
    assert {plan.order.name for plan in plans} == {"window-v1, 10 images × 2 streams"}
    assert len({plan.digest for plan in plans}) == 1
    for plan in plans[1:]:
        assert np.array_equal(plan.order.at(np.arange(400)), plans[0].order.at(np.arange(400)))


def test_the_plan_and_the_record_say_that_it_is_no_uniform_permutation(tmp_path, server):
    plan, _, _ = open_run(load(tmp_path, server.url, **WINDOW), 2)
    text = str(plan.page())
    assert "window-v1, 10 images × 2 streams" in text and "no uniform permutation" in text
    assert plan.summary()["order"] == plan.order.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe.order.streams": 3}, ["recipe.order.streams is 3", "4 logical workers", "1, 2, 4"]),
        ({"recipe.order.kind": "uniform", "recipe.cache.gigabytes": 1e-4}, ["do not fit", "uniform", "window"]),
        (
            {**WINDOW, "recipe.cache.gigabytes": 6e-5},
            ["recipe.cache.gigabytes 6e-05", "2 streams", "10 windows", "window_shards"],
        ),
        ({"recipe.order.kind": "stream"}, ["recipe.stream"]),
        ({"recipe.stream": "pipe:cat x"}, ["{}"]),
        ({"recipe.stream": "pipe:cat {}", "recipe.order.kind": "window"}, ["random access"]),
        ({"recipe.order.window": 3}, ["recipe.order", "window_shards"]),
    ],
)
def test_what_the_storage_does_not_allow_is_refused_before_anything_starts(tmp_path, server, changes, words):
    with pytest.raises(UserError) as error:
        open_run(load(tmp_path, server.url, **changes), 2, range(2))
    for word in words:
        assert word in str(error.value)
    assert not list((tmp_path / "cache").glob("*.tar"))


# ---------------------------------------------------------------- shards in a cache


@pytest.mark.parametrize("changes", [WINDOW, {}, {"recipe.order.kind": "uniform"}], ids=["window", "auto", "uniform"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_ranks_read_what_the_local_copy_holds_and_fetch_each_shard_once(
    tmp_path, many_shards, server, changes, world_size
):
    experiment, updates = load(tmp_path, server.url, **changes), range(10)  # two epochs and a half
    read = read_as_ranks(experiment, world_size, updates)
    assert read == expected(experiment, many_shards, world_size, updates)
    shards = {shard.path.name: shard.size for shard in load_split(many_shards, "train").shards}
    sent = {name: traffic.sent for name, traffic in server.traffic.items() if name in shards}
    assert sent == shards, "every byte of every shard once"


def test_reading_goes_on_from_the_middle_of_an_epoch(tmp_path, many_shards, server):
    experiment = load(tmp_path, server.url, **WINDOW)
    assert read_as_ranks(experiment, 2, range(2, 7)) == expected(experiment, many_shards, 2, range(2, 7))


def test_a_cache_smaller_than_the_data_is_never_exceeded_and_loses_nothing(tmp_path, tiny_shards):
    """65 shards of two images, and room for 30: just what the windows of 4 ranks and an evaluation need."""
    data = tmp_path / "shards"
    assert shards_main(["prepare", "webdataset", str(tiny_shards), str(data), "--shards", "65", "--workers", "1"]) == 0
    largest = max(shard.size for name in ("train", "val") for shard in load_split(data, name).shards)
    small = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "recipe.order.kind": "window",
        "recipe.order.window_shards": 2,
        "recipe.order.streams": 1,
        "recipe.loader.prefetch": 1,
    }
    updates = range(4 * TRAIN // 8)
    with serve(data) as server:
        for room in (20, 30):
            experiment = load(tmp_path, server.url, **small, **{"recipe.cache.gigabytes": room * largest / 1e9})
            if room == 20:
                with pytest.raises(UserError, match="1 stream on a host × 6 windows"):
                    open_run(experiment, 4, range(4))
        watched: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.002):
                watched.append(tar_bytes(tmp_path / "cache"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        read = read_as_ranks(experiment, 4, updates)
        stop.set()
        watcher.join()
        assert read == expected(experiment, data, 4, updates)
        assert 20 * largest < max(watched) <= 30 * largest
        fetched = sum(traffic.requests for name, traffic in server.traffic.items() if name.startswith("train"))
        assert 65 < fetched < 3 * 65, "four epochs out of a cache of less than half"


def assert_evaluation_is_exact(experiment: config.Config, split, data: Path, *, contiguous: bool) -> None:
    """On 1 and 3 ranks: every image of the local copy, once."""
    local = ShardReader(load_split(data, "val"))
    for world_size in (1, 3):
        ids = []
        for rank in range(world_size):
            reader = evaluation_reader(split, experiment.recipe, rank=rank, world_size=world_size)
            with contextlib.closing(reader):
                for request in evaluation_requests(VAL, 4, 32, rank, world_size, contiguous=contiguous):
                    reader.expect(request.last)
                    for sample, weight in zip(request.ids.tolist(), request.weights, strict=True):
                        assert reader.read(sample) == local.read(sample)
                        ids += [sample] * bool(weight)
                    reader.passed(request.first)
        assert sorted(ids) == list(range(VAL))
    local.close()


def test_evaluation_reads_every_image_once_whatever_the_ranks(tmp_path, many_shards, server):
    experiment = load(tmp_path, server.url)
    split = dataset.open_split(experiment.recipe, "val")
    assert_evaluation_is_exact(experiment, split, many_shards, contiguous=False)


def open_shards() -> int:
    """Descriptors of tars and crop indexes."""
    names = [path.readlink().suffix for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return names.count(".tar") + names.count(".cropindex")


def test_extents_of_cached_shards_are_those_of_local_ones(tmp_path, many_shards, server):
    experiment = load(tmp_path, server.url)
    split = dataset.open_split(experiment.recipe, "train")
    before = open_shards()
    local = ShardReader(load_split(many_shards, "train"))
    ids = np.random.default_rng(0).permutation(TRAIN)[:40].astype(np.int64)
    with contextlib.closing(evaluation_reader(split, experiment.recipe, rank=0, world_size=1)) as reader:
        reader.expect(TRAIN)
        for part in (ids[:7], ids, ids[::-1].copy()):
            with reader.extents(part) as ours, local.extents(part) as theirs:
                assert ours.labels.tolist() == theirs.labels.tolist()
                for field in ("offset", "size", "row"):
                    np.testing.assert_array_equal(ours.extents[field], theirs.extents[field])
                for place, sample in zip(ours.extents, part.tolist(), strict=True):
                    image = os.pread(int(place["descriptor"]), int(place["size"]), int(place["offset"]))
                    assert image == local.read(sample).image == reader.read(sample).image
    local.close()
    assert open_shards() == before


def test_cached_shards_are_loaded_as_local_ones_are(tmp_path, many_shards, server):
    experiment = load(tmp_path, server.url)
    recipe, batches = experiment.recipe, []
    for split in (dataset.open_split(recipe, "val"), load_split(many_shards, "val")):
        with (
            contextlib.closing(evaluation_reader(split, recipe, rank=0, world_size=1)) as reader,
            Loader(
                reader,
                make_decoder(recipe.transform, 0),
                evaluation_requests(VAL, 16, recipe.transform.size, 0, 1),
                threads=2,
                prefetch=2,
            ) as loader,
        ):
            batches.append(list(loader))
            assert loader.take_tally().images == 48
    for ours, theirs in zip(*batches, strict=True):
        assert ours.images.equal(theirs.images) and ours.labels.equal(theirs.labels)


def test_a_server_that_cuts_and_corrupts_costs_time_and_no_sample(tmp_path, many_shards, server):
    server.fault = lambda request: (
        None
        if not request.name.endswith(".tar")
        else [Fault(cut=3000), Fault(corrupt=True), None][min(request.number, 2)]
    )
    experiment = load(tmp_path, server.url, **WINDOW)
    assert read_as_ranks(experiment, 2, range(5)) == expected(experiment, many_shards, 2, range(5))


def test_a_shard_that_is_gone_ends_the_reading_with_its_address(tmp_path, many_shards, server):
    server.fault = lambda request: Fault(status=404) if request.name == "train-00005.tar" else None
    experiment = load(tmp_path, server.url)
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"train-00005\.tar"):
        read_as_ranks(experiment, 2, range(5))
    assert time.perf_counter() - began < 20


def test_closing_while_a_server_is_silent_is_prompt(tmp_path, many_shards, server):
    server.fault = lambda request: Fault(stall=30) if request.name.endswith(".tar") else None
    experiment = load(tmp_path, server.url, **WINDOW)
    plan, train, _ = open_run(experiment, 1)
    reader = training_reader(train, experiment.recipe, plan.order, plan.batch, rank=0, local_ranks=range(1), position=0)
    assert isinstance(reader, CachedReader)
    requests = training_requests(plan.order, plan.batch, plan.config.recipe.transform, 0, 0, 10)
    loader = Loader(reader, make_decoder(experiment.recipe.transform, 0), requests, threads=2, prefetch=2)
    loader._submit_ahead()
    time.sleep(0.3)
    began = time.perf_counter()
    loader.close()
    assert time.perf_counter() - began < 2
    reader.close()
    assert time.perf_counter() - began < 6


class NoDecoder:
    """In the place of a decoder: the images themselves are compared elsewhere."""

    class transform:  # noqa: N801  as a decoder names it
        size = 4

    reads_files = False

    def image(self, *_) -> None: ...


def load_rank(world, path: str, updates: int) -> list[int]:
    """One rank's ids through the real loader, in lock-step with the others, evaluating on the way."""
    import torch.distributed as dist

    experiment = config.load(path)
    recipe = experiment.recipe
    plan, train, validation = open_run(experiment, world.size, world.local_ranks)
    batch, threads, prefetch = plan.batch, 2, recipe.loader.prefetch
    reader = training_reader(
        train, recipe, plan.order, batch, rank=world.rank, local_ranks=world.local_ranks, position=0
    )
    requests = training_requests(plan.order, batch, plan.config.recipe.transform, world.rank, 0, updates)
    ids: list[int] = []
    with (
        contextlib.closing(reader),
        Loader(reader, NoDecoder(), requests, threads=threads, prefetch=prefetch) as loader,
    ):
        for number, micro_batch in enumerate(loader):
            ids += micro_batch.ids.tolist()
            dist.barrier()
            if number % 20 == 10:
                evaluating = evaluation_reader(
                    validation, recipe, rank=world.rank, world_size=world.size, training=reader
                )
                wanted = evaluation_requests(VAL, 2, 32, world.rank, world.size)
                with (
                    contextlib.closing(evaluating),
                    Loader(evaluating, NoDecoder(), wanted, threads=threads, prefetch=prefetch) as images,
                ):
                    assert sum(int(batch.weights.sum()) for batch in images) == len(range(world.rank, VAL, world.size))
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [1, 6])
def test_ranks_that_share_a_cache_just_large_enough_never_wait_for_each_other(tmp_path, tiny_shards, prefetch):
    data = tmp_path / "shards"
    assert shards_main(["prepare", "webdataset", str(tiny_shards), str(data), "--shards", "65", "--workers", "1"]) == 0
    changes = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "recipe.order.kind": "window",
        "recipe.order.window_shards": 2,
        "recipe.order.streams": 2,
        "recipe.loader.prefetch": prefetch,
    }
    with serve(data) as server:
        plan, train, validation = open_run(load(tmp_path, server.url, **changes), 4, range(4))
        needed = dataset.residence(plan.config.recipe, plan.order, train, validation, range(4), 4)
        assert needed is not None
        experiment = load(tmp_path, server.url, **changes, **{"recipe.cache.gigabytes": (needed.total + 1) / 1e9})
        answers = fork_ranks(load_rank, 4, str(experiment.path), 100)
    for rank, ids in enumerate(answers):
        wanted = [
            request.ids
            for request in training_requests(plan.order, plan.batch, plan.config.recipe.transform, rank, 0, 100)
        ]
        assert ids == np.concatenate(wanted).tolist()


# ---------------------------------------------------------------- shards through a command


def stream_of(tmp_path: Path, data: Path, command: str = "pipe:cat {place}/{{}}", **changes) -> config.Config:
    pattern = command.format(place=data)
    return load(
        tmp_path,
        data,
        **{"recipe.stream": pattern, "recipe.order.streams": 2, "recipe.order.shuffle_buffer": 10} | changes,
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_command_gives_the_same_samples_as_the_index(tmp_path, many_shards, world_size):
    experiment = stream_of(tmp_path, many_shards)
    plan, _, _ = open_run(experiment, world_size)
    assert plan.order.name == "stream-v1, 10 images × 2 streams"
    assert read_as_ranks(experiment, world_size, range(10)) == expected(experiment, many_shards, world_size, range(10))
    windowed = open_run(load(tmp_path, many_shards, **WINDOW), world_size)[0]
    assert np.array_equal(plan.order.at(np.arange(400)), windowed.order.at(np.arange(400)))
    assert plan.digest == windowed.digest, "the same shards"


def test_a_stream_goes_on_from_the_middle_by_skipping(tmp_path, many_shards):
    log = tmp_path / "opened"
    experiment = stream_of(tmp_path, many_shards, f"pipe:echo {{{{}}}} >> {log}; cat {{place}}/{{{{}}}}")
    assert read_as_ranks(experiment, 2, range(2, 5)) == expected(experiment, many_shards, 2, range(2, 5))
    assert len(set(log.read_text().split())) <= 13
    assert len(log.read_text().split()) < 16, "the shards before the position were not opened"


def test_timms_info_alone_is_enough(tmp_path, many_shards):
    meta = tmp_path / "meta"
    meta.mkdir()
    for name in ("_info.json", "classes.json"):
        shutil.copy(many_shards / name, meta)
    experiment = load(
        tmp_path, meta, **{"recipe.stream": f"pipe:cat {many_shards}/{{}}", "recipe.order.shuffle_buffer": 10}
    )
    read = read_as_ranks(experiment, 1, range(5))
    assert sorted(map(hash, read[0][:TRAIN])) == sorted(
        map(hash, expected(experiment, many_shards, 1, range(5))[0][:TRAIN])
    )


def test_a_streamed_evaluation_is_exact_in_contiguous_shares(tmp_path, many_shards):
    experiment = stream_of(tmp_path, many_shards)
    split = dataset.open_split(experiment.recipe, "val")
    assert_evaluation_is_exact(experiment, split, many_shards, contiguous=True)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pipe:false {{}}", ["cannot be read"]),
        ("pipe:head -c 5000 {place}/{{}}", ["train-000"]),
        ("pipe:cat {place}/{{}} | head -c 20480", ["train-000"]),
        ("pipe:cat {place}/val-00000.tar # {{}}", ["samples, the index says"]),
        ("pipe:echo no tar {{}}", ["cannot be read"]),
        ("ftq://host/{{}}", ["ftq"]),
    ],
)
def test_a_stream_that_is_not_what_the_index_says_is_an_error(tmp_path, many_shards, command, words):
    experiment = stream_of(tmp_path, many_shards, command)
    with pytest.raises(UserError) as error:
        read_as_ranks(experiment, 1, range(5))
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "name", ["a;touch x", "../up.tar", "/root.tar", "-rf", "$(id).tar", "a b.tar", "a'b.tar", "a\nb"]
)
def test_a_shards_name_cannot_become_a_command(tmp_path, many_shards, name):
    meta = tmp_path / "meta"
    meta.mkdir()
    shutil.copy(many_shards / "classes.json", meta)
    info = json.loads((many_shards / "_info.json").read_text())
    info["splits"]["train"]["filenames"][3] = name
    (meta / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="shard name"):
        open_run(load(tmp_path, meta, **{"recipe.stream": "pipe:cat {}"}), 1)


def test_closing_a_stream_ends_its_commands(tmp_path, many_shards):
    experiment = stream_of(tmp_path, many_shards, "pipe:sleep 3600; cat {place}/{{}}")
    plan, train, _ = open_run(experiment, 1)
    reader = training_reader(train, experiment.recipe, plan.order, plan.batch, rank=0, local_ranks=range(1), position=0)
    assert isinstance(reader, StreamReader)
    began = time.perf_counter()
    reader.close()
    assert time.perf_counter() - began < 4
    assert not [child for child in psutil.Process().children(recursive=True) if "sleep" in child.name()]


def test_a_command_that_hangs_does_not_outlive_a_rank_that_is_killed(tmp_path, many_shards):
    experiment = stream_of(tmp_path, many_shards, "pipe:exec sleep 3601 # {{}}")
    code = (
        "import sys, time; from pipeline import config; from pipeline.experiment import open_run; "
        "from pipeline.readers import training_reader\n"
        "e = config.load(sys.argv[1]); plan, train, _ = open_run(e, 1)\n"
        "training_reader(train, e.recipe, plan.order, plan.batch, rank=0, local_ranks=range(1), position=0)\n"
        "time.sleep(0.5); print('started', flush=True); time.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code, str(experiment.path)], stdout=subprocess.PIPE)
    assert rank.stdout is not None and rank.stdout.readline() == b"started\n"
    commands = psutil.Process(rank.pid).children(recursive=True)
    assert len(commands) == 2, "one of each stream"
    rank.kill()
    rank.wait()
    _, alive = psutil.wait_procs(commands, timeout=5)
    assert not alive


def test_a_stream_that_gives_nothing_is_given_up(tmp_path, many_shards, monkeypatch):
    monkeypatch.setattr("pipeline.stream.PATIENCE", 0.3)
    with pytest.raises(UserError, match="nothing has arrived"):
        read_as_ranks(stream_of(tmp_path, many_shards, "pipe:sleep 3602; cat {place}/{{}}"), 1, range(1))


def test_shards_listed_by_url_need_no_stream(tmp_path, many_shards, server):
    meta = tmp_path / "meta"
    meta.mkdir()
    shutil.copy(many_shards / "classes.json", meta)
    index = json.loads((many_shards / "index.json").read_text())
    for part in index["datasets"]:
        for shard in part["shardlist"]:
            shard["url"] = f"{server.url}/{shard['url']}"
    (meta / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"need no recipe\.stream"):
        open_run(load(tmp_path, meta, **{"recipe.stream": "pipe:cat {}"}), 1)
    assert len(open_run(load(tmp_path, meta), 1)[1]) == TRAIN


# ---------------------------------------------------------------- secrets, and other people's commands


def test_secrets_in_addresses_are_not_shown(tmp_path, many_shards, server):
    secret = server.url.replace("://", "://user:SECRET@") + "?token=SECRET"
    loaded = load(tmp_path, many_shards)
    experiment = config.load(loaded.path, [f"recipe.data={json.dumps(secret)}"])
    plan, _, _ = open_run(experiment, 2)
    assert "SECRET" not in json.dumps(plan.summary()) + str(plan.page())
    assert experiment.resolved()["recipe"]["data"] == secret, "the run itself needs it"


def test_a_run_folders_command_is_not_run_by_evaluate(tmp_path, many_shards, monkeypatch, capsys):
    from pipeline.cli import main

    trap = tmp_path / "trap"
    experiment = stream_of(tmp_path, many_shards, f"pipe:touch {trap}; cat {{place}}/{{{{}}}}")
    folder = tmp_path / "runs" / "copied"
    folder.mkdir(parents=True)
    (folder / "config.resolved.json").write_text(json.dumps(experiment.resolved()))
    (folder / "model.safetensors").write_bytes(b"")
    assert main(["evaluate", str(folder)]) == 2
    assert "--config FILE" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--data", str(many_shards)]) == 2, "there are no weights in it"
    assert not trap.exists()


def facts_of(path: str) -> dict:
    from pipeline.prepared import Prepared, prepare

    class World:
        size, local_ranks = 2, range(2)

    return Prepared.facts(prepare(path, [], World()))  # type: ignore[arg-type]


def test_hosts_whose_shards_lie_in_different_places_do_not_agree(tmp_path, many_shards, server):
    here = facts_of(str(load(tmp_path, many_shards).path))
    there = facts_of(str(load(tmp_path, server.url, "there").path))
    assert here["training shards"] == there["training shards"]
    assert here["order"] != there["order"]


def test_hosts_that_would_decode_differently_do_not_agree(tmp_path, many_shards, monkeypatch):
    from shards import jpeg

    path = str(load(tmp_path, many_shards).path)
    monkeypatch.setattr(jpeg, "unavailable", lambda: None)
    monkeypatch.setattr(jpeg, "describe", lambda: "C extension")
    here = facts_of(path)
    monkeypatch.setattr(jpeg, "unavailable", lambda: "was not built")
    there = facts_of(path)
    assert [name for name in here if here[name] != there[name]] == ["decoder", "versions"]
    assert here["decoder"] == "native" and there["decoder"] == "simplejpeg"
    assert "simplejpeg" in there["versions"]


@pytest.mark.parametrize("choice", ["native", "pillow"])
def test_hosts_need_not_have_the_decoders_that_are_not_used(tmp_path, many_shards, monkeypatch, choice):
    """What the message says helps: naming a decoder that all have, whatever else they have."""
    from shards import jpeg

    path = str(load(tmp_path, many_shards, **{"recipe.loader.decoder": choice}).path)
    monkeypatch.setattr(jpeg, "unavailable", lambda: None)
    here = facts_of(path)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setattr(
        "pipeline.prepared.versions", lambda: {key: n for key, n in versions().items() if key != "simplejpeg"}
    )
    assert facts_of(path) == here


# ---------------------------------------------------------------- whole runs


def train_rank(world, path: str, stop_at: int | None = None) -> None:
    """The training of one rank, ended by an exception after the first save at or after update `stop_at`."""
    from pipeline.prepared import Prepared, prepare
    from pipeline.run import Run
    from pipeline.together import prepare_together

    class StopError(Exception):
        pass

    class StoppingRun(Run):
        def _save(self) -> str:
            line = super()._save()
            if stop_at is not None and self.step >= stop_at:
                raise StopError
            return line

    prepared = prepare_together(lambda: prepare(path, [], world), Prepared.facts)
    with contextlib.suppress(StopError), StoppingRun(prepared, world) as run:
        run.train()


@pytest.mark.slow  # the readers of this file are compared with the index by the tests above
def test_remote_and_streamed_runs_are_the_local_training(tmp_path, many_shards, server):
    """Window order: local on 1 rank; remote on 2, stopped and resumed on 8, from a server that cuts every connection
    once and corrupts every shard once; streamed on 2. Without BN, which amplifies the rounding of sums.
    """
    faults = [Fault(cut=5000), Fault(corrupt=True)]
    server.fault = lambda request: (
        faults[request.number] if request.name.endswith(".tar") and request.number < 2 else None
    )
    often = {"recipe.checkpoint.every_epochs": 0.45, "train_micro_batch_size_per_gpu": 4, **BN_FREE}
    local = load(tmp_path, many_shards, "local", **WINDOW, **often)
    remote = load(tmp_path, server.url, "remote", **WINDOW, **often)
    stream = load(
        tmp_path,
        many_shards,
        "stream",
        **often,
        **{
            "recipe.stream": f"pipe:cat {many_shards}/{{}}",
            "recipe.order.streams": 2,
            "recipe.order.shuffle_buffer": 10,
        },
    )
    fork_ranks(train_rank, 1, str(local.path))
    fork_ranks(train_rank, 2, str(remote.path), 5)
    fork_ranks(train_rank, 8, str(remote.path))
    fork_ranks(train_rank, 2, str(stream.path))
    requests = {name: traffic.requests for name, traffic in server.traffic.items() if name.endswith(".tar")}
    assert len(requests) == 17 and set(requests.values()) == {3}, "cut, corrupt, whole: one download by ten processes"
    runs = [experiment.run_folder for experiment in (local, remote, stream)]
    assert "resume" in [event["event"] for event in read_metrics(runs[1] / "metrics.jsonl")]
    orders = [next(iter(read_metrics(run / "metrics.jsonl")))["order"] for run in runs]
    assert orders == ["window-v1, 10 images × 2 streams"] * 2 + ["stream-v1, 10 images × 2 streams"]
    updates = [read_samples(run) for run in runs]
    for number, update in updates[0].items():
        for other in updates[1:]:
            assert np.array_equal(update.ids, other[number].ids) and update.lr == other[number].lr
    for run in runs:
        for row in audit(run, TRAIN)[:3]:
            assert (row["used"], row["missing"], row["repeated"]) == (TRAIN, 0, 0)
    ours = load_file(runs[0] / "model.safetensors")
    for run in runs[1:]:
        for name, tensor in load_file(run / "model.safetensors").items():
            if "num_batches" not in name:
                difference = (tensor - ours[name]).abs().max() / ours[name].abs().max().clamp(min=1e-3)
                assert difference < 2e-5, f"{run.name}: {name} differs by {difference:.1e}"


def test_a_streamed_sample_with_two_images_is_refused():
    split = SimpleNamespace(labels=Labels(), classes=("a",))
    sample = {"__key__": "k", "png": b"mask", "jpg": b"photo", "cls": b"0"}
    with pytest.raises(UserError, match=r"x\.tar: key k: has 2 images: \.png and \.jpg"):
        _Shards._encoded(SimpleNamespace(_split=split), "x.tar", sample, 0, 0)
    del sample["png"]
    assert _Shards._encoded(SimpleNamespace(_split=split), "x.tar", sample, 0, 0).image == b"photo"
