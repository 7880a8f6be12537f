"""The tables of loader.py, and the ratios that are required."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from loader_measure import KERNELS, LIBJPEG_FUSED, NATIVE_INDEXED

COMPARED = ("native-indexed", "native", "simplejpeg", "pillow")
"""Our rows that the others are divided by."""
FLOAT32 = "native-indexed-float32"
"""Our row that rows which deliver normalised float32 are divided by, too."""


class Found(Protocol):
    """`loader.Findings`."""

    rounds: int
    measurements: list[Any]
    skipped: dict[str, str]
    failed: dict[str, str]


@dataclass(frozen=True)
class Required:
    """A bound on the median of `row` / `ours`, CPU time: at least, or `at_most`."""

    row: str
    ours: str
    bound: float
    at_most: bool = False


REQUIRED = (
    Required("timm-wds", "native-indexed", 5.0),
    Required("webdataset", "native-indexed", 7.5),
    Required("torchvision-v2", "native-indexed", 4.5),
    Required("ffcv", "native-indexed", 2.2),
    Required("dali", "native-indexed", 3.0),
    Required("bare-decode", "native-indexed", 1.7),
    Required("timm-wds", "native", 3.7),
    Required("webdataset", "native", 5.5),
    Required("torchvision-v2", "native", 3.3),
    Required("ffcv", "native", 1.6),
    Required("dali", "native", 2.1),
    Required("bare-decode", "native", 1.25),
    Required("timm-wds", "simplejpeg", 1.6),
)
REQUIRED_OF_KERNELS = (Required(NATIVE_INDEXED, LIBJPEG_FUSED, 0.55, at_most=True),)


def by_round(found: Found, row: str, threads: int, figure: str = "cpu_us") -> dict[int, float]:
    """One figure of a row, by round."""
    chosen = (each for each in found.measurements if each.row == row and each.threads == threads)
    return {each.round: each.result[figure] for each in chosen}


def kernel_by_round(found: Found, name: str) -> dict[int, float]:
    """CPU-µs of one kernel, by round."""
    chosen = (each for each in found.measurements if each.row == KERNELS)
    return {each.round: each.result["kernels"][name] for each in chosen if name in each.result["kernels"]}


def ratio(row: dict[int, float], ours: dict[int, float]) -> float | None:
    """The median of the ratios formed within the rounds that both have."""
    ratios = [row[number] / ours[number] for number in row.keys() & ours.keys()]
    return statistics.median(ratios) if ratios else None


def float32_ratio(found: Found, row: str, threads: int) -> float | None:
    """The ratio to our FLOAT32, of a row that delivers float32 as well."""
    delivered = [each.result["delivers"] for each in found.measurements if each.row == row]
    if not any(pixels.startswith("float32") for pixels in delivered):
        return None
    return ratio(by_round(found, row, threads), by_round(found, FLOAT32, threads))


NOTES = f"""\
CPU: of the process and all of its children. Ratios: formed within a round, their median.
float32: rows that deliver normalised float32, divided by {FLOAT32}, which normalises, too. Their other
    ratios, and those that --gate requires, include the normalisation, which ours leave to the device.
RSS: peak resident set of the process, files that it has mapped included, plus what its children hold for themselves at
    the end (USS); the largest of the rounds. load average: of the minute before a row began, median.
"""


def print_loaders(found: Found, rows: list[str], threads: int) -> None:
    """Whole loaders: figures, or why there are none; then what each row is."""
    compared = {name: len(name) + 2 for name in COMPARED if by_round(found, name, threads)}
    print(f"\n{'':24}{'CPU-µs per image':>19}{'images/s':>16}{'RSS':>7}{'load':>9}  times the CPU of ours:")
    columns = "".join(f"{name:>{width}}" for name, width in compared.items()) + f"{'float32':>9}"
    print(f"{'':24}{'median':>12}{'min':>7}{'median':>9}{'best':>7}{'MB':>7}{'average':>9}{columns}{'n':>4}")
    measured = {}
    for row in rows:
        cpu = by_round(found, row, threads)
        if not cpu:
            print(f"{row:24}{silent(found, row)}")
            continue
        measured[row] = next(each.result for each in reversed(found.measurements) if each.row == row)
        loads = [each.load for each in found.measurements if each.row == row and each.threads == threads]
        rates = by_round(found, row, threads, "images_per_second").values()
        peak = max(by_round(found, row, threads, "megabytes").values())
        figures = f"{statistics.median(cpu.values()):12,.0f}{min(cpu.values()):7,.0f}"
        figures += f"{statistics.median(rates):9,.0f}{max(rates):7,.0f}{peak:7,.0f}{statistics.median(loads):9.1f}"
        ratios = "".join(cell(ratio(cpu, by_round(found, name, threads)), width) for name, width in compared.items())
        print(f"{row:24}{figures}{ratios}{cell(float32_ratio(found, row, threads), 9)}{len(cpu):4}")
        if row in found.failed:
            print(f"{'':24}{silent(found, row)}")
    print(NOTES)
    for row, result in measured.items():
        made_by = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        print(f"{row:24}{result['delivers']:14}{result['how']}{f' ({made_by})' if made_by else ''}")


def silent(found: Found, row: str) -> str:
    """Why a row has no figures."""
    if row in found.failed:
        return f"FAILED {found.failed[row]}"
    return f"SKIP   {found.skipped.get(row, 'not measured')}"


def cell(value: float | None, width: int) -> str:
    """A ratio, or a dash."""
    return f"{value:{width}.2f}" if value is not None else f"{'–':>{width}}"


def print_kernels(found: Found) -> None:
    """The kernels, each divided by libjpeg-turbo's fused one."""
    results = [each.result for each in found.measurements if each.row == KERNELS]
    print(f"\n{'one thread':36}{'CPU-µs':>8}{'min':>7}{'/libjpeg-turbo':>16}   n  from Pillow: mean, largest")
    if not results:
        print(f"{KERNELS:36}{silent(found, KERNELS)}")
        return
    base = kernel_by_round(found, LIBJPEG_FUSED)
    for name in results[-1]["kernels"]:
        cpu = kernel_by_round(found, name)
        figures = f"{statistics.median(cpu.values()):8,.0f}{min(cpu.values()):7,.0f}{cell(ratio(cpu, base), 16)}"
        mean, largest = results[-1]["from_pillow"].get(name, (None, None))
        print(f"{name:36}{figures}{len(cpu):4}  {'' if mean is None else f'{mean:.3f}, {largest}'}")
    for name, reason in results[-1]["skipped"].items():
        print(f"{name:36}SKIP   {reason}")
    print(f"{'; '.join(results[-1]['libraries'])}; all kernels decode the same boxes")


