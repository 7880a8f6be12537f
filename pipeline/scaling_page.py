"""`onehour plan CONFIG --scaling`: arguments, and from a measured step to what more ranks would make of it."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from pipeline import batch as batch_sizes
from pipeline import cost, scaling_paper
from pipeline.batch import Batch
from pipeline.buckets import BUCKET_BYTES
from pipeline.config import Config
from pipeline.plan import Plan
from pipeline.record import RunRecord
from pipeline.scaling import Bucket, Cluster, Gradient, Link, Step, make_buckets, predict
from pipeline.scaling_paper import GBIT
from pipeline.scaling_text import Found, as_json, as_text
from pipeline.schema import Model
from shards.errors import UserError

DEFAULT_RANKS_PER_HOST = 8
MOST_RANKS = 256
"""Shown by default where the configuration's minibatch grows with the ranks; the paper's 256 GPUs."""

_POSITIVE = ("step_seconds", "link_gbit", "local_gbit", "ranks_per_host", "up_to")
_NOT_NEGATIVE = ("latency_us", "straggler_ms", "bucket_mib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--scaling` and what belongs to it."""
    group = parser.add_argument_group("scaling (docs/scaling.md)")
    group.add_argument("--scaling", action="store_true", help="what an update would take on more ranks, predicted")
    group.add_argument(
        "--step-seconds", type=float, metavar="S", help="measured: one micro-batch on one rank, all its work"
    )
    group.add_argument("--from", dest="from_run", type=Path, metavar="RUN", help="take that from a run's record")
    group.add_argument("--link-gbit", type=float, metavar="G", help="Gbit/s that a host reaches to the others")
    group.add_argument("--latency-us", type=float, metavar="US", help="of a message between hosts (default: 50)")
    group.add_argument("--local-gbit", type=float, metavar="G", help="Gbit/s between ranks of a host (default: 80)")
    group.add_argument("--ranks-per-host", type=int, metavar="L", help="default: the hostfile's, else 8")
    group.add_argument("--straggler-ms", type=float, metavar="MS", help="deviation of a rank's time (default: 0)")
    group.add_argument("--algorithm", choices=("halving-doubling", "ring"), help="between hosts (default: the first)")
    group.add_argument("--bucket-mib", type=float, metavar="MIB", help="gradients sent together (default: 8)")
    group.add_argument("--no-overlap", action="store_true", help="all gradients after backward, as DeepSpeed does it")
    group.add_argument("--up-to", type=int, metavar="W", help="most ranks; default: the logical workers")


def wanted(args: argparse.Namespace) -> bool:
    """Whether `--scaling` is given.

    Raises:
        UserError: one of its options is given without it, or has a value that cannot be.
    """
    names = ("step_seconds", "from_run", "link_gbit", "latency_us", "local_gbit", "ranks_per_host", "straggler_ms")
    given = [name for name in (*names, "algorithm", "bucket_mib", "up_to") if getattr(args, name) is not None]
    given += ["no_overlap"] * args.no_overlap
    if not args.scaling and given:
        raise UserError(f"{_option(given[0])} belongs to --scaling, which is not given")
    for name in given:
        value = getattr(args, name)
        if name in _POSITIVE and not (math.isfinite(value) and value > 0):
            raise UserError(f"{_option(name)} {value:g}: a number greater than 0 is needed")
        if name in _NOT_NEGATIVE and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{_option(name)} {value:g}: a number of at least 0 is needed")
    return args.scaling


def run(args: argparse.Namespace, plan: Plan, classes: int, local_ranks: range | None) -> int:
    """Print the page, or its numbers with `--json`. Returns 0.

    Args:
        args: what `add_arguments` added, passed by `wanted`.
        plan: of the configuration on any number of ranks.
        classes: of the data.
        local_ranks: those of a host of the hostfile, or None.

    Raises:
        UserError: nothing was measured, or not this configuration; no link is given; ranks that do not divide.
    """
    recipe = plan.config.recipe
    counts = world_sizes(plan.config, args.up_to, _ranks_per_host(args, local_ranks))
    cluster, assumed = _cluster(args, local_ranks)
    seconds, measured, warnings = _measured(args, plan)

    from pipeline import backward, model  # both bring torch, which the mistakes above can do without

    network = model.create(recipe.model, classes, recipe.seed, recipe.transform.sizes)
    own = backward.trace(network, max(recipe.transform.sizes))
    step = Step(seconds, own.share * seconds)
    buckets, sent = _buckets(args, plan, own.gradients)
    paper = _paper_gradients()
    other_fit = scaling_paper.best_straggler(paper, scaling_paper.LINE_RATE)
    found = Found(
        plan,
        step,
        measured,
        warnings,
        buckets,
        sent,
        cluster,
        assumed,
        [predict(step, buckets, cluster, batch) for batch in counts],
        paper=scaling_paper.compare(paper),
        unfitted=scaling_paper.compare(paper, scaling_paper.without_fit()),
        other_fit=(other_fit, scaling_paper.compare(paper, other_fit)),
    )
    print(as_json(found) if args.json else as_text(found))
    return 0


@cache
def _paper_gradients() -> tuple[Gradient, ...]:
    from pipeline import backward, model

    return backward.trace(model.create(Model(name="resnet50"), 1000, 0), 224).gradients


