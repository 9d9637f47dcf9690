"""linear_policy_loss in Triton: the kernels of linear_token_logprobs and of policy_loss, one after the other.

This takes four products per token, where keeping all logits takes three: the loss is known when all tokens are scored, and its backward
computes the logits again. Computing the gradient in the forward, as on the CPU, would need a chunk's logits in memory and a host that
waits for no chunk; here a tile of logits never leaves the registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._dispatch import operator
from reinforce_ada.ops._torch import once, refuse_transforms
from reinforce_ada.ops.linear_policy_loss.contract import WHERE, Inputs
from reinforce_ada.ops.linear_token_logprobs import contract as head
from reinforce_ada.ops.linear_token_logprobs import triton as linear
from reinforce_ada.ops.policy_loss import contract as policy


def evaluate(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return (loss, metrics in the order of `METRICS`)."""
    ids, with_entropy = torch.where(x.mask != 0, x.token_ids.long(), IGNORED).flatten(), x.settings.entropy_coef != 0
    scoring = (x.flat_temperature, x.logit_scale, x.soft_cap, with_entropy, False)
    inputs = head.arguments(x.hidden.flatten(0, -2), x.weight, x.bias, ids, *scoring, x.max_extra_bytes)
    if x.weight_grad is not None and x.weight.requires_grad and torch.is_grad_enabled():
        refuse_transforms(WHERE, inputs)
        logprobs, entropy, *_ = _OntoWeightGrad.apply(x.weight_grad, *inputs)
    else:
        logprobs, entropy, *_ = operator("linear_token_logprobs", "triton")(*inputs)
    bonus = entropy.view(x.mask.shape) if with_entropy else None
    tokens = (logprobs.view(x.mask.shape), x.advantages, x.mask, x.old_logprobs, x.rollout_logprobs, x.ref_logprobs, bonus)
    value, metrics, _, _ = operator("policy_loss", "triton")(*policy.arguments(*tokens, x.cu_seqlens, x.settings))
    return value, metrics


class _OntoWeightGrad(torch.autograd.Function):
    """linear_token_logprobs whose backward adds the weight's gradient to a tensor and gives autograd none for the weight."""

    @staticmethod
    def forward(ctx: Any, onto: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        output = linear.scores(head.Inputs(*inputs))
        head.setup_context(ctx, inputs, output)
        ctx.onto = onto
        return output

    @staticmethod
    @partial(once, WHERE)
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        of_hidden, _, of_bias = ctx.needs_input_grad[1:4]
        x, normalizers = head.saved_inputs(ctx, incoming, of_hidden, True, of_bias)
        grad_hidden, _, grad_bias = linear.gradients(x, *normalizers, onto=ctx.onto)
        torch.autograd.graph.increment_version(ctx.onto)
        return None, grad_hidden if of_hidden else None, None, grad_bias if of_bias else None, *(None,) * 8
