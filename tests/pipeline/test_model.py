"""The network as the paper builds it: initialisation, decay groups, BN statistics, export."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers.grn import GlobalResponseNorm
from timm.models.nfnet import NormFreeBlock
from torch import nn

from pipeline import model, schema
from pipeline.checkpoint import load_weights
from shards.errors import UserError

RESNET50 = schema.Model(name="resnet50")


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return model.create(RESNET50, classes=1000, seed=0)


def test_resnet50_has_the_paper_s_initialisation(resnet50):
    for name, module in resnet50.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            expected = 0.0 if name.endswith("bn3") else 1.0
            assert (module.weight == expected).all() and (module.bias == 0).all(), name
            assert module.momentum == 0.1
    assert resnet50.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (resnet50.fc.bias == 0).all()
    # the stride-2 convolutions are the 3×3 ones (fb.resnet.torch)
    assert all(
        layer[0].conv2.stride == (2, 2) and layer[0].conv1.stride == (1, 1)
        for layer in (resnet50.layer2, resnet50.layer3, resnet50.layer4)
    )


def test_gamma_of_the_last_bn_is_switchable():
    network = model.create(schema.Model(name="resnet18", zero_init_last=False), 10, seed=0)
    assert all((m.weight == 1).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_every_rank_builds_the_same_weights_and_seeds_differ():
    small = schema.Model(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})
    first, again, other = (model.create(small, 10, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_weight_decay_spares_bn_and_nothing_else(resnet50):
    decayed, spared = model.parameter_groups(resnet50)
    names = {id(parameter): name for name, parameter in resnet50.named_parameters()}
    assert "weight_decay" not in decayed and spared["weight_decay"] == 0.0
    assert len(decayed["params"]) == 53 + 2 and len(spared["params"]) == 2 * 53
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert {"layer1.0.downsample.1.weight", "layer1.0.downsample.1.bias"} <= spared_names  # no "bn" in the name
    assert "fc.bias" not in spared_names and "fc.weight" not in spared_names
    assert all(names[id(p)].endswith((".weight", "fc.bias")) for p in decayed["params"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "resnetv2_50"])
def test_any_other_timm_model_keeps_its_own_initialisation_and_spares_its_norms(name):
    built = model.create(schema.Model(name=name), 7, seed=4)
    torch.manual_seed(4)
    own = timm.create_model(name, num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), own.parameters(), strict=True))
    spared = {id(p) for p in model.parameter_groups(built)[1]["params"]}
    norms = [m for m in built.modules() if "Norm" in type(m).__name__]
    assert norms and spared == {id(p) for m in norms for p in m.parameters(recurse=False)}
    groups = model.parameter_groups(built)
    assert sum(len(group["params"]) for group in groups) == len(list(built.parameters()))


def test_unknown_models_and_arguments_are_user_errors():
    with pytest.raises(UserError, match="resnet5O") as error:
        model.create(schema.Model(name="resnet5O"), 10, seed=0)
    with pytest.raises(UserError, match="resnet18") as error:
        model.create(schema.Model(name="resnet18", args={"no_such": 1}), 10, seed=0)
    assert "no_such" in str(error.value)
    with pytest.raises(UserError, match="less than the data's 10 classes"):
        model.create(schema.Model(name="resnet18", args={"num_classes": 9}), 10, seed=0)


def test_what_timm_raises_for_an_argument_is_a_user_error():
    with pytest.raises(UserError, match=r"recipe\.model\.args: resnet18 cannot be built") as error:
        model.create(schema.Model(name="resnet18", args={"act_layer": "no_such"}), 10, seed=0)
    assert "no_such" in str(error.value)


def test_parameters_beside_normalisation_decay_whatever_their_type_is_called():
    block = NormFreeBlock(16, skipinit=True, act_layer=nn.ReLU)
    decayed, spared = model.parameter_groups(block)
    assert any(parameter is block.skipinit_gain for parameter in decayed["params"]) and not spared["params"]


@pytest.mark.parametrize(
    "layer",
    "BatchNormAct2d EvoNorm2dS0 FilterResponseNormTlu2d GlobalResponseNorm GroupNorm1 LayerNorm2d RmsNorm RmsNormAct2d "
    "SimpleNorm SplitBatchNorm2d".split(),
)
def test_every_normalisation_of_timm_is_spared(layer):
    built = getattr(timm.layers, layer, GlobalResponseNorm)(4)
    assert not model.parameter_groups(built)[0]["params"]


@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4), nn.GroupNorm(2, 4)])
def test_every_normalisation_of_torch_is_spared(layer):
    decayed, spared = model.parameter_groups(layer)
    assert not decayed["params"] and spared["params"]


def test_a_model_that_does_not_take_the_size_is_a_user_error():
    vit = schema.Model(name="vit_tiny_patch16_224")
    with pytest.raises(UserError, match="vit_tiny_patch16_224 does not take images of 96 × 96") as error:
        model.create(vit, 7, seed=0, sizes=(96,))
    assert "recipe.transform.size" in str(error.value) and "recipe.model.args.img_size=96" in str(error.value)
    model.create(schema.Model(name="vit_tiny_patch16_224", args={"img_size": 96}), 7, seed=0, sizes=(96,))
    model.create(vit, 7, seed=0, sizes=(224,))


def test_a_model_that_is_no_classifier_is_a_user_error():
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    with pytest.raises(UserError, match="with a list, not with 10 scores"):
        model.create(schema.Model(name="resnet18", args={**small, "features_only": True}), 10, seed=0, sizes=(32,))
    model.create(schema.Model(name="resnet18", args=small), 10, seed=0, sizes=(32,))


class ReadsValues(nn.Module):
    """Decides by a value, which the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mean((2, 3)) * (2 if images.sum().item() > 0 else 1))


