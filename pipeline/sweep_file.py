"""A sweep file: the runs that one table or figure is made of, in YAML.

    title: "Table 1: warmup at kn = 8k"
    base: ../imagenet_256.json
    seeds: [0, 1, 2, 3, 4]
    arms:
      - name: kn-256
        paper: {error: 23.60, std: 0.12}
      - name: kn-8k-gradual
        set: {train_batch_size: 8192}
        paper: {error: 23.74, std: 0.09}

An arm is a configuration: the base's file or its own, with values set by their paths as `--set` does it. Every arm is
trained once with every seed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from pipeline.config import validate
from pipeline.config_file import SWEEP_SUFFIXES
from pipeline.deepspeed_keys import did_you_mean
from pipeline.section import Section
from shards.errors import UserError

OF_THE_SWEEP = {
    "recipe.seed": "the seeds of a sweep are its seeds: [0, 1, …]",
    "recipe.run": "every run of a sweep has a folder of its own; --out DIR says where",
}
"""Paths that a sweep itself sets in every run, and what to write instead."""

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,79}")
_JSON_PATH = re.compile(r"[^\s=.]+(\.[^\s=.]+)*")


class Published(Section):
    """A result that was published: top-1 error in percent, its standard deviation over runs, and where it stands."""

    error: float = Field(ge=0, le=100)
    std: float | None = Field(None, ge=0)
    source: str = ""
    minibatch: int | None = Field(None, gt=0, description="of the published runs, where it is not the arm's")


class Arm(Section):
    """One row of the table. Its name is that of a folder too."""

    name: str
    config: str | None = Field(None, description="instead of the sweep's base; relative to the sweep file")
    set: dict[str, Any] = Field(default_factory=dict, description="values by path, after those of the sweep")
    paper: Published | None = None

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not _FOLDER_NAME.fullmatch(name):
            raise ValueError("an arm's runs are in a folder of its name: up to 80 letters, digits and ._+=-")
        return name


class Figure(Section):
    """A figure in the paper's layout.

    curves: training error against epochs, the baseline and one arm in each panel (the paper's figures 2 to 5).
    minibatch: error against the minibatch on a logarithmic axis (figure 1).
    """

    kind: Literal["curves", "minibatch"]
    title: str = ""
    arms: list[str] | None = Field(None, description="default: all, curves: all but the baseline")
    baseline: str | None = Field(None, description="curves only; default: the sweep's")
    validation: bool = Field(False, description="curves only: the validation error too, as in figure 4")

    @model_validator(mode="after")
    def _own_keys(self) -> Figure:
        if self.kind == "minibatch" and (self.baseline is not None or self.validation):
            raise ValueError("baseline and validation are for curves: leave them out")
        return self


class Sections(Section):
    """The file."""

    title: str
    base: str | None = Field(None, description="a configuration, relative to this file")
    seeds: list[int] = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict, description="values by path, for all arms")
    arms: list[Arm] = Field(min_length=1)
    baseline: str | None = Field(None, description="the arm that the others are compared with; default: the first")
    paper_task: str = Field("", description="what the published figures are of, where it is not what this file trains")
    figures: list[Figure] = Field(default_factory=list)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError("seeds are not negative, and below 2⁶³")
        if len(set(seeds)) < len(seeds):
            raise ValueError("every seed is given once")
        return seeds


@dataclass(frozen=True)
class SweepRun:
    """One run: an arm with a seed.

    Attributes:
        arm: its section.
        seed: `recipe.seed`.
        config: the configuration's file.
        overrides: `path.to.key=value` each, as `config.load` takes them.
        folder: the run folder.
    """

    arm: Arm
    seed: int
    config: Path
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """What people call it, and where it is inside the sweep's folder: "gradual/seed-0"."""
        return f"{self.arm.name}/{self.folder.name}"

    @property
    def log(self) -> Path:
        """What its trainings print; beside its folder, which a training may set aside."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Sweep:
    """A sweep file, validated; its configurations are not loaded yet.

    Attributes:
        path: the file as the user named it.
        sections: its content.
    """

    path: Path
    sections: Sections

    @property
    def name(self) -> str:
        """The file's, without folder and suffix."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Where its runs are, unless another place is given."""
        return Path("runs") / self.name

    @property
    def arms(self) -> list[Arm]:
        """The rows of the table, in the file's order."""
        return self.sections.arms

    @property
    def baseline(self) -> str:
        """The name of the arm that the others are compared with."""
        return self.sections.baseline or self.arms[0].name

    def figures(self) -> list[Figure]:
        """The figures, with all that the file leaves open; without any, the curves of every arm beside the baseline."""
        return [self._complete(figure) for figure in self.sections.figures or [Figure(kind="curves")]]

    def _complete(self, figure: Figure) -> Figure:
        baseline = figure.baseline or self.baseline
        if figure.kind == "minibatch":
            return figure.model_copy(update={"arms": figure.arms or [arm.name for arm in self.arms]})
        others = [arm.name for arm in self.arms if arm.name != baseline]
        return figure.model_copy(update={"baseline": baseline, "arms": figure.arms or others or [baseline]})

    def runs(self, folder: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> list[SweepRun]:
        """Every arm with every seed.

        Args:
            folder: of the sweep; the runs' are inside.
            overrides: of the command line; they win over the file's.
            only: the arms that are wanted; all by default.

        Raises:
            UserError: there is no such arm, or an override is one of those that the sweep sets itself.
        """
        names = [arm.name for arm in self.arms]
        for name in only:
            if name not in names:
                raise UserError(f"{self.path}: there is no arm {name}{did_you_mean(name, names)}")
        for override in overrides:
            path = override.partition("=")[0]
            if path in OF_THE_SWEEP:
                raise UserError(f"--set {override}: {OF_THE_SWEEP[path]}")
        return [
            self._run(arm, seed, folder / arm.name / f"seed-{seed}", overrides)
            for arm in self.arms
            if not only or arm.name in only
            for seed in self.sections.seeds
        ]

    def _run(self, arm: Arm, seed: int, folder: Path, overrides: Sequence[str]) -> SweepRun:
        named = arm.config or self.sections.base
        assert named is not None, "checked when the file was read"
        own = {"recipe.seed": seed, "recipe.run": str(folder)}
        everything = (*_overrides(self.sections.set), *_overrides(arm.set), *overrides, *_overrides(own))
        return SweepRun(arm, seed, _beside(self.path, named), everything, folder)


def load(path: str | Path) -> Sweep:
    """Read and validate a sweep file.

    Raises:
        UserError: it is not there, is not YAML, or something in it is not as a sweep has it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(p) for suffix in SWEEP_SUFFIXES for p in path.parent.glob(f"*{suffix}"))
        raise UserError(f"{path}: there is no such sweep file{did_you_mean(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a sweep file: {error}") from None
    if path.suffix == ".json":
        raise UserError(f"{path} is a configuration, not a sweep", f"Train it with: onehour train {path}")
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader: it makes plain values only
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # of a value, as a date without a 13th month
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a sweep is a mapping with title, base, seeds and arms, this is {_kind(values)}")
    sections = validate(str(path), Sections, values)
    _check(str(path), sections)
    return Sweep(path, sections)


def _check(place: str, sections: Sections) -> None:
    """What no section can see alone."""
    names = [arm.name for arm in sections.arms]
    for number, arm in enumerate(sections.arms):
        if arm.name in names[:number]:
            raise UserError(f"{place}: arms.{number}.name: there is an arm {arm.name} before", "Give it another name.")
        if arm.config is None and sections.base is None:
            raise UserError(
                f"{place}: arms.{number}: it has no config, and the sweep no base",
                "Name a configuration as base, for all arms, or as config of the arm.",
            )
        _check_values(place, f"arms.{number}.set", arm.set)
    _check_values(place, "set", sections.set)
    named = [("baseline", sections.baseline)]
    for number, figure in enumerate(sections.figures):
        named += [(f"figures.{number}.baseline", figure.baseline)]
        named += [(f"figures.{number}.arms.{index}", name) for index, name in enumerate(figure.arms or ())]
    for path, name in named:
        if name is not None and name not in names:
            raise UserError(f"{place}: {path}: there is no arm {name}{did_you_mean(name, names)}")


def _check_values(place: str, section: str, values: Mapping[str, Any]) -> None:
    for path, value in values.items():
        if not _JSON_PATH.fullmatch(path):
            raise UserError(
                f'{place}: {section}: "{path}" is not the path of a value',
                "Example: {optimizer.params.lr: 0.4}",
            )
        if path in OF_THE_SWEEP:
            raise UserError(f"{place}: {section}.{path}: cannot be set: {OF_THE_SWEEP[path]}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise UserError(
                f"{place}: {section}.{path}: {value!r} is nothing that JSON has ({_kind(value)})",
                "If it is meant as text, write it between quotes.",
            ) from None


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{path}={json.dumps(value)}" for path, value in values.items()]


def _beside(file: Path, named: str) -> Path:
    """A file that another one names, without the `..` in its path where that leads to the same."""
    path = file.parent / named
    tidy = Path(os.path.normpath(path))
    return tidy if path.exists() and tidy.exists() and tidy.samefile(path) else path


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "empty"


class _Loader(yaml.SafeLoader):
    """YAML with JSON's numbers, and without keys that appear twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: list[str] = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'the key "{key.value}" appears twice', problem_mark=key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)


# PyYAML is of YAML 1.1, for which 1e-4 is text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
