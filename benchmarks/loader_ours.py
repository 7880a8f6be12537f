"""Our own loader on each rung of the decoder, as a rank of a run uses it, and the loaders that only decode.

torch itself computes in one thread here: loader.py sets OMP_NUM_THREADS=1 for all rows, as pipeline.launch does for all
ranks unless it is set; only a rank without a GPU asks torch for more. So the resize of the simplejpeg and Pillow rungs
stays in the decoding thread that calls it, and `normalised` in the thread that takes the batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from loader_data import SPLIT, Data, SkipError
from loader_reference import bare_loader

from pipeline import schema
from pipeline.batch import Batch
from pipeline.decode import make_decoder
from pipeline.loader import Loader, training_requests
from pipeline.order import Order
from pipeline.reader import ShardReader
from pipeline.rungs import Rung
from pipeline.schema import Transform
from shards.errors import UserError
from shards.index import load_split

PREFETCH = schema.Loader().prefetch
"""Batches: the default of a run."""

SEED = 0


def loader(data: Data, threads: int, batch: int, *, rung: Rung, indexed: bool = False) -> Iterator[torch.Tensor]:
    """Batches of the training loader: uint8 [n, 3, 224, 224], channels_last.

    Raises:
        SkipError: there is no such rung here, or an image of a batch went to another one, or was decoded from its crop
            index where none should be, or from the top where all should be from it.
    """
    try:
        decoder = make_decoder(Transform(), SEED, rung)
    except UserError as error:
        raise SkipError(str(error).splitlines()[0]) from None
    split = load_split(data.indexed_shards if indexed else data.shards, SPLIT)
    one_rank = Batch(train=batch, micro=batch, accumulation=1, world_size=1)
    requests = training_requests(Order(len(split), SEED), one_rank, Transform(), 0, 0, updates=sys.maxsize)
    with Loader(ShardReader(split), decoder, requests, threads=threads, prefetch=PREFETCH) as ours:
        for micro_batch in ours:
            tally, images = ours.take_tally(), len(micro_batch.ids)
            if tally[rung] != images or tally.images != images or tally["indexed"] != (images if indexed else 0):
                raise SkipError(f"not all {images} images of a batch were decoded as they should be: {tally.figures()}")
            yield micro_batch.images


def normalised(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What the device does otherwise: float32, contiguous NCHW, ImageNet's mean 0 and deviation 1."""
    transform = Transform()
    mean = 255 * torch.tensor(transform.mean)[:, None, None]
    std = 255 * torch.tensor(transform.std)[:, None, None]
    for images in batches:
        yield images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def native_indexed(data: Data, threads: int, batch: int) -> Iterator[torch.Tensor]:
    """C extension; each crop decoded from its crop index on."""
    return loader(data, threads, batch, rung="native", indexed=True)


def native(data: Data, threads: int, batch: int) -> Iterator[torch.Tensor]:
    """C extension; each crop decoded from the top."""
    return loader(data, threads, batch, rung="native")


def native_indexed_float32(data: Data, threads: int, batch: int) -> Iterator[torch.Tensor]:
    """As native-indexed, and normalised on the CPU."""
    return normalised(native_indexed(data, threads, batch))


def simplejpeg(data: Data, threads: int, batch: int) -> Iterator[torch.Tensor]:
    """simplejpeg, and torchvision's resize."""
    return loader(data, threads, batch, rung="simplejpeg")


def pillow(data: Data, threads: int, batch: int) -> Iterator[torch.Tensor]:
    """Pillow, and torchvision's resize."""
    return loader(data, threads, batch, rung="pillow")


def pillow_float32(data: Data, threads: int, batch: int) -> Iterator[torch.Tensor]:
    """As pillow, and normalised on the CPU."""
    return normalised(pillow(data, threads, batch))


def bare_decode(data: Data, threads: int, batch: int) -> Iterator[int]:
    """Nothing but libjpeg-turbo's decode of the whole image."""
    return bare_loader(data, threads, batch, lambda reference, images: reference.decode_whole(images))


def entropy_floor(data: Data, threads: int, batch: int) -> Iterator[int]:
    """Nothing but libjpeg-turbo's Huffman decoding."""
    return bare_loader(data, threads, batch, lambda reference, images: reference.entropy_only(images, to_crop=False))