def world_sizes(config: Config, up_to: int | None, ranks_per_host: int) -> list[Batch]:
    """The updates to predict: on one rank, on parts of a host, on whole hosts, each at least twice the one before.

    Raises:
        UserError: the configuration's micro-batch depends on the ranks, or cannot be divided over `up_to`.
    """
    blocks = config.blocks
    if blocks.train_micro_batch_size_per_gpu is None:
        raise UserError(
            f"{config.path}: train_micro_batch_size_per_gpu is not given, so the step that was measured would change "
            "with the ranks",
            "Give train_batch_size and train_micro_batch_size_per_gpu.",
        )
    fixed = blocks.train_batch_size is not None
    if up_to is None:
        up_to = batch_sizes.resolve(config, 1).logical_workers if fixed else MOST_RANKS
    last = batch_sizes.resolve(config, up_to)
    found: list[Batch] = []
    for ranks in range(1, up_to):
        if (ranks > ranks_per_host and ranks % ranks_per_host) or (fixed and last.logical_workers % ranks):
            continue
        if not found or ranks >= 2 * found[-1].world_size or ranks == ranks_per_host:
            found.append(batch_sizes.resolve(config, ranks))
    return [*found, last]


def _ranks_per_host(args: argparse.Namespace, local_ranks: range | None) -> int:
    return args.ranks_per_host or (len(local_ranks) if local_ranks is not None else DEFAULT_RANKS_PER_HOST)


def _cluster(args: argparse.Namespace, local_ranks: range | None) -> tuple[Cluster, frozenset[str]]:
    """The cluster, and the options of it that nobody gave."""
    if args.link_gbit is None:
        raise UserError(
            "--scaling needs the link between hosts: --link-gbit G",
            "What a host reaches is less than the line rate; onehour doctor CONFIG --hostfile F measures it.",
        )
    paper = scaling_paper.CLUSTER
    cluster = Cluster(
        _ranks_per_host(args, local_ranks),
        Link(args.link_gbit * GBIT, paper.link.latency if args.latency_us is None else args.latency_us * 1e-6),
        Link(paper.local.bandwidth if args.local_gbit is None else args.local_gbit * GBIT, paper.local.latency),
        (args.straggler_ms or 0.0) * 1e-3,
        args.algorithm or "halving-doubling",
    )
    assumed = {name for name in ("latency_us", "local_gbit", "straggler_ms") if getattr(args, name) is None}
    if args.ranks_per_host is None and local_ranks is None:
        assumed.add("ranks_per_host")
    return cluster, frozenset(assumed)


def _buckets(args: argparse.Namespace, plan: Plan, gradients: Sequence[Gradient]) -> tuple[list[Bucket], str]:
    """How the gradients are sent, and a word on when."""
    late = "--no-overlap" if args.no_overlap else "" if plan.averages_gradients else "DeepSpeed averages them"
    if late:
        return [Bucket(sum(gradient.bytes for gradient in gradients), 1.0)], f"sent after backward ({late})"
    buckets = make_buckets(gradients, BUCKET_BYTES if args.bucket_mib is None else round(args.bucket_mib * 2**20))
    if plan.config.recipe.step.compile:
        return [replace(bucket, ready=1.0) for bucket in buckets], "sent after backward, which is compiled"
    return buckets, "sent as soon as backward has made " + ("them" if len(buckets) > 1 else "it")


def _measured(args: argparse.Namespace, plan: Plan) -> tuple[float, str, list[str]]:
    """Seconds of one micro-batch on a rank that talks to nobody, where they are from, and why they may be others."""
    if (args.step_seconds is None) == (args.from_run is None):
        raise UserError(
            "--scaling starts from a step that was measured: give --step-seconds S or --from RUN, one of them",
            "S is the time of one micro-batch on one rank. A short run measures it: onehour train CONFIG --ranks 1.",
        )
    if args.step_seconds is not None:
        return args.step_seconds, "--step-seconds", []
    record = RunRecord.read(args.from_run)
    return *measured_by(record, plan), cost.warnings(record, plan.config)


def measured_by(record: RunRecord, plan: Plan) -> tuple[float, str]:
    """Seconds of compute of one micro-batch in a run, the median of its reports after the first; and a word on it.

    Raises:
        UserError: the run trained something else, has too few reports, or did not record its shares.
    """
    start, expected = record.start, plan.summary()
    for name in (*cost.FACTS, "micro_batch"):
        if start.get(name) != expected[name]:
            raise UserError(
                f"--from {record.folder}: its {name} was {start.get(name)}, the configuration's is {expected[name]}",
                "Measure this configuration: onehour train CONFIG --ranks 1.",
            )
    reports = record.of_last_process(record.train)[1:]  # the first has what is done once
    shares = [_compute_share(report, start["world_size"]) for report in reports]
    if not reports or None in shares:
        why = "does not say how much of its time was communication" if reports else "has no report after its first"
        raise UserError(
            f"--from {record.folder}: the run {why}",
            "Measure on one rank: onehour train CONFIG --ranks 1, or give --step-seconds S.",
        )
    seconds = [
        report["step_seconds"] * share / start["accumulation"]
        for report, share in zip(reports, shares, strict=True)
        if share is not None
    ]
    ranks = start["world_size"]
    on = f" on {device}" if (device := cost.device(record)) else ""
    where = f"{record.folder}, {ranks} rank{'s' * (ranks != 1)}{on}, median of {len(seconds)} reports"
    return statistics.median(seconds), where


def _compute_share(report: dict, ranks: int) -> float | None:
    """Of a report's time; None where it is not known. A single rank waits for nobody."""
    if report.get("compute") is not None:
        return report["compute"]
    return 1 - report["data_wait"] if ranks == 1 else None


def _option(name: str) -> str:
    return {"from_run": "--from"}.get(name, "--" + name.replace("_", "-"))
