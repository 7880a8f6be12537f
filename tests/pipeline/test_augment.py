"""The training view of a sample: torchvision's distributions, keyed by (seed, epoch, sample) and by nothing else."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment import Augmentation, View
from pipeline.schema import Transform

RESIZED = Transform()
PADDED = Transform(size=32, crop="padded", padding=3, evaluation_resize=32)
DRAWS = 4000
# two-sample Kolmogorov–Smirnov distance that chance exceeds once in 100,000 comparisons; the draws are seeded
KS_LIMIT = np.sqrt(-0.5 * np.log(0.5e-5)) * np.sqrt(2 / DRAWS)


def views(
    transform: Transform, count: int = DRAWS, *, width: int = 500, height: int = 375, seed: int = 0
) -> list[View]:
    augmentation = Augmentation(transform, seed)
    return [augmentation.view(width, height, sample % 3, sample) for sample in range(count)]


def torchvisions_boxes(width: int, height: int, count: int, transform: Transform = RESIZED) -> np.ndarray:
    """(left, top, width, height) of torchvision's own RandomResizedCrop."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    draws = [RandomResizedCrop.get_params(image, list(transform.scale), list(transform.ratio)) for _ in range(count)]
    return np.array([(left, top, w, h) for top, left, h, w in draws])


def boxes(drawn: list[View]) -> np.ndarray:
    return np.array([(view.left, view.top, view.width, view.height) for view in drawn])


def ks_distance(one: np.ndarray, other: np.ndarray) -> float:
    places = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


# ---------------------------------------------------------------- resized crops


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    epoch=st.integers(0, 10**6),
    sample=st.integers(0, 10**12),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=300, deadline=None)
def test_box_lies_inside_any_image(width, height, epoch, sample, seed):
    view = Augmentation(RESIZED, seed).view(width, height, epoch, sample)
    assert 0 <= view.left <= view.left + view.width <= width
    assert 0 <= view.top <= view.top + view.height <= height
    assert view.width > 0
    assert view.height > 0


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.25, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 1.0)])
def test_area_and_ratio_stay_in_their_ranges(scale, ratio):
    drawn = boxes(views(Transform(scale=scale, ratio=ratio), 500, width=1000, height=1000))
    width, height = drawn[:, 2], drawn[:, 3]
    # each side is rounded to a whole pixel, at most half a pixel away
    assert ((width + 0.5) * (height + 0.5) >= scale[0] * 1e6).all()
    assert ((width - 0.5) * (height - 0.5) <= scale[1] * 1e6).all()
    assert ((width + 0.5) / (height - 0.5) >= ratio[0]).all()
    assert ((width - 0.5) / (height + 0.5) <= ratio[1]).all()


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(500, 375, (0.08, 1.0)), (375, 500, (0.08, 1.0)), (224, 224, (0.08, 1.0)), (640, 300, (0.35, 1.0))],
)
def test_boxes_are_distributed_as_torchvisions(width, height, scale):
    transform = Transform(scale=scale)
    ours = boxes(views(transform, width=width, height=height))
    theirs = torchvisions_boxes(width, height, DRAWS, transform)
    quantities = {
        "left": lambda b: b[:, 0],
        "top": lambda b: b[:, 1],
        "width": lambda b: b[:, 2],
        "height": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 2] / b[:, 3],
        "right margin": lambda b: width - b[:, 0] - b[:, 2],
        "bottom margin": lambda b: height - b[:, 1] - b[:, 3],
        "log ratio × area": lambda b: np.log(b[:, 2] / b[:, 3]) * b[:, 2] * b[:, 3],
    }
    for name, quantity in quantities.items():
        one, other = quantity(ours).astype(float), quantity(theirs).astype(float)
        assert ks_distance(one, other) < KS_LIMIT, name
        error = np.sqrt((one.var() + other.var()) / DRAWS)
        assert abs(one.mean() - other.mean()) < 4.5 * error + 1e-9, name


def test_area_is_uniform_and_log_ratio_is_symmetric():
    drawn = boxes(views(Transform(scale=(0.1, 0.3)), width=2000, height=2000))
    area = drawn[:, 2] * drawn[:, 3] / 4e6
    assert abs(area.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * DRAWS)
    assert abs(area.std() - 0.2 / np.sqrt(12)) < 0.002
    log_ratio = np.log(drawn[:, 2] / drawn[:, 3])
    half_width = np.log(4 / 3)
    assert abs(log_ratio.mean()) < 5 * half_width / np.sqrt(3 * DRAWS)
    assert abs(log_ratio.std() - half_width / np.sqrt(3)) < 0.005
    assert abs(np.corrcoef(area, log_ratio)[0, 1]) < 5 / np.sqrt(DRAWS)


def test_position_of_the_box_is_uniform_up_to_both_edges():
    drawn = boxes(views(Transform(scale=(0.25, 0.25), ratio=(1.0, 1.0)), width=20, height=12))
    # 240 pixels × ¼: 8 × 8 at 13 × 5 places
    assert set(map(tuple, drawn[:, 2:])) == {(8, 8)}
    for column, places in ((0, 13), (1, 5)):
        counts = np.bincount(drawn[:, column], minlength=places)
        assert len(counts) == places
        expected = DRAWS / places
        assert ((counts - expected) ** 2 / expected).sum() < places + 5 * np.sqrt(2 * places)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("width", "height"), [(1000, 10), (10, 1000), (2001, 7), (7, 2001), (999, 8), (50, 2000), (1, 500), (500, 1)]
)
def test_extreme_images_get_torchvisions_central_crop(width, height):
    theirs = {tuple(box) for box in torchvisions_boxes(width, height, 50).tolist()}
    ours = {tuple(box) for box in boxes(views(RESIZED, 50, width=width, height=height)).tolist()}
    assert len(theirs) == 1
    assert ours == theirs


