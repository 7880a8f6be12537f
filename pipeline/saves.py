"""The saves of a run on disk: which there are, which of them are whole, and which may go. No weights, no torch.

A save is a folder `checkpoints/step-N` that appears whole, by a rename. What was whole can be damaged later, so
`state.json` has the sha256 of the other files and one of itself; a save that does not fit them is passed over, and is
none of those that are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import open_regular

STATE_FILE = "state.json"
WEIGHTS_FILE = "model.safetensors"
AVERAGE_FILE = "model_ema.safetensors"
"""In the saves, and the run folder, of a recipe that averages its weights."""
OPTIMIZER_FILE = "optimizer.pt"
LATEST_FILE = "latest"
STEP_FOLDER = re.compile(r"^step-(\d+)$")
REPLACED_PREFIX = ".replaced-"
"""Before the name of a save while another one of the same step takes its place."""

DIGEST_KEY = "digest"
UNSEALED_KEYS = {"format", "samples", "step", "facts", "sha256"}
"""Of a `state.json` from before it had a digest of itself."""

SETTLED_SECONDS = 2
"""A file that was written to more recently may be written to again without a later time to show it."""


class DamagedError(UserError):
    """A save is not what was saved."""


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def saved_steps(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every save of a run, whole or damaged, oldest first."""
    folder = checkpoints_folder(run_folder)
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # one that was to be replaced comes first, and counts if nothing replaced it
        match = STEP_FOLDER.match(path.name.removeprefix(REPLACED_PREFIX))
        if match and path.is_dir():
            found[int(match[1])] = path
    return sorted(found.items())


def latest_step(run_folder: Path) -> int | None:
    """The step that `latest` names, if there is a save of it."""
    try:
        named = (checkpoints_folder(run_folder) / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    match = STEP_FOLDER.match(named)
    return int(match[1]) if match and int(match[1]) in dict(saved_steps(run_folder)) else None


def in_order_of_use(run_folder: Path) -> list[Path]:
    """The saves as a run would continue from them, the first that is whole.

    The one that `latest` names (else the newest), those before it, the newest first; at last any that came after it.
    """
    saved = dict(saved_steps(run_folder))
    named = latest_step(run_folder)
    first = max(saved, default=0) if named is None else named
    before = sorted((step for step in saved if step <= first), reverse=True)
    return [saved[step] for step in (*before, *sorted(step for step in saved if step > first))]


def seal(state: dict[str, Any]) -> str:
    """The text of a `state.json`, with a digest of itself."""
    return json.dumps({**state, DIGEST_KEY: _state_digest(state)}, indent=1)


def read_state(folder: Path) -> dict[str, Any]:
    """Read a save's `state.json`; the other files are not looked at.

    Raises:
        DamagedError: it is missing, or not what was saved.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(folder, f"it has no {STATE_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{STATE_FILE} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise _damaged(folder, f"{STATE_FILE} is no object")
    sealed = DIGEST_KEY in state
    if sealed and state.pop(DIGEST_KEY) != _state_digest(state):
        raise _damaged(folder, f"{STATE_FILE} does not fit its own digest")
    # without a digest its keys alone can be compared: a digest whose name is damaged must not pass for an older file
    if not sealed and state.keys() != UNSEALED_KEYS:
        raise _damaged(folder, f"{STATE_FILE} has no digest, and not the keys of an older one")
    digests = state.get("sha256")
    if not isinstance(digests, dict) or not {WEIGHTS_FILE, OPTIMIZER_FILE} <= digests.keys():
        raise _damaged(folder, f"{STATE_FILE} has no digests of the other files")
    return state


def verify(folder: Path) -> None:
    """Compare all files of a save with their digests.

    Raises:
        DamagedError: one is missing, or not what was saved.
    """
    for name, digest in read_state(folder)["sha256"].items():
        try:
            found = sha256(folder / name)
        except FileNotFoundError:
            raise _damaged(folder, f"{name} is missing") from None
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {error.strerror}") from None
        if found != digest:
            raise _damaged(folder, f"the sha256 of {name} is not the one that was saved")


def is_whole(folder: Path) -> bool:
    """Whether all files of a save are what was saved."""
    try:
        verify(folder)
    except DamagedError:
        return False
    return True


def newest_whole(run_folder: Path) -> Path | None:
    """The save that a run would continue from, or None where there is no whole one."""
    return next((folder for folder in in_order_of_use(run_folder) if is_whole(folder)), None)


def prune(run_folder: Path, keep: int) -> list[Path]:
    """Remove what is older than the `keep` newest whole saves; never the one that the run would continue from.

    A damaged save is not counted as one of those that are kept, and goes when as many whole ones are newer than it.

    Returns:
        The folders that were removed.
    """
    saved = saved_steps(run_folder)
    if len(saved) <= keep:
        return []
    spared = newest_whole(run_folder)
    whole, removed = 0, []
    for _, folder in reversed(saved):
        if whole < keep:
            whole += is_whole(folder)
        elif folder != spared:
            remove(folder)
            removed.append(folder)
    return removed


def remove(folder: Path) -> None:
    """Remove a save: a kill in between leaves nothing that would look like a damaged one."""
    removed = folder.with_name(f".removed-{folder.name.removeprefix(REPLACED_PREFIX)}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def sweep(run_folder: Path) -> None:
    """Remove what processes left that were killed while saving. Nothing else may be saving.

    What cannot be removed, as where another process still reads it over NFS, is left for the next time.
    """
    folder = checkpoints_folder(run_folder)
    for pattern in (".partial-*", ".removed-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(f".{LATEST_FILE}.*.tmp"):
        leftover.unlink(missing_ok=True)
    for replaced in folder.glob(f"{REPLACED_PREFIX}*"):
        if (folder / replaced.name.removeprefix(REPLACED_PREFIX)).is_dir():
            shutil.rmtree(replaced, ignore_errors=True)


_digests: dict[tuple[int, int, int, int], str] = {}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; computed once in a process while nobody writes to the file.

    Raises:
        OSError: the file cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        settled = time.time() - status.st_mtime > SETTLED_SECONDS
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = _digests.get(identity)
        if known is None:
            known = hashlib.file_digest(file, "sha256").hexdigest()
            if settled:
                _digests[identity] = known
        return known


def _state_digest(state: dict[str, Any]) -> str:
    """Of what the state says, however it is written."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, what: str) -> DamagedError:
    return DamagedError(
        f"{folder}: damaged: {what}",
        f"Which saves are whole: onehour checkpoints {folder.parent.parent} --verify",
    )
