"""One rank's entry: join the others, read everything, agree, train.

    deepspeed --hostfile hosts --module pipeline.train ds_configs/imagenet_8k.json
    torchrun --nproc-per-node 8 -m pipeline.train ds_configs/imagenet_8k.json

`onehour train` starts the first of these after checking everything that can be checked before.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence

import torch

from pipeline import checkpoint, config, engine, model, resume
from pipeline.engine import World
from pipeline.experiment import add_config_arguments, check_monitors, open_run, overrides_of
from pipeline.loader import default_threads
from pipeline.run import FACT_MENDS, DivergenceError, Prepared, Run
from pipeline.together import prepare_together
from shards.errors import UserError

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo words it


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank. Returns the exit code: 0 finished, 1 failed, 2 a mistake of the user's."""
    args = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    place = f"rank {rank} on {socket.gethostname()}"
    training = False
    try:
        world = engine.join(args.expect_world_size)
        rank, place = world.rank, f"rank {world.rank} on {socket.gethostname()}"
        if world.device.type == "cpu":
            torch.set_num_threads(default_threads(world.local_size))
        else:
            torch.backends.cudnn.benchmark = True
        prepared = prepare_together(lambda: prepare(args.config, overrides_of(args), world), Prepared.facts, FACT_MENDS)
        training = True
        with Run(prepared, world) as run:
            run.train()
        engine.leave()
    except UserError as error:
        # mistakes before the training are met by every rank, and one says them; a damaged image is one rank's own
        if rank == 0 or (training and not isinstance(error, DivergenceError)):
            print(f"onehour: {error}" + f"\n  ({place})" * training, file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER):
            print(f"onehour: {place} stopped: another rank is gone; its own message says why", file=sys.stderr)
        else:
            print(f"onehour: {place} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def prepare(config_path: str, overrides: Sequence[str], world: World) -> Prepared:
    """Read everything that this rank needs and check it; no rank talks to another here.

    Raises:
        UserError: any mistake in the configuration, the shards or the checkpoint.
    """
    experiment = config.load(config_path, overrides)
    check_monitors(experiment)
    plan, train_split, validation_split = open_run(experiment, world.size, world.local_ranks)
    warnings: list[str] = []
    saved = resume.find_latest(plan.config.run_folder, warnings.append)
    if saved is not None:
        resume.check(saved, plan)
    recipe = plan.config.recipe
    network = model.create(recipe.model, len(train_split.classes), recipe.seed, recipe.transform.sizes)
    state = checkpoint.load(saved, network) if saved is not None else None
    return Prepared(plan, train_split, validation_split, saved, network, state, tuple(warnings))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipeline.train", description=__doc__.splitlines()[0] if __doc__ else None)
    add_config_arguments(parser, positional=False)
    parser.add_argument("config_file", nargs="?", help="the DeepSpeed JSON file with a recipe section")
    parser.add_argument("--deepspeed_config", help="the same, as DeepSpeed's own examples name it")
    parser.add_argument("--deepspeed", action="store_true", help="accepted and without effect")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment says the same")
    parser.add_argument("--expect-world-size", type=int, help="fail if the launcher started another number of ranks")
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
