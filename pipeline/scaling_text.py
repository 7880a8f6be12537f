"""What `onehour plan --scaling` found, for people and for scripts."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import scaling_paper
from pipeline.plan import Plan, format_page
from pipeline.scaling import Bucket, Cluster, Prediction, Step
from pipeline.scaling_paper import GBIT, ONE_SERVER, Comparison


@dataclass(frozen=True)
class Found:
    """What the command found.

    Attributes:
        plan: of some number of ranks.
        step: of one micro-batch, and `measured` where it is from.
        warnings: why the configuration's step may take another time than the one that was measured, a sentence each.
        buckets: of gradients, and when they are `sent`, in words.
        cluster: the links, and `assumed` which options of it nobody gave.
        predictions: in ascending order of ranks.
        paper: the published points, predicted by the same functions.
        unfitted: the same, were the line rate reached and no rank late.
        other_fit: other fitted numbers that meet the points, and what comes of them.
    """

    plan: Plan
    step: Step
    measured: str
    warnings: list[str]
    buckets: list[Bucket]
    sent: str
    cluster: Cluster
    assumed: frozenset[str]
    predictions: list[Prediction]
    paper: list[Comparison]
    unfitted: list[Comparison]
    other_fit: tuple[Cluster, list[Comparison]]

    def training_seconds(self, prediction: Prediction) -> float:
        """Of all configured epochs, without evaluations and saves."""
        return float(self.plan.total_samples) / prediction.images_per_second


def as_json(found: Found) -> str:
    """All numbers in seconds, bytes and bytes per second, unrounded."""
    cluster = found.cluster
    fit, fit_points = found.other_fit
    content = {
        "config": str(found.plan.config.path),
        "step_seconds": found.step.seconds,
        "backward_seconds": found.step.backward,
        "measured": found.measured,
        "warnings": found.warnings,
        "gradient_bytes": sum(bucket.bytes for bucket in found.buckets),
        "buckets": len(found.buckets),
        "sent": found.sent,
        "cluster": {
            "ranks_per_host": cluster.ranks_per_host,
            "algorithm": cluster.algorithm,
            "bandwidth": cluster.link.bandwidth,
            "latency": cluster.link.latency,
            "local_bandwidth": cluster.local.bandwidth,
            "local_latency": cluster.local.latency,
            "straggler": cluster.straggler,
            "assumed": sorted(found.assumed),
        },
        "predictions": [
            {
                "world_size": prediction.batch.world_size,
                "accumulation": prediction.batch.accumulation,
                "train_batch_size": prediction.batch.train,
                "seconds": prediction.seconds,
                "images_per_second": prediction.images_per_second,
                "efficiency": prediction.efficiency,
                "compute": prediction.compute,
                "communication_hidden": prediction.hidden,
                "communication_exposed": prediction.exposed,
                "straggler": prediction.straggler,
                "training_seconds": found.training_seconds(prediction),
            }
            for prediction in found.predictions
        ],
        "paper": {
            "fitted": scaling_paper.FITTED,
            "assumed": scaling_paper.ASSUMED,
            "points": [_point_as_json(comparison) for comparison in found.paper],
            "efficiency_256": {
                "published": scaling_paper.EFFICIENCY,
                "predicted": scaling_paper.efficiency(found.paper),
            },
            "without_fit": [_point_as_json(comparison) for comparison in found.unfitted],
            "other_fit": {
                "bandwidth": fit.link.bandwidth,
                "straggler": fit.straggler,
                "largest_deviation": scaling_paper.worst(fit_points),
            },
        },
    }
    return json.dumps(content, indent=2)


def _point_as_json(comparison: Comparison) -> dict[str, Any]:
    point = comparison.point
    return {
        "gpus": point.gpus,
        "train_batch_size": point.minibatch,
        "said": point.said,
        "seconds": {"published": point.seconds, "predicted": comparison.prediction.seconds},
        "images_per_second": {
            "published": point.images_per_second,
            "predicted": comparison.prediction.images_per_second,
        },
        "deviation": comparison.deviation,
    }


def as_text(found: Found) -> str:
    """The page: what is assumed, the predictions, and the paper's figures beside theirs."""
    return "\n".join([format_page(_rows(found)), "", _predictions(found), "", *_paper(found)])


