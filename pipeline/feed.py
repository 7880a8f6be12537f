"""Images on their way from the loader to the model: copied beside the computation, and normalised on the device."""

from __future__ import annotations

import torch
from torch import nn


class Copier:
    """Copies to the device on a stream of its own, so that a copy and the computation before it overlap.

    The training is never waited for, so it asks for the copy of an update while the device is still busy with the one
    before.

    Args:
        device: where the copies are needed. On a CPU nothing is copied.

    Attributes:
        stream: on which they are made; None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, for use on the current stream; only one in pinned memory is not waited for."""
        if self.stream is None:
            return tensor.to(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.stream):
            copy = tensor.to(self._device, non_blocking=True)
        current.wait_stream(self.stream)
        copy.record_stream(current)  # the allocator knows only of the stream that it was made on
        return copy


class Normalise(nn.Module):
    """uint8 images → float32 images on the same device, mean 0 and deviation 1 per channel.

    Args:
        mean, std: per channel, of pixels in 0 … 1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) uint8 → (n, 3, H, W) float32, in the same memory format."""
        return (images.float() - self.mean) / self.std
