"""linear_policy_loss in Triton: the kernels of linear_token_logprobs and of policy_loss, one after the other.

Four products a token, where keeping all logits takes three: the loss is known when all tokens are scored, and its backward computes the
logits again. The gradient inside the forward, as on the CPU, would need a chunk's logits in memory and a host that waits for no chunk;
here a tile of logits never leaves the registers, so there are none to keep.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._torch import once, refuse_transforms
from reinforce_ada.ops.linear_token_logprobs import launches as linear
from reinforce_ada.ops.policy_loss import gpu as policy
from reinforce_ada.ops.policy_loss.contract import Settings, arguments


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    soft_cap: float | None,
    temperature: float | Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: Settings,
    max_extra_bytes: int | None,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of `METRICS`); arguments as in `ops.linear_policy_loss`."""
    inputs = linear.arguments(
        hidden.flatten(0, -2),
        weight,
        bias,
        torch.where(mask != 0, token_ids.long(), IGNORED).flatten(),
        temperature.flatten() if isinstance(temperature, Tensor) else temperature,
        logit_scale,
        soft_cap,
        settings.entropy_coef != 0,
        False,
        max_extra_bytes,
    )
    if weight_grad is not None and weight.requires_grad and torch.is_grad_enabled():
        refuse_transforms("linear_policy_loss", inputs)
        logprobs, _, _, entropy, _ = _OntoWeightGrad.apply(weight_grad, *inputs)
    else:
        logprobs, _, _, entropy, _ = linear.scored(*inputs)
    bonus = entropy.view(mask.shape) if settings.entropy_coef != 0 else None
    tokens = (logprobs.view(mask.shape), advantages, mask, old_logprobs, rollout_logprobs, ref_logprobs, bonus)
    return policy.policy_loss("triton", arguments(*tokens, cu_seqlens, settings))


class _OntoWeightGrad(torch.autograd.Function):
    """linear_token_logprobs whose backward adds the weight's gradient to a tensor, and gives none of it to autograd."""

    @staticmethod
    def forward(ctx: Any, onto: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        output = linear.score_inputs(*inputs)
        linear.setup_context(ctx, inputs, output)
        ctx.onto = onto
        return output

    @staticmethod
    @partial(once, "linear_policy_loss")
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        of_hidden, _, of_bias = ctx.needs_input_grad[1:4]
        grad_hidden, grad_bias = linear.gradients_onto(ctx, incoming, ctx.onto, of_hidden, of_bias)
        torch.autograd.graph.increment_version(ctx.onto)
        return None, grad_hidden, None, grad_bias, *(None,) * 8
