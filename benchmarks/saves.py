"""What a save costs the training loop: written beside it against in it, taken in turns.

    python benchmarks/saves.py --out /a/disk

Rank 0's loop trains ResNet-50 with SGD and momentum (one image of 64 × 64 an update on a CPU, 64 of 224 × 224 on a GPU;
the state that is saved is the same), saves, and trains on until the save is on disk. The loop is held within
`Saver.save`; and an update beside the writing takes longer than one without, as the thread takes processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from loader_machine import cpu_model
from rich import filesize
from rich.console import Console
from rich.table import Table

from pipeline import config, plan
from pipeline.plan import Plan
from pipeline.saver import Saved, Saver

UPDATES = 3
"""Before every save, to compare those beside it with."""


def make_plan(folder: Path, *, background: bool) -> Plan:
    """A plan whose saves go to `folder`; its data is never read."""
    path = folder / f"background-{background}.json"
    content = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}},
        "scheduler": {"type": "GradualWarmupLR", "params": {}},
        "recipe": {
            "data": "none",
            "model": {"name": "resnet50"},
            "epochs": 90,
            "run": str(folder / f"run-{background}"),
            "checkpoint": {"background": background, "keep": 1},
        },
    }
    path.write_text(json.dumps(content))
    resolved = plan.resolve(config.load(path), 1, samples=1_281_167)
    # a planned run knows its data by this
    return Plan(**{**vars(resolved), "digest": "0" * 64})


class Training:
    """ResNet-50 and its optimizer on one device."""

    def __init__(self, device: torch.device) -> None:
        size, images = (224, 64) if device.type == "cuda" else (64, 1)
        self.device = device
        self.model = timm.create_model("resnet50").to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.images = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.zeros(images, dtype=torch.long, device=device)
        self.model.eval()  # one image has no statistics

    def update(self) -> float:
        """One update, waited for. Returns its seconds."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """As the engine has it."""
        return {"optimizer": self.optimizer.state_dict()["state"], "loss_scaler": None}


def around_a_save(training: Training, saver: Saver, done: list[Saved], step: int) -> dict[str, float]:
    """Some updates, a save, and updates until it is on disk, to which `saver` adds it in `done`. Returns seconds."""
    before, alone, beside = len(done), [training.update() for _ in range(UPDATES)], []
    saver.save(training.model, training.state(), samples=step * 256, step=step)
    while len(done) == before:
        beside.append(training.update())
        saver.poll()
    return {
        "held": done[-1].held,
        "written": done[-1].seconds,
        "alone": statistics.median(alone),
        "beside": statistics.median(beside or alone),  # none where the loop waits
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder on the disk that is to be measured; default: the temporary")
    parser.add_argument("--saves", type=int, default=15, help="of each kind (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    training = Training(torch.device(args.device))
    figures: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        done: list[Saved] = []
        savers = {kind: Saver(make_plan(Path(folder), background=kind), 1000, done.append) for kind in figures}
        for number in range(-1, args.saves):  # the first of each allocates and warms up
            for kind, saver in savers.items():
                measured = around_a_save(training, saver, done, number + 2)
                if number >= 0:
                    figures[kind].append(measured)
        size = sum(path.stat().st_size for path in done[-1].folder.iterdir())
    _print(figures, size, args)


def _print(figures: dict[bool, list[dict[str, float]]], size: int, args: argparse.Namespace) -> None:
    median = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for kind, rows in figures.items()
    }
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{os.cpu_count()} cores"
    print(f"{cpu_model()}, {device}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"ResNet-50, SGD with momentum: {filesize.decimal(size)} a save; medians of n = {args.saves}, in turns\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("seconds per save")
    for name in ("in the loop", "background", "ratio"):
        table.add_column(name, justify="right")
    names = {
        "held": "the loop is held",
        "written": "writing takes",
        "alone": "an update without a save takes",
        "beside": "an update beside the writing takes",
    }
    for key, name in names.items():
        blocking, background = median[False][key], median[True][key]
        if key == "beside":
            table.add_row(name, "–", f"{background:.3f}", "–")
        else:
            table.add_row(name, f"{blocking:.3f}", f"{background:.3f}", f"{background / blocking:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
