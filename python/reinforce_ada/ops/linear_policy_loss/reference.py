"""linear_policy_loss in plain PyTorch: the head, its log-probabilities, the policy loss."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops.linear_token_logprobs import reference as head
from reinforce_ada.ops.policy_loss import reference
from reinforce_ada.ops.policy_loss.contract import Settings


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
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of `METRICS`); arguments as in `ops.linear_policy_loss`."""
    keep = mask != 0
    if weight_grad is not None and weight.requires_grad and torch.is_grad_enabled():
        weight = weight.detach().requires_grad_()  # another leaf, whose gradient autograd adds to what is there
        weight.grad = weight_grad
    # Also the hidden states: a NaN there would reach the weight's gradient as NaN * 0.
    hidden = torch.where(keep[..., None], hidden, 0.0).flatten(0, -2)
    ids = torch.where(keep, token_ids.long(), IGNORED).flatten()
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten()
    logprobs, entropy, _ = head.linear_token_logprobs(
        hidden, weight, bias, ids, temperature, logit_scale, soft_cap, settings.entropy_coef != 0, False, None
    )
    entropy = None if entropy is None else entropy.view(mask.shape)
    return reference.policy_loss(
        logprobs.view(mask.shape), advantages, mask, old_logprobs, rollout_logprobs, ref_logprobs, entropy, cu_seqlens, settings
    )
