"""Looking at a data set: a contact sheet of some pictures, and what all of them are like."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shards.catalog import shuffled
from shards.errors import UserError
from shards.files import opened
from shards.idx import IndexedSample
from shards.pool import run_tasks, usable_cores
from shards.progress import shard_progress
from shards.sheet import MAX_IMAGE_BYTES, Picture, draw_sheet
from shards.subject import Subject, open_subject
from shards.survey import Survey, image_of, quantiles, survey_part

TRAINING_SIZE = 224
"""Pixels; pictures whose shorter side has fewer are enlarged in training."""

SURVEYED = 10_000
"""Headers read of a larger set, unless all are asked for."""

MOST_PICTURES = 1000
_MOST_NAMED = 5


def show(
    target: Path,
    *,
    split: str | None = None,
    samples: int = 64,
    columns: int = 8,
    seed: int | None = None,
    classes: Sequence[str] = (),
    out: Path | None = None,
    everything: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw a contact sheet of a data set or a tar and gather what its images are like.

    Args:
        target: data set folder, or one tar, with or without an index.
        split: of the folder; by default train, or the only one.
        samples: pictures on the sheet.
        columns: of the sheet.
        seed: of the choice of pictures; by default 0 in a folder, and the first ones of a tar.
        classes: names or numbers, or several of them with commas between; only these are looked at.
        out: the sheet, a PNG; by default named after the target, in the working folder.
        everything: read the headers of all images and not only of `SURVEYED`.
        workers: processes that read headers, by default one per usable core.
        console: where progress goes.

    Returns:
        What was found, as JSON values; ``sheet`` is the path of the picture.

    Raises:
        UserError: if there is no data set or tar, it is damaged, or the sheet cannot be written.
    """
    target = Path(target)
    for option, value, most in (("--samples", samples, MOST_PICTURES), ("--columns", columns, 100)):
        if not 1 <= value <= most:
            raise UserError(f"{option} {value}: must be from 1 to {most:,}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    subject = open_subject(target, split)
    sheet = _check_out(out or Path(f"{subject.stem}.png"))
    numbers = _choose_classes(subject, classes)
    chosen = numbers[:samples]
    if subject.indexed or seed is not None:
        chosen = np.sort(numbers[shuffled(len(numbers), f"onehour shards show {seed or 0}")[:samples]])
    surveyed = numbers
    if not everything and len(numbers) > SURVEYED:
        surveyed = np.sort(numbers[shuffled(len(numbers), "onehour shards survey")[:SURVEYED]])
    survey = _survey(subject, surveyed, workers, console or Console(quiet=True))
    report = _report(subject, numbers, survey, len(surveyed))
    of_classes = f" · of {len(classes):,} classes" if len(classes) > 1 else f" · class {classes[0]}" if classes else ""
    how = f"seed {seed or 0}" if subject.indexed or seed is not None else "the first ones"
    draw_sheet(
        sheet,
        subject.place,
        f"{len(chosen):,} of {len(numbers):,} images{of_classes} · {how}",
        _pictures(subject, chosen),
        len(chosen),
        columns,
    )
    return {**report, "sheet": str(sheet)}


def _check_out(out: Path) -> Path:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out}: is there and no file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    return out


def _choose_classes(subject: Subject, chosen: Sequence[str]) -> np.ndarray:
    """Numbers of the samples of these classes; of all samples if none are named."""
    if not chosen:
        return np.arange(len(subject.labels))
    labels = []
    names = subject.classes or ()
    # a name may itself have commas, as ImageNet's have
    for name in (part for given in chosen for part in ([given] if given in names else given.split(","))):
        if name in names:
            labels += [label for label, other in enumerate(names) if other == name]
        elif name.isascii() and name.isdigit() and len(name) < 10:
            labels.append(int(name))
        else:
            near = difflib.get_close_matches(name, names, 3)
            raise UserError(
                f"--class {name}: is no class of {subject.place}",
                f"Did you mean {', '.join(near)}?"
                if near
                else f"There are {len(names):,}: {', '.join(names[:5])} …"
                if names
                else "No class names are known here: give numbers.",
            )
    numbers = np.flatnonzero(np.isin(subject.labels, labels))
    if not len(numbers):
        raise UserError(f"--class {' '.join(chosen)}: {subject.place} has no such images")
    return numbers


def _survey(subject: Subject, numbers: np.ndarray, workers: int | None, console: Console) -> Survey:
    parts = subject.parts(numbers)
    if len(numbers) <= SURVEYED:
        workers = 1  # done before processes have started
    workers = min(workers or usable_cores(), len(parts))
    surveys: dict[Path, Survey] = {}
    with shard_progress(console, "reading", len(parts), len(numbers), workers) as advance:
        for part, survey in run_tasks(survey_part, parts, workers):
            surveys[part.tar] = survey
            advance(len(part.rows))
    total = Survey()
    for part in parts:  # in the order of the shards: the same samples are named each time
        total.add(surveys[part.tar])
    return total


