"""The rows of ds_configs/modern: each trains what its source says, and names that and what it published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pipeline import config, model, plan

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs" / "modern"
N = 1_281_167
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


@pytest.mark.parametrize(
    ("name", "epochs", "larger_from"), [("ffcv_16", 16, 12), ("ffcv_32", 32, 25), ("ffcv_88", 88, 71)]
)
def test_ffcv(name, epochs, larger_from):
    """lr_schedule_type cyclic: linear between 1e-4 × lr at 0, lr at epoch 2 and 0 at the end."""
    loaded = load(name)
    assert loaded.recipe.epochs == epochs
    middle = 2 + (epochs - 2) / 2
    assert rates(name, 0, 1, 2, middle, epochs) == pytest.approx([1.7e-4, 1.7 * 0.50005, 1.7, 0.85, 0], abs=1e-5)
    transform = loaded.recipe.transform
    sizes = [transform.training_size(epoch) for epoch in (0, larger_from - 0.01, larger_from, epochs - 1)]
    assert sizes == [160, 160, 192, 192]
    assert transform.evaluation_resize == round(256 / (224 / 256)) and transform.size == 256
    params = loaded.blocks.optimizer.params
    assert (params["momentum"], params["nesterov"], params["weight_decay"]) == (0.9, False, 1e-4)
    assert loaded.recipe.loss.label_smoothing == 0.1
    # eight GPUs of 512 images
    assert plan.resolve(loaded, 8, samples=N).batch.accumulation == 1


def test_ffcvs_network_blurs_where_it_strides():
    network = model.create(load("ffcv_16").recipe.model, 1000, seed=0)
    first = [getattr(network, f"layer{stage}")[0] for stage in (1, 2, 3, 4)]
    assert [type(block.aa).__name__ for block in first] == ["Identity", "BlurPool2d", "BlurPool2d", "BlurPool2d"]
    assert {block.conv2.stride for block in first} == {(1, 1)}


def test_timms_a3():
    loaded = load("timm_a3")
    assert rates("timm_a3", 0, 5, 52.5, 100) == pytest.approx([1e-6, 8e-3, 4e-3, 1e-6], rel=1e-3)
    assert loaded.blocks.optimizer.type == "Lamb"
    assert set(loaded.blocks.optimizer.params) == {"lr", "weight_decay"}
    recipe = loaded.recipe
    assert {recipe.transform.training_size(epoch) for epoch in range(100)} == {160} and recipe.transform.size == 224
    assert (recipe.mixing.mixup_alpha, recipe.mixing.cutmix_alpha, recipe.mixing.label_smoothing) == (0.1, 1.0, 0)
    assert recipe.loss.kind == "binary_cross_entropy"
    assert plan.resolve(loaded, 4, samples=N).batch.accumulation == 1


def test_torchvisions():
    assert rates("torchvision_v1", 0, 29.9, 30, 60, 89.9) == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    loaded = load("torchvision_v2")
    assert rates("torchvision_v2", 0, 5, 302.5, 600) == pytest.approx([0.005, 0.5, 0.25, 0], abs=1e-4)
    recipe = loaded.recipe
    assert recipe.transform.training_size(0) == 176 and recipe.transform.evaluation_resize == 232
    assert plan.resolve(loaded, 8, samples=N).batch.accumulation == 1
    # torchvision averages every 32 updates with 1 − (1 − 0.99998) × world size × micro-batch × 32 / epochs
    of_32 = 1 - (1 - 0.99998) * 8 * 128 * 32 / 600
    assert recipe.model.ema.decay**32 == pytest.approx(of_32, abs=1e-5)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_network_of_a_row_takes_its_images(name):
    """In training and in evaluation, at every size that the file has."""
    recipe = load(name).recipe
    network = model.create(recipe.model, 10, seed=0).eval()
    with torch.inference_mode():
        for size in recipe.transform.sizes:
            assert network(torch.zeros(1, 3, size, size)).shape == (1, 10)
