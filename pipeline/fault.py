"""How a training can end: the exit codes, and what is written down of a fault.

Each rank that sees a fault writes into `RUN/faults/<launch>/`: `rank-N.json` has the fault, `rank-N.txt` the stacks of
all of the rank's threads and the samples that it was at.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FINISHED, FAILED, MISTAKE = 0, 1, 2
"""Exit codes of a rank and of `onehour train`; what failed may be tried again, a mistake of the user's not."""

STOPPED = 75
"""Exit code of a training that saved and ended because it was told to (EX_TEMPFAIL: the same command continues)."""

FAULTS_FOLDER = "faults"


@dataclass(frozen=True)
class Fault:
    """Why a training ended.

    Attributes:
        kind: "silent" (a rank gave no sign of life), "stuck" (none got any further), "error" (a rank failed, and said
            why), "first" (rank 0, which the others meet at, is gone), "launcher" (what started the rank is gone).
        rank: the one at fault, or None where it is not one rank.
        host: its host.
        step: updates that it had done.
        what: the fault in a sentence.
        code: the exit code of every rank.
    """

    kind: str
    rank: int | None
    host: str
    step: int
    what: str
    code: int = FAILED

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str | bytes) -> Fault:
        """From `text`. Raises ValueError, TypeError: it is not a fault."""
        return cls(**json.loads(text))


def faults_of(run_folder: Path, launch: str) -> list[Fault]:
    """What the ranks of a launch wrote down, the most telling first."""
    found = []
    for path in sorted((run_folder / FAULTS_FOLDER / launch).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Fault.read(path.read_text(encoding="utf-8")))
    telling = ("error", "silent", "stuck", "first", "launcher")
    return sorted(found, key=lambda fault: telling.index(fault.kind) if fault.kind in telling else len(telling))