def test_image_within_the_ratios_that_no_attempt_fits_is_taken_whole():
    import torch
    from torchvision.transforms import RandomResizedCrop

    impossible = Transform(scale=(1.0, 1.0), ratio=(1.5, 2.0))
    torch.manual_seed(0)
    top, left, height, width = RandomResizedCrop.get_params(torch.empty(1, 70, 100), [1.0, 1.0], [1.5, 2.0])
    view = Augmentation(impossible, 0).view(100, 70, 0, 0)
    assert (view.left, view.top, view.width, view.height) == (left, top, width, height)


# ---------------------------------------------------------------- padded and none


def test_padded_offsets_cover_exactly_their_range_uniformly():
    drawn = views(PADDED, 7000, width=32, height=32)
    assert {(view.width, view.height) for view in drawn} == {(32, 32)}
    for offsets in ([view.left for view in drawn], [view.top for view in drawn]):
        assert set(offsets) == set(range(-3, 4)), "0 … 2p of the padded image, both ends included"
        counts = np.bincount(np.array(offsets) + 3)
        assert ((counts - 1000) ** 2 / 1000).sum() < 6 + 5 * np.sqrt(12)
    places = {(view.left, view.top) for view in drawn}
    assert len(places) == 49, "left and top are drawn independently"


def test_padding_of_zero_never_moves():
    none = Transform(size=32, crop="padded", padding=0, evaluation_resize=32)
    assert {(view.left, view.top) for view in views(none, 50)} == {(0, 0)}


def test_no_crop_is_the_whole_image():
    drawn = views(Transform(crop="none"), 200)
    assert {(v.left, v.top, v.width, v.height) for v in drawn} == {(0, 0, 500, 375)}
    assert {v.flip for v in drawn} == {True, False}


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_half_the_views_are_flipped(crop):
    flips = np.array([view.flip for view in views(Transform(crop=crop))])
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(DRAWS)
    assert abs(np.corrcoef(flips[1:], flips[:-1])[0, 1]) < 5 / np.sqrt(DRAWS), "neighbours flip independently"


def test_flip_is_independent_of_the_box():
    drawn = views(RESIZED)
    flips = np.array([view.flip for view in drawn], dtype=float)
    for column in boxes(drawn).T:
        assert abs(np.corrcoef(flips, column)[0, 1]) < 5 / np.sqrt(DRAWS)


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_flip_can_be_switched_off_without_moving_the_box(crop):
    on, off = views(Transform(crop=crop), 200), views(Transform(crop=crop, flip=False), 200)
    assert not any(view.flip for view in off)
    assert all(isinstance(view.flip, bool) for view in on + off)


# ---------------------------------------------------------------- keyed


def test_same_seed_epoch_and_sample_give_the_same_view():
    one, other = Augmentation(RESIZED, 7), Augmentation(RESIZED, 7)
    for sample in range(50):
        assert one.view(500, 375, 2, sample) == other.view(500, 375, 2, sample) == one.view(500, 375, 2, sample)


def test_any_other_seed_epoch_or_sample_gives_another_view():
    keys = [(seed, epoch, sample) for seed in range(6) for epoch in range(20) for sample in range(20)]
    keys += [(2**63 - 1, 0, 0), (0, 10**6, 0), (0, 0, 10**12), (0, 0, 2**32), (0, 2**32, 0)]
    drawn = {key: Augmentation(RESIZED, key[0]).view(4000, 4000, key[1], key[2]) for key in keys}
    assert len(set(drawn.values())) == len(keys), "epoch and sample must not be interchangeable either"


def test_neighbouring_samples_and_epochs_are_uncorrelated():
    augmentation = Augmentation(RESIZED, 0)
    widths = np.array([[augmentation.view(500, 375, e, s).width for s in range(1000)] for e in (0, 1)])
    assert abs(np.corrcoef(widths[0], widths[1])[0, 1]) < 5 / np.sqrt(1000)
    assert abs(np.corrcoef(widths[0, 1:], widths[0, :-1])[0, 1]) < 5 / np.sqrt(1000)


def test_order_of_calls_and_threads_and_global_generators_do_not_matter():
    straight = views(RESIZED, 600)
    augmentation = Augmentation(RESIZED, 0)
    shuffled = list(range(600))
    random.Random(1).shuffle(shuffled)

    def draw(sample: int) -> tuple[int, View]:
        np.random.seed(sample % 3)  # what another library may do at any time
        random.seed(sample % 5)
        return sample, augmentation.view(500, 375, sample % 3, sample)

    with ThreadPoolExecutor(8) as pool:
        threaded = dict(pool.map(draw, shuffled))
    assert [threaded[sample] for sample in range(600)] == straight


# ---------------------------------------------------------------- pinned: a change would alter every saved run

GOLDEN = {
    "resized": [
        View(213, 154, 163, 187, False),
        View(75, 11, 263, 203, True),
        View(141, 24, 338, 333, True),
        View(41, 16, 306, 267, True),
    ],
    "padded": [
        View(-4, -2, 32, 32, False),
        View(-3, 4, 32, 32, True),
        View(1, 0, 32, 32, True),
        View(-1, 2, 32, 32, True),
    ],
}


@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_views_never_change(crop):
    transform = Transform() if crop == "resized" else Transform(crop="padded", size=32, evaluation_resize=32)
    augmentation = Augmentation(transform, 0)
    keys = [(0, 0), (0, 1), (1, 0), (89, 1_281_166)]
    assert [augmentation.view(500, 375, epoch, sample) for epoch, sample in keys] == GOLDEN[crop]
