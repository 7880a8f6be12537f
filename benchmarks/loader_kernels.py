"""The kernels by themselves: one thread, its CPU time, the same images and boxes for all, taken in turns.

A kernel is a call for a block of images in page-cached files: read, decode the crop, resize, mirror, into a slab.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
from loader_data import SPLIT, Data, SkipError
from loader_measure import LIBJPEG_FUSED, NATIVE, NATIVE_INDEXED
from loader_reference import Images, Reference

from pipeline.decode_native import NativeDecoder
from pipeline.decode_pillow import PillowDecoder
from pipeline.reader import ShardReader
from pipeline.schema import Transform
from shards import jpeg
from shards.index import load_split

BLOCK = 64
SEED, EPOCH = 0, 0
"""Of the views."""
SIZE = Transform().size

Kernel = Callable[[np.ndarray, np.ndarray | None, np.ndarray], None]
"""(sample ids [n], their IMAGE_DTYPE with views [n], out [n, size, size, 3]) → nothing."""


def kernels(data: Data) -> tuple[dict[str, Kernel], dict[str, str], list[str]]:
    """Those that can be run here, why the others cannot, and what runs them."""
    found: dict[str, Kernel] = {}
    skipped: dict[str, str] = {}
    libraries: list[str] = []
    try:
        reference = Reference(data)
    except SkipError as reason:
        skipped["libjpeg-turbo kernels"] = str(reason)
    else:
        libraries.append(reference.description)
        found["libjpeg-turbo whole image"] = lambda _, images, out: reference.decode_whole(images)
        found["libjpeg-turbo entropy, whole"] = lambda _, images, out: reference.entropy_only(images, to_crop=False)
        found["libjpeg-turbo entropy, to crop"] = lambda _, images, out: reference.entropy_only(images, to_crop=True)
        found[LIBJPEG_FUSED] = lambda _, images, out: reference.decode_views(images, out)
    for name, indexed in ((NATIVE_INDEXED, True), (NATIVE, False)):
        try:
            found[name] = native_kernel(data, indexed)
        except SkipError as reason:
            skipped[name] = str(reason)
    if NATIVE in found:
        libraries.append(jpeg.describe())
    return found, skipped, libraries


def native_kernel(data: Data, indexed: bool) -> Kernel:
    """Ours, called as pipeline.loader calls it.

    Raises:
        SkipError: it is not built, there is no index, or it does not do what is to be measured.
    """
    reason = jpeg.unavailable()
    if reason is not None:
        raise SkipError(f"the C extension {reason}")
    decoder = NativeDecoder(Transform(), SEED)
    reader = ShardReader(load_split(data.indexed_shards if indexed else data.shards, SPLIT))
    wanted = jpeg.Status.INDEXED if indexed else jpeg.Status.PLAIN

    def run(samples: np.ndarray, _: np.ndarray | None, out: np.ndarray) -> None:
        epochs = np.full(len(samples), EPOCH, np.int64)
        with reader.extents(samples) as located:
            status = decoder.files(located.extents, out, epochs, samples)
        if np.any(status != wanted):
            unlike = sorted({jpeg.Status(value).name for value in status[status != wanted].tolist()})
            raise SkipError(f"the C extension says {', '.join(unlike)} where it should say {wanted.name}")

    samples = np.arange(BLOCK, dtype=np.int64) % len(reader.split)
    run(samples, None, np.empty((BLOCK, SIZE, SIZE, 3), np.uint8))
    return run


def measure(data: Data, count: int, seed: int) -> dict[str, object]:
    """CPU-µs per image of every kernel, and how far their pixels lie from Pillow's.

    Args:
        data: the images.
        count: images for each kernel, at least; rounded up to whole blocks.
        seed: of the order within each block.
    """
    chosen, skipped, libraries = kernels(data)
    if not chosen:
        raise SkipError("; ".join(skipped.values()))
    images = Images(load_split(data.shards, SPLIT), SEED)
    out = np.zeros((BLOCK, SIZE, SIZE, 3), np.uint8)
    spent = dict.fromkeys(chosen, 0.0)
    draw = random.Random(seed)
    blocks = -(-count // BLOCK)
    for number in range(-1, blocks):  # the first block warms up
        samples = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64) % len(images.split)
        views = images.views(samples, EPOCH)
        for name in draw.sample(list(chosen), len(chosen)):
            started = time.thread_time()
            chosen[name](samples, views, out)
            if number >= 0:
                spent[name] += time.thread_time() - started
    return {
        "kernels": {name: seconds / (blocks * BLOCK) * 1e6 for name, seconds in spent.items()},
        "skipped": skipped,
        "libraries": libraries,
        "from_pillow": {name: differences(images, chosen[name]) for name in chosen if name in RENDERING},
    }


RENDERING = (LIBJPEG_FUSED, NATIVE_INDEXED, NATIVE)


def differences(images: Images, kernel: Kernel) -> tuple[float, int]:
    """Mean and largest absolute difference of one block of views from those of the Pillow rung."""
    samples = np.arange(BLOCK, dtype=np.int64) % len(images.split)
    ours, theirs = (np.zeros((BLOCK, SIZE, SIZE, 3), np.uint8) for _ in range(2))
    kernel(samples, images.views(samples, EPOCH), ours)
    decoder, reader = PillowDecoder(Transform(), SEED), ShardReader(images.split)
    for slot, sample in enumerate(samples.tolist()):
        decoder.train(reader.read(sample).image, theirs[slot], EPOCH, sample)
    distance = np.abs(ours.astype(np.int16) - theirs)
    return float(distance.mean()), int(distance.max())
