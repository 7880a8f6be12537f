"""The `onehour` command: plan, train, launch, sweep, lr-find, evaluate, report, audit, checkpoints, doctor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shards.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 not done, 2 a mistake of the user's."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("train", "launch", "sweep", "lr-find"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        # imported here, so that `plan` starts without what the others need
        if args.command == "plan":
            return _plan(args)
        if args.command in ("train", "launch"):
            from pipeline import launch

            return launch.run(args, rest)
        if args.command == "sweep":
            from pipeline import sweep

            return sweep.run(args, rest)
        if args.command == "lr-find":
            from pipeline import lr_find

            return lr_find.run(args, rest)
        if args.command == "evaluate":
            from pipeline import assess

            return assess.run(args)
        if args.command == "audit":
            return _audit(args)
        if args.command == "doctor":
            from pipeline import doctor

            return doctor.run(args)
        if args.command == "checkpoints":
            from pipeline import inventory

            return inventory.run(args)
        from pipeline import report

        return report.run(args)
    except UserError as error:
        print(f"onehour: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from pipeline import doctor, inventory, launch, lr_find, report, scaling_page, sweep
    from pipeline.experiment import add_config_arguments

    parser = argparse.ArgumentParser(
        prog="onehour",
        description="ImageNet training from one DeepSpeed JSON file: exact epochs on tar shards, "
        "the large-minibatch recipe of Goyal et al. 2017.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="show what a configuration will train, without starting anything")
    add_config_arguments(plan)
    launch.add_rank_arguments(plan)
    plan.add_argument("--world-size", type=int, metavar="W", help="number of ranks, wherever they are")
    plan.add_argument("--samples", type=int, metavar="N", help="training images, when the shards are not at hand")
    plan.add_argument(
        "--build-model", action="store_true", help="also build the model, for its decay groups and memory (slower)"
    )
    plan.add_argument("--json", action="store_true", help="the numbers and the resolved DeepSpeed JSON, for scripts")
    scaling_page.add_arguments(plan)

    train = commands.add_parser("train", help="train, on this machine or on a hostfile's")
    launch.add_arguments(train)

    supervised = commands.add_parser("launch", help="train on a hostfile's hosts, and go on without one that fails")
    launch.add_arguments(supervised)
    launch.add_supervisor_arguments(supervised)

    sweep_parser = commands.add_parser("sweep", help="train the runs of a table or a figure, those that are missing")
    sweep.add_arguments(sweep_parser)

    find = commands.add_parser("lr-find", help="try rates that grow from update to update, and suggest a peak rate")
    lr_find.add_arguments(find)

    evaluate = commands.add_parser("evaluate", help="measure weights or a checkpoint on the whole split, in fp32")
    evaluate.add_argument("weights", type=Path, help="a .safetensors file, a checkpoint folder, or a run folder")
    evaluate.add_argument("--config", help="the configuration; default: config.resolved.json of the run")
    evaluate.add_argument("--data", help="folder or URL of shards; default: the configuration's")
    evaluate.add_argument("--json", action="store_true", help="one JSON object")

    report_parser = commands.add_parser("report", help="one HTML page about one run, or comparing several")
    report.add_arguments(report_parser)

    audit = commands.add_parser("audit", help="prove from a run's record that every image was used once per epoch")
    audit.add_argument("run", type=Path, help="a run trained with recipe.logging.record_samples")

    checkpoints = commands.add_parser("checkpoints", help="what a run has saved: list, verify, export, prune")
    inventory.add_arguments(checkpoints)

    doctor_parser = commands.add_parser(
        "doctor", help="what is wrong with this host or with a hostfile's, before a run: decoders, data, network"
    )
    doctor.add_arguments(doctor_parser)
    return parser


def _plan(args: argparse.Namespace) -> int:
    from pipeline import config, launch, plan, resume, scaling_page
    from pipeline.experiment import check_start_weights, open_run, overrides_of

    scaling = scaling_page.wanted(args)
    experiment = config.load(args.config, overrides_of(args))
    where, local_ranks = "", None
    if args.world_size is not None:
        if args.hostfile or args.ranks:
            raise UserError("--world-size and --hostfile or --ranks both say how many ranks there are: give one")
        world_size = args.world_size
    else:
        ranks = launch.ranks_of(args, experiment)
        world_size, where, local_ranks = ranks.world_size, ranks.where, range(ranks.most_on_a_host)
    if args.samples is not None:
        if args.samples < 1:
            raise UserError(f"--samples {args.samples}: a training set has at least one image")
        resolved, classes, goes_on = plan.resolve(experiment, world_size, samples=args.samples), 1000, ""
    else:
        resolved, train, _ = open_run(experiment, world_size, local_ranks)
        classes = len(train.classes)
        goes_on = resume.outlook(resolved, lambda damage: print(f"onehour: WARNING   {damage}", file=sys.stderr))
        if not goes_on:
            check_start_weights(experiment)
    if scaling:
        return scaling_page.run(args, resolved, classes, local_ranks if args.hostfile else None)
    rows = None
    if args.build_model:
        from pipeline import model, transfer

        recipe = experiment.recipe
        network = model.create(recipe.model, classes, recipe.seed, recipe.transform.sizes)
        start = transfer.prepare(network, recipe.model, resumes=bool(goes_on))
        rows = model.describe(
            network,
            weight_decay=experiment.blocks.optimizer.params.get("weight_decay", 0),
            images=resolved.batch.physical,
            size=max(recipe.transform.sizes),
            precision=experiment.precision,
            averaged=recipe.model.ema is not None,
            vectors_decay=not experiment.layer_wise,
        )
        rows += transfer.describe(network, start, recipe.transform)
    if args.json:
        print(json.dumps(resolved.summary() | {"resume": goes_on}, indent=2))
    else:
        print(plan.format_page(resolved.page(ranks=where, model_lines=rows, resume=goes_on)))
    return 0


def _audit(args: argparse.Namespace) -> int:
    from pipeline.record import RunRecord
    from pipeline.samples import audit

    record = RunRecord.read(args.run)
    samples = record.start["train_samples"]
    rows = audit(args.run, samples)
    table = Table(box=None, pad_edge=False)
    for name in ("epoch", "images", "used", "missing", "repeated"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(f"{value:,}" for value in (row["epoch"], samples, row["used"], row["missing"], row["repeated"]))
        )
    Console().print(table)
    exact = all(row["missing"] == row["repeated"] == 0 for row in rows)
    print(
        "every image at most once per epoch, none missing from a finished one" if exact else "the epochs are not exact"
    )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
