"""The table of gpu.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gpu_points import BARE, ENGINE, SECTIONS, TIMM, Point, Settings
from gpu_required import (
    BEST,
    PUBLISHED,
    PUBLISHED_BY,
    Gate,
    Record,
    broken,
    gates,
    has,
    loaded_ratios,
    rates,
    ratios,
    step_records,
)
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
