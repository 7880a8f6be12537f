"""`onehour lr-find CONFIG`: a learning rate range test of a configuration, and the peak rate that it suggests.

The ranks do the configuration's own updates, at rates that grow (`lr_range`); this side starts them, and shows the
curve (`lr_curve`). Nothing is written but into a folder of the test's own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import launch, saves
from pipeline.experiment import MONITOR_PACKAGES, check_start_weights, open_run
from pipeline.fault import FAILED, FINISHED, STOPPED, faults_of
from pipeline.lr_curve import CURVE_FILE, Curve, Sweep
from pipeline.plan import Plan
from shards.errors import UserError
from shards.files import exclusive, write_whole

LOWEST, HIGHEST = 1e-3, 100.0
"""By default the rates go from and to so many times the configuration's peak rate."""

WRITERS = (*MONITOR_PACKAGES, "csv_monitor", "flops_profiler", "comms_logger")
"""Blocks of DeepSpeed that write down what a training does: a test is none."""

BAR = 30
"""Characters of the longest bar in the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour lr-find`."""
    from pipeline.experiment import add_config_arguments

    add_config_arguments(parser)
    parser.add_argument("--updates", type=int, default=100, metavar="M", help="of the test (default: %(default)s)")
    parser.add_argument(
        "--from", type=float, dest="first", metavar="RATE", help=f"default: {LOWEST:g} of the configuration's peak rate"
    )
    parser.add_argument(
        "--to",
        type=float,
        dest="last",
        metavar="RATE",
        help=f"default: {HIGHEST:g} times the configuration's peak rate",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object; all else goes to stderr")
    launch.add_rank_arguments(parser)


def run(args: argparse.Namespace, launcher_options: Sequence[str]) -> int:
    """Run the test and show what it found. Returns the exit code, see `pipeline.fault`.

    Raises:
        UserError: a mistake that was found before anything was launched.
    """
    from pipeline import config
    from pipeline.experiment import overrides_of

    given = config.load(args.config, overrides_of(args))
    folder = Path(args.run) if args.run else given.run_folder.with_name(f"{given.run_folder.name}-lr-find")
    args.run = str(folder)
    args.set = [*args.set, *(f"{block}.enabled=false" for block in WRITERS if getattr(given.blocks, block).enabled)]
    args.fresh = False
    starter = launch.Launch(args, launcher_options)
    ranks = launch.ranks_of(args, starter.experiment)
    plan, _, _ = open_run(starter.experiment, ranks.world_size, range(ranks.most_on_a_host))
    check_start_weights(starter.experiment)
    peak = float(plan.schedule.peak_lr)
    sweep = Sweep(
        peak * LOWEST if args.first is None else args.first,
        peak * HIGHEST if args.last is None else args.last,
        args.updates,
    )
    _check_folder(folder)
    console = Console(highlight=False, soft_wrap=True, stderr=args.json)
    console.print(_header(plan, sweep), markup=False)
    ended, token, _ = starter.start(ranks, starter.prepare_hosts(ranks), ["--lr-range", sweep.text()])
    if not (folder / CURVE_FILE).exists():
        fault = next(iter(faults_of(folder, token)), None)
        why = fault.what if fault is not None else "What happened is above."
        console.print(f"The range test did not finish. {why}", markup=False)
        return STOPPED if ended.code == STOPPED else ended.code or FAILED
    _show(plan, folder, console, as_json=args.json)
    return FINISHED


def _check_folder(folder: Path) -> None:
    """That the folder is a range test's, or free, and without the curve of an earlier one."""
    if not folder.exists():
        return
    if saves.saved_steps(folder) or (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: is a run's folder", "A range test needs one of its own: --run DIR")
    with exclusive(folder, "training"):
        (folder / CURVE_FILE).unlink(missing_ok=True)


def _header(plan: Plan, sweep: Sweep) -> str:
    recipe, batch = plan.config.recipe, plan.batch
    updates = (
        f"{sweep.updates:,} updates of {batch.train:,} images = {sweep.updates * batch.train / plan.train_samples:.2g}"
    )
    return (
        f"lr-find {plan.config.name}   {recipe.model.name} · {plan.config.blocks.optimizer.type} · {updates} epochs · "
        f"rate {sweep.first:.3g} → {sweep.last:.3g}"
    )


def _show(plan: Plan, folder: Path, console: Console, *, as_json: bool) -> None:
    record = json.loads((folder / CURVE_FILE).read_text(encoding="utf-8"))
    curve = Curve.restore(record)
    record |= suggestion(curve, plan)
    write_whole(folder / CURVE_FILE, (json.dumps(record, indent=1) + "\n").encode())
    write_whole(folder / "lr_range.csv", _csv(curve).encode())
    write_whole(folder / "lr_range.png", draw(curve, plan))
    if as_json:
        print(json.dumps(record))
        return
    console.print(_table(curve))
    for line in sentences(curve, plan, record["withheld"]):
        console.print(line, markup=False)
    console.print(f"{folder}/  lr_range.png  lr_range.csv  {CURVE_FILE}", markup=False)


def suggestion(curve: Curve, plan: Plan) -> dict[str, Any]:
    """What the curve suggests, as `lr_range.json` has it.

    `suggested_peak` is the rate at the batch that was swept, `suggested_lr` what `optimizer.params.lr` must be for it.

    Raises:
        UserError: there is no curve: the first loss is not finite.
    """
    if not math.isfinite(curve.losses[0]):
        raise UserError(
            f"the loss of the first update, at a rate of {curve.rates[0]:.3g}, is not finite",
            "Lower --from. If that does not help it is not the rate: look at the images and at the precision.",
        )
    factor = float(plan.schedule.peak_lr / plan.schedule.reference_lr)
    return {
        "suggested_peak": curve.suggested,
        "suggested_lr": curve.suggested / factor if curve.suggested is not None else None,
        "lowest_at": curve.rates[curve.minimum],
        "falls_fastest_at": curve.rates[curve.steepest],
        "problem": curve.problem,
    }


def sentences(curve: Curve, plan: Plan, withheld: int) -> list[str]:
    """What was found, for people."""
    found = suggestion(curve, plan)
    how = "came apart" if curve.diverged else "was ended"
    lowest, fastest, last = (f"{rate:.3g}" for rate in (found["lowest_at"], found["falls_fastest_at"], curve.rates[-1]))
    lines = [f"loss lowest at {lowest}, falls fastest at {fastest}; the sweep {how} at {last}"]
    if withheld:
        lines.append(f"{withheld} updates were withheld by overflows in float16, and moved nothing")
    if curve.problem is not None:
        return [*lines, f"no suggestion: {curve.problem}"]
    recipe = plan.config.recipe
    peak = f"{found['suggested_peak']:.2g}"
    setting = f"--set optimizer.params.lr={found['suggested_lr']:.2g}"
    scaled = f"at reference_batch {recipe.reference_batch:,}, scaling {recipe.scaling}"
    return [
        *lines,
        f"suggested peak rate {peak}, a tenth of that of the lowest loss:   {setting}   ({scaled})",
        "So few updates know nothing of warmup, or of the end of a run: try it, and half and twice of it. "
        f"The configuration's peak is {float(plan.schedule.peak_lr):g}.",
    ]


def _table(curve: Curve) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("update", "rate", "loss", "smoothed"):
        table.add_column(name, justify="right")
    table.add_column("")
    low, first = min(curve.smoothed), curve.smoothed[0]
    high = min(max(curve.smoothed), first + 0.5 * (first - low))  # where it comes apart, a loss may be of any size
    for update, note in curve.table():
        value = curve.smoothed[update]
        bar = "█" * (1 + round((BAR - 1) * min(1.0, (value - low) / (high - low or 1))))
        note = f" ← {note}" if note else ""
        table.add_row(
            f"{update + 1:,}", f"{curve.rates[update]:.3g}", f"{curve.losses[update]:.3f}", f"{value:.3f}", bar + note
        )
    return table


def _csv(curve: Curve) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["update", "rate", "loss", "smoothed"])
    for number, (rate, loss) in enumerate(zip(curve.rates, curve.losses, strict=True)):
        smoothed = curve.smoothed[number] if number < len(curve.smoothed) else ""
        writer.writerow([number + 1, rate, loss, smoothed])
    return text.getvalue()


def draw(curve: Curve, plan: Plan) -> bytes:
    """The curve as a PNG: losses as dots, the smoothed one as a line, and the rates of note."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from pipeline.report.drawing import DPI, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        shown = len(curve.smoothed)
        axes.plot(curve.rates[:shown], curve.losses[:shown], ".", color="#bbbbbb", markersize=4)
        axes.plot(curve.rates[:shown], curve.smoothed, color="#0072B2")
        for rate, label, colour in (
            (curve.rates[curve.minimum], "lowest", "#999999"),
            (curve.rates[curve.steepest], "falls fastest", "#009E73"),
            (curve.suggested, "suggested", "#D55E00"),
        ):
            if rate is not None:
                axes.axvline(rate, color=colour, linestyle=(0, (5, 1.6)), label=f"{label} {rate:.2g}")
        low, high = min(curve.smoothed), curve.smoothed[0]
        axes.set(xscale="log", ylim=(low - 0.1 * (high - low), high + 0.5 * (high - low)) if high > low else None)
        axes.set(xlabel=f"learning rate at {plan.batch.train:,} images", ylabel="training loss")
        axes.xaxis.set_major_formatter(lambda rate, place: f"{rate:g}")
        axes.set_title(plan.config.name)
        axes.legend()
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