def test_a_model_that_does_not_run_on_the_meta_device_is_checked_with_values_and_not_estimated(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: ReadsValues())
    before = torch.get_rng_state()
    network = model.create(schema.Model(name="resnet18"), 10, seed=0, sizes=(32,))
    torch.set_rng_state(before)
    rows = dict(model.describe(network, weight_decay=1e-4, images=4, size=32, precision="fp32"))
    assert rows["memory"].startswith("not estimated · 0.0 M parameters")


def test_checking_the_size_leaves_weights_statistics_and_random_numbers_alone():
    recipe = schema.Model(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "drop_rate": 0.5})
    checked = model.create(recipe, 10, seed=1, sizes=(32,))
    after_checked = torch.rand(1)
    unchecked = model.create(recipe, 10, seed=1)
    assert torch.equal(after_checked, torch.rand(1))
    ours, theirs = checked.state_dict(), unchecked.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_export_is_timm_s_own_file(tmp_path):
    recipe = schema.Model(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]})
    network = model.create(recipe, classes=6, seed=3).to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.export(network, tmp_path / "m.safetensors", recipe, classes=6)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    arguments = json.loads(metadata["timm_args"])
    theirs = timm.create_model(metadata["timm_model"], **arguments, checkpoint_path=str(tmp_path / "m.safetensors"))
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(theirs.eval()(images), network.eval()(images))


def test_weights_that_do_not_fit_are_a_user_error(tmp_path):
    small = schema.Model(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]})
    model.export(model.create(small, 6, seed=0), tmp_path / "m.safetensors", small, classes=6)
    with pytest.raises(UserError, match="do not fit"):
        load_weights(tmp_path / "m.safetensors", model.create(small, 7, seed=0))
    (tmp_path / "m.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_weights(tmp_path / "m.safetensors", model.create(small, 6, seed=0))


def test_memory_and_decay_are_described(resnet50):
    rows = dict(model.describe(resnet50, weight_decay=1e-4, images=32, size=224, precision="fp32"))
    assert "55 weights and biases" in rows["decay"] and "106 normalisation" in rows["decay"]
    assert "25.6 M parameters" in rows["memory"] and "204.5 MB" in rows["memory"]
    amount, unit, *_ = rows["memory"].split()
    assert unit == "GB" and 2 < float(amount) < 6  # 32 × some 80 MB of fp32 layer outputs, and 0.3 GB of state
    assert next(resnet50.parameters()).device.type == "cpu", "counting must not move the model"
