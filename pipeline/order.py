"""Which sample stands at which position: a pure function of (seed, position), the same on any number of ranks.

This is the uniform order, for shards that can be read anywhere; `window` is the one for shards that come by network.

A run is one infinite stream, the concatenation of one random permutation of the N samples per epoch (the paper's
fourth remark: one permutation per epoch, divided among all k workers). Update t takes positions [t·kn, (t+1)·kn);
nothing is padded, dropped or repeated, and an update that crosses an epoch's end takes its remainder from the next
permutation.

Two orders, chosen by N alone. Their names go into the checkpoint, because they define what a position means:

- `argsort-v1`, N ≤ 65,536: a stable argsort of N raw Philox words. Unbiased for any N.
- `feistel-v1`, larger N: a keyed Feistel network over the next power of two, values ≥ N walked on until they fall
  below N (Black & Rogaway 2002, "cycle walking"). No memory proportional to N and no start-up: at N = 10⁹ a slice
  of 8,192 positions takes under a millisecond.

NumPy guarantees the streams of its bit generators but not `Generator.permutation`, so only raw words are used.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Protocol

import numpy as np

ARGSORT_LIMIT = 65_536
FEISTEL_ROUNDS = 8


class SampleStream(Protocol):
    """Which sample stands at which position of a run; every epoch of it is a permutation of all samples."""

    samples: int
    """N."""
    name: str
    """Kind, version and numbers: what a position means depends on them, so checkpoints hold it."""

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at any positions: int64, of the shape of `positions` (int64, ≥ 0)."""

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch (0-based) that each position belongs to: int64."""


def order_name(samples: int) -> str:
    """The name and version of the order used for a data set of `samples` samples."""
    return "argsort-v1" if samples <= ARGSORT_LIMIT else "feistel-v1"


class Order:
    """The stream of sample ids of one run.

    Args:
        samples: N, the size of the training split.
        seed: the run's seed.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError("an order needs at least one sample")
        self.samples = samples
        self.seed = seed
        self.name = order_name(samples)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Sample ids at positions [start, stop) of the stream: int64 of shape (stop - start,)."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at any positions: int64, of the shape of `positions` (int64, ≥ 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._permute(int(epoch), offsets[chosen])
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch (0-based) that each position belongs to: int64."""
        return np.asarray(positions, dtype=np.int64) // self.samples

    def _permute(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        return permute(offsets, self.samples, f"{self.seed}:{epoch}")


def permute(values: np.ndarray, size: int, purpose: str) -> np.ndarray:
    """Where a random permutation of range(size), a function of `purpose` alone, takes `values`: int64, same shape."""
    if order_name(size) == "argsort-v1":
        return _argsort_permutation(size, purpose)[values]
    return _feistel(values, size, purpose)


def _raw_words(purpose: str, count: int) -> np.ndarray:
    """`count` raw 64-bit words of a Philox stream of its own for each purpose."""
    key = hashlib.sha256(purpose.encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


@lru_cache(maxsize=32)  # of at most 512 KiB each: this epoch and the next, or this window and the next of 16 streams
def _argsort_permutation(size: int, purpose: str) -> np.ndarray:
    return np.argsort(_raw_words(purpose, size), kind="stable")


def _feistel(values: np.ndarray, samples: int, purpose: str) -> np.ndarray:
    """Permute `values` within [0, samples) by an unbalanced Feistel network with cycle walking."""
    keys = [np.uint64(word) for word in _raw_words(purpose, FEISTEL_ROUNDS)]
    bits = (samples - 1).bit_length()
    low_bits = bits // 2
    result = values.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        walked = _feistel_pass(result[pending], low_bits, bits - low_bits, keys)
        result[pending] = walked
        pending = pending[walked >= samples]
    return result.astype(np.int64)


def _feistel_pass(values: np.ndarray, low_bits: int, high_bits: int, keys: list[np.uint64]) -> np.ndarray:
    """One pass: each round masks one half with a mix of the other, which is its own inverse."""
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_mix(high, key) & low_mask)
        else:
            high = high ^ (_mix(low, key) & high_mask)
    return (high << np.uint64(low_bits)) | low


def _mix(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed 64-bit mixer: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    mixed = half + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def micro_batch_positions(
    update: int, micro_step: int, rank: int, *, micro: int, accumulation: int, world_size: int
) -> tuple[int, int]:
    """The slice [start, stop) of the stream that a rank reads in one micro-step of one update.

    Rank r runs the logical workers [r·a, (r+1)·a), a = accumulation; logical worker j of an update takes the n
    images from position update·kn + j·n. So the images that share a BN batch do not depend on the ranks.
    """
    worker = rank * accumulation + micro_step
    start = update * micro * accumulation * world_size + worker * micro
    return start, start + micro
