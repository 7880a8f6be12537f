"""Runs as the trainer would record them, and a report's page as a browser would see it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import report
from pipeline.record import RunRecord
from pipeline.report import drawing, page

TRAIN, VAL = 51_167, 5_000  # no minibatch divides an epoch, as with ImageNet


class Run:
    """Simulates one run: warmup, two milestones, an error that decays; every field from arithmetic."""

    def __init__(self, folder: Path, kn: int = 256, seed: int = 0, floor: float = 23.6, **start: Any) -> None:
        self.folder, self.kn, self.seed, self.floor = folder, kn, seed, floor
        self.clock = datetime(2026, 11, 1, 8, 0, tzinfo=UTC) + timedelta(hours=seed)
        self.random = np.random.default_rng([seed, kn])
        self.samples = 0
        self.events: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {
            "run": str(folder),
            "config": f"ds_configs/imagenet_{kn}.json",
            "overrides": [f"recipe.seed={seed}"] if seed else [],
            "model": "resnet50",
            "world_size": 8,
            "train_batch_size": kn,
            "micro_batch": 32,
            "logical_workers": kn // 32,
            "accumulation": max(1, kn // 256),
            "peak_lr": 0.1 * kn / 256,
            "reference_lr": 0.1,
            "reference_batch": 256,
            "epochs": 20,
            "train_samples": TRAIN,
            "val_samples": VAL,
            "seed": seed,
            "device": "cuda (H100)",
            "precision": "fp16",
            "plan": f"imagenet_{kn}   resnet50 · {TRAIN:,} train / {VAL:,} val · 20 epochs\n\n"
            f"batch      {kn:,} = 32 micro-batch × {max(1, kn // 256)} accumulation × 8 ranks\n"
            f"rate       0.1 per 256 → peak {0.1 * kn / 256:g}",
            "versions": {"onehour": "0.1.0", "torch": "2.14.1", "deepspeed": "0.19.8"},
        } | start

    def log(self, event: str, after: float = 0.0, **fields: Any) -> None:
        self.clock += timedelta(seconds=after)
        self.events.append({"event": event, "time": self.clock.isoformat(timespec="milliseconds"), **fields})

    def begin(self, resumed_from: int | None = None, **changes: Any) -> Run:
        self.log("start", 60, **(self.facts | changes | {"resumed_from": resumed_from}))
        if resumed_from is not None:
            self.samples = resumed_from
            self.log("resume", 5, samples=resumed_from, path=f"step-{resumed_from // self.kn}", world_size=8)
        return self

    def lr(self, epoch: float) -> float:
        peak = self.facts["peak_lr"]
        if epoch < 3:
            return 0.1 + (peak - 0.1) * epoch / 3
        return peak * 0.1 ** sum(epoch >= milestone for milestone in (10, 16))

    def error(self, epoch: float) -> float:
        level = self.floor + 70 * math.exp(-epoch / 2.5) + 10 * (epoch < 10) + 3 * (epoch < 16)
        return float(level + self.random.normal(0, 0.15))

    def train_to(self, epochs: float, evaluated: int = VAL) -> Run:
        end = math.ceil(epochs * TRAIN / self.kn) * self.kn
        every = max(1, TRAIN // self.kn // 4) * self.kn
        while self.samples < end:
            before = self.samples
            crossing = math.ceil(math.floor(self.samples / TRAIN + 1) * TRAIN / self.kn) * self.kn
            self.samples = min(end, crossing, (self.samples // every + 1) * every)
            epoch = self.samples / TRAIN
            rate = 2_400 * (1 + self.random.normal(0, 0.01))
            seconds = (self.samples - before) / rate
            shares = {"communication": 0.03, "data_wait": 0.004 * (1 + self.random.random())}
            shares["compute"] = 1 - sum(shares.values())
            self.log(
                "train",
                seconds,
                step=self.samples // self.kn,
                samples=self.samples,
                epoch=round(epoch, 4),
                loss=self.error(epoch) / 15,
                lr=self.lr(epoch),
                images_per_second=rate,
                **shares,
                skipped_steps=0,
                step_seconds=self.kn / rate,
            )
            number = math.floor(epoch)
            if number > math.floor(before / TRAIN):
                error = self.error(number)
                self.log("epoch", epoch=number, samples=self.samples, loss=error / 15, top1=97 - error, seconds=21.3,
                         images_per_second=rate, **shares)  # fmt: skip
                self.log("evaluation", 2, epoch=round(epoch, 4), samples=self.samples, top1=100 - error,
                         top5=100 - error / 4, loss=error / 20, images=evaluated, seconds=2.0)  # fmt: skip
                self.log("checkpoint", 0.4, samples=self.samples, path=f"step-{self.samples // self.kn}", seconds=0.4)
        return self

    def finish(self) -> Run:
        last = [event for event in self.events if event["event"] == "evaluation"][-1]
        self.log("finished", samples=self.samples, top1=last["top1"], top5=last["top5"], images=last["images"],
                 median_epochs=[16, 17, 18, 19, 20], seconds=431.5, steps_share=0.92)  # fmt: skip
        return self

    def save(self, broken: bytes = b"") -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(event) + "\n" for event in self.events)
        (self.folder / "metrics.jsonl").write_bytes(lines.encode() + broken)
        return self.folder

    def errors(self) -> dict[int, float]:
        """Error per finished epoch as last evaluated: what the report should have read."""
        return {
            math.floor(event["epoch"]): 100 - event["top1"] for event in self.events if event["event"] == "evaluation"
        }

    def expected(self) -> float:
        last = self.errors()
        return float(np.median([last[epoch] for epoch in sorted(last)[-5:]]))


def whole(folder: Path, **facts: Any) -> Run:
    return Run(folder, **facts).begin().train_to(20).finish()


class Page(HTMLParser):
    """What a browser would do with a page: what it would fetch, the elements, the text, the tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.styles = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster", "background") or name.startswith("on"):
                self.fetched.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text.append(data)


def text_of(path: Path) -> str:
    return " ".join(" ".join(Page(path).text).split())


def rows_of(folders: list[Path], reference: Path | None = None) -> list[report.Row]:
    return report.compare([RunRecord.read(folder) for folder in folders], reference)


@pytest.fixture(scope="session")
def paper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The paper's comparison in small: 3 seeds at kn = 256, 3 at 2,048, one of which was killed and resumed."""
    root = tmp_path_factory.mktemp("runs")
    small = [whole(root / f"imagenet_256-{seed}", seed=seed) for seed in range(3)]
    large = [whole(root / f"imagenet_2k-{seed}", kn=2048, seed=seed, floor=23.75) for seed in range(2)]
    killed = Run(root / "imagenet_2k-2", kn=2048, seed=2, floor=23.75).begin()
    killed.log("warning", message="sample substituted", shard="train-0007.tar", key="n0153/17")
    for step, scale in ((1, 32768), (2, 16384), (9, 8192)):
        killed.log("skip", step=step, loss_scale=scale)
    killed.train_to(7.5)
    checkpoint = [e["samples"] for e in killed.events if e["event"] == "checkpoint"][-2]
    large.append(killed.begin(checkpoint, world_size=4, accumulation=16).train_to(20).finish())
    folders = [run.save() for run in small + large]
    out = root / "report"
    return {"small": small, "large": large, "folders": folders, "page": report.write_report(folders, out), "out": out}


@pytest.fixture(autouse=True)
def small_pictures(paper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time: after the comparison's own report, pictures are small."""
    monkeypatch.setattr(drawing, "DPI", 50)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what the page says."""
    monkeypatch.setattr(page, "draw_charts", lambda rows: [])
