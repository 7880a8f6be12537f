"""Where the runs of a sweep go: how many ranks each has, how many runs go at once, and what of the machine is whose."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline import batch, hosts
from pipeline.config import Config
from pipeline.launch import DEFAULT_CPU_RANKS
from shards.errors import UserError


@dataclass(frozen=True)
class Share:
    """A part of this machine: numbers of GPUs, none where ranks are on the CPU, and of cores, none for any."""

    gpus: tuple[int, ...]
    cores: tuple[int, ...]

    @classmethod
    def sum(cls, shares: Iterable[Share]) -> Share:
        """What several parts are together."""
        every = list(shares)
        return cls(
            tuple(number for share in every for number in share.gpus),
            tuple(number for share in every for number in share.cores),
        )


@dataclass(frozen=True)
class Machine:
    """This machine, or the hosts of a hostfile.

    Attributes:
        gpus: numbers of this machine's that may be used; none: ranks are on the CPU.
        cores: likewise.
        ranks: of each run, where that was asked for.
        at_once: runs, where that was asked for.
        slots: by host, where a hostfile says where every run goes.
        options: of the command line that each run is given.
    """

    gpus: tuple[int, ...]
    cores: tuple[int, ...]
    ranks: int | None = None
    at_once: int | None = None
    slots: dict[str, list[int]] | None = None
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: argparse.Namespace, launcher_options: Sequence[str]) -> Machine:
        """As the arguments of `onehour sweep` have it.

        Raises:
            UserError: they contradict each other, or the hostfile cannot be used.
        """
        hosts.read_launcher_options(launcher_options)
        if args.ranks is not None and args.ranks < 1:
            raise UserError(f"--ranks {args.ranks}: at least one rank is needed")
        slots = None
        options = list(launcher_options)
        if args.hostfile is not None:
            if args.ranks is not None:
                raise UserError("--ranks is for this machine alone; with --hostfile the slots are the ranks")
            if args.jobs is not None and args.jobs > 1:
                raise UserError(f"--jobs {args.jobs}: with --hostfile every run takes all slots, one after the other")
            slots = hosts.select(hosts.read_hostfile(args.hostfile), args.include, args.exclude)
            given = {"--hostfile": args.hostfile, "--include": args.include, "--exclude": args.exclude}
            options += [word for name, value in given.items() if value for word in (name, str(value))]
        elif args.include or args.exclude:
            raise UserError("--include and --exclude filter a hostfile; give one with --hostfile")
        cores = tuple(sorted(os.sched_getaffinity(0)))
        gpus = tuple(hosts.local_gpus()) if slots is None else ()
        return cls(gpus, cores, args.ranks, args.jobs, slots, tuple(options))

    @property
    def units(self) -> int:
        """What a rank takes one of: GPUs, or cores where there are none."""
        return len(self.gpus) or len(self.cores)

    def world_size(self, experiment: Config) -> int:
        """The ranks of a run: what was asked for, else what `onehour train` would choose on the run's part."""
        if self.slots is not None:
            return sum(map(len, self.slots.values()))
        if self.ranks is not None:
            return self.ranks
        most = len(self.gpus) or DEFAULT_CPU_RANKS
        return batch.largest_world_size(experiment, max(1, min(most, self.units // (self.at_once or 1))))

    def ranks_on_a_host(self, world_size: int) -> int:
        """The most ranks of a run that one host has."""
        return world_size if self.slots is None else max(map(len, self.slots.values()))

    def divide(self, world_sizes: Sequence[int]) -> tuple[list[Share], list[int]]:
        """Divide the machine among runs that go at once.

        Where nobody says how many those are, a rank's part is a GPU, or a core where there are none, and more where
        there are few ranks; else the parts are the runs'.

        Args:
            world_sizes: of each run that is to be started.

        Returns:
            The parts, and how many of them each run takes.

        Raises:
            UserError: there are not enough GPUs.
        """
        most = max(world_sizes, default=1)
        if self.slots is not None:
            return [Share((), ())], [1] * len(world_sizes)
        if self.gpus and most * (self.at_once or 1) > len(self.gpus):
            wanted = f"{self.at_once} runs at once of {most} ranks" if self.at_once else f"a run of {most} ranks"
            raise UserError(
                f"{wanted} need{'s' * (not self.at_once)} {most * (self.at_once or 1)} GPUs, this machine has "
                f"{len(self.gpus)}" + " in CUDA_VISIBLE_DEVICES" * ("CUDA_VISIBLE_DEVICES" in os.environ),
                "Choose fewer with --jobs or --ranks, or ranks on the CPU: DS_ACCELERATOR=cpu",
            )
        if self.at_once is not None:
            parts = self._parts(self.at_once, len(self.gpus) // self.at_once)
            return parts, [1] * len(world_sizes)
        parts = self._parts(min(self.units, max(1, sum(world_sizes))), 1)
        return parts, [min(ranks, len(parts)) for ranks in world_sizes]  # ranks may be more than the cores

    def _parts(self, number: int, gpus: int) -> list[Share]:
        """So many parts, each with so many GPUs if there are any, and equal numbers of cores, or one that is shared."""
        bounds = [len(self.cores) * part // number for part in range(number + 1)]
        return [
            Share(
                self.gpus[part * gpus : (part + 1) * gpus],
                self.cores[bounds[part] : max(bounds[part + 1], bounds[part] + 1)],
            )
            for part in range(number)
        ]

    def arguments(self, world_size: int) -> tuple[str, ...]:
        """What tells `onehour train` where the ranks of a run go."""
        return (*(() if self.slots is not None else ("--ranks", str(world_size))), *self.options)
