"""Colour jitter, random operations, erasing and mixing: keyed like views, torchvision's and timm's in what they do."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipeline import config, plan
from pipeline.augment_schema import Mixing
from pipeline.image_augment import ImageAugmentation, image_augmentation
from pipeline.mixing import KeyedMixup
from pipeline.schema import Transform
from shards.errors import UserError

SIZE = 32
SECTIONS = {
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "auto_augment": {"kind": "rand", "operations": 3, "magnitude": 12},
    "random_erasing": {"probability": 1.0, "fill": "noise"},
}


def transform(**sections) -> Transform:
    return Transform.model_validate({"size": SIZE, "evaluation_resize": SIZE, **sections})


def picture(seed: int = 0) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    base = np.stack([8 * x, 8 * y, 255 - 4 * (x + y)], -1)
    return np.clip(base + np.random.default_rng(seed).normal(0, 8, base.shape), 0, 255).astype(np.uint8)


def changed(augmentation: ImageAugmentation, epoch: int, sample: int) -> np.ndarray:
    pixels = picture()
    augmentation.apply(pixels, epoch, sample)
    return pixels


def test_nothing_is_made_where_nothing_is_asked_for():
    assert image_augmentation(transform(), 0) is None


@pytest.mark.parametrize("name", [*SECTIONS, "trivial", "all"])
def test_draws_depend_on_seed_epoch_and_sample_alone(name):
    chosen = {"auto_augment": {"kind": "trivial"}} if name == "trivial" else SECTIONS
    sections = transform(**(chosen if name in ("trivial", "all") else {name: SECTIONS[name]}))
    keys = [(epoch, sample) for epoch in range(3) for sample in range(20)]
    straight = {key: changed(ImageAugmentation(sections, 3), *key) for key in keys}

    def work(key: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray]:
        torch.manual_seed(key[1] % 3)  # what another library may do at any time
        torch.rand(key[0] + 1)
        return key, changed(shared, *key)

    shared = ImageAugmentation(sections, 3)
    shuffled = random.Random(0).sample(keys, len(keys))
    with ThreadPoolExecutor(8) as pool:
        for key, pixels in pool.map(work, shuffled):
            np.testing.assert_array_equal(pixels, straight[key])
    assert len({pixels.tobytes() for pixels in straight.values()}) > 30
    assert any(not np.array_equal(changed(ImageAugmentation(sections, 4), *key), straight[key]) for key in keys)


def test_the_global_generators_are_left_alone():
    state = torch.random.get_rng_state()
    changed(ImageAugmentation(transform(**SECTIONS), 0), 0, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "reference"), [("rand", v2.RandAugment), ("trivial", v2.TrivialAugmentWide)])
def test_operations_and_their_frequencies_are_torchvisions(kind, reference):
    augmentation = ImageAugmentation(
        transform(auto_augment={"kind": kind, **({"operations": 1} if kind == "rand" else {})}), 0
    )
    operations = augmentation._changes[0]._operations
    seen: dict[str, set[float]] = {}

    def record(image, name, magnitude, **options):
        seen.setdefault(name, set()).add(round(magnitude, 4))
        counts[name] = counts.get(name, 0) + 1
        return image

    counts: dict[str, int] = {}
    operations._apply_image_or_video_transform = record
    for sample in range(2800):
        augmentation.apply(picture(), 0, sample)
    space = reference._AUGMENTATION_SPACE
    assert set(seen) == set(space)
    assert min(counts.values()) > 0.7 * 2800 / len(space) and max(counts.values()) < 1.3 * 2800 / len(space)
    for name, (magnitudes_of, is_signed) in space.items():
        magnitudes = magnitudes_of(31, SIZE, SIZE)
        allowed = {0.0} if magnitudes is None else {round(float(m), 4) for m in magnitudes}
        if kind == "rand" and magnitudes is not None:
            allowed = {round(float(magnitudes[9]), 4)}
        assert seen[name] <= allowed | ({-value for value in allowed} if is_signed else set())
        if is_signed:
            assert any(value < 0 for value in seen[name]) and any(value > 0 for value in seen[name])


def test_jitter_of_one_kind_is_the_adjustment_within_its_range():
    augmentation = ImageAugmentation(transform(color_jitter={"brightness": 0.4}), 0)
    means = np.array([changed(augmentation, 0, sample).mean() for sample in range(300)]) / picture().mean()
    assert means.min() > 0.58 and means.max() < 1.42 and means.std() > 0.15
    assert abs(means.mean() - 1) < 0.06


def test_jitter_applies_with_its_probability():
    augmentation = ImageAugmentation(transform(color_jitter={"hue": 0.4, "probability": 0.3}), 0)
    share = np.mean([not np.array_equal(changed(augmentation, 0, sample), picture()) for sample in range(400)])
    assert 0.2 < share < 0.4


@pytest.mark.parametrize("fill", ["mean", "noise"])
def test_erasing_fills_one_rectangle_of_the_right_share(fill):
    section = {"probability": 1.0, "fill": fill, "scale": [0.1, 0.3]}
    augmentation = ImageAugmentation(transform(random_erasing=section), 0)
    for sample in range(100):
        pixels = changed(augmentation, 0, sample)
        different = (pixels != picture()).any(axis=2)
        rows, columns = np.flatnonzero(different.any(axis=1)), np.flatnonzero(different.any(axis=0))
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / SIZE**2
        assert 0.07 < area < 0.36
        if fill == "mean":
            assert np.abs(pixels[different].astype(int) - [124, 116, 104]).max() <= 1


# ---------------------------------------------------------------- mixing


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 5


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}]
)
def test_mixing_is_keyed_by_update_and_logical_worker(mode, alphas):
    section = Mixing(mode=mode, **alphas)
    mixed = {}
    for key in ((0, 0), (0, 1), (1, 0), (0, 0)):
        np.random.seed(len(mixed))
        before = np.random.get_state()[1].copy()
        images, targets = KeyedMixup(section, 5, seed=7)(*batch(), *key)
        assert np.array_equal(np.random.get_state()[1], before)
        if key in mixed:
            assert torch.equal(mixed[key][0], images) and torch.equal(mixed[key][1], targets)
        mixed[key] = images, targets
        assert targets.shape == (8, 5)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    assert not torch.equal(mixed[0, 0][0], mixed[0, 1][0]) and not torch.equal(mixed[0, 0][0], mixed[1, 0][0])


def test_mixup_mixes_images_and_labels_by_the_same_share():
    images, labels = batch()
    mixed, targets = KeyedMixup(Mixing(mixup_alpha=1.0), 5, seed=0)(images.clone(), labels, 0, 0)
    share = float(targets[0, 0]) if labels[0] != labels[-1] else None
    assert share is not None and 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))


# ---------------------------------------------------------------- configurations


def load(*overrides: str) -> config.Config:
    return config.load("ds_configs/imagenet_256.json", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('recipe.transform.color_jitter={"brightnes": 0.4}', 'unknown key "brightnes"; did you mean'),
        ("recipe.transform.color_jitter={}", "changes nothing"),
        ('recipe.transform.auto_augment={"kind": "trivial", "magnitude": 3}', "leave these keys out"),
        ('recipe.transform.random_erasing={"scale": [0.5, 0.1]}', "low ≤ high"),
        ("recipe.mixing={}", "mixes nothing"),
        ('recipe.transform.progressive=[{"from_epoch": 1, "size": 128}]', "begin with from_epoch 0"),
        (
            'recipe.transform.progressive=[{"from_epoch": 0, "size": 128}, {"from_epoch": 0, "size": 160}]',
            "must ascend",
        ),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError) as error:
        load(override)
    assert message in str(error.value) and "recipe." in str(error.value)


def test_mixing_needs_pairs():
    with pytest.raises(UserError, match="is odd"):
        plan.resolve(
            load('recipe.mixing={"mixup_alpha": 0.2}', "train_micro_batch_size_per_gpu=1", "train_batch_size=8"),
            8,
            samples=1000,
        )


def test_sizes_follow_the_epochs_and_the_page_says_so():
    steps = '[{"from_epoch": 0, "size": 128}, {"from_epoch": 30.5, "size": 192}]'
    experiment = load(
        f"recipe.transform.progressive={steps}",
        'recipe.mixing={"cutmix_alpha": 1.0}',
        'recipe.transform.auto_augment={"kind": "rand"}',
    )
    sizes = experiment.recipe.transform
    assert [sizes.training_size(epoch) for epoch in (0, 30.49, 30.5, 89.9)] == [128, 128, 192, 192]
    assert sizes.sizes == (128, 192, 224)
    page = dict(plan.resolve(experiment, 8, samples=1000).page())
    assert page["size"] == "128 from epoch 0 → 192 from epoch 30.5 · evaluation 224"
    assert page["augment"] == "RandAugment 2 × 9 · CutMix α = 1 · not in the paper's recipe"
