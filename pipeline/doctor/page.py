"""What a person sees: one host's findings, or a row for each check with the hosts as columns."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.doctor.compare import Check
from pipeline.doctor.finding import MARKS, WORSE, Finding, problems, worst

MOST_COLUMNS = 6
"""Hosts that are shown side by side; more are counted."""

MOST_NAMED = 4
LONGEST_TEXT = 90
SHOWN = ("slots", "network")
"""Rows whose good findings are shown even where hosts differ."""


def one_host(host: str, findings: Sequence[Finding]) -> str:
    """The page about this host alone."""
    width = max(len(finding.about) for finding in findings) + 2
    lines = [f"doctor   {host}", ""]
    for finding in findings:
        lines.append(f"{finding.about:<{width}}{MARKS[finding.verdict]} {finding.text}")
        lines += [f"{'':<{width}}  → {line}" for line in finding.mend]
    return "\n".join([*lines, "", problems(sum(finding.verdict == "wrong" for finding in findings))])


def cluster(hosts: Sequence[str], checks: Sequence[Check], summary: Sequence[Finding]) -> str:
    """The page about a cluster: rows of marks, below each what is not good, at the end what concerns all hosts."""
    first = max(len(finding) for finding in (*(check.about for check in checks), *(one.about for one in summary))) + 2
    width = max(len(host) for host in hosts) + 2
    side_by_side = len(hosts) <= MOST_COLUMNS
    lines = []
    if side_by_side:
        lines.append(f"{'':<{first}}" + "".join(f"{host:^{width}}" for host in hosts).rstrip())
    else:
        lines.append(f"{'':<{first}}{len(hosts):,} hosts, {hosts[0]} … {hosts[-1]}")
    for check in checks:
        verdicts = {host: worst(list(findings)) for host, findings in check.found.items()}
        if side_by_side:
            marks = "".join(f"{MARKS[verdicts[host]] if host in verdicts else '–':^{width}}" for host in hosts)
        else:
            counts = [(verdict, sum(found == verdict for found in verdicts.values())) for verdict in WORSE]
            marks = "   ".join(f"{count:,} hosts {MARKS[verdict]}" for verdict, count in counts if count) + "  "
        lines.append(f"{check.about:<{first}}{marks}{_common(check)}".rstrip())
        lines += _details(check)
    for finding in summary:
        lines.append(f"{finding.about:<{first}}{MARKS[finding.verdict]} {finding.text}")
        lines += [f"{'':<{first}}  → {line}" for line in finding.mend]
    number = count_problems(checks, summary)
    return "\n".join([*lines, "", problems(number) + ("; training would fail or differ." if number else "")])


def count_problems(checks: Sequence[Check], summary: Sequence[Finding]) -> int:
    """How many things are wrong; what several hosts have alike is one."""
    groups = sum(verdict == "wrong" for check in checks for verdict, _, _ in grouped(check))
    return groups + sum(finding.verdict == "wrong" for finding in summary)


def grouped(check: Check) -> dict[tuple[str, str, tuple[str, ...]], list[str]]:
    """The hosts that a verdict, a text and its mend are about."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for host, findings in check.found.items():
        for finding in findings:
            groups.setdefault((finding.verdict, finding.text, finding.mend), []).append(host)
    return groups


def _common(check: Check) -> str:
    """What all hosts have alike, where nothing is wrong."""
    texts = {
        host: " · ".join(dict.fromkeys(finding.text for finding in findings if finding.verdict == "good"))
        for host, findings in check.found.items()
    }
    text = next(iter(texts.values()), "")
    if not text or len(set(texts.values())) > 1 or check.verdict == "wrong":
        return ""
    return f"  {text}" if len(text) <= LONGEST_TEXT else f"  {text[: LONGEST_TEXT - 2]} …"


def _details(check: Check) -> list[str]:
    lines = []
    shown = check.about in SHOWN and not _common(check)
    for (verdict, text, mends), hosts in grouped(check).items():
        if verdict == "good" and not shown:
            continue
        lines.append(f"  {MARKS[verdict]} {_names(hosts)}: {text}")  # type: ignore[index]
        lines += [f"      → {mend}" for mend in mends]
    return lines


def _names(hosts: Sequence[str]) -> str:
    rest = len(hosts) - MOST_NAMED
    return ", ".join(hosts[:MOST_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
