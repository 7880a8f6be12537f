"""Which decoders there are on this host, best first, and which of them a run uses.

A run goes down a ladder: what its best rung refuses, the next one tries. All of them show the same part of an image,
with pixels that differ by no more than rounding; what differs is how long it takes.
"""

from __future__ import annotations

import importlib
from typing import Literal

from pipeline.schema import DecoderChoice
from shards import jpeg
from shards.errors import UserError

Rung = Literal["native", "simplejpeg", "pillow"]
RUNGS: tuple[Rung, ...] = ("native", "simplejpeg", "pillow")
"""From the fastest to the one that decides what is an image."""

NAMES: dict[Rung, str] = {"native": "C extension", "simplejpeg": "simplejpeg", "pillow": "Pillow"}
"""As people read them."""

MENDS: dict[Rung, tuple[str, ...]] = {"native": jpeg.MEND, "simplejpeg": ("Install it: pip install simplejpeg",)}
"""How to get a rung; Pillow is always there."""


class RefusedError(Exception):
    """A rung does not decode an image: the next one may.

    Attributes:
        reason: "unsupported" or "damaged", see `tally.REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def missing(rung: Rung) -> str | None:
    """Why a rung cannot be used here, as the end of a sentence about it; None if it can."""
    if rung == "native":
        return jpeg.unavailable()
    if rung == "simplejpeg":
        try:
            importlib.import_module("simplejpeg")
        except ImportError as error:  # not there, or built for another NumPy
            return "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
    return None


def ladder(choice: DecoderChoice) -> tuple[Rung, ...]:
    """The rungs of a run, the live one first.

    Args:
        choice: the best rung to use, or "auto" for the best that is there.

    Raises:
        UserError: the rung that is asked for is not there; it says how to get it.
    """
    there = [rung for rung in RUNGS if missing(rung) is None]
    if choice == "auto":
        return tuple(there)
    reason = missing(choice)
    if reason is not None:
        raise UserError(
            f'recipe.loader.decoder is "{choice}", and the {NAMES[choice]} {reason}',
            *MENDS[choice],
            f'Or leave the choice to what is there ("auto", the default): {NAMES[there[0]]}.',
        )
    return tuple(there[there.index(choice) :])


def describe(rung: Rung) -> str:
    """A rung for people, with its variant: ``C extension, AVX2``."""
    return jpeg.describe() if rung == "native" else NAMES[rung]


def better(rung: Rung) -> dict[Rung, str]:
    """The faster rungs than `rung` that cannot be used here, and why, as `missing` says it."""
    faster = RUNGS[: RUNGS.index(rung)]
    return {name: reason for name in faster if (reason := missing(name)) is not None}
