"""One rank's entry: join the others, read everything, agree, train.

    deepspeed --hostfile hosts --module pipeline.train ds_configs/imagenet_8k.json
    torchrun --nproc-per-node 8 -m pipeline.train ds_configs/imagenet_8k.json

`onehour train` starts the first of these after checking everything that can be checked before.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
import torch.distributed as dist

from pipeline import engine
from pipeline.divergence import DivergenceError
from pipeline.engine import World
from pipeline.experiment import add_config_arguments, overrides_of
from pipeline.fault import FAILED, FINISHED, MISTAKE, STOPPED
from pipeline.loader import default_threads
from pipeline.lr_curve import Sweep
from pipeline.lr_range import LrRange
from pipeline.meeting import RankError
from pipeline.prepared import FACT_MENDS, Prepared, prepare
from pipeline.run import Run
from pipeline.stop import Stop
from pipeline.together import prepare_together
from shards.errors import UserError

SECOND_INTERRUPT_SECONDS = 2.0
"""A terminal's Ctrl-C reaches a rank twice, from the terminal and from its launcher; one later than that is meant."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank. Returns the exit code (`pipeline.fault`): 0 finished, 1 failed, 2 a mistake, 75 stopped."""
    args = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    place = f"rank {rank} on {socket.gethostname()}"
    world: World | None = None
    try:
        world = engine.join(args.expect_world_size)
        rank, place = world.rank, f"rank {world.rank} on {socket.gethostname()}"
        if world.device.type == "cpu":
            torch.set_num_threads(default_threads(world.local_size))
        else:
            torch.backends.cudnn.benchmark = True
        joined = world
        prepared = prepare_together(
            lambda: prepare(args.config, overrides_of(args), joined), Prepared.facts, FACT_MENDS
        )
        experiment = prepared.plan.config
        world.watch.configure(experiment.run_folder, experiment.watchdog, args.lease)
        _stop_on_signals(world.watch.stop)
        # told before anything is closed, which may hang with what the error is about; and what is met on the way there
        with _telling(world, place), _work(args, prepared, world) as work, _telling(world, place):
            finished = work.train()
        engine.leave(world)
    except _ToldError as told:
        return told.code
    except UserError as error:
        # met by every rank, and one says it; where there is no world yet, each of those that met it
        if rank == 0 or world is None:
            _say(str(error))
        _leave_quietly(world)
        return FAILED if isinstance(error, RankError) else MISTAKE
    except Exception as error:
        _say(f"{place} failed:\n{traceback.format_exc()}")
        if world is not None:
            world.watch.fail(repr(error), FAILED)
        return FAILED
    return FINISHED if finished else STOPPED


def _work(args: argparse.Namespace, prepared: Prepared, world: World) -> Run | LrRange:
    if args.lr_range is not None:
        return LrRange(prepared, world, Sweep.read(args.lr_range))
    return Run(prepared, world)


class _ToldError(Exception):
    """What ended the training of this rank has been told of."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


@contextlib.contextmanager
def _telling(world: World, place: str) -> Iterator[None]:
    """Say and write down what ends a training, and tell the other ranks, unless all of them meet it."""
    try:
        yield
    except _ToldError:
        raise
    except DivergenceError as error:
        if world.rank == 0:
            _say(f"{error}\n  ({place})")
        _leave_quietly(world)
        raise _ToldError(MISTAKE) from error
    except Exception as error:
        # a connection to another rank: gloo's errors have no type of their own
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            world.watch.wait_for_verdict(error)
            _say(f"{place} stopped: another rank is gone; its own message says why")
        elif isinstance(error, UserError):  # of this rank alone: another host, or another try, may do better
            _say(f"{error}\n  ({place})")
            world.watch.fail(error.headline, FAILED)
        else:
            _say(f"{place} failed:\n{traceback.format_exc()}")
            world.watch.fail(repr(error), FAILED)
        raise _ToldError(FAILED) from error


def _leave_quietly(world: World | None) -> None:
    """Leave where all ranks end alike: none takes another that was quicker for gone."""
    if world is not None:
        with contextlib.suppress(RuntimeError):
            engine.leave(world)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more
        print(f"onehour: {text}", file=sys.stderr, flush=True)


def _stop_on_signals(stop: Stop) -> None:
    """SIGTERM and Ctrl-C ask for a save and a stop on all ranks together; a second Ctrl-C ends this rank at once.

    To the end of the process: a launcher sends SIGTERM to the ranks beside one that is gone, and what they know of it
    must be written down first.
    """
    interrupted: list[float] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            interrupted.append(time.monotonic())
            if interrupted[-1] - interrupted[0] > SECOND_INTERRUPT_SECONDS:
                os._exit(128 + signal.SIGINT)
        stop.want(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipeline.train", description=__doc__.splitlines()[0] if __doc__ else None)
    add_config_arguments(parser, positional=False)
    parser.add_argument("config_file", nargs="?", help="the DeepSpeed JSON file with a recipe section")
    parser.add_argument("--deepspeed_config", help="the same, as DeepSpeed's own examples name it")
    parser.add_argument("--deepspeed", action="store_true", help="accepted and without effect")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment says the same")
    parser.add_argument("--expect-world-size", type=int, help="fail if the launcher started another number of ranks")
    parser.add_argument("--lease", help="given by onehour train: the token of its lease (pipeline.lease)")
    parser.add_argument("--lr-range", help="given by onehour lr-find: the rates to try, in place of a training")
    parser.add_argument("--overrides-base64", help="given by onehour train: a JSON list of --set arguments, in base64")
    args = parser.parse_args(argv)
    if args.overrides_base64:
        # remote shells would take the quotes and braces of values apart
        args.set = json.loads(base64.urlsafe_b64decode(args.overrides_base64)) + args.set
    args.config = args.config_file or args.deepspeed_config
    if not args.config:
        parser.error("give the configuration: pipeline.train CONFIG")
    return args


if __name__ == "__main__":
    sys.exit(main())
