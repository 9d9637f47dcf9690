"""policy_loss on the CPU: csrc/ops/policy_loss behind torch's registration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, address, constant, dense, is_eager
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
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of `METRICS`), float32 and float64; see the public function."""
    value, metrics, _, _ = _op(
        *arguments(logprobs, advantages, mask, old_logprobs, rollout_logprobs, ref_logprobs, entropy, cu_seqlens, settings)
    )
    return value, metrics


def arguments(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: Settings,
) -> tuple[Any, ...]:
    """What an operator of `SCHEMA` takes for those of the public function."""
    return (
        dense(logprobs),
        constant(advantages, torch.float32),
        constant(mask if mask.dtype in (torch.bool, torch.float32) else mask != 0),
        *(None if x is None else constant(x, _readable(x)) for x in (old_logprobs, rollout_logprobs, ref_logprobs)),
        None if entropy is None else dense(entropy, _readable(entropy)),
        None if cu_seqlens is None else constant(cu_seqlens, torch.int64),
        settings.advantages_per_token,
        entropy is not None and entropy.requires_grad and settings.entropy_coef != 0,
        numbers(settings),
    )


def _readable(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in DTYPE_CODES else torch.float32


def numbers(s: Settings) -> list[float]:
    """The settings as csrc/ops/policy_loss/policy_loss.h lists them."""
    correction = s.rollout_correction or RolloutCorrection()
    return [
        float(LOSSES.index(s.loss)),
        float(s.ratio_level == "sequence"),
        float(s.clip_low),
        float(s.clip_high),
        _or_infinity(s.dual_clip),
        _or_infinity(s.log_ratio_bound),
        float(LOSS_AGGS.index(s.loss_agg)),
        float(s.num_tokens_global or 0),
        float(s.num_seqs_global or 0),
        float(s.norm_length or 0),
        _correction_code(s.rollout_correction),
        float(correction.low or 0),
        float(correction.high),
        1 / correction.normalizer,
        float(correction.allow_missing),
        0.0 if s.kl is None else float(KL_ESTIMATORS.index(s.kl.rstrip("+"))),
        float(s.kl is not None and s.kl.endswith("+")),
        float(s.kl_coef),
        float(s.kl_weighting == "ratio"),
        _or_infinity(s.kl_bound),
        float(s.entropy_coef),
    ]


def _or_infinity(bound: float | None) -> float:
    return math.inf if bound is None else float(bound)


def _correction_code(correction: RolloutCorrection | None) -> float:
    if correction is None:
        return 0.0
    return 1.0 + 2 * CORRECTION_LEVELS.index(correction.level) + CORRECTION_MODES.index(correction.mode)


def evaluate(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    advantages_per_token: bool,
    entropy_grad: bool,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, derivative in logprobs, derivative in entropy or empty); contiguous tensors, settings as `numbers` lists them."""
    value, metrics, grad, grad_entropy = out = empty_results(logprobs, entropy, entropy_grad)
    wrong = cpu.policy_loss(
        address(logprobs),
        DTYPE_CODES[logprobs.dtype],
        address(advantages),
        advantages_per_token,
        address(mask),
        mask.dtype != torch.bool,
        *_stream(old_logprobs),
        *_stream(rollout_logprobs),
        *_stream(ref_logprobs),
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


def empty_results(logprobs: Tensor, entropy: Tensor | None, entropy_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, derivative in logprobs, derivative in entropy or empty), to be written to."""
    return (
        logprobs.new_empty((), dtype=torch.float32),
        logprobs.new_empty(len(METRICS), dtype=torch.float64),
        torch.empty_like(logprobs),
        logprobs.new_empty(0) if entropy is None or not entropy_grad else torch.empty_like(entropy),
    )


def fake(logprobs: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of an operator of `SCHEMA`, without their values."""
    return empty_results(logprobs, args[5], args[8])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Saves the derivatives that the forward has computed."""
    _, metrics, grad, grad_entropy = output
    ctx.mark_non_differentiable(metrics, grad, grad_entropy)
    ctx.save_for_backward(grad, grad_entropy)
    ctx.set_materialize_grads(False)
    ctx.wants_entropy = inputs[9]


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, grad_entropy = ctx.saved_tensors
    if grad_value is None:
        return (None,) * 11
    # loss.backward(): no second array of the size of logprobs
    if not (is_eager((grad, grad_value)) and grad_value.item() == 1):
        grad, grad_entropy = grad * grad_value, grad_entropy * grad_value
    return (grad, None, None, None, None, None, grad_entropy if ctx.wants_entropy else None, None, None, None, None)


SCHEMA = (
    "(Tensor logprobs, Tensor advantages, Tensor mask, Tensor? old_logprobs, Tensor? rollout_logprobs, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? cu_seqlens, bool advantages_per_token, bool entropy_grad, float[] numbers) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

_op = NativeOp(
    "policy_loss",
    SCHEMA,
    evaluate,
    fake,
    setup_context=setup_context,
    backward=_backward,
)
