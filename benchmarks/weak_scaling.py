"""Weak scaling on one machine: an update on one core, and on two ranks with a core each, taken in turns.

    python benchmarks/weak_scaling.py                # ResNet-50, 32 images of 224 × 224 per rank and update

What is timed is the trainer's own update: the loader decodes on the rank's core, the engine trains, gloo all-reduces
the gradients. Two ranks also share caches, memory and power. What that alone costs is the control: two trainings of
one rank each at the same time, which talk to nobody. The efficiency is then

    two ranks / (2 × one alone)  =  control / (2 × one alone)  ×  two ranks / control
                                    what the machine shares       what the ranks exchange

All processes live from the beginning to the end and wait in between. Every turn begins with an update that is not
timed, in which loaders catch up and ranks meet. Processor time that other processes took is measured: a round in which
they took more than 3 % of both cores is not counted but repeated, until there are three times as many as asked for.
Each round that ends is a line on stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from loader_data import SkipError
from loader_machine import cpu_model
from rich.console import Console
from rich.table import Table
from weak_scaling_ranks import PARTS, Ranks, Turn, make_shards, write_config

ARMS = {"one": "1 rank, alone", "control": "2 × 1 rank, the control", "two": "2 ranks"}
QUIET = 0.03
"""Of both cores: a round in which other processes took more is not counted."""
FEWEST = 3
"""Quiet rounds; with fewer of them all rounds are shown, and said to be disturbed."""
MOST = 3
"""Times as many rounds as quiet ones are asked for, and then no more."""

Round = dict[str, Turn]
"""A turn of each arm, one after the other."""


def quiet(turns: Round) -> bool:
    """Whether the machine had nothing else to do."""
    return max(turn.others for turn in turns.values()) <= QUIET


def efficiencies(rounds: list[Round], arm: str) -> list[float]:
    """Of an arm, in each round against the one rank alone of that round."""
    return [turns[arm].rate / (2 * turns["one"].rate) for turns in rounds]


def progress(rounds: list[Round], wanted: int) -> str:
    """A line on the round that has ended.

    Args:
        rounds: so far; none where what has ended was the warm-up.
        wanted: quiet ones.
    """
    if not rounds:
        return "warmed up"
    counted = list(filter(quiet, rounds))
    state = "quiet" if quiet(rounds[-1]) else "disturbed"
    so_far = f"{statistics.median(efficiencies(counted, 'two')):.3f}" if counted else "–"
    return (
        f"round {len(rounds)} of at most {MOST * wanted}, {state} · {len(counted)} of {wanted} quiet ones · "
        f"efficiency so far {so_far}"
    )


def show(rounds: list[Round]) -> None:
    """Print medians of all turns, efficiencies as medians over rounds, and which part costs what."""
    turns = {arm: [one[arm] for one in rounds] for arm in ARMS}
    ratios = {arm: efficiencies(rounds, arm) for arm in ARMS}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("images/s", "s/update", "compute", "communication", "data wait", "efficiency", "lowest – highest"):
        table.add_column(heading, justify="right")
    for arm, name in ARMS.items():
        medians = {part: statistics.median(turn.parts[part] for turn in turns[arm]) for part in PARTS}
        table.add_row(
            name,
            f"{statistics.median(turn.rate for turn in turns[arm]):.2f}",
            f"{statistics.median(turn.seconds for turn in turns[arm]):.3f}",
            *(f"{medians[part]:.3f}" for part in PARTS),
            "1" if arm == "one" else f"{statistics.median(ratios[arm]):.3f}",
            "" if arm == "one" else f"{min(ratios[arm]):.3f} – {max(ratios[arm]):.3f}",
        )
    console = Console(width=120, highlight=False)
    console.print(table)
    efficiency, shared = (statistics.median(ratios[arm]) for arm in ("two", "control"))
    console.print(
        f"\nweak-scaling efficiency {efficiency:.3f} = {shared:.3f} that the machine shares × "
        f"{efficiency / shared:.3f} that the ranks exchange"
    )
    others = [turn.others for arm in turns.values() for turn in arm]
    console.print(f"other processes took {statistics.median(others):.1%} of both cores, at most {max(others):.1%}")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prepared shards; default: some are made, of smooth noise")
    parser.add_argument("--model", default="resnet50", help="a timm model (default: resnet50)")
    parser.add_argument("--images", type=int, default=32, help="per rank and update (default: 32, the paper's)")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: 224)")
    parser.add_argument("--updates", type=int, default=2, help="timed in a turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="in which each arm has a turn (default: 9)")
    parser.add_argument("--json", action="store_true", help="every turn, for scripts")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("two cores are needed, and this process may use one")
    # inherited by the ranks, and read when they import torch
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    load = os.getloadavg()[0]
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = args.data or make_shards(Path(folder))
        except SkipError as error:
            sys.exit(str(error))
        config = write_config(Path(folder), data, model=args.model, images=args.images, size=args.size)
        ranks = Ranks(cores, config)
        for number in range(-1, MOST * args.rounds):  # the first allocates and warms up
            order = sorted(ARMS, key=list(ARMS).index, reverse=number % 2 == 1)
            turns = {arm: ranks.turn(arm, args.updates, args.images) for arm in order}
            rounds += [turns] if number >= 0 else []
            print(progress(rounds, args.rounds), file=sys.stderr, flush=True)
            if sum(map(quiet, rounds)) == args.rounds:
                break
        ranks.close()
    counted = [turns for turns in rounds if quiet(turns)]
    disturbed = len(counted) < min(FEWEST, args.rounds)
    if args.json:
        print(json.dumps([{arm: vars(turn) for arm, turn in turns.items()} for turns in rounds], indent=2))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    print(f"{cpu_model()}, cores {cores[0]} and {cores[1]}, Python {platform.python_version()}, {versions}")
    print(
        f"{args.model}, {args.images} images of {args.size} × {args.size} per rank and update, "
        f"{ranks.gradient_bytes / 1e6:.0f} MB of gradients"
    )
    shown = rounds if disturbed else counted
    print(
        f"seconds per update, medians of n = {len(shown)} turns of {args.updates} updates, taken in turns; "
        f"load average before: {load:.2f}\n"
    )
    show(shown)
    if disturbed:
        print(f"DISTURBED: {len(counted)} of {len(rounds)} rounds were quiet; the figures are of all, and say little")
    elif len(counted) < len(rounds):
        print(f"not counted: {len(rounds) - len(counted)} of {len(rounds)} rounds, in which they took more")


if __name__ == "__main__":
    main()
