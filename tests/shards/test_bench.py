"""`shards bench`: rates that agree with an independent clock, an emptied page cache, and advice that follows."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from shards.advice import advise
from shards.bench import ROUNDS, Way, _Data, bench, parse_threads
from shards.cli import main
from shards.errors import UserError
from shards.index import load_split
from shards.pagecache import Residence, available_memory, drop, resident_share


@pytest.fixture
def run_bench(capsys):
    """Run the command line: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_measurements_of_a_small_set(prepared, run_bench):
    started = time.perf_counter()
    code, said, error = run_bench(prepared, "--seconds", 2, "--threads", "2,1", "--json")
    assert code == 0 and not error
    assert time.perf_counter() - started < 15
    report = json.loads(said)
    ways = [(way["order"], way["threads"], way["cold"]) for way in report["measurements"]]
    once = [("sequential", 1), ("window", 2), ("random", 1), ("random", 2)]
    assert ways == [(*way, True) for way in once] + [(*way, False) for way in once]
    for way in report["measurements"]:
        assert len(way["rounds"]) == ROUNDS and min(way["rounds"]) <= way["images_per_second"] <= max(way["rounds"])
        # images and bytes come from one reading, so their ratio is the size of an image
        per_image = way["bytes_per_second"] / way["images_per_second"]
        if way["order"] == "sequential":  # headers, labels and padding are read as well
            assert report["bytes_per_image"] < per_image <= report["bytes"] / report["images"]
        else:
            assert per_image == pytest.approx(report["bytes_per_image"], rel=0.3)
    assert report["images"] == 60 and report["advice"]
    code, said, _ = run_bench(prepared, "--seconds", 1, "--cold", "--demand", 1)
    assert code == 0 and "from memory" not in said and "uniform order gives" in said


def test_the_page_cache_is_emptied_and_looked_at(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        place = Residence(file.fileno(), 1000, (1 << 20) - 1000)
        file.read()
        assert resident_share([place]) == 1.0
        drop([file.fileno()])
        if resident_share([place]) == 1.0:
            pytest.skip("this file system lies in memory")
        assert resident_share([place]) == 0.0
        os.pread(file.fileno(), 4096, 0)
        assert 0 < resident_share([Residence(file.fileno(), 0, 4096)]) <= 1
    assert resident_share([]) == 1.0, "what cannot be told is taken to be there"
    assert available_memory() is None or 1 << 20 < available_memory() < 1 << 50


def report_of(*, random: dict[int, float], window: float, sequential: float, warm: float = 1e5, **fields) -> dict:
    def way(order: str, threads: int, rate: float, cold: bool = True) -> dict:
        return {"order": order, "threads": threads, "cold": cold, "images_per_second": rate}

    return {
        "measurements": [
            way("sequential", 1, sequential),
            way("window", 8, window),
            *(way("random", threads, rate) for threads, rate in random.items()),
            way("random", 8, warm, cold=False),
        ],
        "page_cache_dropped": True,
        "bytes": 10**12,
        "memory_available": 10**10,
        "demand": 3000,
        **fields,
    }


def test_advice_follows_from_the_rates():
    fast = advise(report_of(random={1: 3000, 4: 9500, 16: 10_000}, window=10_000, sequential=12_000))
    assert (fast["order"], fast["saturating_threads"]) == ("uniform", 4)
    assert fast["random_to_sequential"] == pytest.approx(10 / 12)
    slow = advise(report_of(random={1: 100, 8: 400}, window=6000, sequential=7000))
    assert slow["order"] == "window" and '"kind": "window"' in " ".join(slow["advice"])
    assert "try more" in slow["advice"][0]
    fits = advise(report_of(random={1: 100, 8: 400}, window=6000, sequential=7000, bytes=10**9))
    assert fits["order"] == "uniform" and "later ones are not" in " ".join(fits["advice"])
    waits = advise(report_of(random={1: 100, 8: 400}, window=500, sequential=7000))
    assert waits["order"] == "window" and "would wait" in " ".join(waits["advice"])
    hopeless = advise(report_of(random={1: 100, 8: 400}, window=410, sequential=500))
    assert hopeless["order"] == "uniform" and "no order helps" in " ".join(hopeless["advice"])
    unknown = advise(report_of(random={8: 4500}, window=1, sequential=5000, demand=None))
    assert unknown["order"] is None and "up to 3,000 images/s" in " ".join(unknown["advice"])
    doubtful = advise(report_of(random={8: 9000}, window=1, sequential=9000, page_cache_dropped=False))
    assert "could not be emptied" in " ".join(doubtful["advice"])


def test_refusals(prepared, tmp_path):
    assert parse_threads("16,1,1") == (1, 16)
    for text in ("0", "", "1,,2", "-1", "a", "٣", "99999", "1.5"):
        with pytest.raises(UserError, match="--threads"):
            parse_threads(text)
    for options in ({"seconds": 0.1}, {"seconds": float("nan")}, {"demand": -1.0}, {"demand": float("nan")}):
        with pytest.raises(UserError, match=r"--(seconds|demand)"):
            bench(prepared, **options)
    with pytest.raises(UserError, match="no such folder"):
        bench(tmp_path / "absent")


def test_a_shard_that_shrinks_meanwhile(prepared, tmp_path):
    """What is not there any more is an error, not a rate."""
    root = tmp_path / "copy"
    shutil.copytree(prepared, root)
    split = load_split(root, "train")
    os.truncate(split.shards[0].path, 2000)
    data = _Data(split)
    with data.opened(), pytest.raises(UserError, match=r"train-00000\.tar: ends at byte"):
        data.measure(Way("random", 2, True), 0, 5)
