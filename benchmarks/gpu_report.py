"""The table of gpu.py, and the ratios that are required."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_points import BARE, ENGINE, SECTIONS, TIMM, Point, Settings
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Record = dict[str, Any]
"""A result of a section: what it said, and its name as `section`; or why there is none, as `failed`."""

PUBLISHED = 7_945
PUBLISHED_BY = "MLPerf Training v4.0, MXNet in fp16, batch 400, per GPU of 8 × H200"
"""Images per second: training_results_v4.0, NVIDIA/results/h200_ngc24.04_mxnet/resnet."""

WIDTH = 160
"""Of the table, in characters."""

UNITS = {
    "compile": "seconds to the end of the first update",
    "correctness": "relative difference",
    "synchronisations": "of the host with the device, in updates",
    "eager": "images/s",
    "compiled": "images/s",
    "end-to-end": "images/s",
}
"""Of the sections, beside their names."""

TO_BARE, TO_ENGINE, TO_TIMM, TO_TIMM_SMALL, BEST = (
    "engine / bare loop",
    "engine on loaded batches / on resident ones",
    "engine / timm, BN over the large batch",
    "engine, workers at once / timm, in turn",
    "fastest engine, images/s",
)


@dataclass(frozen=True)
class Required:
    """A lower bound, on a ratio formed within a round or, of the fastest, on images per second; at every point."""

    name: str
    bound: float


REQUIRED = (
    Required(TO_BARE, 0.98),
    Required(TO_ENGINE, 0.95),
    Required(TO_TIMM, 1.0),
    Required(TO_TIMM_SMALL, 1.3),
    Required(BEST, 6000),
)


@dataclass(frozen=True)
class Gate:
    """A requirement and what was measured.

    Attributes:
        values: by point, one for each round.
        missing: points that were not measured.
    """

    required: Required
    values: dict[Point, list[float]]
    missing: list[Point]

    @property
    def lowest(self) -> tuple[Point, float] | None:
        """The point with the lowest median; of the fastest engine, that with the highest."""
        medians = [(point, statistics.median(values)) for point, values in self.values.items()]
        choose = max if self.required.name == BEST else min
        return choose(medians, key=lambda found: found[1]) if medians else None

    @property
    def failing(self) -> list[Point]:
        """Points below the bound; of the fastest engine, that one."""
        if self.required.name == BEST:
            return [self.lowest[0]] if self.lowest and self.lowest[1] < self.required.bound else []
        return [point for point, values in self.values.items() if statistics.median(values) < self.required.bound]

    @property
    def met(self) -> bool:
        """At all points; what was not measured is not met."""
        return bool(self.values) and not self.failing and (self.required.name == BEST or not self.missing)


def gates(records: Sequence[Record], settings: Settings) -> list[Gate]:
    """Every requirement with the ratios of its points."""
    steps = step_records(records)
    loaded = {
        Point(**record["point"]): loaded_ratios(record)
        for record in records
        if record["section"] == "end-to-end" and record.get("what") == "engine"
    }
    points = [*settings.eager, *settings.compiled]
    found = []
    for required in REQUIRED:
        if required.name == TO_ENGINE:
            wanted, values = settings.fed, loaded
        elif required.name == BEST:
            wanted = points
            values = {point: rates(record, ENGINE) for point, record in steps.items() if has(record, ENGINE)}
        else:
            other = BARE if required.name == TO_BARE else TIMM
            wanted = [point for point in points if concerns(required.name, point, settings)]
            values = {
                point: ratios(record, ENGINE, other) for point, record in steps.items() if has(record, ENGINE, other)
            }
        there = {point: values[point] for point in wanted if point in values}
        found.append(Gate(required, there, [point for point in wanted if point not in there]))
    return found


def concerns(name: str, point: Point, settings: Settings) -> bool:
    """Whether a requirement of steps is one at this point."""
    if name == TO_TIMM:
        return point.n == settings.large
    return name == TO_BARE or point.groups > 1


def step_records(records: Iterable[Record]) -> dict[Point, Record]:
    """The points whose contenders were timed."""
    return {
        Point(**record["point"]): record
        for record in records
        if record["section"] in ("eager", "compiled") and "rounds" in record
    }


def has(record: Record, *contenders: str) -> bool:
    """Whether all of these were timed at a point."""
    return all(name in each for each in record["rounds"] for name in contenders)


def rates(record: Record, contender: str) -> list[float]:
    """Images per second in each round."""
    return [each[contender] for each in record["rounds"]]


def ratios(record: Record, contender: str, other: str) -> list[float]:
    """Within each round."""
    return [each[contender] / each[other] for each in record["rounds"]]


def loaded_ratios(record: Record) -> list[float]:
    """Each turn on loaded batches, divided by the mean of those on resident ones before and after it."""
    resident = record["resident"]
    return [rate / statistics.fmean(resident[number : number + 2]) for number, rate in enumerate(record["loaded"])]


def broken(records: Iterable[Record]) -> list[str]:
    """What is not the same training, or waits for the device; and a count of waits that does not count."""
    found = []
    for record in records:
        if record["section"] == "correctness" and "value" in record and not record["value"] <= record["most"]:
            found.append(f"{record['what']}: {record['value']:.1e}")
        elif record["section"] == "synchronisations" and "explicit" in record:
            waits = record["explicit"] or any((record["named"] or {}).values()) or record["raised"]
            if record["timer"] and not record["explicit"]:
                found.append(f"{record['what']}: its synchronisations were not counted")
            elif waits and not record["timer"]:
                found.append(f"{record['what']}: the host waits for the device")
    return found


# ---------------------------------------------------------------- printing


def print_report(records: Sequence[Record], settings: Settings, seconds: float) -> list[Gate]:
    """The machine, the table, and the requirements, which are returned."""
    console = Console(width=WIDTH, highlight=False, soft_wrap=True)
    for line in machine_lines(records, settings):
        console.print(line, markup=False)
    console.print()
    console.print(table(records, settings))
    found = gates(records, settings)
    console.print(gate_table(found, judged=not settings.smoke))
    if not settings.smoke:
        console.print(f"published: {PUBLISHED:,} images/s, {PUBLISHED_BY}", markup=False)
    for record in records:
        if record["section"] == "profile" and "path" in record:
            parts = ", ".join(f"{name} {share:.0%}" for name, share in record["shares"].items())
            about = f"profile of the engine, {Point(**record['point'])}: {record['path']}"
            console.print(f"{about}\n  {parts}", markup=False)
    for promise in broken(records):
        console.print(f"NOT AS PROMISED: {promise}", markup=False)
    about = f"{seconds:,.0f} s elapsed; ratios are formed within a round, and their median is taken"
    console.print(about, markup=False)
    return found


def machine_lines(records: Sequence[Record], settings: Settings) -> list[str]:
    """What was measured on."""
    lines = []
    if settings.smoke:
        lines.append("SMOKE RUN on a CPU: tiny sizes, to see that everything runs. Its figures mean nothing.")
        if not settings.compile:
            lines.append("torch.compile is told to compile nothing; --compile has it compile.")
    for record in records:
        if record["section"] == "machine" and "cpu" in record:
            lines += _machine(record)
        if record["section"] == "data" and "images" in record:
            index = "with a crop index" if record["crop_index"] else f"without a crop index: {record['why']}"
            lines.append(
                f"{record['images']:,} images, {record['mean_bytes'] / 1e3:.1f} kB each, {record['source']}; "
                f"ordinary shards {index}, read from the page cache again and again"
            )
    lines.append(
        f"{settings.model}, {settings.size} × {settings.size} pixels, NHWC, SGD; contenders take turns of "
        f"{settings.block_seconds:g} s in {settings.rounds} rounds after {settings.warm_up} updates of warm-up. "
        "No CUDA graphs were captured by hand."
    )
    return lines


def _machine(record: Record) -> list[str]:
    lines = []
    if record["gpu"]:
        tool = record["nvidia_smi"] or {}
        said = "".join(f", {name.replace('.', ' ').replace('_', ' ')} {value}" for name, value in tool.items())
        lines.append(
            f"{record['gpu']}, {record['gigabytes']:.0f} GB, {record['multiprocessors']} multiprocessors, "
            f"capability {record['capability']}{said}, CUDA {record['cuda']}, cuDNN {record['cudnn']}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines.append(f"{record['cpu']}, {record['cores']} cores; {versions}")
    if record["batch_norm"]:
        chosen = ", ".join(
            f"{each['images']} with {each['weights']} weights: {each['backend']}" for each in record["batch_norm"]
        )
        lines.append(f"torch's BN of NHWC images in training: {chosen}")
    return lines


def table(records: Sequence[Record], settings: Settings) -> Table:
    """One row for each thing that was measured, by section."""
    found = Table(box=None, pad_edge=False)
    found.add_column("", min_width=62, no_wrap=True)
    for name in ("median", "least – most", "n"):
        found.add_column(name, justify="right")
    found.add_column("", overflow="fold")
    printers = {
        "ceilings": _ceilings,
        "compile": _compile,
        "eager": _steps,
        "compiled": _steps,
        "end-to-end": _end_to_end,
        "correctness": _correctness,
        "synchronisations": _synchronisations,
    }
    for name in (*(section for section in SECTIONS if section in printers), "machine", "data", "profile"):
        here = [record for record in records if record["section"] == name]
        if not here:
            continue
        if name in printers:
            found.add_row(f"[bold]{name}[/]" + (f", {UNITS[name]}" if name in UNITS else ""))
            printers[name](found, [record for record in here if "failed" not in record], settings)
        for record in here:
            if "failed" in record:
                what = f"  {Point(**record['point'])}" if "point" in record else f"  {name}"
                found.add_row(what, "", "", "", escape(f"FAILED {record['failed']}"))
        reached = {Point(**record["point"]) for record in here if "point" in record}
        for point in {"eager": settings.eager, "compiled": settings.compiled, "end-to-end": settings.fed}.get(name, []):
            if point not in reached:
                found.add_row(f"  {point}", "–", "", "", "not reached")
        for record in here:
            if record.get("clocks"):
                found.add_row("  clocks", "", "", "", _clocks(record["clocks"]))
    return found


def _figures(values: Sequence[float], form: str = ",.0f") -> tuple[str, str, str]:
    return (
        f"{statistics.median(values):{form}}",
        f"{min(values):{form}} – {max(values):{form}}",
        str(len(values)),
    )


def _ceilings(found: Table, records: list[Record], settings: Settings) -> None:
    for record in records:
        if record.get("values"):
            found.add_row(f"  {record['what']}, {record['unit']}", *_figures(record["values"], ",.1f"))
        elif "what" in record:
            found.add_row(f"  {record['what']}", "–", "", "", "there is no device to copy to")


def _compile(found: Table, records: list[Record], settings: Settings) -> None:
    for record in (record for record in records if "seconds" in record):
        layers = "our" if record["ours"] else "torch's"
        found.add_row(
            f"  {Point(**record['point'])}, {layers} BN",
            f"{record['seconds']:,.1f}",
            "",
            "1",
            f"{record['anew']} graphs compiled, {record['from_cache']} from the cache",
        )


def _steps(found: Table, records: list[Record], settings: Settings) -> None:
    """A point's contenders, each with its ratio to the first; the engine's to timm's beside timm."""
    for point, record in step_records(records).items():
        about = []
        if point.compiled:
            firsts = (f"{name} {seconds:.1f} s" for name, seconds in record["first"].items())
            about.append(f"first update: {', '.join(firsts)}")
        if record["peak_gigabytes"]:
            about.append(f"at most {record['peak_gigabytes']:.1f} GB")
        found.add_row(f"  {point}", "", "", "", "; ".join(about))
        for name in record["first"]:
            if name in record["without"]:
                continue
            top, below = {BARE: ("", ""), ENGINE: (ENGINE, BARE), TIMM: (ENGINE, TIMM)}.get(name, (name, ENGINE))
            text = f"{top} / {below} {_ratio(ratios(record, top, below))}" if top and has(record, top, below) else ""
            found.add_row(f"    {name}", *_figures(rates(record, name)), text.removeprefix(name).strip())
        for name, why in record["without"].items():
            found.add_row(f"    {name}", "–", "", "", escape(f"FAILED {why}"))


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def _end_to_end(found: Table, records: list[Record], settings: Settings) -> None:
    for record in records:
        if record.get("what") == "loader alone":
            decoded = ", ".join(f"{name} {count:,}" for name, count in record["decoded"].items())
            found.add_row(f"  loader alone, {record['threads']} threads", *_figures(record["rates"]), decoded)
        elif record.get("what") == "engine":
            found.add_row(f"  {Point(**record['point'])}, {record['threads']} threads")
            found.add_row("    engine on resident batches", *_figures(record["resident"]))
            waited = f"{statistics.median(record['waited']):.1%} of the time waited for batches"
            text = f"loaded / resident {_ratio(loaded_ratios(record))}; {waited}"
            found.add_row("    loader → engine", *_figures(record["loaded"]), text)


