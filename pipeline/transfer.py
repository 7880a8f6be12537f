"""Fine-tuning: weights to start from, a new classifier, parameters that are not trained, a lower rate for the body.

All of it is `recipe.model` (docs/recipe.md). Only the classifier may differ between the weights and the network, which
is timm's: `get_classifier` says where it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import schema
from pipeline.batch_norm import batch_norms
from shards.errors import UserError

FROM_TIMM = "timm"
"""What `recipe.model.start_from` says for the weights that the library knows for a model's name."""

NAMED = 4
"""Parameters that a message about many of them names."""


@dataclass(frozen=True)
class Start:
    """The weights that a training began with.

    Attributes:
        source: what `recipe.model.start_from` says.
        digest: sha256 of all of them, in hexadecimal: every host must have the same.
        classifier: what became of it, for people.
    """

    source: str
    digest: str
    classifier: str


# ---------------------------------------------------------------- the weights


def load_start(network: nn.Module, recipe: schema.Model) -> Start:
    """Load the weights that `recipe.start_from` names into a network; its classifier stays new where it must.

    The classifier is taken if all of its parameters are there in the right shape and `recipe.new_head` is false, else
    all of it stays as it is. Everything else must be there and fit. Where a file holds an average of the weights
    beside them (timm's EMA), that is taken, as timm does.

    Args:
        network: as `model.create` made it; changed in place.
        recipe: that it was made from, with `start_from`.

    Raises:
        UserError: the weights cannot be read, are not finite, or do not fit, naming the parameters.
    """
    assert recipe.start_from is not None
    place = f"recipe.model.start_from: {recipe.start_from}"
    weights = _of_timm(recipe) if recipe.start_from == FROM_TIMM else _of_file(Path(recipe.start_from).expanduser())
    ours = network.state_dict()
    head = _classifier_names(network, ours)
    unfit = _unfit(ours, weights)
    other = [problem for name, problem in unfit.items() if name not in head and not name.startswith(_prefixes(network))]
    if other:
        raise UserError(
            f"{place}: the weights do not fit {recipe.name}{_with(recipe.args)}",
            *other[:NAMED],
            *([f"and {len(other) - NAMED:,} others"] if len(other) > NAMED else []),
            "Only the classifier may differ: recipe.model.name and args must be those that the weights are of.",
        )
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{place}: {broken[0]} is not finite", "The file is of a training that came apart.")
    new = recipe.new_head or bool(unfit)
    kept = {name: tensor for name, tensor in weights.items() if name in ours and not (new and name in head)}
    # not strict: counts of batches may be missing, as they are in older files
    network.load_state_dict(kept, strict=False)
    return Start(recipe.start_from, _digest(weights), _classifier_text(network, weights, new=new))


def _unfit(ours: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What keeps weights from being those of a network, by name; counts of batches aside, which may be missing."""
    problems = {
        name: f"missing: {name} {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if name not in weights and not name.endswith("num_batches_tracked")
    }
    problems |= {name: f"unknown: {name} {tuple(tensor.shape)}" for name, tensor in weights.items() if name not in ours}
    problems |= {
        name: f"{name} is {tuple(weights[name].shape)}, the network's {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if name in weights and weights[name].shape != tensor.shape
    }
    return problems


def _of_file(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        inside = path / "model.safetensors"
        mend = f"The weights that a run exported are {inside}" if inside.exists() else "Name a file in it."
        raise UserError(f"recipe.model.start_from: {path} is a folder", mend)
    try:
        # safetensors, or torch's restricted unpickler: nothing in the file is run
        weights = load_state_dict(str(path))
    except FileNotFoundError:
        raise UserError(f"recipe.model.start_from: {path}: there is no such file") from None
    except Exception as error:  # torch, pickle, zipfile and safetensors have their own each
        raise UserError(f"recipe.model.start_from: {path}: cannot be read as weights: {error}") from None
    strange = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if strange or not weights:
        what = f"{strange[0]} is no tensor" if strange else "it is empty"
        raise UserError(f"recipe.model.start_from: {path}: not a file of weights: {what}")
    return weights


def _of_timm(recipe: schema.Model) -> dict[str, torch.Tensor]:
    """The library's weights of a model, with the classifier that they were trained with."""
    arguments = {key: value for key, value in recipe.args.items() if key != "num_classes"}
    try:
        return timm.create_model(recipe.name, pretrained=True, **arguments).state_dict()
    except OSError as error:
        raise UserError(
            f'recipe.model.start_from "timm": the weights of {recipe.name} cannot be fetched: {error}',
            "timm takes them from the Hugging Face Hub, and from its cache on this host once they are there.",
            "Without a network: fetch the file elsewhere, and name it in recipe.model.start_from.",
        ) from None
    except Exception as error:  # no such weights, or arguments that they do not fit
        raise UserError(
            f'recipe.model.start_from "timm": timm has no weights of {recipe.name}{_with(recipe.args)}: {error}',
            "List those that it has: python -c 'import timm; print(timm.list_pretrained())'",
        ) from None


def _with(arguments: Mapping[str, Any]) -> str:
    return f" with {dict(arguments)}" if arguments else ""


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}\n".encode())
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- the classifier


