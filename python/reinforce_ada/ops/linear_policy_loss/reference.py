"""linear_policy_loss in plain PyTorch: the head, its log-probabilities, the policy loss."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops.linear_policy_loss.contract import WHERE, Inputs
from reinforce_ada.ops.linear_token_logprobs import reference as head
from reinforce_ada.ops.policy_loss import reference
from reinforce_ada.ops.policy_loss.checks import check_offsets
from reinforce_ada.ops.token_logprobs.checks import check_values


def evaluate(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return (loss, metrics in the order of `METRICS`). Raises: InputError for offsets, ids and temperatures out of range."""
    keep, weight = x.mask != 0, x.weight
    check_offsets(WHERE, x.cu_seqlens, x.mask.shape[0])
    if not torch.compiler.is_compiling():  # a traced tensor has no values to check
        check_values(WHERE, x.token_ids.where(keep, 0).flatten(), weight.shape[0], x.flat_temperature)
    if x.weight_grad is not None and weight.requires_grad and torch.is_grad_enabled():
        weight = weight.detach().requires_grad_()  # another leaf, whose gradient autograd adds to what is there
        weight.grad = x.weight_grad
    # Also the hidden states: a NaN there would reach the weight's gradient as NaN * 0.
    hidden = torch.where(keep[..., None], x.hidden, 0.0).flatten(0, -2)
    ids = torch.where(keep, x.token_ids.long(), IGNORED).flatten()
    scoring = (x.flat_temperature, x.logit_scale, x.soft_cap, x.settings.entropy_coef != 0, False)
    logprobs, entropy, _ = head.linear_token_logprobs(hidden, weight, x.bias, ids, *scoring, None)
    entropy = None if entropy is None else entropy.view(keep.shape)
    others = (x.old_logprobs, x.rollout_logprobs, x.ref_logprobs, entropy, x.cu_seqlens)
    return reference.policy_loss(logprobs.view(keep.shape), x.advantages, x.mask, *others, x.settings)
