"""The fastest rung: the C extension reads, decodes, cuts, resizes and mirrors a slice of a batch in one call."""

from __future__ import annotations

import numpy as np

from pipeline.augment import Augmentation
from pipeline.rungs import RefusedError
from pipeline.schema import Transform
from shards import jpeg
from shards.jpeg import Status


class NativeDecoder:
    """Decodes undamaged baseline JPEGs. Arguments as `decode_pillow.PillowDecoder`."""

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform = transform
        self._views = jpeg.Views(
            key=Augmentation(transform, seed).key,
            crop=transform.crop,
            scale=transform.scale,
            ratio=transform.ratio,
            padding=transform.padding,
            flip=transform.flip,
        )

    def files(
        self,
        extents: np.ndarray,
        out: np.ndarray,
        epochs: np.ndarray | None,
        samples: np.ndarray,
        stop: np.ndarray | None = None,
    ) -> np.ndarray:
        """Decode images that lie in open files. Arguments as `decode.Decoder.files`.

        Returns:
            int32 [n], a `jpeg.Status` for each image.
        """
        status = np.empty(len(extents), np.int32)
        if epochs is None:
            jpeg.evaluate_files(extents, out, status, self.transform.evaluation_resize, stop=stop)
        else:
            jpeg.decode_files(extents, out, status, self._views, epochs, samples, stop=stop)
        return status

    def train(self, data: bytes, out: np.ndarray, epoch: int, sample: int) -> None:
        """As `decode_pillow.PillowDecoder.train`.

        Raises:
            RefusedError: for the next rung.
        """
        _accept(jpeg.decode_bytes(data, out, self._views, epoch, sample))

    def evaluate(self, data: bytes, out: np.ndarray) -> None:
        """As `decode_pillow.PillowDecoder.evaluate`.

        Raises:
            RefusedError: for the next rung.
        """
        _accept(jpeg.evaluate_bytes(data, out, self.transform.evaluation_resize))


def _accept(status: Status) -> None:
    if status < 0:
        raise RefusedError("damaged" if status == Status.DAMAGED else "unsupported")
