"""What the checks of all operators share."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # torch's ignore_index; csrc/ops/token_logprobs/token_logprobs.h
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(tensor: Tensor) -> str:
    """Return the shape, dtype and device of a tensor, for messages."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
