"""What was looked at on a host, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "slow", "wrong"]
MARKS: dict[Verdict, str] = {"good": "✓", "slow": "!", "wrong": "✗"}
WORSE: tuple[Verdict, ...] = ("good", "slow", "wrong")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what.
        verdict: good; slow: training works, and could be faster or needs an eye; wrong: it would fail, or a file or
            host is not what it should be.
        text: what was found.
        mend: what to do about it, a line each.
    """

    about: str
    verdict: Verdict
    text: str
    mend: tuple[str, ...] = ()


def worst(findings: list[Finding]) -> Verdict:
    """The worst verdict; good where there is none."""
    return max((finding.verdict for finding in findings), key=WORSE.index, default="good")


def problems(number: int) -> str:
    """How many things are wrong, in words."""
    return f"{number} problem{'s' * (number != 1)}" if number else "nothing is wrong"
