"""The record of consumed samples: which ids every update took and at what rate, and the proof that epochs are exact.

Written when `recipe.logging.record_samples` is on: one file per rank and process, a line per update, flushed at once.
An update that was done again after a resume counts as the later process did it, as the weights do.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import UserError

FOLDER = "samples"
FILE = re.compile(r"^from-(\d+)-rank-(\d+)-of-(\d+)\.jsonl$")


class SampleWriter:
    """Appends one rank's updates.

    Args:
        run_folder: the run.
        first_update: the update this process begins with (0-based).
        rank, world_size: of this process.
    """

    def __init__(self, run_folder: Path, first_update: int, rank: int, world_size: int) -> None:
        folder = run_folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        # "w": a process that starts at the same update again replaces the one that was killed
        path = folder / f"from-{first_update}-rank-{rank}-of-{world_size}.jsonl"
        self._file = path.open("w", encoding="utf-8")

    def write(self, update: int, lr: float, ids: list[np.ndarray]) -> None:
        """Record an update: the rate read from the optimizer, and the ids of each micro-step."""
        line = {"update": update, "lr": lr, "time": time.time(), "ids": [micro_batch.tolist() for micro_batch in ids]}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class Update:
    """One update as it was done: sample ids in stream order, int64 of shape (kn,), and the rate used."""

    ids: np.ndarray
    lr: float


def read_samples(run_folder: Path) -> dict[int, Update]:
    """Every complete update of a run, by its number (0-based), as the weights came about.

    Raises:
        UserError: the run recorded no samples.
    """
    folder = run_folder / FOLDER
    files = [(path, FILE.match(path.name)) for path in folder.glob("*.jsonl")] if folder.is_dir() else []
    began: dict[tuple[int, int], float] = {}
    sessions: dict[tuple[int, int], dict[int, list[tuple[list, float]]]] = {}
    for path, match in files:
        if match is None:
            continue
        first, rank, world_size = (int(group) for group in match.groups())
        updates = sessions.setdefault((first, world_size), {})
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # what a kill left of the last line
            began[first, world_size] = min(began.get((first, world_size), record["time"]), record["time"])
            updates.setdefault(record["update"], [([], 0.0)] * world_size)[rank] = (record["ids"], record["lr"])
    if not sessions:
        raise UserError(
            f"{run_folder}: no samples were recorded", "Train with --set recipe.logging.record_samples=true"
        )
    done: dict[int, Update] = {}
    for (first, _), updates in sorted(sessions.items(), key=lambda item: began.get(item[0], 0)):
        done = {update: value for update, value in done.items() if update < first}
        for update, ranks in updates.items():
            if all(ids for ids, _ in ranks):
                ids = np.concatenate([np.asarray(ids, dtype=np.int64).ravel() for ids, _ in ranks])
                done[update] = Update(ids, ranks[0][1])
    return dict(sorted(done.items()))


def audit(run_folder: Path, samples_per_epoch: int) -> list[dict[str, int]]:
    """Count, for every epoch that the run touched, how often each image was used.

    Returns:
        Per epoch: `epoch`, `used` positions, `missing` and `repeated` images. A finished epoch that is exact has
        `used` = N and the others 0.

    Raises:
        UserError: nothing was recorded, or an update is missing in between.
    """
    updates = read_samples(run_folder)
    missing_updates = sorted(set(range(max(updates) + 1)) - set(updates))
    if missing_updates:
        raise UserError(f"{run_folder}: update {missing_updates[0]} was not recorded", "The audit needs all of them.")
    stream = np.concatenate([update.ids for update in updates.values()])
    rows = []
    for epoch, start in enumerate(range(0, len(stream), samples_per_epoch)):
        ids = stream[start : start + samples_per_epoch]
        counts = np.bincount(ids, minlength=samples_per_epoch)
        rows.append(
            {
                "epoch": epoch + 1,
                "used": len(ids),
                "missing": int((counts == 0).sum()) - (samples_per_epoch - len(ids)),
                "repeated": int((counts > 1).sum()),
            }
        )
    return rows