def _correctness(found: Table, records: list[Record], settings: Settings) -> None:
    for record in (record for record in records if "value" in record):
        verdict = "met" if record["value"] <= record["most"] else "MISSED"
        beside = f"; eager: {record['beside']:.1e}" if "beside" in record else ""
        text = f"≤ {record['most']:g} {verdict}{beside}"
        found.add_row(f"  {record['what']}", f"{record['value']:.1e}", "", "1", text)


def _synchronisations(found: Table, records: list[Record], settings: Settings) -> None:
    for record in (record for record in records if "explicit" in record):
        named = record["named"]
        text = f"{record['explicit']} explicit"
        if named is not None:
            text += f", {sum(named.values())} by operations{''.join(f'; {place}' for place in named)}"
            text += f"; as an error: {record['raised'] or 'none raised'}"
        expected = "; the count counts" if record["timer"] and record["explicit"] else ""
        what = f"  {record['what']}, {record['updates']} updates"
        found.add_row(what, "", "", "", escape(f"{text}{expected}"))


def _clocks(clocks: dict[str, Any]) -> str:
    units = {"clocks.sm": "MHz SM", "power.draw": "W", "temperature.gpu": "°C"}
    parts = [
        f"{clocks[name]['least']:,.0f} – {clocks[name]['most']:,.0f} {unit} (median {clocks[name]['median']:,.0f})"
        for name, unit in units.items()
        if name in clocks
    ]
    return ", ".join(parts) + f"; lowered by: {', '.join(clocks['reasons']) or 'nothing'}"


def gate_table(found: Sequence[Gate], *, judged: bool) -> Table:
    """The requirements, with the point that decides."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("[bold]required[/]", min_width=62, no_wrap=True)
    for name in ("bound", "median", "points"):
        shown.add_column(name, justify="right")
    shown.add_column("", overflow="fold")
    for gate in found:
        form = ",.0f" if gate.required.name == BEST else ".3f"
        lowest = gate.lowest
        if not judged:
            verdict = "not judged on a CPU"
        elif lowest is None:
            verdict = "NOT MEASURED"
        elif gate.failing:
            verdict = f"MISSED at {', '.join(map(str, gate.failing))}"
        elif not gate.met:
            verdict = f"INCOMPLETE: not measured at {', '.join(map(str, gate.missing))}"
        else:
            verdict = "met"
        where = f"{lowest[0]}: " if lowest else ""
        shown.add_row(
            f"  {gate.required.name}",
            f"≥ {gate.required.bound:{',.0f' if gate.required.name == BEST else '.2f'}}",
            f"{lowest[1]:{form}}" if lowest else "–",
            str(len(gate.values)),
            where + verdict,
        )
    return shown
