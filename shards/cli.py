"""The ``shards`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shards.classes import CLASSES_HELP
from shards.errors import UserError
from shards.fetch import is_remote, mask
from shards.labels import RULE_HELP
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
    _add_show(commands)
    _add_bench(commands)
    return parser


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="write images as shuffled shards with index",
        description="Write a labelled set of images as tar shards, shuffled over the whole set, with index.json, "
        ".idx, _info.json and classes.json. Image bytes are copied untouched, unless you ask for other ones. The "
        "same data and options give the same bytes, with any number of workers and after any interruption: run the "
        "same command again and it goes on.",
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
        _add_selection(parser)
        _add_reencoding(parser)
        parser.add_argument(
            "--no-crop-index",
            action="store_false",
            dest="crop_index",
            help="do not write the .cropindex files, with which training decodes only the part of a JPEG that it shows",
        )
        _add_workers(parser)
        parser.add_argument(
            "--overwrite", action="store_true", help="replace the data set that is in OUT: all shards that it lists"
        )
        parser.set_defaults(run=_prepare)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="rename, merge and drop classes: YAML or JSON {class: new name}, text with two columns, or a list of "
        "pairs; null drops a class, the class * stands for all that are not listed. New labels follow the sorted "
        "names, or the order of a list or text",
    )
    group.add_argument(
        "--limit-classes",
        metavar="N|FILE|A,B",
        help="only the first N classes, or those named, in a file one a line; applied after --class-map",
    )
    group.add_argument(
        "--limit-per-class", type=int, metavar="N", help="at most N training images of each class, chosen by the seed"
    )


def _add_reencoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image bytes (by default all are kept as they are)")
    group.add_argument(
        "--resize-short",
        type=int,
        metavar="PIXELS",
        help="reduce images whose shorter side is longer than this, as JPEG of quality 90, 4:2:0 (Lanczos)",
    )
    group.add_argument(
        "--normalize-odd",
        action="store_true",
        help="encode anew what fast decoders refuse (PNG, CMYK, progressive, …), as JPEG of quality 95, 4:4:4",
    )
    group.add_argument("--quality", type=int, metavar="Q", help="of JPEGs encoded anew, 1 to 100")
    group.add_argument("--check-decode", action="store_true", help="decode every image and name all broken ones")


def _add_index(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "index",
        help="index shards made elsewhere",
        description="Read the headers and labels of all tars in a folder and write .idx, index.json, _info.json "
        "and classes.json beside them. The tars stay as they are. The split comes from the folder or the file name: "
        "DIR/train/*.tar, train*, val*, validation*, test*, or NAME-train-*. Run again, it hashes only shards that "
        "have changed: their size, headers, or time. Of a URL, the tars are fetched into the cache, and OUT gets an "
        "index.json that lists them, to train from.",
    )
    parser.add_argument(
        "folder",
        metavar="DIR|URL",
        help="folder of tars, here or at a URL, or URL of tars: https://host/{000..127}.tar",
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="of a URL: where its index goes")
    parser.add_argument("--label", metavar="RULE", help=f"{RULE_HELP} (default: as indexed before, else cls)")
    parser.add_argument(
        "--classes", metavar="FILE|N", help=f"{CLASSES_HELP} (default: classes.json in DIR, else highest label + 1)"
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image once and write .cropindex files, with which training decodes only the part of a JPEG "
        "that it shows (of a URL: always done, if the C extension is there)",
    )
    parser.add_argument("--rehash", action="store_true", help="hash all shards, also those that seem unchanged")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="of a URL: recipe.cache.folder (default: in the user's cache folder)"
    )
    parser.add_argument(
        "--cache-gigabytes", type=float, default=200, metavar="N", help="of a URL: most that it may hold (default: 200)"
    )
    _add_workers(parser)
    parser.set_defaults(run=_index)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a data set against its index",
        description="Check that every shard is there, whole, and as its index says. All problems are listed; "
        "exit code 1 if there is one. Remarks say what may be meant so, such as classes without images; they do not "
        "change the exit code.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--digests", action="store_true", help="read every byte and compare the sha256")
    parser.add_argument(
        "--decode", action="store_true", help="decode every image, and compare .cropindex files with it"
    )
    parser.add_argument(
        "--duplicates", action="store_true", help="find images with equal bytes, also across splits (remarks)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, progress on stderr")
    _add_workers(parser)
    parser.set_defaults(run=_verify)


def _add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show",
        help="draw a contact sheet, and say what the images are like",
        description="Draw some pictures of a data set or of one tar, with their classes, as one PNG, and print what "
        "all of them are like: sizes, classes, kinds, odd files. A tar needs no index.",
    )
    parser.add_argument("target", type=Path, metavar="DIR|TAR", help="folder of a data set, or one tar")
    parser.add_argument("--split", metavar="NAME", help="of the folder (default: train)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="pictures on the sheet (default: 64)")
    parser.add_argument("--columns", type=int, default=8, metavar="N", help="of the sheet (default: 8)")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of the choice of pictures (default: 0; of a tar, the first ones)"
    )
    parser.add_argument(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="A,B",
        help="look only at these classes, by name or number; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="the sheet (default: DIR-SPLIT.png or TAR.png here)")
    parser.add_argument("--all", action="store_true", help="read the headers of all images, not of 10,000")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    _add_workers(parser)
    parser.set_defaults(run=_show)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure how fast this storage reads the shards",
        description="Read a data set as training does, image by image in random order with several numbers of "
        "threads, then in windowed order, and whole shards from end to end; from the disk and from memory. Print "
        "the rates and what they mean for the order of the samples. Empties the page cache of these shards.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--split", metavar="NAME", help="default: train")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="to measure in all (default: 30)")
    parser.add_argument(
        "--threads", default="1,4,16", metavar="N,…", help="that read at the same time (default: 1,4,16)"
    )
    parser.add_argument(
        "--demand", type=float, metavar="RATE", help="images a second that one host trains on, for the advice"
    )
    parser.add_argument("--cold", action="store_true", help="measure only what is not in the page cache")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    parser.set_defaults(run=_bench)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per usable core)")


def _prepare(arguments: argparse.Namespace, console: Console) -> int:
    from shards.prepare import prepare
    from shards.reencode import Reencoding

    prepare(
        SOURCES[arguments.source].from_arguments(arguments),
        arguments.out,
        shards=arguments.shards,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        class_map=arguments.class_map,
        limit_classes=arguments.limit_classes,
        limit_per_class=arguments.limit_per_class,
        reencoding=Reencoding(arguments.resize_short, arguments.normalize_odd, arguments.quality),
        check_decode=arguments.check_decode,
        crop_index=arguments.crop_index,
        console=console,
    )
    return 0


def _index(arguments: argparse.Namespace, console: Console) -> int:
    if is_remote(arguments.folder):
        return _index_remote(arguments, console)
    if arguments.out is not None:
        raise UserError(f"{arguments.out}: OUT is for shards at a URL; those in a folder are indexed where they are")
    from shards.foreign import index_folder

    index_folder(
        Path(arguments.folder),
        classes=arguments.classes,
        label=arguments.label,
        rehash=arguments.rehash,
        decode=arguments.decode,
        workers=arguments.workers,
        console=console,
    )
    return 0


def _index_remote(arguments: argparse.Namespace, console: Console) -> int:
    from shards.cache import ShardCache, default_folder
    from shards.crop_index import require_extension
    from shards.remote_index import index_remote

    if arguments.decode:
        require_extension()
    if arguments.out is None:
        raise UserError(
            f"{mask(arguments.folder)}: nothing can be written there; where should the index go?",
            f"Give a folder: shards index {mask(arguments.folder)} OUT",
        )
    index_remote(
        arguments.folder,
        arguments.out,
        ShardCache(arguments.cache or default_folder(), int(arguments.cache_gigabytes * 1e9)),
        classes=arguments.classes,
        label=arguments.label,
        workers=arguments.workers,
        console=console,
    )
    return 0


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    from shards.findings import print_report, report_as_json
    from shards.verify import verify

    report = verify(
        arguments.folder,
        digests=arguments.digests,
        decode=arguments.decode,
        duplicates=arguments.duplicates,
        workers=arguments.workers,
        console=Console(stderr=True) if arguments.json else console,
    )
    if arguments.json:
        print(report_as_json(report))
    else:
        print_report(report, console)
    return 1 if report.problems else 0


def _split_class(argv: Sequence[str]) -> list[str]:
    """``prepare torchvision:CIFAR10`` → ``prepare torchvision:<Class> CIFAR10``, a name and an argument to argparse."""
    words = list(argv)
    if len(words) > 1 and words[0] == "prepare" and words[1].partition(":")[0] == "torchvision":
        words[1:2] = ["torchvision:<Class>", words[1].partition(":")[2]]
    return words


def _show(arguments: argparse.Namespace, console: Console) -> int:
    from shards.show import print_report, show

    report = show(
        arguments.target,
        split=arguments.split,
        samples=arguments.samples,
        columns=arguments.columns,
        seed=arguments.seed,
        classes=arguments.classes,
        out=arguments.out,
        everything=arguments.all,
        workers=arguments.workers,
        console=None if arguments.json else console,
    )
    if arguments.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print_report(report, console)
    return 0


def _bench(arguments: argparse.Namespace, console: Console) -> int:
    from shards.advice import print_report
    from shards.bench import bench, parse_threads

    report = bench(
        arguments.folder,
        split=arguments.split,
        seconds=arguments.seconds,
        threads=parse_threads(arguments.threads),
        demand=arguments.demand,
        cold_only=arguments.cold,
        console=None if arguments.json else console,
    )
    if arguments.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print_report(report, console)
    return 0


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that has gone, such as ``head``, to `main`: rich would exit with 1, `verify`'s code."""
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for problems that `verify` found, 2 for a mistake."""
    arguments = build_parser().parse_args(_split_class(sys.argv[1:] if argv is None else argv))
    try:
        code = arguments.run(arguments, _Console())
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"shards: {error.headline}", *(f"  {line}" for line in error.details), sep="\n", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's exit would try to write the rest
        return 141  # what a shell reports of a process that SIGPIPE ended
    except KeyboardInterrupt:
        goes_on = arguments.run in (_prepare, _index)
        print(f"shards: interrupted{'; run the same command again to go on' * goes_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
