"""The question that a report is opened with, its answer in sentences, and what to know before trusting it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.metrics import is_number
from pipeline.record import RunRecord, median_last_epochs
from pipeline.report import text
from pipeline.report.rows import LAST_EPOCHS, Row


def question(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The headline, and the answer to it in sentences: one for a single row, else one per row but the baseline."""
    baseline = next(row for row in rows if row.baseline)
    others = [row for row in rows if not row.baseline]
    if not others:
        return "How did it go?", [_outcome(baseline)]
    if max(_minibatch(row) for row in others) > _minibatch(baseline):
        headline = "Does the large minibatch match the baseline?"
    else:
        headline = "How do the runs compare with the first?"
    return headline, [_verdict(row, baseline) for row in others]


def remarks(row: Row) -> list[str]:
    """What a reader must know before trusting a row's figures."""
    found = []
    for name, record in row.runs.items():
        if record.diverged:
            found.append(f"{name} diverged: {record.diverged.get('why') or text.progress(record)}.")
        elif not record.finished:
            effect = ": its figures are those so far." if name in row.counted else " and is left out of the figures."
            found.append(f"{name} has not finished ({text.progress(record)}){effect}")
    for name, record in row.counted.items():
        median = record.median_error(LAST_EPOCHS)
        if median is None:
            found.append(f"{name} was never evaluated.")
            continue
        if median.used < median.wanted:
            used = ", ".join(f"{epoch:.4g}" for epoch in median.epochs)
            found.append(f"{name}: {median.used} of {median.wanted} epoch evaluations exist (at epoch {used}).")
        whole = record.start.get("val_samples")
        if whole is not None and any(images != whole for images in median.images):
            images = ", ".join(map(text.count, median.images))
            found.append(f"{name} was evaluated on {images} of {text.count(whole)} images: not the whole set.")
        found += _averages(name, record)
        if record.start.get("loss"):
            found.append(
                f"{name} was trained with {record.start['loss']}: its training loss is not comparable with others'; "
                "errors, and the loss of evaluations, are."
            )
    if len(set(row.seeds)) < len(row.seeds):
        found.append(f"{row.label}: a seed occurs more than once, so ± understates the spread.")
    return [*found, *row.notes]


def _averages(name: str, record: RunRecord) -> list[str]:
    """What to know of a run that averages its weights (`recipe.model.ema`)."""
    if any(event.get("weights") == "ema" for event in record.evaluations):
        return [f"{name}: its figures are those of the exponential average of its weights."]
    beside = [{**event, "top1": event["ema_top1"]} for event in record.evaluations if is_number(event.get("ema_top1"))]
    median = median_last_epochs(beside, LAST_EPOCHS)
    if median is None:
        return []
    return [
        f"{name}: the exponential average of its weights has error {text.number(median.error)} % over those epochs."
    ]


def _lack(row: Row) -> str:
    if row.finished:
        return "was never evaluated"
    if row.diverged:
        return text.diverges(row)
    return "has not finished" if row.runs else "has not been trained"


def _divergence(row: Row) -> str:
    """The answer about a row that diverged."""
    epochs = ", ".join(text.number(record.diverged["epoch"]) for record in row.diverged.values() if record.diverged)
    sentence = f"{row.label}: {text.diverges(row)}, at epoch {epochs}."
    survivors = row.survivors
    if survivors is None:
        return sentence
    others = "The one that finished has" if len(survivors.runs) == 1 else "Those that finished have"
    error = text.spread(survivors.error, survivors.std)
    return f"{sentence} {others} error {error} %, which is not the row’s."


def _level(difference: float) -> str:
    """`1.24` as "1.24 points above"."""
    if not difference:
        return "equal to"
    return f"{text.number(abs(difference))} points {'above' if difference > 0 else 'below'}"


def _minibatch(row: Row) -> int:
    return row.start.get("train_batch_size") or 0


def _outcome(row: Row) -> str:
    """The answer about a single row."""
    if row.diverged:
        return _divergence(row)
    if row.error is None or row.accuracy is None:
        return f"There is no evaluation in the record of {row.label}, so there is no accuracy to report."
    used = row.medians[0].used
    what = f"median of the last {used} epoch evaluations" if used > 1 else "from the one evaluation there is"
    parts = [f"{text.spread(row.accuracy, row.std)} % top-1 accuracy (error {text.number(row.error)} %)"]
    parts += [f"over {len(row.medians)} seeds"] if len(row.medians) > 1 else []
    parts += [what, f"{text.counts(row.images)} images{' each' * (used > 1)}"]
    sentence = ", ".join(parts) + "."
    first = next(iter(row.counted.values()))
    return sentence if row.finished else f"So far, {text.progress(first)}: {sentence}"


def _verdict(row: Row, baseline: Row) -> str:
    """The answer about a row beside the baseline."""
    if row.diverged:
        return _divergence(row)
    if row.difference is None:
        missing = [r for r in (row, baseline) if not r.finished or r.error is None]
        reasons = [f"{r.label} {_lack(r)}" for r in missing]
        yet = "" if baseline.diverged else " yet"
        return f"{row.label}: no answer{yet}, because {' and '.join(reasons)}."
    lead = (
        f"{row.label}: error {text.spread(row.error, row.std)} %, {_level(row.difference)} {baseline.label} "
        f"({text.spread(baseline.error, baseline.std)} %)."
    )
    if row.paper is not None and row.paper.difference is not None:
        where = f", {row.paper.task}" if row.paper.task else ""
        published = text.spread(row.paper.error, row.paper.std)
        lead += f" In the paper{where}: {published} %, {_level(row.paper.difference)} its baseline."
    if row.interval is None:
        few = [r.label for r in (row, baseline) if len(r.medians) < 2]
        if not few:
            return lead
        owners = f"{few[0]} has one run" if len(few) == 1 else "Each has one run"
        return f"{lead} {owners}, so how much of this is chance is not known."
    low, high = row.interval
    within = "within seed-to-seed variation" if low <= 0 <= high else "more than seed-to-seed variation explains"
    return (
        f"{lead} That is {within} (95 % interval {text.signed(low)} … {text.signed(high)} points, "
        f"{len(row.medians)} and {len(baseline.medians)} seeds)."
    )
