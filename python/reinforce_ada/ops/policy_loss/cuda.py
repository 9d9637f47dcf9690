"""The CUDA kernels of policy_loss: csrc/ops/policy_loss/policy_loss_cuda.h on tensors, for the torch side in gpu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import DTYPE_CODES, address
from reinforce_ada.ops.policy_loss.contract import Inputs


def workspace_size(num_tokens: int, num_sequences: int) -> int:
    """How many doubles `evaluate` works in."""
    return cuda.policy_loss_workspace(num_tokens, num_sequences)


def evaluate(inputs: Inputs, value: Tensor, metrics: Tensor, grad: Tensor, grad_entropy: Tensor, workspace: Tensor) -> None:
    """See gpu.Kernels."""
    logprobs, mask = inputs.logprobs, inputs.mask
    cuda.policy_loss(
        logprobs.get_device(),
        stream(logprobs),
        address(logprobs),
        DTYPE_CODES[logprobs.dtype],
        address(inputs.advantages),
        inputs.advantages_per_token,
        address(mask),
        mask.dtype != torch.bool,
        *_stream(inputs.old_logprobs),
        *_stream(inputs.rollout_logprobs),
        *_stream(inputs.ref_logprobs),
        *_stream(inputs.entropy),
        address(inputs.cu_seqlens),
        logprobs.numel(),
        inputs.num_sequences,
        logprobs.shape[-1],
        inputs.numbers,
        address(workspace),
        address(value),
        address(metrics),
        address(grad),
        address(grad_entropy) if inputs.entropy_grad else 0,
    )


def _stream(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (address(x), DTYPE_CODES[x.dtype])
