"""Colour jitter, random operations, erasing and mixing: keyed like views, torchvision's and timm's in what they do."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

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
    operations = augmentation._changes[0][1]._operations
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


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("Identity", 0, lambda image, value: image),
        ("Rotate", 20, lambda image, value: F.rotate(image, value, fill=[124, 116, 104])),
        ("Brightness", 9, lambda image, value: F.adjust_brightness(image, 1 + value)),
        ("Contrast", 30, lambda image, value: F.adjust_contrast(image, 1 + value)),
        ("Posterize", 15, lambda image, value: F.posterize(image, int(value))),
        ("Solarize", 12, lambda image, value: F.solarize(image, 255 * value)),
        ("Equalize", 0, lambda image, value: F.equalize(image)),
    ],
)
def test_pixels_of_an_operation_are_those_of_torchvision_s_function(name, index, expected):
    section = {"kind": "rand", "operations": 1, "magnitude": index}
    augmentation = ImageAugmentation(transform(auto_augment=section), 0)
    operations = augmentation._changes[0][1]
    operations._space = [(name, v2.RandAugment._AUGMENTATION_SPACE[name])]
    image = torch.from_numpy(picture()).permute(2, 0, 1)
    magnitudes_of, is_signed = operations._space[0][1]
    magnitudes = magnitudes_of(31, SIZE, SIZE)
    value = 0.0 if magnitudes is None else float(magnitudes[index])
    wanted = {expected(image, sign * value).numpy().tobytes() for sign in ((1, -1) if is_signed else (1,))}
    seen = {
        torch.from_numpy(changed(augmentation, 0, sample)).permute(2, 0, 1).contiguous().numpy().tobytes()
        for sample in range(20)
    }
    assert seen == wanted


@pytest.mark.parametrize("name", ["_AUGMENTATION_SPACE", "_apply_image_or_video_transform", "_fill"])
def test_another_torchvision_is_refused_when_the_augmentation_is_made(name, monkeypatch):
    class Other:
        interpolation = _fill = _AUGMENTATION_SPACE = _apply_image_or_video_transform = None

        def __init__(self, fill: list[int]) -> None: ...

    delattr(Other, name)
    monkeypatch.setattr(v2, "RandAugment", Other)
    with pytest.raises(UserError, match=f"torchvision {torchvision.__version__.partition('+')[0]}.*no {name}") as error:
        ImageAugmentation(transform(auto_augment={"kind": "rand"}), 0)
    assert "0.23" in str(error.value)


def test_a_section_changes_no_draw_of_another():
    erasing = {"random_erasing": {"probability": 1.0}}
    alone = ImageAugmentation(transform(**erasing), 0)
    both = ImageAugmentation(transform(**erasing, color_jitter={"brightness": 0.4, "contrast": 0.4}), 0)
    assert len({key for key, _ in both._changes}) == 2
    for sample in range(20):
        erased = (changed(alone, 0, sample) != picture()).any(axis=2)
        assert (changed(both, 0, sample)[erased] == changed(alone, 0, sample)[erased]).all()


@pytest.mark.parametrize("strength", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_factors_of_jitter_are_uniform_in_torchvision_s_range(name, strength, monkeypatch):
    strength = min(strength, 0.5) if name == "hue" else strength
    factors: list[float] = []
    monkeypatch.setattr(F, f"adjust_{name}", lambda image, factor: factors.append(factor) or image)
    augmentation = ImageAugmentation(transform(color_jitter={name: strength}), 0)
    for sample in range(500):
        changed(augmentation, 0, sample)
    low, high = getattr(v2.ColorJitter(**{name: strength}), name)
    shares = (np.array(factors) - low) / (high - low)
    assert shares.min() >= 0 and shares.max() <= 1 and len(set(factors)) == 500
    assert np.abs(np.sort(shares) - np.linspace(0, 1, 500)).max() < 0.08  # Kolmogorov and Smirnov, p < 0.01


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
        ('recipe.mixing={"mixup_alpha": 0.2, "switch_probability": 0.3}', "give both alphas"),
        ('recipe.transform.progressive=[{"from_epoch": 0, "sise": 128}]', 'unknown key "sise"; did you mean "size"?'),
        (
            'recipe.transform.progressive=[{"from_epoch": 0, "size": 128}, {"from_epoch": 90, "size": 160}]',
            "from_epoch 90 is never reached: the run ends at epoch 90",
        ),
        ('recipe.transform.progressive=[{"from_epoch": 0, "size": 32768}]', "32768 is more than 32,767 pixels"),
        ("recipe.transform.size=32768", "32768 is more than 32,767 pixels"),
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
    assert message in str(error.value) and "recipe" in str(error.value)


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
