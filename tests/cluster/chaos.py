"""A training that is killed again and again, anywhere and at any moment, against one that nobody touched.

    python -m tests.cluster.chaos --kills 50 --seed 1

It trains on three hosts through `onehour train --hostfile`. Each launch has a random part of the hosts and their slots,
and at a random moment something of it gets a SIGKILL: a rank, a host, a launcher. What is left must end by itself,
nothing that was reported as saved may be lost, and the next launch goes on. After so many kills the last launch runs to
the end; then the record, the weights and the saves are compared with those of an unbroken run on one host.

All choices come from the seed; what a kill meets is the machine's affair, so no two storms are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline import saves
from pipeline.fault import FINISHED, STOPPED
from pipeline.meeting import JOIN_TIMEOUT
from pipeline.metrics import read_metrics
from pipeline.record import RunRecord
from pipeline.samples import read_samples
from shards.cli import main as shards_main
from shards.errors import UserError
from tests.cluster.hosts import Cluster, Host, missing
from tests.cluster.launched import KN, Launched, configure, tidy, wait_until_nothing_is_left
from tests.conftest import TINY_CLASSES, TINY_VAL, write_images
from tests.training import assert_close, assert_the_run_is_exact, run_of

TRAIN, VAL = 200 * len(TINY_CLASSES), TINY_VAL * len(TINY_CLASSES)
END_SECONDS = 150
"""After a kill, until nothing of the launch is left: the lease of a launcher on another host is good for 60, and three
hosts share a machine that may have other things to do. The longest wait is printed."""

JOINING_END_SECONDS = 60 + JOIN_TIMEOUT.total_seconds()
"""The same before all ranks have met: they wait so long for one whose host is gone."""

LAST_SECONDS = 3600
"""Of a launch that nobody touches: the unbroken run does at once what all launches of a storm did."""

MOST_UPDATES = 30
"""Of a launch before it is struck."""

KEEP = 3
# No BN, which amplifies rounding, and a rate that falls: at 0.001 throughout, one and two ranks of this network are
# apart by 1e-3 after 500 updates and its loss begins to jump
CONFIGURATION = {
    "recipe.model.name": "vit_tiny_patch16_224",
    "recipe.model.args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "optimizer.params.lr": 0.001,
    "scheduler.params.milestones": [4, 8, 16, 32, 64, 128, 256],
    "scheduler.params.gamma": 0.5,
    "recipe.checkpoint.every_epochs": 0.3,
    "recipe.checkpoint.keep": KEEP,
}
TOLERANCE = 1e-3
ENDLESS = 100_000
"""Epochs until the last launch, which is given an end."""

LAUNCHERS = ("onehour", "deepspeed", "pdsh")
VICTIMS = ("a rank", "the ranks of a host", "a host", "launch.py", *LAUNCHERS)
MOMENTS = ("launch", "set-up", "first update", *["update"] * 3, *["save"] * 4)


@dataclass
class Storm:
    """What has happened so far.

    Attributes:
        kills: that met living ranks, by victim and by moment.
        early: kills before any rank lived.
        in_a_save: kills that left a save half-written.
        launches: the last one, which finishes, included.
        again: updates that were done a second time.
        waited: seconds from a kill until nothing was left, the longest.
        codes: exit codes of what was killed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    early: int = 0
    in_a_save: int = 0
    launches: int = 0
    again: int = 0
    waited: float = 0.0
    codes: Counter[int] = field(default_factory=Counter)

    @property
    def struck(self) -> int:
        """Kills that met living ranks."""
        return sum(self.kills[victim] for victim in VICTIMS)


