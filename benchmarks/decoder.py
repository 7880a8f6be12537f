"""What the decoder promises, on images of your own: agreement with Pillow, and what the crop index costs.

    python benchmarks/decoder.py IMAGES [--crops N] [--indexed-crops N] [--rounds N]

IMAGES is a folder that holds JPEGs at any depth. Every rung shows the same training views; their pixels are compared
with Pillow's. Views decoded from the crop index are compared, byte for byte, with those decoded from the top. Building
the index is timed in one thread (CPU time), and done twice to compare the bytes. Exit status 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import rungs
from pipeline.augment import Augmentation
from pipeline.decode import make_decoder
from pipeline.schema import Transform
from pipeline.tally import Tally
from shards import jpeg
from shards.jpeg import Status, Views

MOST_MEAN, MOST = 0.5, 2
"""Of the absolute difference from Pillow, in 255ths: the mean over all images, and the largest of a pixel."""
MOST_INDEX_SHARE = 0.05


@dataclass
class Difference:
    """From Pillow's pixels, over all views of a rung."""

    means: list[float]
    largest: int = 0

    def add(self, ours: np.ndarray, pillow: np.ndarray) -> None:
        apart = np.abs(ours.astype(np.int16) - pillow)
        self.means.append(float(apart.mean()))
        self.largest = max(self.largest, int(apart.max()))


def agreement(images: list[bytes], crops: int) -> bool:
    """Compare each rung with Pillow on `crops` training views of every image, and on its evaluation view."""
    transform = Transform()
    pillow = make_decoder(transform, 0, "pillow")
    good = True
    print(f"agreement with Pillow, {len(images):,} images × {crops} training views, and the evaluation view")
    for rung in rungs.RUNGS[:-1]:
        reason = rungs.missing(rung)
        if reason is not None:
            print(f"  {rung:<12}SKIP: the {rungs.NAMES[rung]} {reason}")
            good = False
            continue
        decoder, tally = make_decoder(transform, 0, rung), Tally()
        found = {"training": Difference([]), "evaluation": Difference([])}
        ours, theirs = (np.zeros((transform.size, transform.size, 3), np.uint8) for _ in range(2))
        for sample, image in enumerate(images):
            for epoch in (None, *range(crops)):
                decoder.image(image, ours, epoch, sample, tally)
                pillow.image(image, theirs, epoch, sample, Tally())
                found["evaluation" if epoch is None else "training"].add(ours, theirs)
        for kind, difference in found.items():
            mean = statistics.fmean(difference.means)
            print(
                f"  {rung:<12}{kind:<12}mean {mean:.4f}   worst image {max(difference.means):.3f}   "
                f"largest {difference.largest}   ({tally[rung]:,} of {tally.images:,} by this rung)"
            )
            good &= mean < MOST_MEAN and difference.largest <= MOST
    return good


def indexed_and_plain(images: list[bytes], crops: int) -> bool:
    """Compare views decoded from the crop index with those decoded from the top."""
    transform = Transform()
    views = Views(
        Augmentation(transform, 0).key, "resized", transform.scale, transform.ratio, transform.padding, transform.flip
    )
    indexed, plain = (np.zeros((transform.size, transform.size, 3), np.uint8) for _ in range(2))
    different = others = 0
    for sample, image in enumerate(images):
        record = jpeg.index_image(image, sample)
        for epoch in range(crops):
            from_index = jpeg.decode_bytes(image, indexed, views, epoch, sample, record, sample)
            from_top = jpeg.decode_bytes(image, plain, views, epoch, sample)
            if (from_index, from_top) == (Status.INDEXED, Status.PLAIN):
                different += not np.array_equal(indexed, plain)
            else:
                others += 1
    total = len(images) * crops
    print(f"index against no index, {total:,} views: {different} differ, {others} were not decoded from an index")
    return not different


def index_cost(images: list[bytes], rounds: int) -> bool:
    """Bytes, build rate and determinism of the index."""
    first = [jpeg.index_image(image, row) for row, image in enumerate(images)]
    seconds = []
    for _ in range(rounds):
        began = time.thread_time()
        again = [jpeg.index_image(image, row) for row, image in enumerate(images)]
        seconds.append(time.thread_time() - began)
    share = (sum(map(len, first)) + 16 * len(images)) / sum(map(len, images))
    rate = len(images) / statistics.median(seconds)
    print(
        f"index: {sum(map(len, first)) / len(images):,.0f} bytes an image, {share:.2%} of the images; "
        f"{rate:,.0f} images a second and core (median of {rounds}); "
        f"built twice: {'the same bytes' if again == first else 'DIFFERENT BYTES'}"
    )
    return share <= MOST_INDEX_SHARE and again == first


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder that holds JPEGs at any depth")
    parser.add_argument("--crops", type=int, default=4, metavar="N", help="views of an image (default: 4)")
    parser.add_argument(
        "--indexed-crops", type=int, default=20, metavar="N", help="views decoded both ways (default: 20)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of building the index (default: 5)")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"{arguments.images}: no JPEGs there")
    images = [path.read_bytes() for path in paths]
    good = agreement(images, arguments.crops)
    if jpeg.unavailable() is not None:
        sys.exit(f"SKIP the crop index: the C extension {jpeg.unavailable()}")
    good &= indexed_and_plain(images, arguments.indexed_crops)
    good &= index_cost(images, arguments.rounds)
    sys.exit(0 if good else "a promise is broken")


if __name__ == "__main__":
    main()
