"""Encoded images → `size` × `size` RGB bytes, written into the slots of a batch by the best rung that takes them.

The views come from `augment`, so every rung shows the same part of every image; their pixels differ by rounding alone.
What a rung refuses goes to the next one, image by image; the last is Pillow, whose word is final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pipeline.decode_native import NativeDecoder
from pipeline.decode_pillow import DecodeError, PillowDecoder
from pipeline.decode_simplejpeg import SimpleJpegDecoder
from pipeline.image_augment import image_augmentation
from pipeline.rungs import RefusedError, Rung, ladder
from pipeline.schema import DecoderChoice, Transform
from pipeline.tally import Tally
from shards.jpeg import Status

__all__ = ["AugmentError", "DecodeError", "Decoder", "PillowDecoder", "make_decoder"]


class AugmentError(Exception):
    """An image was decoded, and changing it failed; the cause says how."""

    def __init__(self, sample: int, epoch: int) -> None:
        super().__init__(f"sample {sample} cannot be augmented in epoch {epoch}")
        self.sample = sample


class ImageDecoder(Protocol):
    """One rung, for single images in memory; see `decode_pillow.PillowDecoder`."""

    def train(self, data: bytes, out: np.ndarray, epoch: int, sample: int) -> None:
        """Decode the training view of a sample into `out`; may raise `RefusedError`."""

    def evaluate(self, data: bytes, out: np.ndarray) -> None:
        """Decode for evaluation into `out`; may raise `RefusedError`."""


_MAKERS: dict[Rung, Callable[[Transform, int], ImageDecoder]] = {
    "native": NativeDecoder,
    "simplejpeg": SimpleJpegDecoder,
    "pillow": PillowDecoder,
}


class Decoder:
    """A ladder of rungs; safe to share between threads.

    Args:
        transform: ranges of the views; the size is that of the slot that is written.
        seed: the run's seed, which keys the training views.
        rungs: the live one first; the last must be "pillow".
    """

    def __init__(self, transform: Transform, seed: int, rungs: Sequence[Rung]) -> None:
        self.transform = transform
        self.rungs = tuple(rungs)
        self._decoders = [_MAKERS[rung](transform, seed) for rung in self.rungs]
        self._augmentation = image_augmentation(transform, seed)

    @property
    def reads_files(self) -> bool:
        """Whether `files` can be used."""
        return isinstance(self._decoders[0], NativeDecoder)

    def files(
        self,
        extents: np.ndarray,
        out: np.ndarray,
        epochs: np.ndarray | None,
        samples: np.ndarray,
        tally: Tally,
        stop: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read and decode images without Python, as far as that goes.

        Args:
            extents: shards.jpeg.EXTENT_DTYPE [n]: where the images lie.
            out: uint8 [n, size, size, 3], contiguous, written in place.
            epochs: int64 [n], with `samples` the keys of training views; None for evaluation.
            samples: int64 [n].
            tally: counts what was decoded.
            stop: uint8 [1]; another thread sets it to end the call after the image under way.

        Returns:
            The slots that are left to `image`, ascending: not read, refused, or not tried because of `stop`.

        Raises:
            AugmentError: changing an image failed.
        """
        (native, *_) = self._decoders
        assert isinstance(native, NativeDecoder), "there is no rung that reads files"
        status = native.files(extents, out, epochs, samples, stop)
        left = np.flatnonzero(status < 0)
        if self._augmentation is not None and epochs is not None:
            for slot in np.flatnonzero(status >= 0).tolist():
                self._augment(out[slot], int(epochs[slot]), int(samples[slot]))
        tally.add("native", len(status) - len(left))
        tally.add("indexed", int(np.count_nonzero(status == Status.INDEXED)))
        tally.add("stale", int(np.count_nonzero(status == Status.STALE)))
        return left

    def image(self, data: bytes, out: np.ndarray, epoch: int | None, sample: int, tally: Tally) -> None:
        """Decode one image in memory.

        Args:
            data: the encoded image.
            out: uint8 [size, size, 3], contiguous, written in place.
            epoch: with `sample` the keys of a training view; None for evaluation.
            sample: id.
            tally: counts who decoded it, and who refused it.

        Raises:
            DecodeError: not an image, or a damaged one.
            AugmentError: changing the image failed.
        """
        for rung, decoder in zip(self.rungs, self._decoders, strict=True):
            try:
                if epoch is None:
                    decoder.evaluate(data, out)
                else:
                    decoder.train(data, out, epoch, sample)
            except RefusedError as refused:
                tally.add(f"{rung}_{refused.reason}")
            else:
                tally.add(rung)
                break
        if epoch is not None:
            self._augment(out, epoch, sample)

    def _augment(self, pixels: np.ndarray, epoch: int, sample: int) -> None:
        if self._augmentation is None:
            return
        try:
            self._augmentation.apply(pixels, epoch, sample)
        except Exception as error:
            raise AugmentError(sample, epoch) from error


def make_decoder(transform: Transform, seed: int, choice: DecoderChoice = "auto") -> Decoder:
    """The ladder of a run.

    Args:
        transform: ranges of the views.
        seed: the run's seed.
        choice: the best rung to use, or "auto" for the best that is there.

    Raises:
        UserError: the rung that is asked for is not there; it says how to get it.
    """
    return Decoder(transform, seed, ladder(choice))
