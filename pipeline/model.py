"""The timm model as the paper trains it: its initialisation, which weights decay, and its weights in files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from rich import filesize
from safetensors.torch import save
from timm.layers import evo_norm, filter_response_norm, grn, inplace_abn, norm, norm_act, split_batchnorm
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import schema
from shards.errors import UserError
from shards.files import write_whole

FC_STD = 0.01  # paper §5.1: "The 1000-way fully-connected layer is initialized … with standard deviation of 0.01"


def _modules_defined_in(namespace: ModuleType) -> list[type[nn.Module]]:
    return [
        kind
        for _, kind in inspect.getmembers(namespace, inspect.isclass)
        if issubclass(kind, nn.Module) and kind.__module__ == namespace.__name__
    ]


NORMALISATION: tuple[type[nn.Module], ...] = tuple(
    kind
    for namespace in (
        torch.nn.modules.batchnorm,  # instance normalisation derives from its classes
        torch.nn.modules.normalization,
        *(evo_norm, filter_response_norm, grn, inplace_abn, norm, norm_act, split_batchnorm),
    )
    for kind in _modules_defined_in(namespace)
)
"""Every normalisation layer of torch and timm. Chosen by type: names mislead, of layers (a shortcut's BN has no "bn" in
it) and of types (NFNet's NormFreeBlock)."""


def create(recipe: schema.Model, classes: int, seed: int, sizes: Sequence[int] = ()) -> nn.Module:
    """Build a timm model; residual networks get the paper's initialisation (§5.1).

    He initialisation with fan-out for convolutions, γ = 1 except γ = 0 in each residual block's last BN
    (`zero_init_last`), N(0, 0.01²) for the classifier. Other models keep their own.

    Args:
        recipe: name and arguments.
        classes: number of classes of the data set.
        seed: every rank builds the same weights from it.
        sizes: of the images (recipe.transform.sizes), which the model must take.

    Raises:
        UserError: no such model, arguments it does not take, or images it does not take.
    """
    if not timm.is_model(recipe.name):
        near = timm.list_models(f"*{recipe.name}*")[:5]
        raise UserError(
            f"recipe.model.name: timm has no model {recipe.name!r}",
            f"Close to it: {', '.join(near)}"
            if near
            else "List them with: python -c 'import timm; timm.list_models()'",
        )
    torch.manual_seed(seed)
    arguments = {"num_classes": classes, **recipe.args}
    if arguments["num_classes"] < classes:
        raise UserError(
            f"recipe.model.args.num_classes {arguments['num_classes']} is less than the data's {classes} classes"
        )
    try:
        model = timm.create_model(recipe.name, **arguments)
    except Exception as error:  # timm's 1,000 models check their arguments each in its own way
        raise UserError(f"recipe.model.args: {recipe.name} cannot be built with {recipe.args}: {error!r}") from None
    if isinstance(model, ResNet):
        _initialise_resnet(model, zero_init_last=recipe.zero_init_last)
    elif not recipe.zero_init_last:
        raise UserError(
            f"recipe.model.zero_init_last is for residual networks; {recipe.name} has its own initialisation"
        )
    for size in sizes:
        _check_takes(model, recipe, arguments["num_classes"], size)
    return model


def _check_takes(model: nn.Module, recipe: schema.Model, outputs: int, size: int) -> None:
    """Two images through copies of the model: without arithmetic, and with it if the meta device is not enough."""
    images = f"images of {size} × {size} pixels (recipe.transform.size)"
    try:
        answer = _forward(model, 2, size, "meta")
    except Exception:  # the model's own, or an operation that does not exist without values
        try:
            answer = _forward(model, 2, size, "cpu")
        except Exception as error:
            raise UserError(
                f"recipe.model: {recipe.name} does not take {images}: {error}",
                "Set recipe.transform.size to a size it takes; a vision transformer is built for another size with "
                f"recipe.model.args.img_size: --set recipe.model.args.img_size={size}",
            ) from None
    if not isinstance(answer, torch.Tensor) or answer.shape != (2, outputs):
        given = f"shape {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
        raise UserError(
            f"recipe.model: {recipe.name} answers two {images} with {given}, not with {outputs} scores for each",
            "A classifier is needed: look at recipe.model.args.",
        )


def _forward(model: nn.Module, images: int, size: int, device: str, hook: Any = None) -> Any:
    """What a copy of the model answers in training; the model, and torch's random numbers, stay as they are.

    Args:
        hook: a forward hook for each layer that has no layers inside.
    """
    shadow = deepcopy(model).to(device).train()
    for module in shadow.modules():
        if hook is not None and not list(module.children()):
            module.register_forward_hook(hook)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return shadow(torch.zeros(images, 3, size, size, device=device))


def _initialise_resnet(model: ResNet, *, zero_init_last: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, _BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_last:
        for block in model.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                block.zero_init_last()
    nn.init.normal_(model.fc.weight, std=FC_STD)
    nn.init.zeros_(model.fc.bias)


def parameter_groups(model: nn.Module, *, vectors_decay: bool = True) -> list[dict[str, Any]]:
    """Two groups: everything that decays, and normalisation's γ and β, which do not (paper §5.1).

    The classifier's bias decays: the paper exempts BN only.

    Args:
        model: only what is trained of it is in a group.
        vectors_decay: else nothing of one dimension decays, which biases are; so it is with LARS and LAMB.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMALISATION)
        for parameter in module.parameters(recurse=False)
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not vectors_decay:
        exempt |= {id(parameter) for parameter in parameters if parameter.ndim <= 1}
    decayed = [parameter for parameter in parameters if id(parameter) not in exempt]
    spared = [parameter for parameter in parameters if id(parameter) in exempt]
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def describe(
    model: nn.Module,
    *,
    weight_decay: float,
    images: int,
    size: int,
    precision: str,
    averaged: bool = False,
    vectors_decay: bool = True,
) -> list[tuple[str, str]]:
    """The rows of the plan's page that need the built model: what decays, and memory.

    Activations are estimated as the outputs of all layers that training keeps for the backward pass, counted on the
    meta device for as many images as go through it at once; the true figure depends on fusion and the allocator. A
    model that does not run there gets no figure.
    """
    decayed, spared = (len(group["params"]) for group in parameter_groups(model, vectors_decay=vectors_decay))
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = 1 + averaged  # of all weights
    state_bytes = (weights * copies + trained * 2) * 4  # weights, gradients, momentum, all fp32
    saved_bytes = (weights * copies + trained) * 4
    activations = _activation_bytes(model, images, size, 4 if precision == "fp32" else 2)
    memory = f"{filesize.decimal(state_bytes + activations)} per rank estimated" if activations else "not estimated"
    return [
        (
            "decay",
            f"{weight_decay:g} on {decayed} weights and biases; none on {spared} normalisation γ, β"
            if vectors_decay
            else f"{weight_decay:g} on {decayed} weights; none on {spared} biases and normalisation γ, β",
        ),
        (
            "memory",
            f"{memory} · {weights / 1e6:.1f} M parameters · checkpoints {filesize.decimal(saved_bytes)}",
        ),
    ]


def _activation_bytes(model: nn.Module, images: int, size: int, element_bytes: int) -> int | None:
    """Bytes of all layers' outputs, or None for a model that does not run on the meta device."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.numel() * element_bytes

    try:
        _forward(model, images, size, "meta", count)
    except Exception:  # whatever it is, an estimate must not end a training
        return None
    return total


# ---------------------------------------------------------------- weights in files


def first_not_finite(model: nn.Module) -> str | None:
    """The name of a weight or statistic that holds NaN or infinity, or None; waits for the device."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


def export(model: nn.Module, path: Path, recipe: schema.Model, classes: int) -> None:
    """Write a model's weights as `exported` has them; the file is whole or not there.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(path, exported(model.state_dict(), recipe, classes))


def exported(weights: Mapping[str, torch.Tensor], recipe: schema.Model, classes: int) -> bytes:
    """Weights as the content of a safetensors file, under timm's own names.

    `timm.create_model(name, num_classes=…, checkpoint_path=path, **args)` loads the file; how to call it is in the
    file's metadata.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    arguments = {"num_classes": classes, **recipe.args}
    return save(state, metadata={"format": "pt", "timm_model": recipe.name, "timm_args": json.dumps(arguments)})
