"""10⁹ images on 4,096 ranks: what one rank computes takes a moment and little memory, and no image comes twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline import config, plan
from pipeline.loader import training_requests
from pipeline.order import FEISTEL_ROUNDS, Order, _raw_words, micro_batch_positions

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "ds_configs/imagenet_8k.json"
BATCH = "train_batch_size=262144"  # 8,192 logical workers of 32
SAMPLES, RANKS, EPOCH, UPDATES = 10**9, 4096, 57, 300
SHARDS, STREAMS = 800_000, 8

MEASURED = f"""
import json, sys, time
from pathlib import Path
import numpy as np
from pipeline import config, plan
from pipeline.order import micro_batch_positions
from pipeline.window import WindowOrder

def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1000

Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, began = memory("VmRSS"), time.process_time()
planned = plan.resolve(config.load("{CONFIG}", ["{BATCH}"]), {RANKS}, samples={SAMPLES})
planned.summary(), planned.page()
batch, order = planned.batch, planned.order
if sys.argv[1] == "window":
    sizes = [{SAMPLES // SHARDS}] * {SHARDS}
    order = WindowOrder(
        sizes, 0, window=16 * sizes[0], streams={STREAMS}, update=batch.train, logical_workers=batch.logical_workers
    )
first_update = {SAMPLES} * {EPOCH} // batch.train + 1000
for update in range(first_update, first_update + {UPDATES}):
    for micro_step in range(batch.accumulation):
        start, stop = micro_batch_positions(
            update, micro_step, 1234, micro=batch.micro, accumulation=batch.accumulation, world_size={RANKS}
        )
        positions = np.arange(start, stop)
        ids, epochs = order.at(positions), order.epochs(positions)
used = time.process_time() - began, memory("VmHWM") - before
print(json.dumps([*used, planned.steps, epochs.tolist(), ids.tolist()]))
"""


@pytest.mark.parametrize("kind", ["uniform", "window"])
def test_one_rank_of_4096_over_a_billion_images(kind):
    """The plan, a seek into epoch 58 and 300 updates of one rank: CPU seconds and peak memory, both beyond imports.

    Measured: 0.1 s and 4 MB in the uniform order, 0.6 s and 86 MB in windows of 800,000 shards.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, kind],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, megabytes, steps, epochs, ids = json.loads(done.stdout)
    print(f"{kind}: {seconds:.2f} s, {megabytes:.0f} MB")
    assert seconds < (1 if kind == "uniform" else 3)
    assert megabytes < 200
    assert steps == 343_323  # ⌈90 · 10⁹ / 262,144⌉
    assert set(epochs) == {EPOCH}
    assert len(set(ids)) == 32 and min(ids) >= 0 and max(ids) < SAMPLES


def test_the_training_asks_for_what_was_measured():
    planned = plan.resolve(config.load(ROOT / CONFIG, [BATCH]), RANKS, samples=SAMPLES)
    batch, update = planned.batch, SAMPLES * EPOCH // planned.batch.train + 1000
    transform = planned.config.recipe.transform
    requests = training_requests(planned.order, batch, transform, 1234, update, planned.steps)
    for number, request in enumerate(islice(requests, 4)):
        start, stop = micro_batch_positions(
            update + number // 2, number % 2, 1234, micro=32, accumulation=2, world_size=RANKS
        )
        assert (request.first, request.last) == (start, stop - 1)
        assert np.array_equal(request.ids, Order(SAMPLES, 0).ids(start, stop))


def sampled_positions(pieces: int) -> np.ndarray:
    """Positions of as many different (rank, update) of one epoch, drawn at random: [pieces × 64]."""
    train, per_rank = 262_144, 64
    first, last = -(-SAMPLES * EPOCH // train), SAMPLES * (EPOCH + 1) // train
    drawn = np.random.default_rng(7).choice((last - first) * RANKS, size=pieces, replace=False)
    updates, ranks = first + drawn // RANKS, drawn % RANKS
    return ((updates * train + ranks * per_rank)[:, None] + np.arange(per_rank)).reshape(-1)


def test_no_image_comes_twice_in_5000_pieces_of_an_epoch():
    """320,000 ids drawn with replacement would have 51 pairs alike on average."""
    positions = sampled_positions(5000)
    ids = Order(SAMPLES, 0).at(positions)
    assert set(Order(SAMPLES, 0).epochs(positions).tolist()) == {EPOCH}
    assert len(np.unique(positions)) == len(np.unique(ids)) == 320_000
    assert np.bincount(ids * 16 // SAMPLES, minlength=16).min() > 19_000, "from everywhere"


def position_of(ids: np.ndarray, samples: int, purpose: str) -> np.ndarray:
    """Where the order has put an id: the Feistel network backwards, in Python's integers."""
    bits = (samples - 1).bit_length()
    low_bits = bits // 2
    keys = [int(key) for key in _raw_words(purpose, FEISTEL_ROUNDS)]

    def mix(half: int, key: int) -> int:
        mixed = (half + key) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return mixed ^ mixed >> 31

    def back(value: int) -> int:
        low, high = value % 2**low_bits, value >> low_bits
        for number in reversed(range(FEISTEL_ROUNDS)):
            if number % 2:
                low ^= mix(high, keys[number]) % 2**low_bits
            else:
                high ^= mix(low, keys[number]) % 2 ** (bits - low_bits)
        return high << low_bits | low

    found = []
    for value in ids.tolist():
        value = back(value)
        while value >= samples:
            value = back(value)
        found.append(value)
    return np.array(found)


def test_every_image_has_one_position_which_can_be_computed():
    """An inverse that holds at every sampled id, and from every sampled position, is what makes the order exact."""
    positions = sampled_positions(50)
    offsets = positions - SAMPLES * EPOCH
    assert np.array_equal(position_of(Order(SAMPLES, 0).at(positions), SAMPLES, f"0:{EPOCH}"), offsets)
    ids = np.random.default_rng(1).integers(0, SAMPLES, 2000)
    back = position_of(ids, SAMPLES, f"0:{EPOCH}")
    assert np.array_equal(Order(SAMPLES, 0).at(SAMPLES * EPOCH + back), ids)
