"""The ``shards`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shards.errors import UserError
from shards.sources import SOURCES


class _IntermixedParser(argparse.ArgumentParser):
    """Lets options stand between positionals: ``imagefolder ROOT --seed 1 OUT``."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="shards",
        description="Make, index and check data sets of WebDataset tar shards.",
        epilog="shards COMMAND --help says more.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_index(commands)
    _add_verify(commands)
    return parser


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="write images as shuffled shards with index",
        description="Write a labelled set of images as tar shards, shuffled over the whole set, with index.json, "
        ".idx, _info.json and classes.json. Image bytes are copied untouched. The same data, seed and number of "
        "shards give the same bytes, with any number of workers and after any interruption: run the same command "
        "again and it goes on.",
    )
    sources = prepare.add_subparsers(
        title="sources", metavar="SOURCE", required=True, dest="source", parser_class=_IntermixedParser
    )
    for name, source in SOURCES.items():
        parser = sources.add_parser(
            name, help=source.summary, description=source.summary[0].upper() + source.summary[1:] + "."
        )
        source.add_arguments(parser)
        parser.add_argument("out", type=Path, metavar="OUT", help="folder of the data set; made if absent")
        size = parser.add_mutually_exclusive_group()
        size.add_argument(
            "--shards", type=int, metavar="N", help="training shards; other splits get shards of the same size"
        )
        size.add_argument(
            "--samples-per-shard", type=int, metavar="N", help="at most this many (default: 1252, or 8 shards)"
        )
        parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the shuffle (default: 0)")
        _add_workers(parser)
        parser.add_argument("--overwrite", action="store_true", help="replace a data set that is in OUT")
        parser.set_defaults(run=_prepare)


def _add_index(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "index",
        help="index shards made elsewhere",
        description="Read the headers and labels of all tars in a folder and write .idx, index.json, _info.json "
        "and classes.json beside them. The tars stay as they are. The split comes from the file name: train*, "
        "val*, validation*, test*, or NAME-train-*.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of tars")
    parser.add_argument(
        "--classes",
        metavar="FILE|N",
        help="class names, one a line or as classes.json, or their number "
        "(default: classes.json in DIR, else highest label + 1)",
    )
    _add_workers(parser)
    parser.set_defaults(run=_index)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a data set against its index",
        description="Check that every shard is there, whole, and as its index says. All problems are listed; "
        "exit code 1 if there is one.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--digests", action="store_true", help="read every byte and compare the sha256")
    parser.add_argument("--decode", action="store_true", help="decode every image")
    _add_workers(parser)
    parser.set_defaults(run=_verify)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per usable core)")


def _prepare(arguments: argparse.Namespace, console: Console) -> int:
    from shards.prepare import prepare

    prepare(
        SOURCES[arguments.source].from_arguments(arguments),
        arguments.out,
        shards=arguments.shards,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        console=console,
    )
    return 0


def _index(arguments: argparse.Namespace, console: Console) -> int:
    from shards.foreign import index_folder

    index_folder(arguments.folder, classes=arguments.classes, workers=arguments.workers, console=console)
    return 0


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    from shards.verify import print_report, verify

    report = verify(
        arguments.folder,
        digests=arguments.digests,
        decode=arguments.decode,
        workers=arguments.workers,
        console=console,
    )
    print_report(report, console)
    return 1 if report.problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for problems that `verify` found, 2 for a mistake."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments, Console())
    except UserError as error:
        print(f"shards: {error.headline}", *(f"  {line}" for line in error.details), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shards: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
