"""The memory of batches, used again and again: fresh memory costs a page fault for every four kilobytes.

A slab comes back by itself when nothing refers to its batch any more, not even a view of a single image of it; who
keeps a batch keeps its slab, and the ring makes another one.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

SPARE = 3
"""Slabs that may wait, each for its copy to the device, before filling another one waits for the oldest."""


@dataclass(eq=False)
class Slab:
    """Memory for the images of a micro-batch.

    Attributes:
        pixels: uint8 of shape (n, size, size, 3), contiguous.
        copied: done when the device has everything that was copied to it before the slab came back; or None.
    """

    pixels: np.ndarray
    copied: torch.cuda.Event | None = None


class SlabRing:
    """Slabs, made when needed and taken back when no longer used. Used by one thread, that of the training.

    Args:
        most: slabs that are kept without use.
        copied_on: the stream that all copies out of them to a device are made on; they are in pinned memory then. One
            on which nothing else is computed: what fills a slab again waits for all that is on it.
    """

    def __init__(self, most: int, *, copied_on: torch.cuda.Stream | None = None) -> None:
        self._most = most
        self._stream = copied_on
        self._free: deque[Slab] = deque()
        self._returned: deque[Slab] = deque()  # by finalizers, in whatever thread: appending needs no lock

    def take(self, shape: tuple[int, int, int, int]) -> Slab:
        """A slab that nobody uses, of shape (n, size, size, 3); its pixels are whatever they were."""
        self._collect()
        for slab in [slab for slab in self._free if slab.pixels.shape != shape]:  # the resolution has changed
            self._free.remove(slab)
            _wait(slab)
        if self._free and (self._is_copied(self._free[0]) or len(self._free) >= SPARE):
            slab = self._free.popleft()
            _wait(slab)
            return slab
        return Slab(torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None).numpy())

    def hand_out(self, slab: Slab) -> torch.Tensor:
        """The slab as a tensor, uint8 (n, 3, size, size) in channels_last memory, at whose end it comes back."""
        # torch keeps this very array as long as any tensor shares its memory, and NumPy's views keep the tensor
        lent = slab.pixels[:]
        weakref.finalize(lent, self._returned.append, slab).atexit = False
        return torch.from_numpy(lent).permute(0, 3, 1, 2)

    def _collect(self) -> None:
        """Take back what has come back, and have the device say when it is done with it."""
        if not self._returned:
            return
        event = None
        if self._stream is not None:
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        while self._returned:
            slab = self._returned.popleft()
            slab.copied = event
            self._free.append(slab)
        while len(self._free) > self._most:
            _wait(self._free.popleft())

    @staticmethod
    def _is_copied(slab: Slab) -> bool:
        return slab.copied is None or slab.copied.query()


def _wait(slab: Slab) -> None:
    """Until the device has read it: before it is filled again, and before its memory is anybody's."""
    if slab.copied is not None:
        slab.copied.synchronize()
