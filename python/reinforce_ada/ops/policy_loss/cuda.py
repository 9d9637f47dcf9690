"""The CUDA kernels of policy_loss: csrc/ops/policy_loss/policy_loss_cuda.h on tensors, for the torch side in gpu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import DTYPE_CODES, address


def workspace_size(num_tokens: int, num_sequences: int) -> int:
    """How many doubles `evaluate` works in."""
    return cuda.policy_loss_workspace(num_tokens, num_sequences)


def evaluate(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    advantages_per_token: bool,
    entropy_grad: bool,
    numbers: list[float],
    value: Tensor,
    metrics: Tensor,
    grad: Tensor,
    grad_entropy: Tensor,
    workspace: Tensor,
) -> None:
    """Writes value [], metrics [17], grad as logprobs and, with entropy_grad, grad_entropy as entropy."""
    cuda.policy_loss(
        logprobs.get_device(),
        stream(logprobs),
        address(logprobs),
        DTYPE_CODES[logprobs.dtype],
        address(advantages),
        advantages_per_token,
        address(mask),
        mask.dtype != torch.bool,
        *_stream(old_logprobs),
        *_stream(rollout_logprobs),
        *_stream(ref_logprobs),
        *_stream(entropy),
        address(cu_seqlens),
        logprobs.numel(),
        logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        logprobs.shape[-1],
        numbers,
        address(workspace),
        address(value),
        address(metrics),
        address(grad),
        address(grad_entropy) if entropy_grad else 0,
    )


def _stream(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (address(x), DTYPE_CODES[x.dtype])
