"""libjpeg-turbo by itself (libjpeg_reference.c), through ctypes: the loaders that only decode, and the kernels."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loader_data import SPLIT, Data, SkipError

from pipeline.augment import Augmentation
from pipeline.order import Order
from pipeline.schema import Transform
from shards.index import Split, load_split
from shards.jpeg_header import read_jpeg_header

SOURCE = Path(__file__).with_name("libjpeg_reference.c")

IMAGE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("descriptor", "<i4"),
        *((name, "<i4") for name in ("left", "top", "width", "height", "flip", "padding")),
    ]
)
"""`image_t` of libjpeg_reference.c."""


class Reference:
    """The compiled library.

    Args:
        data: where it is put.

    Raises:
        SkipError: it cannot be compiled; with the compiler's first complaint.
    """

    def __init__(self, data: Data) -> None:
        self._library = ctypes.CDLL(str(data.form(f"libjpeg_reference-{int(SOURCE.stat().st_mtime)}.so", _compile)))
        self._library.describe.restype = ctypes.c_char_p
        self.description = self._library.describe().decode()

    def decode_whole(self, images: np.ndarray) -> None:
        """Decode whole images and throw the pixels away."""
        self._check(self._library.decode_whole(self._pointer(images), len(images)))

    def entropy_only(self, images: np.ndarray, *, to_crop: bool) -> None:
        """Huffman decoding alone, of all rows or down to the crop's last."""
        self._check(self._library.entropy_only(self._pointer(images), len(images), to_crop))

    def decode_views(self, images: np.ndarray, out: np.ndarray) -> None:
        """Decode, resize and mirror the crops into `out`, uint8 [n, size, size, 3]."""
        assert out.dtype == np.uint8 and out.flags.c_contiguous and len(out) == len(images)
        pointer = ctypes.c_void_p(out.ctypes.data)
        self._check(self._library.decode_views(self._pointer(images), len(images), out.shape[1], pointer))

    @staticmethod
    def _pointer(images: np.ndarray) -> ctypes.c_void_p:
        assert images.dtype == IMAGE_DTYPE and images.flags.c_contiguous
        return ctypes.c_void_p(images.ctypes.data)

    @staticmethod
    def _check(failed: int) -> None:
        if failed >= 0:
            raise ValueError(f"libjpeg-turbo cannot decode image {failed} of the batch")


def _compile(target: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise SkipError("no C compiler (cc) to build libjpeg_reference.c with")
    command = [compiler, "-O3", "-shared", "-fPIC", SOURCE, "-o", target, "-ljpeg", "-lm"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        complaints = [line for line in run.stderr.splitlines() if "error" in line] or ["cc failed"]
        raise SkipError(f"{complaints[0]} (headers of libjpeg-turbo: Debian's libjpeg62-turbo-dev)")


class Images:
    """Where the images of a split lie, and their views, for `Reference`.

    Args:
        split: an opened split; its shards stay open for as long as this lives.
        seed: of the views.
    """

    def __init__(self, split: Split, seed: int = 0) -> None:
        self.split = split
        self.files = [shard.path.open("rb") for shard in split.shards]
        self.augmentation = Augmentation(Transform(), seed)

    def at(self, samples: np.ndarray) -> np.ndarray:
        """IMAGE_DTYPE [n] of sample ids, without their views."""
        chosen = self.split.samples[samples]
        images = np.zeros(len(samples), IMAGE_DTYPE)
        images["offset"], images["size"] = chosen["offset"], chosen["size"]
        images["descriptor"] = [self.files[shard].fileno() for shard in chosen["shard"]]
        return images

    def views(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """As `at`, with the views that our decoders draw for the epoch."""
        images = self.at(samples)
        for image, sample in zip(images, samples, strict=True):
            file = self.files[int(self.split.samples[sample]["shard"])]
            file.seek(int(image["offset"]))
            header = read_jpeg_header(file.read(int(image["size"])))
            assert header is not None
            view = self.augmentation.view(header.width, header.height, epoch, int(sample))
            for name in ("left", "top", "width", "height", "flip"):
                image[name] = getattr(view, name)
        return images


def bare_loader(data: Data, threads: int, batch: int, work: Callable[[Reference, np.ndarray], None]) -> Iterator[int]:
    """A loader that does nothing but `work` on shuffled batches: one batch a thread at a time; yields their sizes."""
    reference = Reference(data)
    images = Images(load_split(data.shards, SPLIT))
    order = Order(len(images.split), seed=0)

    def load(number: int) -> int:
        chosen = images.at(order.ids(number * batch, (number + 1) * batch))
        work(reference, chosen)
        return len(chosen)

    with ThreadPoolExecutor(threads) as pool:
        numbers = itertools.count()
        pending = [pool.submit(load, next(numbers)) for _ in range(2 * threads)]
        while True:
            yield pending.pop(0).result()
            pending.append(pool.submit(load, next(numbers)))
