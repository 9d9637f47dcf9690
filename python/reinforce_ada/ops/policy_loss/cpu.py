"""policy_loss on the CPU: csrc/ops/policy_loss behind torch's registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, address, is_eager
from reinforce_ada.ops.policy_loss.contract import SCHEMA, Inputs, Results, empty_results, fake, gradients, setup_context
from reinforce_ada.ops.policy_loss.settings import WHERE


def policy_loss(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of `METRICS`), float32 and float64; see the public function."""
    value, metrics, _, _ = _op(*inputs)
    return value, metrics


def evaluate(inputs: Inputs | tuple[Any, ...]) -> Results:
    """Value, metrics and derivatives. Raises: InputError for a cu_seqlens that does not go from 0 to T without decreasing."""
    logprobs, advantages, mask, old, rollout, ref, entropy, cu_seqlens, advantages_per_token, entropy_grad, numbers = inputs
    value, metrics, grad, grad_entropy = out = empty_results(logprobs, entropy, entropy_grad)
    wrong = cpu.policy_loss(
        address(logprobs),
        DTYPE_CODES[logprobs.dtype],
        address(advantages),
        advantages_per_token,
        address(mask),
        mask.dtype != torch.bool,
        *_stream(old),
        *_stream(rollout),
        *_stream(ref),
        *_stream(entropy),
        address(cu_seqlens),
        logprobs.numel(),
        logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        logprobs.shape[-1],
        numbers,
        address(value),
        address(metrics),
        address(grad),
        address(grad_entropy) if entropy_grad else 0,
        torch.get_num_threads(),
    )
    if cu_seqlens is not None and wrong >= 0:
        raise wrong_offset(WHERE, cu_seqlens, wrong, logprobs.numel())
    return out


def _stream(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (address(x), DTYPE_CODES[x.dtype])


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, grad_entropy = ctx.saved_tensors
    if grad_value is None:
        return gradients(None, None)
    # loss.backward(): no second array of the size of logprobs
    if not (is_eager((grad, grad_value)) and grad_value.item() == 1):
        grad, grad_entropy = grad * grad_value, grad_entropy * grad_value
    return gradients(grad, grad_entropy if ctx.wants_entropy else None)


_op = NativeOp(
    "policy_loss",
    SCHEMA,
    lambda *inputs: evaluate(inputs),
    fake,
    setup_context=setup_context,
    backward=_backward,
)
