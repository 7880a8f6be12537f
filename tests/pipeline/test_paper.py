"""The paper's rows (Goyal et al. 2017): what each file of ds_configs/paper trains, and the networks that it trains."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import config, model, plan
from shards.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
EVERY = sorted(CONFIGS.rglob("*.json"))
PAPER = sorted((CONFIGS / "paper").glob("*.json"))
N = 1_281_167
# figure 3: minibatch, η, top-1 error and its deviation (64 is in figure 1 only, as a point)
FIGURE = {
    64: (0.025, None),
    128: (0.05, "23.49 ± 0.12"),
    256: (0.1, "23.60 ± 0.12"),
    512: (0.2, "23.48 ± 0.09"),
    1024: (0.4, "23.53 ± 0.08"),
    2048: (0.8, "23.49 ± 0.11"),
    4096: (1.6, "23.56 ± 0.12"),
    8192: (3.2, "23.74 ± 0.09"),
    16384: (6.4, "24.79 ± 0.27"),
    32768: (12.8, "27.55 ± 0.28"),
    65536: (25.6, "33.96 ± 0.80"),
}
# tables 1 and 2: file, minibatch, η of the first update, peak η, network, γ = 0, error
ROWS = [
    ("table1_no_warmup", 8192, 3.2, 3.2, "resnet50", True, "24.84 ± 0.37"),
    ("table1_constant_warmup", 8192, 0.1, 3.2, "resnet50", True, "25.88 ± 0.56"),
    ("table2a_256_lr_0.05", 256, 0.05, 0.05, "resnet50", True, "23.92 ± 0.10"),
    ("table2a_256_lr_0.2", 256, 0.2, 0.2, "resnet50", True, "23.68 ± 0.09"),
    ("table2a_8k_lr_0.05", 8192, 0.05, 1.6, "resnet50", True, "24.27 ± 0.08"),
    ("table2a_8k_lr_0.2", 8192, 0.2, 6.4, "resnet50", True, "24.05 ± 0.18"),
    ("table2a_8k_fixed_lr", 8192, 0.1, 0.1, "resnet50", True, "41.67 ± 0.10"),
    ("table2a_8k_square_root", 8192, 0.1, 0.1 * math.sqrt(32), "resnet50", True, "26.22 ± 0.03"),
    ("table2b_256_gamma_1", 256, 0.1, 0.1, "resnet50", False, "23.84 ± 0.18"),
    ("table2b_8k_gamma_1", 8192, 0.1, 3.2, "resnet50", False, "24.11 ± 0.07"),
    ("table2c_256_resnet101", 256, 0.1, 0.1, "resnet101", True, "22.08 ± 0.06"),
    ("table2c_8k_resnet101", 8192, 0.1, 3.2, "resnet101", True, "22.36 ± 0.09"),
]


def short(kn: int) -> str:
    return f"{kn // 1024}k" if kn >= 1024 else str(kn)


def rows() -> list[tuple]:
    figure = [
        (f"kn_{short(kn)}", kn, min(0.1, peak), peak, "resnet50", True, error) for kn, (peak, error) in FIGURE.items()
    ]
    return figure + ROWS


def test_every_row_has_a_file_and_every_file_is_a_row():
    assert sorted(row[0] for row in rows()) == [path.stem for path in PAPER]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_is_the_papers(row):
    name, kn, first, peak, network, zero_init_last, error = row
    path = CONFIGS / "paper" / f"{name}.json"
    loaded = config.load(path)
    resolved = plan.resolve(loaded, 1, samples=N)
    assert (resolved.batch.train, resolved.batch.micro) == (kn, 32)
    assert resolved.schedule.lr(0) == first
    rates = [resolved.schedule.lr(epoch * N) for epoch in (6, 29, 30, 59, 60, 79, 80, 89)]
    assert rates == pytest.approx([peak / 10**decade for decade in (0, 0, 1, 1, 2, 2, 3, 3)], rel=1e-12)
    recipe, optimizer = loaded.recipe, loaded.blocks.optimizer
    assert recipe.epochs == 90 and (recipe.model.name, recipe.model.zero_init_last) == (network, zero_init_last)
    assert optimizer.params | {"lr": 0} == {"lr": 0, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    assert loaded.blocks.gradient_clipping == 0 and recipe.mixing is None
    assert (recipe.transform.size, recipe.transform.evaluation_resize, recipe.evaluation.every_epochs) == (224, 256, 1)
    comment = re.findall(r"^  // (.*)$", path.read_text(), re.MULTILINE)
    assert comment[0].startswith("Goyal et al. 2017") and (error is None or error in " ".join(comment))


def test_a_row_says_only_what_differs():
    lines = {path.stem: path.read_text().count("\n") for path in PAPER}
    assert max(lines.values()) <= 7, lines


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(CONFIGS)))
@pytest.mark.parametrize("world_size", [1, 8, 256])
def test_every_configuration_resolves_or_is_refused_with_the_reason(path, world_size):
    loaded = config.load(path)
    try:
        resolved = plan.resolve(loaded, world_size, samples=N)
    except UserError as refused:
        k = loaded.blocks.train_batch_size // loaded.blocks.train_micro_batch_size_per_gpu
        assert k % world_size, refused
        assert f"cannot be split over {world_size} ranks" in str(refused) and f"{k} logical workers" in str(refused)
        return
    assert resolved.batch.train == loaded.blocks.train_batch_size, "kn does not depend on the ranks"
    text = plan.format_page(resolved.page())
    assert f"{resolved.batch.train:,} = " in text and json.dumps(resolved.summary())


# ---------------------------------------------------------------- the networks


@pytest.fixture(scope="module", params=["kn_8k", "table2c_8k_resnet101"], ids=["resnet50", "resnet101"])
def network(request) -> nn.Module:
    loaded = config.load(CONFIGS / "paper" / f"{request.param}.json")
    return model.create(loaded.recipe.model, 1000, seed=0)


def blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, BasicBlock | Bottleneck)]


def test_the_last_bn_of_every_block_begins_at_0_and_the_others_at_1(network):
    """§5.1: "we initialize γ = 1 … except for each residual block's last BN where we initialize γ to be 0"."""
    last = {id(block.bn3) for block in blocks(network)}
    assert len(last) in (16, 33)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            assert (layer.weight == (0 if id(layer) in last else 1)).all() and (layer.bias == 0).all()


def test_the_classifier_has_a_deviation_of_a_hundredth(network):
    """§5.1: "initialized by drawing weights from a zero-mean Gaussian with standard deviation of 0.01"."""
    weight = network.fc.weight
    assert weight.shape == (1000, 2048)
    assert weight.std().item() == pytest.approx(0.01, rel=0.01) and abs(weight.mean().item()) < 1e-4
    assert (network.fc.bias == 0).all()


def test_convolutions_have_hes_deviation(network):
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 50_000:
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02), name


def test_normalisation_does_not_decay_and_everything_else_does(network):
    """§5.1: "we do not apply weight decay on the learnable BN coefficients": the classifier's bias decays."""
    decayed, spared = model.parameter_groups(network)
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    of_bn = {id(parameter) for layer in layers for parameter in layer.parameters()}
    assert {id(parameter) for parameter in spared["params"]} == of_bn and spared["weight_decay"] == 0
    assert "weight_decay" not in decayed
    assert {id(p) for p in decayed["params"]} == {id(p) for p in network.parameters()} - of_bn
    assert any(parameter is network.fc.bias for parameter in decayed["params"])


def test_stride_is_in_the_3x3_convolutions(network):
    """The fb.resnet.torch variant, "v1.5": of a block that halves the size, the 3×3 convolution does it."""
    strided = [block for block in blocks(network) if block.downsample is not None and block.conv2.stride == (2, 2)]
    assert len(strided) == 3
    for block in blocks(network):
        assert block.conv1.stride == block.conv3.stride == (1, 1)
        assert block.conv1.kernel_size == (1, 1) and block.conv2.kernel_size == (3, 3)
    with torch.no_grad():
        shapes = [tuple(feature.shape[1:]) for feature in network.forward_intermediates(torch.zeros(1, 3, 224, 224))[1]]
    assert shapes[1:] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
