"""The rows of ds_configs/modern: each asks for what its source says and nothing else, and names what it published."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from pipeline import config, model, plan

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs" / "modern"
N = 1_281_167
SGD = {"momentum": 0.9, "nesterov": False}
# kn, n, the optimizer, clipping, and all of `recipe` that is not at its default, the data aside
ASKED = {
    "ffcv_16": (
        (4096, 512),
        ("SGD", {**SGD, "lr": 1.7, "weight_decay": 1e-4}),
        0,
        {
            "model": {"name": "resnetblur50", "zero_init_last": False},
            "epochs": 16,
            "reference_batch": 4096,
            "transform": {
                "size": 256,
                "evaluation_resize": 293,
                "progressive": [{"from_epoch": 0, "size": 160}, {"from_epoch": 12, "size": 192}],
            },
            "loss": {"label_smoothing": 0.1},
        },
    ),
    "timm_a3": (
        (2048, 512),
        ("Lamb", {"lr": 8e-3, "weight_decay": 0.02}),
        1,
        {
            "model": {"name": "resnet50"},
            "epochs": 100,
            "reference_batch": 2048,
            "transform": {
                "evaluation_resize": int(224 / 0.95),
                "progressive": [{"from_epoch": 0, "size": 160}],
                "auto_augment": {"kind": "rand", "operations": 1, "magnitude": 18},
            },
            "mixing": {"mixup_alpha": 0.1, "cutmix_alpha": 1},
            "loss": {"kind": "binary_cross_entropy", "target_threshold": 0.2},
        },
    ),
    "torchvision_v1": (
        (256, 32),
        ("SGD", {**SGD, "lr": 0.1, "weight_decay": 1e-4}),
        0,
        {"model": {"name": "resnet50", "zero_init_last": False}, "epochs": 90},
    ),
    "torchvision_v2": (
        (1024, 128),
        ("SGD", {**SGD, "lr": 0.5, "weight_decay": 2e-5}),
        0,
        {
            "model": {"name": "resnet50", "zero_init_last": False, "ema": {"decay": 0.999966}},
            "epochs": 600,
            "reference_batch": 1024,
            "transform": {
                "evaluation_resize": 232,
                "progressive": [{"from_epoch": 0, "size": 176}],
                "auto_augment": {"kind": "trivial"},
                "random_erasing": {"probability": 0.1},
            },
            "mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1, "label_smoothing": 0.1},
        },
    ),
}
for epochs, larger_from in ((32, 25), (88, 71)):
    batch, optimizer, clipping, recipe = copy.deepcopy(ASKED["ffcv_16"])
    recipe["epochs"] = epochs
    recipe["transform"]["progressive"][1]["from_epoch"] = larger_from
    ASKED[f"ffcv_{epochs}"] = (batch, optimizer, clipping, recipe)
PUBLISHED = {  # source, top-1 in per cent, as it is published
    "ffcv_16": ("ffcv-imagenet", "73.8"),
    "ffcv_32": ("ffcv-imagenet", "76.6"),
    "ffcv_88": ("ffcv-imagenet", "78.4"),
    "timm_a3": ("arXiv:2110.00476", "78.1"),
    "torchvision_v1": ("IMAGENET1K_V1", "76.13"),
    "torchvision_v2": ("IMAGENET1K_V2", "80.86"),
}


def load(name: str) -> config.Config:
    return config.load(CONFIGS / f"{name}.json")


def rates(name: str, *epochs: float) -> list[float]:
    """Of updates that begin so many epochs after the start."""
    schedule = plan.resolve(load(name), 1, samples=N).schedule
    return [schedule.lr(round(epoch * N)) for epoch in epochs]


def test_every_file_names_its_source_and_the_published_figure():
    assert sorted(PUBLISHED) == sorted(path.stem for path in CONFIGS.glob("*.json"))
    for name, (source, top1) in PUBLISHED.items():
        comment = " ".join(re.findall(r"^  // (.*)$", (CONFIGS / f"{name}.json").read_text(), re.MULTILINE))
        assert source in comment and f"Published: {top1} % top-1" in comment, name


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_row_asks_for_what_its_source_does_and_for_nothing_else(name):
    loaded = load(name)
    batch, (optimizer, params), clipping, recipe = ASKED[name]
    blocks = loaded.blocks
    assert (blocks.train_batch_size, blocks.train_micro_batch_size_per_gpu) == batch
    assert (blocks.optimizer.type, blocks.optimizer.params) == (optimizer, params)
    assert blocks.gradient_clipping == clipping
    assert loaded.recipe.model_dump(mode="json", exclude_defaults=True) == {"data": "data/imagenet", **recipe}
    # as many GPUs as the source had, with a micro-batch each
    assert plan.resolve(loaded, batch[0] // batch[1], samples=N).batch.accumulation == 1


@pytest.mark.parametrize(("epochs", "start", "end"), [(16, 11, 13), (32, 23, 27), (88, 65, 76)])
def test_ffcvs_rates_and_sizes(epochs, start, end):
    """lr_schedule_type cyclic: linear between 1e-4 × lr at 0, lr at epoch 2 and 0 at the end; and its start_ramp and
    end_ramp: 160 to 192 pixels in multiples of 32, by whole epochs."""
    name = f"ffcv_{epochs}"
    middle = 2 + (epochs - 2) / 2
    assert rates(name, 0, 1, 2, middle, epochs) == pytest.approx([1.7e-4, 1.7 * 0.50005, 1.7, 0.85, 0], abs=1e-5)
    for epoch in range(epochs):
        ramp = min(max((epoch - start) / (end - start), 0), 1)
        assert load(name).recipe.transform.training_size(epoch) == 32 * round((160 + 32 * ramp) / 32)


def test_ffcvs_network_blurs_where_it_strides():
    network = model.create(load("ffcv_16").recipe.model, 1000, seed=0)
    first = [getattr(network, f"layer{stage}")[0] for stage in (1, 2, 3, 4)]
    assert [type(block.aa).__name__ for block in first] == ["Identity", "BlurPool2d", "BlurPool2d", "BlurPool2d"]
    assert {block.conv2.stride for block in first} == {(1, 1)}
    # what the file says is not theirs
    assert first[1].downsample[0].stride == (2, 2) and type(network.maxpool[1]).__name__ == "BlurPool2d"


def test_the_other_rates():
    assert rates("timm_a3", 0, 5, 52.5, 100) == pytest.approx([1e-4, 8e-3, 4e-3, 1e-6], rel=1e-3)
    assert rates("torchvision_v1", 0, 29.9, 30, 60, 89.9) == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    assert rates("torchvision_v2", 0, 5, 302.5, 600) == pytest.approx([0.005, 0.5, 0.25, 0], abs=1e-4)


def test_torchvisions_average():
    """Every 32 updates with 1 − (1 − 0.99998) × world size × micro-batch × 32 / epochs."""
    of_32 = 1 - (1 - 0.99998) * 8 * 128 * 32 / 600
    assert load("torchvision_v2").recipe.model.ema.decay ** 32 == pytest.approx(of_32, abs=1e-5)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_network_of_a_row_takes_its_images(name):
    """In training and in evaluation, at every size that the file has."""
    recipe = load(name).recipe
    network = model.create(recipe.model, 10, seed=0).eval()
    with torch.inference_mode():
        for size in recipe.transform.sizes:
            assert network(torch.zeros(1, 3, size, size)).shape == (1, 10)
