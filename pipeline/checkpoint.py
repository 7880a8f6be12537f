"""Saving and loading a run: weights as safetensors, optimizer tensors, facts as JSON; loading runs no code.

DeepSpeed's own checkpoints are not used: they are written in place, their `latest` can name an incomplete save, a
missing one silently starts the training anew, and loading them executes what the file says. Ours go through torch's
restricted unpickler (`weights_only=True`), which makes tensors and plain containers and nothing else.
At ZeRO stage 0 every rank holds the same state, so rank 0 writes one copy that any number of ranks can continue from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import filesize
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline import saves
from pipeline.model import exported
from pipeline.plan import Plan
from pipeline.resume import Checkpoint, Facts
from pipeline.saves import AVERAGE_FILE, OPTIMIZER_FILE, WEIGHTS_FILE
from shards.errors import UserError
from shards.files import sync_folder, write_whole

AVERAGE = "ema"
"""Key of the averaged weights in the state that is saved with a model; they have a file of their own."""


def save(
    plan: Plan,
    weights: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, Any],
    *,
    samples: int,
    step: int,
    classes: int,
) -> Path:
    """Write a checkpoint: into a temporary folder, synced, renamed; then `latest` moves; then old ones go.

    Called by rank 0, after the BN statistics were averaged.

    Args:
        plan: of the run.
        weights: the model's state, by name.
        optimizer_state: tensors and plain containers; under AVERAGE, if there are any, averaged weights by name.
        samples: consumed.
        step: updates done.
        classes: that the network tells apart.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it cannot be written, the disk being full for example. What was saved before is untouched.
    """
    run = plan.config.run_folder
    folder = saves.checkpoints_folder(run)
    final = folder / f"step-{step}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saves.sweep(run)
        _check_space(folder, weights, optimizer_state)
        partial.mkdir()
        recipe = plan.config.recipe.model
        rest = {key: value for key, value in optimizer_state.items() if key != AVERAGE}
        digests = {
            WEIGHTS_FILE: _write(partial / WEIGHTS_FILE, exported(weights, recipe, classes)),
            OPTIMIZER_FILE: _write(partial / OPTIMIZER_FILE, _pickled(rest)),
        }
        if AVERAGE in optimizer_state:
            averaged = exported(optimizer_state[AVERAGE], recipe, classes)
            digests[AVERAGE_FILE] = _write(partial / AVERAGE_FILE, averaged)
        checkpoint = Checkpoint(final, samples, step, Facts.of(plan), digests, plan.batch.world_size)
        _write(partial / saves.STATE_FILE, saves.seal(checkpoint.state()).encode())
        sync_folder(partial)
        _put_in_place(partial, final)
        write_whole(folder / saves.LATEST_FILE, final.name.encode())
    except (OSError, UserError) as error:
        raise _cannot_be_saved(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # the new save is good, and the next one removes what this could not
        saves.prune(run, plan.config.recipe.checkpoint.keep)
    return final


def load(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Check the digests, load the weights into `model`, and return the rest of the state as it was given to `save`.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model.
    """
    saves.verify(checkpoint.folder)  # `find_latest` did, and then it costs nothing
    load_weights(checkpoint.folder / WEIGHTS_FILE, model)
    state = torch.load(checkpoint.folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    if AVERAGE_FILE in checkpoint.digests:
        state[AVERAGE] = load_file(checkpoint.folder / AVERAGE_FILE)
    return state


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


def _write(path: Path, content: bytes | memoryview) -> str:
    """Write a file and wait until it is on disk. Returns the sha256 of what it should contain."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _pickled(state: Mapping[str, Any]) -> memoryview:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getbuffer()


def _put_in_place(partial: Path, final: Path) -> None:
    """Give a complete save its name. One of the same step stands aside until then, and is found there meanwhile."""
    replaced = final.with_name(saves.REPLACED_PREFIX + final.name)
    if final.exists():  # the same step again, after a resume from an older checkpoint or instead of a damaged one
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # what is left is swept by the next save


def _check_space(folder: Path, *trees: Any) -> None:
    """Raise the error of a full disk before it is full: what else is written there goes on."""
    needed = sum(tensor.nbytes for tree in trees for tensor in _tensors(tree))
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"a save takes {filesize.decimal(needed)}, and there is no space for it")


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _cannot_be_saved(final: Path, error: OSError | UserError) -> UserError:
    reason = error.headline if isinstance(error, UserError) else error.strerror
    run = final.parent.parent
    safe = saves.newest_whole(run)
    try:
        free = f"{filesize.decimal(shutil.disk_usage(run).free)} free there"
    except OSError:
        free = "its file system does not answer"
    return UserError(
        f"{final}: the checkpoint cannot be saved: {reason} ({free})",
        f"Safe is the save before it: {safe}" if safe is not None else "There is no earlier save.",
        "Make room, with recipe.checkpoint.keep or on another disk; then the same command continues from what is safe.",
    )
