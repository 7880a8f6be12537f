"""The order of samples: every id once per epoch, on any number of ranks, and never another for a saved run."""

from __future__ import annotations

import hashlib
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import ARGSORT_LIMIT, Order, _feistel, micro_batch_positions, order_name

IMAGENET = 1_281_167


@pytest.fixture(scope="module")
def imagenet_epochs() -> list[np.ndarray]:
    """The whole of epochs 0 and 1 at ImageNet's N, seed 0."""
    order = Order(IMAGENET, 0)
    return [order.ids(epoch * IMAGENET, (epoch + 1) * IMAGENET) for epoch in (0, 1)]


def is_permutation(ids: np.ndarray, samples: int) -> bool:
    return len(ids) == samples and bool((np.bincount(ids, minlength=samples) == 1).all())


def stream_as_read(order: Order, updates: int, *, micro: int, accumulation: int, world_size: int) -> np.ndarray:
    """Every rank's ids of every micro-step, put together in the order of the logical workers."""
    slices = []
    for update in range(updates):
        for rank in range(world_size):
            for step in range(accumulation):
                start, stop = micro_batch_positions(
                    update, step, rank, micro=micro, accumulation=accumulation, world_size=world_size
                )
                assert stop - start == micro
                slices.append(order.ids(start, stop))
    return np.concatenate(slices)


# ---------------------------------------------------------------- exactly once


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 10, 64, 130, 1437, 50_000, ARGSORT_LIMIT, ARGSORT_LIMIT + 1])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_id_exactly_once_in_each_of_three_epochs(samples, seed):
    order = Order(samples, seed)
    for epoch in range(3):
        assert is_permutation(order.ids(epoch * samples, (epoch + 1) * samples), samples)


def test_every_id_exactly_once_at_imagenets_size(imagenet_epochs):
    for ids in imagenet_epochs:
        assert ids.dtype == np.int64
        assert is_permutation(ids, IMAGENET)


@given(samples=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_feistel_is_a_permutation_at_any_size(samples, seed, epoch):
    assert is_permutation(_feistel(np.arange(samples), samples, f"{seed}:{epoch}"), samples)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097, 2**16, 2**17, 2**17 + 1])
def test_feistel_is_a_permutation_around_powers_of_two(samples):
    assert is_permutation(_feistel(np.arange(samples), samples, "0:0"), samples)


@pytest.mark.parametrize(
    ("samples", "name"),
    [(1, "argsort-v1"), (65_536, "argsort-v1"), (65_537, "feistel-v1"), (IMAGENET, "feistel-v1")],
)
def test_size_alone_chooses_the_order(samples, name):
    assert order_name(samples) == Order(samples, 5).name == name


