"""What gpu.py measures: its sections, the points at which a step is timed, and the sizes, which a smoke run has small.

No torch here: the process that starts the others and prints the table needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Say = Callable[..., None]
"""Prints a result, given as keyword arguments, as a line of JSON."""


DTYPES = ("bf16", "fp16", "tf32", "fp32")
"""By importance: what comes last is what a machine that is too slow does not reach."""


@dataclass(frozen=True)
class Point:
    """One way of computing an update.

    Attributes:
        dtype: of convolutions and matrix products, one of `DTYPES`.
        n: images of a logical worker, over which BN normalises.
        groups: logical workers that go through the model at once (ghost batches).
        compiled: by torch.compile; else eager.
    """

    dtype: str
    n: int
    groups: int = 1
    compiled: bool = False

    @property
    def images(self) -> int:
        """In an update."""
        return self.n * self.groups

    def __str__(self) -> str:
        way = "compiled" if self.compiled else "eager"
        return f"{way} {self.dtype} n={self.n}" + (f", {self.groups} at once" if self.groups > 1 else "")


@dataclass(frozen=True)
class Settings:
    """Sizes and places, the same in all processes of a run.

    Attributes:
        work: folder of what is made: data, configurations, compiled kernels, results.
        smoke: tiny sizes on a CPU, to see that everything runs; its figures mean nothing.
        compile: whether torch.compile compiles; else it is told to let everything run as it is.
        images: a folder of class folders of JPEGs, or a zip of one; None for synthetic ones.
        model: name, and arguments of timm.create_model.
        size: of the images, in pixels.
        small, large: n of the paper, and a batch that fills a GPU; `groups` of the small make a large one.
        rounds: of taking turns.
        block_seconds: about as long is a turn.
        warm_up: updates before anything is timed; DeepSpeed's timer is idle in the first two.
        loaded_seconds: of a turn of the engine on the loader's batches.
        dataset: images of an epoch.
        checked: n of the comparisons of gradients, on images of `checked_size` pixels.
        elements: of a side of the matrices.
        copied: bytes read and written by a copy on the device, and half of those of a copy to it.
    """

    work: str
    smoke: bool = False
    compile: bool = True
    images: str | None = None
    model: str = "resnet50"
    model_args: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    small: int = 32
    groups: int = 8
    rounds: int = 4
    block_seconds: float = 0.4
    warm_up: int = 5
    loaded_seconds: float = 10.0
    dataset: int = 2048
    checked: int = 8
    checked_size: int = 128
    elements: int = 8192
    copied: int = 8 * 10**9

    @classmethod
    def for_smoke(cls, work: str, **changes: Any) -> Settings:
        """Seconds on a CPU."""
        tiny: dict[str, Any] = {
            "smoke": True,
            "compile": False,
            "model": "resnet18",
            "model_args": {"layers": [1, 1, 0, 0], "channels": [8, 8, 8, 8]},
            "size": 32,
            "small": 4,
            "groups": 2,
            "rounds": 2,
            "block_seconds": 0.02,
            "warm_up": 3,
            "loaded_seconds": 0.3,
            "dataset": 48,
            "checked": 4,
            "checked_size": 32,
            "elements": 128,
            "copied": 10**6,
        }
        return cls(work, **tiny | changes)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """For the command line of a child."""
        return json.dumps(asdict(self))

    @property
    def large(self) -> int:
        return self.small * self.groups

    @property
    def folder(self) -> Path:
        """`work` as a path."""
        return Path(self.work)

    @property
    def eager(self) -> list[Point]:
        """The points of the section eager."""
        return [Point(dtype, n) for dtype in DTYPES for n in (self.large, self.small)]

    @property
    def compiled(self) -> list[Point]:
        """The points of the section compiled; the first is the one that a training would choose."""
        return [
            point
            for dtype in ("bf16", "fp16")
            for point in (
                Point(dtype, self.small, self.groups, compiled=True),
                Point(dtype, self.large, compiled=True),
                Point(dtype, self.small, compiled=True),
            )
        ]

    @property
    def fed(self) -> list[Point]:
        """The points of the section end-to-end."""
        return self.compiled[:2]


ASIDE = ("machine", "data", "compile", "correctness", "synchronisations")
"""Sections that time nothing; they run beside each other, and before all others."""

TIMED = {"ceilings": 15, "eager": 95, "compiled": 105, "end-to-end": 115}
"""Sections that have the machine to themselves, in this order, and their shares of the time that is left for them."""

SECTIONS = (*ASIDE, *TIMED)

NEEDS = {"compiled": ("compile",), "end-to-end": ("data", "compile")}
"""What must run before a section, if that alone is asked for."""

BARE, ENGINE, TIMM = "bare loop", "engine", "timm"
FOREACH, FLAT_COPIES, TIMER = "engine, foreach optimizer", "engine, overlap off", "engine, throughput timer on"
"""Contenders: the step without an engine, ours, and timm's; and the engine with one thing changed."""


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
