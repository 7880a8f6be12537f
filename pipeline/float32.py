"""What float32 means on a GPU: all 24 bits of mantissa, or the tensor cores' TF32."""

from __future__ import annotations

import torch


def allow_tf32(allowed: bool) -> None:
    """Let float32 convolutions and matrix products compute with ten bits of mantissa, or forbid it, in this process.

    torch allows it for convolutions and forbids it for matrix products by default, and an environment variable
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) changes the latter. Devices without TF32 compute in full float32 either way.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
