"""policy_loss on the CPU: csrc/ops/policy_loss behind torch's registration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import NativeOp, address, is_eager
from reinforce_ada.ops.policy_loss.settings import (
    CORRECTION_LEVELS,
    CORRECTION_MODES,
    KL_ESTIMATORS,
    LOSS_AGGS,
    LOSSES,
    METRICS,
    WHERE,
    RolloutCorrection,
    Settings,
)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of `METRICS`), float32 and float64; see the public function."""
    value, metrics, _ = _op(
        logprobs.contiguous(),
        advantages.contiguous(),
        settings.advantages_per_token,
        (mask if mask.dtype in (torch.bool, torch.float32) else mask != 0).contiguous(),
        *(None if x is None else x.contiguous() for x in (old_logprobs, rollout_logprobs, ref_logprobs)),
        None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        *_codes(settings),
    )
    return value, metrics


def _codes(s: Settings) -> tuple[int | float | bool, ...]:
    """The settings as csrc/ops/policy_loss/policy_loss.h takes them."""
    correction = s.rollout_correction or RolloutCorrection()
    return (
        LOSSES.index(s.loss),
        float(s.clip_low),
        float(s.clip_high),
        math.inf if s.dual_clip is None else float(s.dual_clip),
        LOSS_AGGS.index(s.loss_agg),
        float(s.num_tokens_global or 0),
        float(s.num_seqs_global or 0),
        float(s.norm_length or 0),
        _correction_code(s.rollout_correction),
        float(correction.low or 0),
        float(correction.high),
        0 if s.kl is None else KL_ESTIMATORS.index(s.kl.rstrip("+")),
        s.kl is not None and s.kl.endswith("+"),
        float(s.kl_coef),
    )


def _correction_code(correction: RolloutCorrection | None) -> int:
    if correction is None:
        return 0
    return 1 + 2 * CORRECTION_LEVELS.index(correction.level) + CORRECTION_MODES.index(correction.mode)


def _forward(
    logprobs: Tensor,
    advantages: Tensor,
    advantages_per_token: bool,
    mask: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    value = logprobs.new_empty(())
    metrics = logprobs.new_empty(len(METRICS), dtype=torch.float64)
    grad = torch.empty_like(logprobs)
    tokens = logprobs.numel()
    args: tuple[Any, ...] = (
        address(logprobs),
        address(advantages),
        advantages_per_token,
        address(mask),
        mask.dtype != torch.bool,
        address(old_logprobs),
        address(rollout_logprobs),
        address(ref_logprobs),
        address(cu_seqlens),
        tokens,
        logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        logprobs.shape[-1],
        *settings,
        address(value),
        address(metrics),
        address(grad),
        torch.get_num_threads(),
    )
    wrong = cpu.policy_loss(*args)
    if cu_seqlens is not None and wrong >= 0:
        raise wrong_offset(WHERE, cu_seqlens, wrong, tokens)
    return value, metrics, grad


def _fake(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logprobs.new_empty(()), logprobs.new_empty(len(METRICS), dtype=torch.float64), torch.empty_like(logprobs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, metrics, grad = output
    ctx.mark_non_differentiable(metrics, grad)
    ctx.save_for_backward(grad)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    nothing = (None,) * _NUM_OTHERS
    if grad_value is None:
        return (None, *nothing)
    if is_eager((grad, grad_value)) and grad_value == 1:  # loss.backward(): no second array of the size of logprobs
        return (grad, *nothing)
    return (grad * grad_value, *nothing)


_NUM_OTHERS = 21  # arguments after logprobs

_op = NativeOp(
    "policy_loss",
    "(Tensor logprobs, Tensor advantages, bool advantages_per_token, Tensor mask, Tensor? old_logprobs, "
    "Tensor? rollout_logprobs, Tensor? ref_logprobs, Tensor? cu_seqlens, int loss_kind, float clip_low, float clip_high, "
    "float dual_clip, int loss_agg, float num_tokens, float num_seqs, float norm_length, int correction, float correction_low, "
    "float correction_high, int kl, bool straight_through, float kl_coef) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
