"""The cache of remote shards: real processes, a real server, real kills."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shards import jpeg
from shards.cache import ShardCache
from shards.cachefiles import network_file_system
from shards.cli import main
from shards.errors import UserError
from shards.fetch import Retry
from shards.index import load_split
from shards.labels import Labels
from shards.remote import RemoteSplit, open_remote
from tests.shards import cache_workers
from tests.shards.cache_workers import QUICK, expected_start
from tests.shards.faulty_server import Fault, FaultyServer, serve

SHARDS = 12
ROWS = 10


@pytest.fixture(scope="module")
def data_set(tmp_path_factory, write_tar) -> Path:
    """A data set of shards of about 200 kB, with images that are nothing but bytes."""
    folder = tmp_path_factory.mktemp("remote") / "data"
    random = np.random.default_rng(3)
    for shard in range(SHARDS):
        members = []
        for row in range(ROWS):
            members.append((f"s{shard}r{row}.cls", str(row % 5).encode()))
            members.append((f"s{shard}r{row}.jpg", expected_start(shard, row) + random.bytes(20_000 + 100 * row)))
        write_tar(folder / f"train-{shard:05d}.tar", members)
    assert main(["index", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def server(data_set) -> Iterator[FaultyServer]:
    with serve(data_set) as running:
        yield running


@pytest.fixture
def split(server, tmp_path) -> RemoteSplit:
    return open_remote(server.url, "train", tmp_path / "cache")


@pytest.fixture
def size(split) -> int:
    """Of each shard, in bytes: they are equal."""
    (size,) = {shard.size for shard in split.shards}
    return size


def cached(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def touch_all(cache: ShardCache, split: RemoteSplit, numbers: list[int]) -> None:
    for number in numbers:
        split.pin(cache, number).close()
        time.sleep(0.02)  # file times are coarse


@contextmanager
def running(*arguments) -> Iterator[object]:
    process = cache_workers.context.Process(target=arguments[0], args=arguments[1:], daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_a_pinned_shard_is_the_shard(split, data_set, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", SHARDS * size)
    local = load_split(data_set, "train")
    for number, shard in enumerate(local.shards):
        with split.pin(cache, number) as pin:
            assert pin.path == split.shards[number].path == tmp_path / "cache" / f"{shard.sha256}.tar"
            assert pin.path.read_bytes() == shard.path.read_bytes()
            assert pin.path.with_suffix(".idx").read_bytes() == shard.path.with_suffix(".idx").read_bytes()
            rows = local.samples[number * ROWS : (number + 1) * ROWS].copy()
            rows["shard"] = 0
            assert isinstance(pin.samples, np.memmap)
            assert not pin.samples.flags.writeable
            np.testing.assert_array_equal(pin.samples, rows)


def test_a_cached_shard_is_not_asked_for_again(split, server, tmp_path, size):
    for _ in range(3):
        split.pin(ShardCache(tmp_path / "cache", size), 0).close()
    assert server.traffic["train-00000.tar"].requests == 1


def test_eight_processes_and_a_server_that_cuts_and_corrupts(server, data_set, tmp_path):
    """Of every shard's requests the first is cut, the second corrupted, the third fine."""
    faults = {0: Fault(cut=50_000), 1: Fault(corrupt=True)}
    server.fault = lambda request: faults.get(request.number) if request.name.endswith(".tar") else None
    found = cache_workers.run(cache_workers.pin_all, [(server.url, tmp_path / "cache", seed) for seed in range(8)])
    local = load_split(data_set, "train")
    for process in found:
        assert sorted(process) == list(range(SHARDS))
        for number, (table, tar) in process.items():
            rows = local.samples[number * ROWS : (number + 1) * ROWS].copy()
            rows["shard"] = 0
            assert table == rows.tobytes()
            assert tar == local.shards[number].path.read_bytes()
    for shard in local.shards:
        traffic = server.traffic[shard.path.name]
        assert traffic.requests == 3, "cut, corrupt, right: one process asked, and only it"
        assert traffic.sent == 50_000 + 2 * shard.size
    kinds = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    crop_indexes = {} if jpeg.unavailable() else {".cropindex": SHARDS}
    assert {kind: kinds.count(kind) for kind in kinds} == {
        ".tar": SHARDS, ".idx": SHARDS, ".npy": SHARDS, ".lock": SHARDS + 1
    } | crop_indexes  # fmt: skip


