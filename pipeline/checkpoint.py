"""Saving and loading a run: weights as safetensors, optimizer tensors, facts as JSON; loading runs no code.

DeepSpeed's own checkpoints are not used: they are written in place, their `latest` can name an incomplete save, a
missing one silently starts the training anew, and loading them executes what the file says. Ours go through torch's
restricted unpickler (`weights_only=True`), which makes tensors and plain containers and nothing else.
At ZeRO stage 0 every rank holds the same state, so rank 0 writes one copy that any number of ranks can continue from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline import resume
from pipeline.model import export
from pipeline.plan import Plan
from pipeline.resume import Checkpoint, Facts
from shards.errors import UserError

WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
RESOLVED_FILE = "config.resolved.json"
"""In the run folder: the configuration with every default, which `config.load` accepts again."""


def save(
    plan: Plan, model: nn.Module, optimizer_state: dict[str, Any], *, samples: int, step: int, classes: int
) -> Path:
    """Write a checkpoint: into a temporary folder, synced, renamed; then `latest` moves; then old ones go.

    Called by rank 0, after the BN statistics were averaged.

    Returns:
        The checkpoint's folder.
    """
    folder = resume.checkpoints_folder(plan.config.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):  # of a process that was killed while saving
        shutil.rmtree(leftover)
    final = folder / f"step-{step}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    partial.mkdir()
    export(model, partial / WEIGHTS_FILE, plan.config.recipe.model, classes)
    torch.save(optimizer_state, partial / OPTIMIZER_FILE)
    digests = {name: _sha256(partial / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)}
    checkpoint = Checkpoint(final, samples, step, Facts.of(plan), digests)
    (partial / resume.STATE_FILE).write_text(json.dumps(checkpoint.state(), indent=1), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    write_atomically(folder / resume.LATEST_FILE, final.name)
    for _, old in resume.saved_steps(plan.config.run_folder)[: -plan.config.recipe.checkpoint.keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def load(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Check the digests, load the weights into `model`, and return the optimizer's state.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model.
    """
    for name, digest in checkpoint.digests.items():
        path = checkpoint.folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(
                f"{path}: damaged: its sha256 is not the one that was saved",
                f"Remove {checkpoint.folder} to continue from the save before it.",
            )
    load_weights(checkpoint.folder / WEIGHTS_FILE, model)
    return torch.load(checkpoint.folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load exported weights into a model.

    Raises:
        UserError: the file cannot be read, or its tensors are not the model's.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the model", *str(error).splitlines()[1:4]) from None


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old content or the new, whatever is killed when."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