@given(
    samples=st.integers(1, 400),
    micro=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 6),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_what_all_ranks_read_is_every_id_once_per_epoch(samples, micro, accumulation, world_size, epochs, seed):
    order = Order(samples, seed)
    kn = micro * accumulation * world_size
    updates = min(-(-epochs * samples // kn), 400)
    stream = stream_as_read(order, updates, micro=micro, accumulation=accumulation, world_size=world_size)
    assert len(stream) == updates * kn, "nothing padded or dropped"
    assert np.array_equal(stream, order.ids(0, updates * kn))
    for epoch in range(len(stream) // samples):
        assert is_permutation(stream[epoch * samples : (epoch + 1) * samples], samples)
    rest = stream[len(stream) // samples * samples :]
    assert len(np.unique(rest)) == len(rest), "nothing repeated in an unfinished epoch either"


@given(
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    world_size=st.integers(1, 64),
    update=st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_slices_of_one_update_tile_it(micro, accumulation, world_size, update):
    slices = [
        micro_batch_positions(update, step, rank, micro=micro, accumulation=accumulation, world_size=world_size)
        for rank in range(world_size)
        for step in range(accumulation)
    ]
    kn = micro * accumulation * world_size
    assert slices == [(update * kn + j * micro, update * kn + (j + 1) * micro) for j in range(kn // micro)]


@pytest.mark.parametrize(("samples", "micro", "workers"), [(130, 8, 4), (1437, 32, 4), (1000, 7, 12), (65_537, 32, 16)])
def test_logical_workers_read_the_same_on_any_number_of_ranks(samples, micro, workers):
    order = Order(samples, 3)
    updates = 6
    alone = stream_as_read(order, updates, micro=micro, accumulation=workers, world_size=1)
    for world_size in (w for w in range(2, workers + 1) if workers % w == 0):
        ours = stream_as_read(order, updates, micro=micro, accumulation=workers // world_size, world_size=world_size)
        assert np.array_equal(ours, alone), world_size


def test_update_that_crosses_an_epochs_end_takes_its_remainder_from_the_next():
    order = Order(10, 0)
    crossing = order.ids(8, 13)
    assert crossing.tolist() == order.ids(0, 10)[8:].tolist() + order.ids(10, 20)[:3].tolist()
    assert order.epochs(np.arange(8, 13)).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("samples", [10, 1437, 65_537, 10**9])
def test_positions_may_be_asked_for_in_any_order_and_shape(samples):
    order = Order(samples, 0)
    base = samples - 20 if samples > 20 else 0
    positions = np.arange(base, base + 60)
    straight = order.at(positions)
    assert np.array_equal(order.at(positions[::-1]), straight[::-1])
    assert np.array_equal(np.concatenate([order.ids(p, p + 1) for p in positions.tolist()]), straight)
    assert order.ids(5, 5).shape == (0,)


def test_an_order_needs_a_sample():
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, 0)


# ---------------------------------------------------------------- randomness


@pytest.mark.parametrize("samples", [1437, 65_537])
def test_epochs_and_seeds_give_different_permutations(samples):
    streams = [Order(samples, seed).ids(e * samples, (e + 1) * samples) for seed in (0, 1, 2) for e in (0, 1, 2)]
    for index, one in enumerate(streams):
        for other in streams[:index]:
            agreeing = int((one == other).sum())
            assert agreeing < 10, "two random permutations agree in one place on average"


def test_seed_and_epoch_do_not_run_into_each_other():
    # seed 1, epoch 11 and seed 11, epoch 1 must not be the same key
    one, other = Order(1000, 1), Order(1000, 11)
    assert not np.array_equal(one.ids(11_000, 12_000), other.ids(1000, 2000))


def test_label_statistics_of_class_sorted_ids_are_those_of_a_true_permutation(imagenet_epochs):
    """226 distinct classes per 256 images on average and 209 at least, neighbours alike 0.0010."""
    labels = imagenet_epochs[0] * 1000 // IMAGENET
    batches = np.sort(labels[: IMAGENET // 256 * 256].reshape(-1, 256), axis=1)
    distinct = (np.diff(batches, axis=1) > 0).sum(axis=1) + 1
    expected = 1000 * (1 - (1 - 1 / 1000) ** 256)
    assert abs(distinct.mean() - expected) < 0.3
    assert distinct.min() >= 200
    assert abs(distinct.std() - 4.6) < 0.5
    assert abs((labels[1:] == labels[:-1]).mean() - 0.001) < 0.0002


def test_no_correlation_with_position_neighbour_or_epoch(imagenet_epochs):
    first, second = imagenet_epochs
    five_sigma = 5 / np.sqrt(IMAGENET)
    assert abs(np.corrcoef(first, np.arange(IMAGENET))[0, 1]) < five_sigma
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < five_sigma
    assert abs(np.corrcoef(first, second)[0, 1]) < five_sigma
    for bit in range(20):
        ones = first[: IMAGENET // 2] >> bit & 1
        share = (np.arange(IMAGENET) >> bit & 1).mean()
        assert abs(ones.mean() - share) < 5 * 0.5 / np.sqrt(IMAGENET / 2), f"bit {bit} in the first half"


@pytest.mark.parametrize("permute", ["argsort", "feistel"])
def test_each_position_takes_each_image_equally_often(permute):
    """χ² over 2,000 epochs of 10 images, 9 × 9 degrees of freedom: mean 81, standard deviation 12.7."""
    order = Order(10, 4)
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        ids = order.ids(10 * epoch, 10 * epoch + 10)
        if permute == "feistel":
            ids = _feistel(np.arange(10), 10, f"4:{epoch}")
        counts[np.arange(10), ids] += 1
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    # a small Feistel network is less even than an argsort, which is why small sets do not use it
    assert chi_squared < (81 + 5 * 12.7 if permute == "argsort" else 200)


def test_feistel_scatters_a_fixed_position_over_epochs():
    samples = ARGSORT_LIMIT + 1
    ids = np.concatenate([Order(samples, 9).ids(e * samples, e * samples + 64) for e in range(150)])
    counts = np.bincount(ids * 16 // samples, minlength=16)
    expected = len(ids) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * np.sqrt(30)


# ---------------------------------------------------------------- a billion images


def test_slice_of_a_billion_is_distinct_quick_and_small():
    order = Order(10**9, 0)
    order.ids(0, 8)
    seconds = []
    for update in range(5):
        begin = time.process_time()
        ids = order.ids(update * 8192, (update + 1) * 8192)
        seconds.append(time.process_time() - begin)
        assert len(np.unique(ids)) == 8192
        assert ids.min() >= 0
        assert ids.max() < 10**9
    assert min(seconds) < 0.05
    tracemalloc.start()
    order.ids(10**9 - 4096, 10**9 + 4096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20, "memory in proportion to N"


# ---------------------------------------------------------------- pinned: a change would reorder every saved run

GOLDEN = {
    (10, 0): [2, 1, 3, 8, 4, 5, 7, 0],
    (10, 1): [5, 3, 4, 2, 7, 9, 8, 1],
    (1437, 0): [1412, 1234, 475, 570, 1085, 1137, 119, 194],
    (1437, 1): [615, 625, 1347, 984, 388, 97, 713, 1167],
    (65_536, 0): [58102, 56071, 42352, 42297, 27864, 12637, 34229, 52588],
    (65_537, 0): [14687, 38896, 57118, 80, 35719, 15595, 9997, 9384],
    (IMAGENET, 0): [1099607, 556391, 905072, 714428, 680276, 620865, 346404, 780971],
    (IMAGENET, 1): [10080, 93784, 836823, 268343, 911813, 213237, 641862, 208826],
    (10**9, 0): [409887776, 474448034, 94975671, 60498285, 11355236, 135978682, 59995500, 143816904],
}


@pytest.mark.parametrize(("samples", "epoch"), GOLDEN)
def test_first_ids_never_change(samples, epoch):
    order = Order(samples, 0)
    assert order.ids(epoch * samples, epoch * samples + 8).tolist() == GOLDEN[samples, epoch]


@pytest.mark.parametrize(
    ("samples", "ids"),
    [
        (1437, [152, 1240, 1032, 1077, 957, 38, 476, 187]),
        (IMAGENET, [790182, 988571, 730183, 1244380, 1097572, 465019, 153665, 1263188]),
    ],
)
def test_first_ids_of_another_seed_never_change(samples, ids):
    assert Order(samples, 7).ids(0, 8).tolist() == ids


@pytest.mark.parametrize(
    ("samples", "digest"),
    [
        (1437, "c4070e94e508607a863e9a91b753820ac9879777d7992e66a2432c6d86290626"),
        (65_537, "9db006931514cf050a5a31534d49b8133bc9f2ea71f121c55a640af79b87e295"),
    ],
)
def test_whole_first_epoch_never_changes(samples, digest):
    assert hashlib.sha256(Order(samples, 0).ids(0, samples).astype("<i8").tobytes()).hexdigest() == digest


def test_whole_first_epoch_of_imagenet_never_changes(imagenet_epochs):
    digest = hashlib.sha256(imagenet_epochs[0].astype("<i8").tobytes()).hexdigest()
    assert digest == "7ab5d3751566758b56a9748da473904b95e4af614cd322b9366d5606e04d2ee9"