def test_threads_share_a_download_too(split, server, tmp_path, size):
    server.fault = lambda request: Fault(stall=0.2)
    cache = ShardCache(tmp_path / "cache", size)
    pins = []
    threads = [threading.Thread(target=lambda: pins.append(split.pin(cache, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pins) == 8
    assert server.traffic["train-00000.tar"].requests == 1


def test_wrong_bytes_are_refused_in_the_end(split, server, tmp_path, size):
    server.fault = lambda request: Fault(corrupt=True)
    with pytest.raises(UserError, match=r"train-00002\.tar: is not the shard that the index describes") as caught:
        split.pin(ShardCache(tmp_path / "cache", size), 2)
    assert split.shards[2].sha256 in str(caught.value)
    assert "3 times in a row" in str(caught.value)
    assert server.traffic["train-00002.tar"].sent == 3 * size
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_damaged_beginning_is_fetched_again(split, server, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", size)
    shard = split.shards[0]
    (tmp_path / "cache" / f"{shard.sha256}-{size}.part").write_bytes(b"x" * 1000)
    with split.pin(cache, 0) as pin:
        assert pin.path.stat().st_size == size
    assert server.traffic["train-00000.tar"].ranges == [(1000, size), (0, size)]


def test_a_killed_download_is_gone_on_with(split, server, tmp_path, size):
    folder = tmp_path / "cache"
    server.fault = lambda request: Fault(drip=0.05, short=40_000) if request.number == 0 else Fault(drip=0.2)
    ready = tmp_path / "ready"
    with running(cache_workers.pin_and_wait, server.url, folder, 0, size, ready) as process:
        partial = folder / f"{split.shards[0].sha256}-{size}.part"
        # most of it is there, the rest is on its way
        wait_for(lambda: "train-00000.tar" in server.traffic and server.traffic["train-00000.tar"].requests == 2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    there = partial.stat().st_size
    assert there == size - 40_000
    server.fault = lambda request: None
    server.traffic.clear()
    started = time.perf_counter()
    split.pin(ShardCache(folder, size), 0).close()
    assert server.traffic["train-00000.tar"].ranges == [(there, size)]
    assert server.traffic["train-00000.tar"].sent == 40_000
    assert time.perf_counter() - started < 5, "the lock of the dead process held nobody up"


def test_others_wait_or_go_on(split, server, tmp_path, size):
    """While one process downloads, who must have the shard waits, and who fetches ahead takes the next one."""
    folder = tmp_path / "cache"
    cache = ShardCache(folder, SHARDS * size)
    server.fault = lambda request: Fault(stall=1) if request.name == "train-00000.tar" else None
    with running(cache_workers.pin_and_wait, server.url, folder, 0, SHARDS * size, tmp_path / "ready"):
        wait_for(lambda: server.traffic.get("train-00000.tar"))
        started = time.perf_counter()
        assert split.pin(cache, 0, wait=False) is None
        assert time.perf_counter() - started < 0.5
        with split.pin(cache, 1, wait=False) as pin:
            assert pin is not None
        with split.pin(cache, 0) as pin:
            assert pin.path.exists()
    assert server.traffic["train-00000.tar"].requests == 1


def test_who_waits_takes_over_from_the_killed(split, server, tmp_path, size):
    folder = tmp_path / "cache"
    server.fault = lambda request: Fault(stall=20) if request.number == 0 else None
    with running(cache_workers.pin_and_wait, server.url, folder, 0, size, tmp_path / "ready") as process:
        wait_for(lambda: server.traffic.get("train-00000.tar"))
        pins = []
        waiting = threading.Thread(target=lambda: pins.append(split.pin(ShardCache(folder, size), 0)))
        waiting.start()
        time.sleep(0.3)
        assert not pins
        os.kill(process.pid, signal.SIGKILL)
        waiting.join(10)
    assert len(pins) == 1
    assert server.traffic["train-00000.tar"].requests == 2


def test_a_download_that_does_not_move_is_named(split, server, tmp_path, size):
    folder = tmp_path / "cache"
    server.fault = lambda request: Fault(stall=20) if request.name.endswith(".tar") else None
    with running(cache_workers.pin_and_wait, server.url, folder, 0, size, tmp_path / "ready"):
        wait_for(lambda: server.traffic.get("train-00000.tar"))
        with pytest.raises(UserError, match="another process has been fetching it"):
            split.pin(ShardCache(folder, size, patience=0.5), 0)


def test_what_is_not_known_to_be_needed_goes_first_the_oldest_before_others(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", 4 * size)
    touch_all(cache, split, [0, 1, 2, 3, 0])
    names = [shard.sha256 for shard in split.shards]
    next_use = {names[2]: 1000, names[3]: 5}.get
    split.pin(cache, 4, next_use).close()  # 1 is unknown and older than 0
    assert cached(tmp_path / "cache") == {names[i] for i in (0, 2, 3, 4)}
    split.pin(cache, 5, {**{names[4]: 7}, names[2]: 1000, names[3]: 5}.get).close()  # 0 is unknown
    assert cached(tmp_path / "cache") == {names[i] for i in (2, 3, 4, 5)}
    split.pin(cache, 6, {names[2]: 1000, names[3]: 5, names[4]: 7, names[5]: 999}.get).close()  # 2 is needed last
    assert cached(tmp_path / "cache") == {names[i] for i in (3, 4, 5, 6)}


def test_fetching_ahead_never_drops_what_is_needed_sooner(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", 2 * size)
    touch_all(cache, split, [0, 1])
    names = [shard.sha256 for shard in split.shards]
    assert split.pin(cache, 2, {names[0]: 1, names[1]: 2, names[2]: 3}.get, wait=False) is None
    assert cached(tmp_path / "cache") == {names[0], names[1]}
    split.pin(cache, 2, {names[0]: 1, names[1]: 4, names[2]: 3}.get, wait=False).close()
    assert cached(tmp_path / "cache") == {names[0], names[2]}


def test_a_pinned_shard_is_never_removed(split, server, tmp_path, size):
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 2 * size)
    names = [shard.sha256 for shard in split.shards]
    with running(cache_workers.pin_and_wait, server.url, folder, 0, 2 * size, tmp_path / "ready"):
        wait_for((tmp_path / "ready").exists)
        mine = split.pin(cache, 1)
        again = split.pin(cache, 1)
        assert split.pin(cache, 2, wait=False) is None
        mine.close()
        mine.close()
        assert split.pin(cache, 2, wait=False) is None, "pinned twice, closed once"
        again.close()
        split.pin(cache, 2, wait=False).close()
        assert cached(folder) == {names[0], names[2]}
    split.pin(cache, 3, {names[2]: 1}.get, wait=False).close()  # the pin of the killed process is gone
    assert cached(folder) == {names[2], names[3]}


def test_no_room_is_an_error_after_a_while(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", 2 * size + 1, patience=0.3)
    with (
        split.pin(cache, 0),
        split.pin(cache, 1),
        pytest.raises(UserError, match=r"train-00002\.tar: no room in the cache") as caught,
    ):
        split.pin(cache, 2)
    assert f"{size:,} bytes are needed of a capacity of {2 * size + 1:,}; 2 shards in use take {2 * size:,}" in str(
        caught.value
    )


def test_waiting_for_room_ends_when_there_is_some(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", size)
    pin = split.pin(cache, 0)
    threading.Timer(0.3, pin.close).start()
    with split.pin(cache, 1) as other:
        assert other.path.exists()
        assert not pin.path.exists()


def test_a_shard_larger_than_the_cache(split, tmp_path, size):
    with pytest.raises(UserError, match=r"train-00000\.tar: larger than the cache") as caught:
        split.pin(ShardCache(tmp_path / "cache", size - 1), 0)
    assert f"{size:,}" in str(caught.value)
    assert f"{size - 1:,}" in str(caught.value)


def test_leftovers_count_and_go(split, server, tmp_path, size):
    """A part that nobody downloads any more counts as the shard that it would be, until the room is needed."""
    folder = tmp_path / "cache"
    cache = ShardCache(folder, size)
    left = folder / f"{split.shards[0].sha256}-{size}.part"
    left.write_bytes(b"x" * 10)
    split.pin(cache, 1).close()
    assert not left.exists()


def test_the_part_of_a_running_download_stays(split, server, tmp_path, size):
    folder = tmp_path / "cache"
    server.fault = lambda request: Fault(stall=1) if request.name == "train-00000.tar" else None
    with running(cache_workers.pin_and_wait, server.url, folder, 0, size, tmp_path / "ready"):
        wait_for(lambda: server.traffic.get("train-00000.tar"))
        assert split.pin(ShardCache(folder, size), 1, wait=False) is None
        wait_for((tmp_path / "ready").exists)


def test_a_failed_download_keeps_no_room(split, server, tmp_path, size):
    server.fault = lambda request: Fault(status=403)
    with pytest.raises(UserError, match="access denied"):
        split.pin(ShardCache(tmp_path / "cache", size, retry=QUICK), 0)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_tar_of_the_wrong_size_is_replaced(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", 2 * size)
    split.pin(cache, 0).close()
    path = split.shards[0].path
    os.truncate(path, 1000)
    with split.pin(cache, 0) as pin:
        assert pin.path.stat().st_size == size


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None], ids=["empty", "cut", "gone"])
def test_a_damaged_table_is_built_again(split, server, tmp_path, size, damage):
    cache = ShardCache(tmp_path / "cache", size)
    with split.pin(cache, 0) as pin:
        before = pin.samples.copy()
    table = split.shards[0].path.with_suffix(".npy")
    table.unlink() if damage is None else table.write_bytes(damage)
    with split.pin(cache, 0) as pin:
        np.testing.assert_array_equal(pin.samples, before)
    assert server.traffic["train-00000.tar"].requests == 1


def test_label_rules_have_tables_of_their_own(tmp_path, write_tar, size):
    """The same tar, whose .txt says other things than its .cls."""
    folder = tmp_path / "data"
    members = [(f"k{i}.{extension}", data) for i in range(4) for extension, data in
               (("jpg", b"x" * 100), ("cls", b"%d" % i), ("txt", b"%d" % (3 - i)))]  # fmt: skip
    write_tar(folder / "train-0.tar", members)
    assert main(["index", str(folder), "--workers", "1"]) == 0
    with serve(folder) as server:
        split = open_remote(server.url, "train", tmp_path / "cache")
        cache = ShardCache(tmp_path / "cache", 1 << 20)
        for labels, expected in ((None, [0, 1, 2, 3]), (Labels("txt"), [3, 2, 1, 0]), (None, [0, 1, 2, 3])):
            with cache.pin(split.shards[0], labels=labels) as pin:
                assert pin.samples["label"].tolist() == expected
        assert server.traffic["train-0.tar"].requests == 1


def test_a_child_does_not_unpin_what_its_parent_holds(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", size)
    with split.pin(cache, 0) as pin:
        child = os.fork()
        if not child:
            pin.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert split.pin(cache, 1, wait=False) is None
        assert os.pread(pin.descriptor, 10, 0)


def test_a_childs_copy_does_not_keep_what_its_parent_let_go(split, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", size)
    pin = split.pin(cache, 0)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        pin.close()
        split.pin(cache, 1, wait=False).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_capacity_holds_at_every_moment(server, split, tmp_path, size):
    """Four processes read 12 shards in random orders through a cache of five and a half, while this one watches."""
    _watch(server, split, tmp_path, processes=4, capacity=5 * size + size // 2, rounds=10)


@pytest.mark.slow
def test_the_capacity_holds_under_eight_processes_and_faults(server, split, tmp_path, size):
    server.fault = lambda request: (
        [None, Fault(cut=30_000), Fault(status=503), Fault(corrupt=True)][request.number % 4]
        if request.name.endswith(".tar")
        else None
    )
    _watch(server, split, tmp_path, processes=8, capacity=9 * size, rounds=60)


def _watch(server, split, tmp_path, processes: int, capacity: int, rounds: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    seen: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            total = 0
            for entry in os.scandir(folder):
                if entry.name.endswith((".tar", ".part")):
                    try:
                        total += entry.stat().st_size
                    except FileNotFoundError:
                        continue
            seen.append(total)
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        found = cache_workers.run(
            cache_workers.work_through, [(server.url, folder, capacity, seed, rounds) for seed in range(processes)]
        )
    finally:
        stop.set()
        watcher.join()
    assert found == [rounds * ROWS] * processes
    assert max(seen) <= capacity
    assert max(seen) > capacity - 2 * split.shards[0].size, "the capacity was put to use"
    assert sum(traffic.requests for name, traffic in server.traffic.items() if name.endswith("tar")) > SHARDS


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        ShardCache(tmp_path / "file" / "cache", 1)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be used: Permission denied"):
            ShardCache(tmp_path / "closed", 1)


def test_network_file_systems_are_recognised(tmp_path):
    mounts = f"""\
/dev/vda1 / ext4 rw,relatime 0 0
server:/home {tmp_path.resolve()} nfs4 rw,vers=4.2 0 0
tmpfs {tmp_path.resolve()}/local tmpfs rw 0 0
server:/b {tmp_path.resolve()}/with\\040blank cifs rw 0 0
"""
    assert network_file_system(tmp_path / "a" / "b", mounts) == "nfs4"
    assert network_file_system(tmp_path / "local" / "b", mounts) is None
    assert network_file_system(tmp_path / "with blank", mounts) == "cifs"
    assert network_file_system(tmp_path.parent, mounts) is None
    assert network_file_system(tmp_path) is None


def test_a_stalled_server_is_an_error(split, server, tmp_path, size):
    server.fault = lambda request: Fault(stall=30)
    started = time.perf_counter()
    with pytest.raises(UserError, match="tried 2 times"):
        split.pin(ShardCache(tmp_path / "cache", size, retry=Retry(2, 0.01, 0.2)), 0)
    assert time.perf_counter() - started < 4
