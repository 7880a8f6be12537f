"""`onehour evaluate`: exported weights or a checkpoint, measured on the whole validation split in one process.

It computes in fp32, whatever precision the training had, so a half precision run may differ from its own record in a
few images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from pipeline import checkpoint, config, model, resume, saves
from pipeline.dataset import open_split
from pipeline.decode import make_decoder
from pipeline.evaluate import Result, evaluate
from pipeline.feed import Copier, Normalise
from pipeline.float32 import allow_tf32
from pipeline.loader import Loader, default_threads, evaluation_requests
from pipeline.readers import evaluation_reader, reads_in_sequence
from pipeline.schema import Transform
from shards.errors import UserError
from shards.fetch import mask


def run(args: argparse.Namespace) -> int:
    """Evaluate what `args.weights` names, in fp32 whatever it was trained in, and print the result."""
    weights, run_folder = _find(args.weights)
    config_path = args.config or (run_folder / config.RESOLVED_FILE if run_folder else None)
    if config_path is None or not (args.config or config_path.exists()):
        raise UserError(
            f"{args.weights}: there is no {config.RESOLVED_FILE} beside the weights",
            "Say how they were trained: --config ds_configs/X.json",
        )
    overrides = [f"recipe.data={json.dumps(args.data)}", "recipe.stream=null"] if args.data else []
    experiment = config.load(config_path, overrides)
    recipe = experiment.recipe
    if recipe.stream is not None and args.config is None:
        # a run folder may come from somebody else, and its configuration would run a command of theirs here
        raise UserError(
            f"{config_path}: the run read its data through recipe.stream: {mask(recipe.stream)}",
            "Name a configuration that you trust with --config FILE, or the folder of the shards with --data DIR.",
        )
    split = open_split(recipe, recipe.evaluation.split)
    network = model.create(recipe.model, len(split.classes), recipe.seed, (recipe.transform.size,))
    checkpoint.load_weights(weights, network)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copy = Copier(device)
    allow_tf32(False)
    micro = recipe.evaluation.micro_batch_size or 64
    requests = evaluation_requests(len(split), micro, recipe.transform.size, 0, 1, contiguous=reads_in_sequence(split))
    with (
        contextlib.closing(evaluation_reader(split, recipe, rank=0, world_size=1)) as reader,
        Loader(
            reader,
            make_decoder(recipe.transform, recipe.seed, recipe.loader.decoder),
            requests,
            threads=default_threads(1),
            prefetch=recipe.loader.prefetch,
            copied_on=copy.stream,
        ) as batches,
    ):
        result = evaluate(
            _fp32_forward(network.to(device).eval(), recipe.transform, copy, device),
            batches,
            images=len(split),
            device=device,
        )
    _print(weights, split.name, result, as_json=args.json)
    return 0


def _fp32_forward(network: nn.Module, transform: Transform, copy: Copier, device: torch.device):
    normalise = Normalise(transform.mean, transform.std).to(device)
    return lambda images: network(normalise(copy(images)))


def _find(path: Path) -> tuple[Path, Path | None]:
    """The weights file that `path` means, and the run folder it belongs to, if it does."""
    if path.is_file():
        candidates = [path.parent, path.parent.parent.parent]
        return path, next((folder for folder in candidates if (folder / config.RESOLVED_FILE).exists()), None)
    if (path / resume.STATE_FILE).exists():
        saves.verify(path)
        return path / checkpoint.WEIGHTS_FILE, path.parent.parent
    if (path / checkpoint.WEIGHTS_FILE).exists():
        return path / checkpoint.WEIGHTS_FILE, path
    saved = resume.find_latest(path, lambda damage: print(f"onehour: warning: {damage}", file=sys.stderr))
    if saved is not None:
        return saved.folder / checkpoint.WEIGHTS_FILE, path
    raise UserError(f"{path}: neither a weights file, nor a checkpoint, nor a run folder with either")


def _print(weights: Path, split: str, result: Result, *, as_json: bool) -> None:
    if as_json:
        figures = {"top1": result.top1, "top5": result.top5, "loss": result.loss, "images": result.images}
        print(json.dumps({"weights": str(weights), "split": split, **figures, "precision": "fp32"}))
    else:
        print(
            f"top-1 {result.top1:.2f} %   top-5 {result.top5:.2f} %   loss {result.loss:.4f}   "
            f"{result.images:,} images of {split}, all of them   computed in fp32   {weights}"
        )