def _rows(found: Found) -> list[tuple[str, str]]:
    plan, step, cluster, assumed = found.plan, found.step, found.cluster, found.assumed
    growing = plan.config.blocks.train_batch_size is None
    minibatch = "the minibatch grows with the ranks" if growing else f"{plan.batch.logical_workers} logical workers"

    def given(option: str) -> str:
        return " (assumed)" if option in assumed else ""

    size = sum(bucket.bytes for bucket in found.buckets) / 1e6
    buckets = f"{len(found.buckets)} bucket{'s' * (len(found.buckets) != 1)}"
    hosts = f"{cluster.ranks_per_host} rank{'s' * (cluster.ranks_per_host != 1)} per host{given('ranks_per_host')}"
    return [
        (plan.config.name, f"{plan.config.recipe.model.name} · {plan.batch.micro} images · {minibatch}"),
        (
            "step",
            f"{step.seconds:.4g} s per micro-batch on one rank, {_percent(step.backward / step.seconds, 0)} of it "
            "backward, by operations",
        ),
        ("", f"from {found.measured}"),
        *_warnings(found),
        ("gradients", f"{size:.1f} MB in fp32 · {buckets}, {found.sent}"),
        (
            "links",
            f"{cluster.algorithm} at {cluster.link.bandwidth / GBIT:g} Gbit/s per host, "
            f"{1e6 * cluster.link.latency:g} µs{given('latency_us')} · {hosts}, "
            f"{cluster.local.bandwidth / GBIT:g} Gbit/s{given('local_gbit')}",
        ),
        ("straggler", f"σ = {1e3 * cluster.straggler:g} ms{given('straggler_ms')} of a rank's time for an update"),
    ]


def _warnings(found: Found) -> list[tuple[str, str]]:
    if not found.warnings:
        return []
    headline = "the run is not known to be of this configuration; an image may have cost something else in it:"
    return [("warning", headline), *(("", sentence) for sentence in found.warnings)]


def _predictions(found: Found) -> str:
    table = _table(
        *("ranks", "accumulation", "minibatch", "s/update", "images/s", "efficiency", "hidden", "exposed"),
        *(["straggler"] if found.cluster.straggler else []),
        f"{found.plan.config.recipe.epochs:g} epochs",
    )
    for prediction in found.predictions:
        batch = prediction.batch
        table.add_row(
            f"{batch.world_size:,}",
            f"{batch.accumulation:,}",
            f"{batch.train:,}",
            f"{prediction.seconds:.4f}",
            f"{prediction.images_per_second:,.0f}",
            _percent(prediction.efficiency),
            _milliseconds(prediction.hidden),
            _milliseconds(prediction.exposed),
            *([_milliseconds(prediction.straggler)] if found.cluster.straggler else []),
            _hours(found.training_seconds(prediction)),
        )
    return (
        f"{_drawn(table)}\n"
        "efficiency: images/s per rank, against a rank that talks to nobody\n"
        "hidden, exposed: communication beside the backward pass, and after it"
    )


def _paper(found: Found) -> list[str]:
    table = _table("GPUs", "minibatch", "s/update", "predicted", "images/s", "predicted", "deviation")
    table.add_column("published as")
    for comparison in found.paper:
        point, prediction = comparison.point, comparison.prediction
        table.add_row(
            str(point.gpus),
            f"{point.minibatch:,}",
            f"{point.seconds:.3f}",
            f"{prediction.seconds:.3f}",
            f"{point.images_per_second:,.0f}",
            f"{prediction.images_per_second:,.0f}",
            "start" if point is ONE_SERVER else _signed(comparison.deviation),
            point.said,
        )
    efficiency = scaling_paper.efficiency(found.paper)
    fit, fit_points = found.other_fit
    other = f"{fit.link.bandwidth / GBIT:g} Gbit/s with σ = {1e3 * fit.straggler:g} ms"
    measured = found.paper[-1].point.seconds / ONE_SERVER.seconds - 1
    unfitted = found.unfitted[-1].prediction.seconds / ONE_SERVER.seconds - 1
    rows = [
        ("fitted", " · ".join(f"{name} {value}" for name, value in scaling_paper.FITTED.items())),
        ("", "to these very points: that they agree is a fit, and no test of the model"),
        (
            "",
            f"the points cannot tell the two apart: {other} is within {_percent(scaling_paper.worst(fit_points))} too",
        ),
        ("assumed", " · ".join(f"{name} {value}" for name, value in scaling_paper.ASSUMED.items())),
        (
            "robust",
            f"at {scaling_paper.LINE_RATE / GBIT:g} Gbit/s and with no GPU late, communication would hide: "
            f"{_signed(unfitted)} per update on 352 GPUs, not {_signed(measured)}",
        ),
        ("", "so the links were slower than that, or GPUs were late, or both"),
    ]
    published = _percent(scaling_paper.EFFICIENCY, 0)
    headline = "Figures 7 (s/update) and 8 (images/s), by the same arithmetic from the time on one server"
    return [
        f"Goyal et al. 2017   {headline}",
        "",
        _drawn(table),
        f"efficiency from 8 to 256 GPUs: ~{published} published, {_percent(efficiency)} predicted",
        "",
        *(f"{label:<11}{text}" for label, text in rows),
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _drawn(table: Table) -> str:
    """The table as plain text."""
    file = io.StringIO()
    Console(file=file, width=140).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "\u2212")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{rest:02}"
