"""The kernels of policy_loss in CUDA: csrc/ops/policy_loss/policy_loss_cuda.h on tensors."""

from __future__ import annotations

import torch

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import address, coded
from reinforce_ada.ops.policy_loss.contract import Inputs, Results, empty_results


def evaluate(x: Inputs) -> Results:
    """See contract.Kernels."""
    logprobs, mask = x.logprobs, x.mask
    value, metrics, grad, grad_entropy = out = empty_results(logprobs, x.entropy, x.entropy_grad)
    workspace = logprobs.new_empty(cuda.policy_loss_workspace(logprobs.numel(), x.num_sequences), dtype=torch.float64)
    cuda.policy_loss(
        logprobs.get_device(), stream(logprobs),
        *coded(logprobs),
        address(x.advantages), x.advantages_per_token, address(mask), mask.dtype != torch.bool,
        *coded(x.old_logprobs),
        *coded(x.rollout_logprobs),
        *coded(x.ref_logprobs),
        *coded(x.entropy),
        address(x.cu_seqlens), logprobs.numel(), x.num_sequences, logprobs.shape[-1], x.numbers,
        address(workspace), address(value), address(metrics), address(grad), address(grad_entropy) if x.entropy_grad else 0,
    )  # fmt: skip
    return out
