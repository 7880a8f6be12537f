"""What the constructor of a torchvision data set takes, and the splits that it can make."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from shards.errors import UserError

Arguments = tuple[tuple[str, Any], ...]
"""Keyword arguments of a constructor, hashable."""

_OURS = ("root", "download", "transform", "target_transform", "transforms", "loader", "is_valid_file")
"""Arguments of the classes that are not for --arg."""

_TRAINING = ("train", "train-standard", "trainval")
_VALIDATION = ("val", "valid", "validation", "test")
"""Values of an argument ``split``, the first that the class knows."""


_UNSAFE = ("LSUN", "LSUNClass")
"""Classes that unpickle a cache file of the working folder, which anybody could have put there."""


def find_class(name: str) -> type:
    """A class of torchvision.datasets.

    Raises:
        UserError: if no name is given, there is no such class, with the names most like it, or it is not safe.
    """
    if not name:
        raise UserError("torchvision: say which class of torchvision.datasets: torchvision:CIFAR10")
    if name in _UNSAFE:
        raise UserError(
            f"torchvision:{name}: torchvision unpickles a file _cache_… of the working folder for it, unchecked",
            "That can run any code. Export the images to class folders, and use: shards prepare imagefolder",
        )
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError(
            f"torchvision cannot be imported: {error}", "Install it with: pip install torchvision"
        ) from error
    known = {name: getattr(datasets, name) for name in datasets.__all__}
    classes = {name: value for name, value in known.items() if inspect.isclass(value)}
    if name not in classes:
        lower = {known.lower(): known for known in classes}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, 3)]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(sorted(classes))}"
        raise UserError(f"torchvision:{name}: no such class in torchvision.datasets", hint)
    return classes[name]


def constructor_parameters(name: str, cls: type) -> dict[str, inspect.Parameter]:
    """What the constructor takes by name, and the constructors that it hands ``**kwargs`` on to."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        for parameter in list(parameters.values())[1:]:
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD or parameter.kind is parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, parameter)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    if "root" not in found:
        raise UserError(f"torchvision:{name}: takes no root folder: it has no data to read")
    return found


def check_argument(place: str, name: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse an argument that the constructor does not take, or that is not the user's to give."""
    allowed = [parameter for parameter in parameters if parameter not in _OURS]
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 1)
        raise UserError(
            f"{place}: has no argument {name} that could be given here",
            f"Did you mean {near[0]}?" if near else f"There are: {', '.join(allowed) or 'none'}",
        )


def parse_argument(text: str) -> tuple[str, Any] | None:
    """``split=letters`` → a string, ``background=False`` → a bool, as Python would read it; None for neither."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        return None
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
    if isinstance(literal, list):
        literal = tuple(literal)
    return name, literal if literal is None or isinstance(literal, bool | int | float | str | tuple) else value


def construct(name: str, root: Path, arguments: Mapping[str, Any]) -> Any:
    """A data set.

    Raises:
        UserError: with torchvision's own words, whatever goes wrong there.
    """
    try:
        return find_class(name)(str(root), **arguments)
    except UserError:
        raise
    except Exception as error:
        raise cannot_open(f"torchvision:{name}", root, error) from error


@lru_cache(maxsize=8)
def open_dataset(name: str, root: Path, arguments: Arguments) -> Any:
    """A data set, opened once in each process that needs it."""
    return construct(name, root, dict(arguments))


def cannot_open(place: str, root: Path, error: Exception) -> UserError:
    """The refusal when torchvision raises something, of whatever type: its message is what the user needs."""
    said = str(error)
    if "weights_only" in said:  # torch goes on to say how to load it all the same, which runs what the file holds
        said = said.partition(". ")[0]
    return UserError(
        f"{place}: torchvision cannot open it in {root}: {said}",
        "ROOT is the folder that torchvision downloads to. --download fetches what is missing.",
    )


def find_splits(
    name: str, root: Path, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any], download: bool
) -> dict[str, dict[str, Any]]:
    """The splits that a class makes by an argument ``train`` or ``split`` that is not given: arguments by split.

    A class without such an argument has the split "train" alone; "test" is there beside a validation split.

    Raises:
        UserError: if an argument without a default is not given, or no split is for training.
    """
    if "train" in parameters and "train" not in arguments:
        _check_required(name, root, parameters, arguments)
        return {"train": {"train": True}, "val": {"train": False}}
    if "split" not in parameters or "split" in arguments:
        _check_required(name, root, parameters, arguments)
        return {"train": {}}
    if download:  # some classes look for their files before they look at the argument
        construct(name, root, {**arguments, "download": True})
    known = _known_splits(name, root, arguments)
    training = next((value for value in _TRAINING if value in known), None)
    if training is None:
        raise UserError(
            f"torchvision:{name}: which of its splits is for training? It has {', '.join(known)}",
            "Say it with --split train:split=NAME, and --split val:split=NAME for validation.",
        )
    found = {"train": {"split": training}}
    validation = next((value for value in _VALIDATION if value in known), None)
    if validation is not None:
        found["val"] = {"split": validation}
    if "test" in known and validation != "test":
        found["test"] = {"split": "test"}
    return found


def _check_required(
    name: str, root: Path, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]
) -> None:
    """Refuse to go on without an argument that has no default.

    Raises:
        UserError: with the values that it can have, where the class lists them.
    """
    for wanted, parameter in parameters.items():
        if parameter.default is not parameter.empty or wanted == "root" or wanted in arguments:
            continue
        hint = f"Give it with --arg {wanted}=VALUE."
        if wanted in _OURS:
            hint = "It is a Python object, which a command line cannot give."
        elif wanted == "split":
            hint = f"Give it with --arg split=VALUE: {', '.join(_known_splits(name, root, arguments))}"
        raise UserError(f"torchvision:{name}: needs the argument {wanted}", hint)


def _known_splits(name: str, root: Path, arguments: Mapping[str, Any]) -> list[str]:
    """The values of ``split`` that a class lists when it is asked for one that it cannot have."""
    try:
        construct(name, root, {**arguments, "split": "?"})
    except UserError as error:
        _, listed, values = error.headline.partition("Valid values are")
        if not listed:
            raise
        return re.findall(r"'([^']*)'", values)
    raise UserError(f"torchvision:{name}: its splits cannot be told", "Name them with --split SPLIT:NAME=VALUE.")