def print_sweep(found: Found, threads: int) -> None:
    """Rows that were measured with several numbers of threads."""
    numbers = sorted({each.threads for each in found.measurements})
    if numbers == [threads]:
        return
    rows = dict.fromkeys(each.row for each in found.measurements if each.threads != threads)
    if not rows:
        return
    print(f"\n{'threads':24}" + "".join(f"{number:>22}" for number in numbers))
    print(f"{'':24}" + "".join(f"{'CPU-µs':>14}{'img/s':>8}" for _ in numbers))
    for row in rows:
        line = f"{row:24}"
        for number in numbers:
            cpu, rates = (by_round(found, row, number, figure).values() for figure in ("cpu_us", "images_per_second"))
            line += f"{statistics.median(cpu):14,.0f}{statistics.median(rates):8,.0f}" if cpu else f"{'–':>22}"
        print(line)


def check_gate(found: Found, rows: list[str], threads: int, factor: float) -> bool:
    """Print every required ratio between chosen rows, and whether it is met in all rounds; True if all are.

    Args:
        found: what was measured.
        rows: those chosen; a requirement counts if both of its rows are among them.
        threads: of the main measurement.
        factor: below 1, bounds are loosened by as much.
    """
    print(f"\n{'required':60}{'bound':>9}{'median':>10}")
    met = []
    for required in REQUIRED:
        if required.row in rows and required.ours in rows:
            equal_work = float32_ratio(found, required.row, threads)
            met.append(check(found, required, factor, lambda row: by_round(found, row, threads), equal_work))
    if KERNELS in rows:
        met += [
            check(found, required, factor, lambda name: kernel_by_round(found, name))
            for required in REQUIRED_OF_KERNELS
        ]
    print(f"{sum(met)} of {len(met)} met" + ("" if all(met) else f": not passed; {NOT_MET}"))
    return bool(met) and all(met)


NOT_MET = "a ratio that was skipped, or was not measured in every round, is not met"


def check(
    found: Found,
    required: Required,
    factor: float,
    figures: Callable[[str], dict[int, float]],
    equal_work: float | None = None,
) -> bool:
    """Print one requirement; whether it is met.

    Args:
        found: what was measured.
        required: the requirement.
        factor: as in `check_gate`.
        figures: a row's, by round.
        equal_work: the ratio to our FLOAT32; printed only.
    """
    bound = required.bound / factor if required.at_most else required.bound * factor
    value = ratio(figures(required.row), figures(required.ours))
    name = f"{required.row} / {required.ours}"
    if value is None:
        missing = [row for row in (required.row, required.ours) if not figures(row)]
        reasons = "; ".join(f"{row}: {silent(found, row).split(maxsplit=1)[1]}" for row in missing)
        print(f"{name:60}{'≤' if required.at_most else '≥'}{bound:8.2f}{'SKIP':>10}  {reasons}")
        return False
    good = value <= bound if required.at_most else value >= bound
    verdict = "met" if good else "MISSED"
    rounds = len(figures(required.row).keys() & figures(required.ours).keys())
    if rounds != found.rounds:
        good = False
        reasons = [f"{row}: {silent(found, row)}" for row in (required.row, required.ours) if row in found.failed]
        verdict = f"INCOMPLETE, {rounds} of {found.rounds} rounds  {'; '.join(reasons)}".rstrip()
    note = f"  normalisation included; {equal_work:.2f} against our float32" if equal_work is not None else ""
    print(f"{name:60}{'≤' if required.at_most else '≥'}{bound:8.2f}{value:10.2f}  {verdict}{note}")
    return good