class Chaos:
    """One run through a storm.

    Args:
        cluster: of three hosts; `onehour` is typed on the first.
        folder: for everything that is written.
        seed: of all choices.
        say: is given a line per launch.
    """

    def __init__(self, cluster: Cluster, folder: Path, seed: int, say: Callable[[str], object] = print) -> None:
        self.cluster = cluster
        self.storm = Storm()
        self._folder = folder
        self._random = random.Random(seed)
        self._say = say
        self._decks: dict[tuple[str, ...], list[str]] = {}
        self._data = make_data(folder)
        self._path = self._configure("struck", ENDLESS)
        self._run = run_of(self._path)
        self._hostfile = cluster.hostfile(folder / "hostfile", slots=2)

    def run(self, kills: int) -> None:
        """Kill so often, let it finish, and compare.

        Raises:
            AssertionError: something is not as it should be.
        """
        with tidy(self.cluster):
            while self.storm.struck < kills:
                self._launch_and_kill()
            # saved or not, the last updates are not done before the end is known: it is after all that were ever done
            epochs = math.ceil(max(self._reached(), self._saved()) * KN / TRAIN) + 2
            self._path = self._configure("struck", epochs)
            self._launch(*self._draw_hosts()).output_of(FINISHED, LAST_SECONDS)
            unbroken = self._configure("unbroken", epochs)
            Launched(self.cluster.hosts[0], unbroken, "--ranks", "2").output_of(FINISHED, LAST_SECONDS)
            self._compare(unbroken, epochs)

    # ---------------------------------------------------------------- one launch

    def _launch_and_kill(self) -> None:
        first, leftovers = self._saved(), self._partial()
        hosts, ranks = self._draw_hosts()
        moment, victim = self._draw(MOMENTS), self._draw(VICTIMS)
        began = time.time()
        launched = self._launch(hosts, ranks)
        self._wait_for(moment, launched, self._run / "samples" / f"from-{first}-rank-0-of-{ranks}.jsonl", began)
        found = self._processes(launched, hosts)
        living = bool(found["a rank"])
        while not found[victim]:  # at a launch not everything is there
            victim = self._random.choice(VICTIMS)
        name, processes = self._random.choice(found[victim])
        if moment == "save":
            if self._random.random() < 0.5:  # the rank that saves
                name, processes = found[victim][0]
            launched.wait_until(lambda: bool(self._partial() - leftovers), pause=0.0005)
            time.sleep(self._random.choice([0, 0, self._random.uniform(0, 0.03)]))
        assert launched.process.poll() is None, launched.output
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        struck_at = time.monotonic()
        moment = moment if living else "launch"
        self._say(f"kill {self.storm.struck + living:3}  {name:22} {moment:13} {ranks} ranks")
        if victim == "a host":
            [host] = [host for host in self.cluster.hosts if host.name == name]
            host.kill_all()
            host.boot()
        self._look(launched, victim, moment, first, leftovers, struck_at)

    def _look(
        self, launched: Launched, victim: str, moment: str, first: int, leftovers: set[str], struck_at: float
    ) -> None:
        """That what is left of a launch ends, and that nothing is lost but the updates since the last save."""
        storm = self.storm
        limit = END_SECONDS if moment not in ("launch", "set-up") else JOINING_END_SECONDS
        code = launched.code(limit)
        (self._folder / f"launch-{storm.launches + 1}.txt").write_text(launched.output)
        wait_until_nothing_is_left(self.cluster.hosts, limit - (time.monotonic() - struck_at))
        waited = time.monotonic() - struck_at
        saved, reached = self._saved(), self._reached()
        half_written = bool(self._partial() - leftovers)
        self._say(
            f"          {first:5} → {reached:5}, saved {saved:5}{' and half of one' * half_written}, exit code {code}, "
            f"nothing left after {waited:.1f} s"
        )
        assert code != FINISHED, launched.output
        assert code != STOPPED or (victim in LAUNCHERS and saved == reached), launched.output
        assert saved >= max(first, self._reported()), launched.output
        storm.launches += 1
        storm.codes[code] += 1
        storm.waited = max(storm.waited, waited)
        storm.in_a_save += half_written
        storm.again += max(0, reached - saved)
        if moment == "launch":
            storm.early += 1
        else:
            storm.kills.update([victim, moment])

    def _launch(self, hosts: list[Host], ranks: int) -> Launched:
        """Start on these hosts, with as many ranks in all; the first of them have two where one each is not enough."""
        two = ranks - len(hosts)
        self._random.shuffle(hosts)
        chosen = "@".join(f"{host.name}:{'0,1' if number < two else number % 2}" for number, host in enumerate(hosts))
        return Launched(self.cluster.hosts[0], self._path, "--hostfile", self._hostfile, "--include", chosen)

    def _wait_for(self, moment: str, launched: Launched, record: Path, began: float) -> None:
        """Return in the moment; where that is a save, some updates before it."""

        def updates() -> int:
            with contextlib.suppress(OSError):
                if record.stat().st_mtime >= began:  # an earlier launch may have begun at the same update
                    return record.read_bytes().count(b"\n")
            return -1

        if moment == "launch":
            time.sleep(self._random.uniform(0, 5))
        elif moment == "set-up":
            launched.wait_until(lambda: any(host.ranks() for host in self.cluster.hosts))
            time.sleep(self._random.uniform(0, 6))
        elif moment == "first update":
            launched.wait_until(lambda: updates() >= 0, pause=0.001)
            time.sleep(self._random.uniform(0, 0.05))
        else:
            wanted = self._random.randint(1, MOST_UPDATES)
            launched.wait_until(lambda: updates() >= wanted, pause=0.005)
            time.sleep(self._random.uniform(0, 0.1))

    def _processes(self, launched: Launched, hosts: list[Host]) -> dict[str, list[tuple[str, list[psutil.Process]]]]:
        """What can be killed: by victim, its names and processes; that of rank 0 first."""
        found: dict[str, list[tuple[str, list[psutil.Process]]]] = {victim: [] for victim in VICTIMS}
        found["onehour"] = [("onehour", [psutil.Process(launched.process.pid)])]
        ranks: dict[int, tuple[str, list[psutil.Process]]] = {}
        ordered = [host for host in self.cluster.hosts if host in hosts]
        for host in dict.fromkeys([*ordered, self.cluster.hosts[0]]):
            processes = {}
            for pid in host.pids():
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    processes[process] = process.cmdline()
            if any("pipeline" in word or "deepspeed" in word for words in processes.values() for word in words):
                found["a host"].append((host.name, list(processes)))
            here = {rank: psutil.Process(pid) for rank, pid in host.ranks().items()}
            ranks |= {rank: (f"rank {rank} on {host.name}", [process]) for rank, process in here.items()}
            if here:
                found["the ranks of a host"].append((f"ranks {min(here)}–{max(here)} on {host.name}", [*here.values()]))
            for process, words in processes.items():
                if "deepspeed.launcher.launch" in words[1:4]:  # and not the ssh that started it
                    found["launch.py"].append((f"launch.py on {host.name}", [process]))
                elif any(word.endswith("bin/deepspeed") for word in words[:2]):
                    found["deepspeed"].append(("deepspeed", [process]))
                elif words and Path(words[0]).name == "pdsh" and not found["pdsh"]:
                    found["pdsh"].append(("pdsh", [process]))
        found["a rank"] = [ranks[rank] for rank in sorted(ranks)]
        return found

    # ---------------------------------------------------------------- what is there

    def _saved(self) -> int:
        """The update that a launch would continue from; 0 where nothing is saved."""
        whole = saves.newest_whole(self._run)
        return 0 if whole is None else int(whole.name.removeprefix("step-"))

    def _partial(self) -> set[str]:
        return {path.name for path in saves.checkpoints_folder(self._run).glob(".partial-*")}

    def _reached(self) -> int:
        """Updates that all ranks have done and recorded."""
        try:
            return max(read_samples(self._run), default=-1) + 1
        except UserError:
            return 0

    def _reported(self) -> int:
        """The last update that the record says is saved."""
        with contextlib.suppress(UserError):
            events = read_metrics(self._run / "metrics.jsonl")
            return max((event["samples"] // KN for event in events if event["event"] == "checkpoint"), default=0)
        return 0

    def _compare(self, unbroken: Path, epochs: int) -> None:
        """The run that was struck with the one that was not."""
        assert_the_run_is_exact(self._run, self._path, TRAIN)
        assert_close(self._run, run_of(unbroken), TOLERANCE)
        struck, other = (RunRecord.read(run_of(path)).evaluations for path in (self._path, unbroken))
        assert [event["samples"] for event in struck] == [event["samples"] for event in other]
        assert [math.floor(event["epoch"] + 1e-3) for event in struck] == list(range(1, epochs + 1))
        assert all(event["images"] == VAL for event in struck)
        folder = saves.checkpoints_folder(self._run)
        left = sorted(path.name for path in folder.iterdir() if path.name != saves.LATEST_FILE)
        assert len(left) == KEEP and all(saves.STEP_FOLDER.match(name) for name in left), left
        for name in left:
            saves.verify(folder / name)
        assert saves.latest_step(self._run) == math.ceil(epochs * TRAIN / KN)

    # ---------------------------------------------------------------- choices

    def _draw(self, choices: tuple[str, ...]) -> str:
        """One of the choices; none comes a second time before all have come once."""
        deck = self._decks.setdefault(choices, [])
        if not deck:
            deck += self._random.sample(choices, len(choices))
        return deck.pop()

    def _draw_hosts(self) -> tuple[list[Host], int]:
        """Some of the hosts, and how many ranks on them: any number that divides the twelve logical workers."""
        count = self._random.randint(1, len(self.cluster.hosts))
        ranks = self._random.choice([ranks for ranks in range(count, 2 * count + 1) if 12 % ranks == 0])
        return self._random.sample(self.cluster.hosts, count), ranks

    def _configure(self, name: str, epochs: int) -> Path:
        return configure(self._data, self._folder, name, {**CONFIGURATION, "recipe.epochs": epochs})


def make_data(folder: Path) -> Path:
    """Prepare 1,000 training and 35 validation images, so that an epoch has ten updates, and three saves."""
    images, out = folder / "images", folder / "shards"
    write_images(images / "train", TRAIN // len(TINY_CLASSES), seed=1)
    write_images(images / "val", TINY_VAL, seed=2)
    assert shards_main(["prepare", "imagefolder", str(images), str(out), "--samples-per-shard", "250"]) == 0
    return out


def main() -> int:
    """Run one storm and print its table."""
    parser = argparse.ArgumentParser(prog="tests.cluster.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="that must meet living ranks (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="for everything that is written; default: one that is kept if it fails"
    )
    args = parser.parse_args()
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    began = time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}, {folder}", flush=True)
    with Cluster(3) as cluster:
        chaos = Chaos(cluster, folder, args.seed, lambda line: print(line, flush=True))
        chaos.run(args.kills)
    if args.folder is None:
        shutil.rmtree(folder)
    print_table(chaos.storm, time.monotonic() - began)
    return 0


def print_table(storm: Storm, seconds: float) -> None:
    """How it was."""
    for name in dict.fromkeys([*VICTIMS, *MOMENTS[1:]]):
        print(f"{name:30} {storm.kills[name]:4}")
    print(f"{'kills of living ranks':30} {storm.struck:4}")
    print(f"{'kills before there were ranks':30} {storm.early:4}")
    print(f"{'that left a save half-written':30} {storm.in_a_save:4}")
    print(f"{'launches':30} {storm.launches + 1:4}")
    print(f"{'updates done again':30} {storm.again:4}")
    print(f"{'longest wait for the end':30} {storm.waited:4.0f} s")
    print(f"{'all of it':30} {seconds:4.0f} s")
    print("exit codes", json.dumps(dict(sorted(storm.codes.items()))))


if __name__ == "__main__":
    sys.exit(main())
