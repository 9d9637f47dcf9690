"""The policy losses from hidden states and the output head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import describe
from reinforce_ada.ops._dispatch import declare_native, operator, resolve
from reinforce_ada.ops._torch import share_memory
from reinforce_ada.ops.linear_policy_loss import reference
from reinforce_ada.ops.linear_policy_loss.contract import WHERE, Inputs
from reinforce_ada.ops.linear_token_logprobs.reference import BYTES_PER_LOGIT, check_extra_bytes
from reinforce_ada.ops.policy_loss import RolloutCorrection, constants
from reinforce_ada.ops.policy_loss.checks import advantages_are_per_token, check_layout, check_tensors, checked_settings
from reinforce_ada.ops.policy_loss.custom import IN_PYTORCH, loss_of, needs_of
from reinforce_ada.ops.policy_loss.settings import KL_BOUND, LOG_RATIO_BOUND, CustomLoss
from reinforce_ada.ops.token_logprobs.checks import check_bias, check_head, check_matrix, check_temperature

__all__ = ["linear_policy_loss"]

declare_native(WHERE, "triton", "cpu", lacks=(IN_PYTORCH,), make=lambda _, form: form.evaluate)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    temperature: float | Tensor = 1.0,
    entropy_coef: float = 0.0,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
    loss: str | CustomLoss = "ppo",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    log_ratio_bound: float | None = LOG_RATIO_BOUND,
    loss_agg: str = "token-mean",
    num_tokens_global: float | None = None,
    num_seqs_global: float | None = None,
    norm_length: float | None = None,
    rollout_correction: RolloutCorrection | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    kl_weighting: str = "none",
    kl_bound: float | None = KL_BOUND,
    max_extra_bytes: int | None = None,
    weight_grad: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the policy loss of the tokens that a linear head scores, from the hidden states to the scalar.

        logprobs, H = linear_token_logprobs(hidden, weight, token_ids, bias, logit_scale, soft_cap, temperature)
        loss = policy_loss(logprobs, advantages, mask, ...) - entropy_coef * aggregate(H)

    with the aggregation and denominators of `policy_loss`. Differentiable in hidden, weight and bias.

    Wrong values raise where the host sees them. The triton form never waits for the device: there an id outside [0, V), a temperature that
    is not positive and finite, or a cu_seqlens that does not go from 0 to T without decreasing makes what depends on it NaN.

    Args:
        hidden: [T, D] with `cu_seqlens`, or [N, L, D] without; float32, bfloat16 or float16 (float64 for checks). hidden[t] scores
            token_ids[t]: the caller shifts by one. Hidden states and ids where the mask is 0 never matter.
        weight: [V, D], of the same dtype.
        token_ids: [T] or [N, L], int64 or int32, in [0, V) where the mask is 1.
        advantages, mask, old_logprobs, rollout_logprobs, ref_logprobs, cu_seqlens, advantages_per: as in `policy_loss`, for tokens of
            that shape.
        bias: [V], of the same dtype.
        logit_scale, soft_cap, temperature: as in `linear_token_logprobs`; a temperature tensor has the shape of token_ids.
        entropy_coef: factor of the entropy bonus.
        loss, ratio_level, clip_low, clip_high, dual_clip, log_ratio_bound, loss_agg: as in `policy_loss`.
        num_tokens_global, num_seqs_global, norm_length: as in `policy_loss`.
        rollout_correction, kl, kl_coef, kl_weighting, kl_bound: as in `policy_loss`.
        max_extra_bytes: bound of the memory beyond the inputs, the results and the gradients; at least 40 V. None means 62 MB in the cpu
            form and 256 MB in the triton form; the reference keeps all logits, whatever the bound.
        weight_grad: [V, D] of the weight's dtype, for micro-batches: the weight's gradient is added to it and autograd gets none for the
            weight, so that no second [V, D] exists. The cpu form adds it in the forward; `loss.backward()` must then follow on the loss
            as it is, not scaled. The triton form adds it in the backward, of whatever the loss was multiplied by.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs), and the metrics of `policy_loss`, with a non-zero entropy_coef
        also entropy: the mean over the counted tokens, in nats.

    Raises:
        InputError: for arguments that do not fit; BackendError for a backend that cannot run here.

    Source: `linear_token_logprobs` and `policy_loss`; the entropy bonus as in arXiv 1602.01783.
    """
    check_layout(WHERE, "token_ids", token_ids, cu_seqlens)
    others = {"old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs, "ref_logprobs": ref_logprobs}
    check_tensors(WHERE, token_ids, mask, others)
    per_token = advantages_are_per_token(WHERE, token_ids, cu_seqlens, advantages, advantages_per)
    settings = checked_settings(
        WHERE, others, loss_of(WHERE, loss), ratio_level, clip_low, clip_high, dual_clip, log_ratio_bound, loss_agg, num_tokens_global,
        num_seqs_global, norm_length, rollout_correction, kl, kl_coef, kl_weighting, kl_bound, entropy_coef, per_token,
    )  # fmt: skip
    _check_head(hidden, weight, token_ids, bias, logit_scale, soft_cap, temperature, entropy_coef)
    _check_weight_grad(weight, weight_grad)
    check_extra_bytes(WHERE, max_extra_bytes, weight.shape[0] * BYTES_PER_LOGIT)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    adv, old, rollout, ref = constants(dtype, advantages, *others.values())
    assert adv is not None
    inputs = Inputs(
        *(hidden, weight, token_ids, bias, logit_scale, soft_cap, temperature, adv, old, rollout, ref, mask, cu_seqlens),
        *(settings, max_extra_bytes, weight_grad),
    )
    form = resolve(WHERE, backend, hidden.device, hidden.dtype, needs_of(settings.loss))
    value, metrics = reference.evaluate(inputs) if form == "reference" else operator(WHERE, form)(inputs)
    has_entropy = settings.entropy_coef != 0
    return value, settings.named(metrics, has_old=old is not None, has_rollout=rollout is not None, has_entropy=has_entropy)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    soft_cap: float | None,
    temperature: float | Tensor,
    entropy_coef: float,
) -> None:
    check_matrix(WHERE, "weight", weight)
    vocab, width = weight.shape
    if vocab == 0 or tuple(hidden.shape) != (*token_ids.shape, width) or hidden.dtype != weight.dtype or hidden.device != weight.device:
        given = f"hidden is {describe(hidden)}, weight {describe(weight)}"
        raise InputError(WHERE, given, f"{[*token_ids.shape, width]} and [V, {width}] of one dtype and device, V >= 1")
    if width > 1 and hidden.stride(-1) != 1:
        raise InputError(WHERE, f"hidden has stride {hidden.stride()}", "stride 1 in the last dimension", "hidden.contiguous()")
    if token_ids.dtype not in (torch.int64, torch.int32) or token_ids.device != hidden.device:
        raise InputError(WHERE, f"token_ids is {describe(token_ids)}", f"int64 or int32 on {hidden.device}")
    check_bias(WHERE, bias, weight)
    if isinstance(temperature, Tensor) and temperature.shape != token_ids.shape:
        raise InputError(WHERE, f"temperature is {describe(temperature)}", f"a number, or {list(token_ids.shape)}")
    flat = temperature.flatten() if isinstance(temperature, Tensor) else temperature
    check_temperature(WHERE, flat, token_ids.numel(), hidden.device)
    check_head(WHERE, logit_scale, soft_cap)
    if not -math.inf < entropy_coef < math.inf:
        raise InputError(WHERE, f"entropy_coef={entropy_coef}", "a finite number")


def _check_weight_grad(weight: Tensor, weight_grad: Tensor | None) -> None:
    if weight_grad is None:
        return
    same = weight_grad.shape == weight.shape and weight_grad.dtype == weight.dtype and weight_grad.device == weight.device
    if not same or not weight_grad.is_contiguous() or weight_grad.requires_grad:
        needed = f"contiguous {describe(weight)}, without a gradient of its own"
        raise InputError(WHERE, f"weight_grad is {describe(weight_grad)}", needed)
    if torch.compiler.is_compiling():
        raise InputError(WHERE, "weight_grad under torch.compile", "an eager call")
    if share_memory(weight_grad, weight):
        raise InputError(WHERE, "weight_grad in the memory of the weight", "memory of its own")