def _pictures(subject: Subject, numbers: np.ndarray) -> Iterator[Picture]:
    labels = iter(subject.labels[numbers].tolist())
    for part in subject.parts(numbers):
        with opened(part.tar) as descriptor:
            for sample in part.samples():
                yield _picture(descriptor, sample, subject.class_name(next(labels)))


def _picture(descriptor: int, sample: IndexedSample, title: str) -> Picture:
    image = image_of(sample)
    if image is None:
        return Picture(b"", title, sample.key, "no image: " + ", ".join(part.extension for part in sample.components))
    if image.size > MAX_IMAGE_BYTES:
        return Picture(b"", title, sample.key, f"{image.size / 1e6:,.0f} MB are not decoded")
    return Picture(os.pread(descriptor, image.size, image.offset), title, sample.key)


def _report(subject: Subject, numbers: np.ndarray, survey: Survey, surveyed: int) -> dict[str, Any]:
    labels, sizes = subject.labels[numbers], subject.sizes[numbers]
    per_class = np.bincount(labels[labels >= 0])
    present = per_class[per_class > 0]
    widths, heights = np.array(survey.widths, np.int64), np.array(survey.heights, np.int64)
    short = np.minimum(widths, heights)
    return {
        "place": subject.place,
        "shards": len(subject.tars),
        "images": len(numbers),
        "image_bytes": int(sizes.sum()),
        "classes": {
            "named": None if subject.classes is None else len(subject.classes),
            "present": len(present),
            "images_per_class": quantiles(present),
            "without_label": int(np.count_nonzero(labels < 0)),
        },
        "bytes": quantiles(sizes),
        "surveyed": surveyed,
        "width": quantiles(widths),
        "height": quantiles(heights),
        "short_side": quantiles(short),
        "short_side_below_training_size": float(np.mean(short < TRAINING_SIZE)) if len(short) else None,
        "kinds": dict(survey.kinds.most_common()),
        "colours": dict(survey.colours.most_common()),
        "findings": {
            finding: {"count": count, "keys": survey.named[finding]} for finding, count in survey.findings.most_common()
        },
        "duplicate_keys": {"count": len(subject.repeated_keys), "keys": list(subject.repeated_keys[:_MOST_NAMED])},
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what `show` found: one screen."""

    def line(name: str, text: str) -> None:
        console.out(f"{name:<10}{text}", highlight=False)

    classes = report["classes"]
    shards = report["shards"]
    line(
        "data",
        f"{report['place']} · {shards:,} shard{'s' if shards > 1 else ''} · {report['images']:,} images · "
        f"{_amount(report['image_bytes'], 'B')}",
    )
    named = "" if classes["named"] is None else f" of {classes['named']:,}"
    per_class = classes["images_per_class"]
    line(
        "classes",
        f"{classes['present']:,}{named} present"
        + (
            f" · images per class: min {per_class['min']:,}, median {per_class['median']:,.0f}, "
            f"mean {per_class['mean']:,.1f}, max {per_class['max']:,}"
            if per_class
            else ""
        )
        + (f" · {classes['without_label']:,} images without label" if classes["without_label"] else ""),
    )
    surveyed, images = report["surveyed"], report["images"]
    how = "all headers read" if surveyed == images else f"from {surveyed:,} of {images:,} images; --all reads them all"
    console.out("")
    table = Table("", box=None, pad_edge=False)
    for heading in ("min", "median", "mean", "max"):
        table.add_column(heading, justify="right")
    table.add_row("file, bytes", *_cells(report["bytes"]))
    for name, key in (("width", "width"), ("height", "height"), ("shorter side", "short_side")):
        table.add_row(f"{name}, pixels", *_cells(report[key]))
    console.print(table)
    console.out("")
    below = report["short_side_below_training_size"]
    if below is not None:
        line("small", f"{_share(below)} have a side below {TRAINING_SIZE} pixels")
    line("kinds", _counts(report["kinds"], surveyed))
    line("colours", _counts(report["colours"], surveyed))
    for number, (finding, found) in enumerate(report["findings"].items()):
        line("odd" if number == 0 else "", f"{found['count']:,} {finding}: {_keys(found)}")
    if not report["findings"]:
        line("odd", "none")
    repeated = report["duplicate_keys"]
    line("keys", f"{repeated['count']:,} repeated: {_keys(repeated)}" if repeated["count"] else "none is repeated")
    line("", f"sizes, kinds, colours, odd files: {how}")
    line("sheet", report["sheet"])


def _cells(values: dict[str, float] | None) -> tuple[str, ...]:
    return ("–",) * 4 if values is None else tuple(f"{values[key]:,.0f}" for key in ("min", "median", "mean", "max"))


def _counts(counts: dict[str, int], total: int) -> str:
    return ", ".join(f"{count:,} {name} ({_share(count / total)})" for name, count in counts.items()) or "–"


def _keys(found: dict[str, Any]) -> str:
    return ", ".join(found["keys"]) + (" …" if found["count"] > len(found["keys"]) else "")


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "< 0.1%"


def _amount(number: float, unit: str) -> str:
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:,.1f} {prefix}{unit}"
    return f"{number:,.0f} {unit}"
