"""The kernels of policy_loss on the CPU: csrc/ops/policy_loss on tensors."""

from __future__ import annotations

import torch

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import address, coded
from reinforce_ada.ops.policy_loss.contract import Inputs, Results, empty_results
from reinforce_ada.ops.policy_loss.settings import WHERE


def evaluate(x: Inputs) -> Results:
    """See contract.Kernels."""
    logprobs, advantages, mask, old, rollout, ref, entropy, cu_seqlens, advantages_per_token, entropy_grad, numbers = x
    value, metrics, grad, grad_entropy = out = empty_results(logprobs, entropy, entropy_grad)
    wrong = cpu.policy_loss(
        *coded(logprobs),
        address(advantages), advantages_per_token, address(mask), mask.dtype != torch.bool,
        *coded(old),
        *coded(rollout),
        *coded(ref),
        *coded(entropy),
        address(cu_seqlens), logprobs.numel(), x.num_sequences, logprobs.shape[-1], numbers,
        address(value), address(metrics), address(grad), address(grad_entropy) if entropy_grad else 0, torch.get_num_threads(),
    )  # fmt: skip
    if cu_seqlens is not None and wrong >= 0:
        raise wrong_offset(WHERE, cu_seqlens, wrong, logprobs.numel())
    return out