def classifier_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of timm's classifier of a network.

    Raises:
        UserError: timm does not say which they are.
    """
    return [parameter for name, parameter in network.named_parameters() if name.startswith(_prefixes(network))]


def _prefixes(network: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's parameters begin with; a network may have several layers of it."""
    find = getattr(network, "get_classifier", None)
    found = find() if find is not None else ()
    layers = found if isinstance(found, tuple | list) else (found,)
    names = tuple(f"{name}." for name, module in network.named_modules() if any(module is layer for layer in layers))
    if not names:
        raise UserError(f"recipe.model: timm does not say which layer of {type(network).__name__} is its classifier")
    return names


def _classifier_names(network: nn.Module, names: Collection[str]) -> list[str]:
    prefixes = _prefixes(network)
    return [name for name in names if name.startswith(prefixes)]


def _classifier_text(network: nn.Module, weights: Mapping[str, torch.Tensor], *, new: bool) -> str:
    first = _classifier_names(network, network.state_dict())[0]
    layer = first.rpartition(".")[0]
    classes = len(network.state_dict()[first])
    if not new:
        return f"{layer} of the weights, {classes} classes"
    before = f"; that of the weights has {len(weights[first])}" if first in weights else ""
    return f"{layer} new, {classes} classes{before}"


# ---------------------------------------------------------------- what is trained, at which rate


def freeze(network: nn.Module, patterns: Collection[str]) -> None:
    """Exclude the parameters that any of the patterns matches (`fnmatch`, on full names) from training.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            tops = dict.fromkeys(name.partition(".")[0] for name in names)
            raise UserError(
                f'recipe.model.freeze: "{pattern}" matches no parameter of the network',
                f"Its parameters are called {names[0]}, {names[len(names) // 2]}, {names[-1]} and so on.",
                f"Patterns are of whole names: {', '.join(f'{top}.*' for top in tops)}",
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("recipe.model.freeze: the patterns match all parameters, and none is left to train")


def frozen_norms(network: nn.Module) -> list[_BatchNorm]:
    """The BN layers whose γ and β are both frozen: they stay in evaluation mode, and their statistics as they are."""
    return [
        layer
        for layer in batch_norms(network)
        if (own := list(layer.parameters(recurse=False))) and not any(parameter.requires_grad for parameter in own)
    ]


def with_body_rate(groups: list[dict[str, Any]], network: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Divide parameter groups into the classifier's, which come first, and the body's at `factor` of the rate.

    Args:
        groups: as `model.parameter_groups` makes them.
        network: theirs.
        factor: `recipe.model.body_lr`; at 1 nothing is divided.

    Raises:
        UserError: the classifier, whose rate the factor is of, is not trained.
    """
    if factor == 1:
        return groups
    head = {id(parameter) for parameter in classifier_parameters(network)}
    heads = [{**group, "params": [p for p in group["params"] if id(p) in head]} for group in groups]
    bodies = [
        {**group, "params": [p for p in group["params"] if id(p) not in head], "lr_scale": factor} for group in groups
    ]
    if not any(group["params"] for group in heads):
        raise UserError(
            "recipe.model.body_lr is a factor of the classifier's rate, and the classifier is frozen",
            "Leave it out: optimizer.params.lr is the rate of all that is trained.",
        )
    return [group for group in (*heads, *bodies) if group["params"]]


def prepare(network: nn.Module, recipe: schema.Model, *, resumes: bool) -> Start | None:
    """Bring a network into the state that a training begins in, or goes on in.

    Args:
        network: as `model.create` made it; changed in place.
        recipe: that it was made from.
        resumes: whether the weights come from a checkpoint: those to start from are not read then.

    Returns:
        The weights that were loaded, or None.

    Raises:
        UserError: see `load_start`, `freeze` and `with_body_rate`.
    """
    start = None if resumes or recipe.start_from is None else load_start(network, recipe)
    freeze(network, recipe.freeze)
    with_body_rate([{"params": [p for p in network.parameters() if p.requires_grad]}], network, recipe.body_lr)
    return start


def describe(network: nn.Module, start: Start | None, transform: schema.Transform) -> list[tuple[str, str]]:
    """The rows of the plan's page that need the network: what it starts from, and how much of it is trained."""
    rows = []
    if start is not None:
        rows.append(("classifier", f"{start.classifier} · weights sha256 {start.digest[:4]}…{start.digest[-2:]}"))
        if start.source == FROM_TIMM:
            rows += _other_normalisation(network, transform)
    parameters = list(network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if len(trained) < len(parameters):
        numbers, of = (sum(p.numel() for p in chosen) / 1e6 for chosen in (trained, parameters))
        layers = len(frozen_norms(network))
        rows.append(
            (
                "trained",
                f"{len(trained)} of {len(parameters)} parameters, {numbers:.1f} M of {of:.1f} M numbers · "
                f"{layers} of {len(batch_norms(network))} BN layers in evaluation mode",
            )
        )
    return rows


def _other_normalisation(network: nn.Module, transform: schema.Transform) -> list[tuple[str, str]]:
    """A row where timm's weights are of images that were normalised otherwise than these are."""
    trained_with = getattr(network, "pretrained_cfg", {})
    settings = [
        f"--set 'recipe.transform.{key}={list(theirs)}'"
        for key in ("mean", "std")
        if (theirs := trained_with.get(key)) and tuple(theirs) != tuple(getattr(transform, key))
    ]
    if not settings:
        return []
    return [("", f"these weights were trained on images normalised otherwise: {' '.join(settings)}")]
