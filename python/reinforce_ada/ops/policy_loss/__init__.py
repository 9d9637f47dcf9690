"""The policy losses over packed or padded tokens: scalar, gradient and metrics in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import FLOATING, describe
from reinforce_ada.ops._dispatch import declare_native, operator, resolve
from reinforce_ada.ops.policy_loss import reference
from reinforce_ada.ops.policy_loss.checks import advantages_are_per_token, check_layout, check_offsets, check_tensors, checked_settings
from reinforce_ada.ops.policy_loss.contract import arguments, torch_operator
from reinforce_ada.ops.policy_loss.custom import IN_PYTORCH, loss_of, needs_of
from reinforce_ada.ops.policy_loss.settings import (
    KL_BOUND,
    KL_ESTIMATORS,
    LOG_RATIO_BOUND,
    LOSS_AGGS,
    LOSSES,
    METRICS,
    WHERE,
    CustomLoss,
    RolloutCorrection,
)

__all__ = ["KL_ESTIMATORS", "LOSSES", "LOSS_AGGS", "METRICS", "CustomLoss", "RolloutCorrection", "policy_loss"]

declare_native(WHERE, "cuda", "triton", "cpu", lacks=(IN_PYTORCH,), make=torch_operator)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
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
    entropy_coef: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a policy-gradient step over the counted tokens, and its metrics.

        loss = aggregate(w * L(A, r) + kl_coef * KL(l, l_ref) - entropy_coef * H)       d = l - l_old, r = exp(clamp(d, -20, 20))

    | `loss` | L of one token | gradient of L in l |
    |---|---|---|
    | "reinforce" | -A l | -A |
    | "ppo" | max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip | -A r, 0 where clipped |
    | "cispo" | -sg[clip(r, 1 - clip_low, 1 + clip_high)] A l | -clip(r) A |
    | "gspo" | "ppo" with r = exp(min(mean of d over the sequence, 10)) | -A r for the token itself, 0 where clipped |
    | "sapo" | -A sigmoid(tau (r - 1)) 4 / tau, tau = 1 for A > 0, else 1.05 | its derivative |

    `ratio_level="sequence"` replaces d by its mean over the sequence, so that all tokens of a sequence have one ratio and share its
    gradient equally.

    | `loss_agg` | value |
    |---|---|
    | "token-mean" | sum over tokens / num_tokens |
    | "seq-mean-token-mean" | sum over sequences of their token means / num_seqs |
    | "seq-mean-token-sum" | sum over tokens / num_seqs |
    | "seq-mean-token-sum-norm" | sum over tokens / (num_seqs * norm_length) |

    num_tokens counts mask 1, num_seqs the sequences with any such token, unless the `_global` argument replaces them: micro-batches
    that share global denominators add up to the loss and gradient of one big batch. If a data-parallel wrapper averages
    gradients over D ranks, pass the global count divided by D.

    KL of x = l - l_ref: "k1" x, "abs" |x|, "k2" x^2 / 2, "k3" min(exp(-x) - 1 + x, kl_bound); "k1+" and so on have that value and the
    gradient of k2.

    Wrong offsets raise where the host sees them. The cuda and triton forms never wait for the device: there loss, gradients and metrics are
    NaN where cu_seqlens does not go from 0 to T without decreasing.

    Args:
        logprobs: l, packed [T] with `cu_seqlens`, or padded [N, L] without; float32, bfloat16, float16 or float64. The loss is
            differentiable in it.
        advantages: [N], or one a token in the shape of logprobs.
        mask: shape of logprobs; bool or floating point in {0, 1}. Values where it is 0, NaN included, never matter.
        old_logprobs: l_old of the policy that ratios refer to, shape of logprobs, any floating dtype like the next three. None is
            on-policy: r = 1, with gradient.
        rollout_logprobs: log-probabilities of the engine that sampled; used for the correction and its metrics only.
        ref_logprobs: l_ref, with `kl`.
        entropy: H, of each token's distribution in nats. The loss is differentiable in it too, with a non-zero entropy_coef.
        cu_seqlens: [N + 1] int32 or int64, sequence i has tokens cu_seqlens[i] up to cu_seqlens[i + 1]; empty ones are allowed.
        advantages_per: "sequence" or "token": for which there is one advantage each. With None the shape decides. Packed advantages of as
            many tokens as sequences fit both, and need the argument, unless every sequence is seen to have one token.
        loss: "reinforce", "ppo", "cispo", "gspo" or "sapo"; or a custom loss, a function or its name, "module:function" or
            "file.py:function". It is called with (logprobs, old_logprobs, advantages, mask) of one shape, packed or padded as they are, in
            the dtype that is computed in, 0 where the mask is False, old_logprobs those of now without gradient where there are none,
            and returns one loss a token in that shape and dtype, through which autograd goes. Only the reference takes it, which is then
            what "auto" takes.
        ratio_level: "token" or "sequence", not with "gspo", whose ratio is of the sequence in its own way.
        clip_low, clip_high: widths of the clip below and above 1.
        dual_clip: a number above 1, for "ppo" only; None for no dual clip.
        log_ratio_bound: bound of d, of its mean and of the logarithm of rollout weights, above 0; None for none but float32's own.
        loss_agg: see above.
        num_tokens_global, num_seqs_global: denominators instead of the local counts, > 0.
        norm_length: divisor of "seq-mean-token-sum-norm", in tokens; None for the padded width, or the longest packed sequence (which
            differs between micro-batches: give it when accumulating).
        rollout_correction: importance weights w, see `RolloutCorrection`; needs rollout_logprobs.
        kl: "k1", "k2", "k3" or "abs", each also with "+"; needs ref_logprobs.
        kl_coef: factor of the KL, which `rollout_correction` does not weigh.
        kl_weighting: "none", or "ratio": KL r with the gradient of both, which is unbiased off-policy.
        kl_bound: largest k3, above 0 (its x is then kept within ±20); None for none.
        entropy_coef: factor of the entropy bonus; needs entropy.
        backend: "auto", "cuda", "triton", "cpu" (these three all but float64) or "reference".

    Returns:
        The loss, a scalar in float32 (float64 for float64 logprobs), and the metrics, 0-d float64 without gradient, means over the
        local counted tokens: num_tokens, num_masked; with old_logprobs approx_kl_k1, approx_kl_k3 (of old || new), ratio_mean,
        ratio_min, ratio_max (gspo: of the sequence ratio) and clip_fraction_low, clip_fraction_high, clip_fraction_dual; with
        rollout_logprobs rollout_kl_k1, rollout_kl_k3 (of rollout || old); with a correction rollout_weight_mean, rollout_weight_max
        and effective_sample_size (sum w)^2 / (n sum w^2), in (0, 1]; with a kl its value, kl, unweighted; with entropy its mean,
        entropy. What does not apply is absent.

    Raises:
        InputError: for shapes, dtypes, names and settings that do not fit; BackendError for a backend that cannot run here.

    Source: arXiv 1707.06347 (ppo), 1912.09729 (dual clip), 2503.14476 (clip-higher, token-mean), 2506.13585 (cispo), 2507.18071
    (gspo), 2511.20347 (sapo), 2503.20783 (norm_length), 2512.02556 (kl_weighting), 1602.01783 (entropy). docs/operators.md says which
    arguments make up the losses of other trainers.
    """
    if logprobs.dtype not in FLOATING:
        raise InputError(WHERE, f"logprobs is {describe(logprobs)}", "float32, bfloat16, float16 or float64")
    check_layout(WHERE, "logprobs", logprobs, cu_seqlens)
    others = {"old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy}
    check_tensors(WHERE, logprobs, mask, others)
    per_token = advantages_are_per_token(WHERE, logprobs, cu_seqlens, advantages, advantages_per)
    settings = checked_settings(
        WHERE, others, loss_of(WHERE, loss), ratio_level, clip_low, clip_high, dual_clip, log_ratio_bound, loss_agg, num_tokens_global,
        num_seqs_global, norm_length, rollout_correction, kl, kl_coef, kl_weighting, kl_bound, entropy_coef, per_token,
    )  # fmt: skip
    if entropy_coef != 0 and entropy is None:
        raise InputError(WHERE, f"entropy_coef={entropy_coef} without entropy", "entropy, one value a token")
    form = resolve(WHERE, backend, logprobs.device, logprobs.dtype, needs_of(settings.loss))
    if form != "reference":
        inputs = arguments(logprobs, advantages, mask, old_logprobs, rollout_logprobs, ref_logprobs, entropy, cu_seqlens, settings)
        value, metrics, _, _ = operator(WHERE, form)(*inputs)
    else:
        check_offsets(WHERE, cu_seqlens, logprobs.shape[0])
        dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
        adv, old, rollout, ref = constants(dtype, advantages, old_logprobs, rollout_logprobs, ref_logprobs)
        assert adv is not None
        bonus = None if entropy is None else entropy.to(dtype)
        value, metrics = reference.policy_loss(logprobs.to(dtype), adv, mask, old, rollout, ref, bonus, cu_seqlens, settings)
    has = {"has_old": old_logprobs is not None, "has_rollout": rollout_logprobs is not None, "has_entropy": entropy is not None}
    return value, settings.named(metrics, **has)


def constants(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors without gradient, in the dtype of the computation."""
    return [None if x is None else x.detach().to(dtype) for x in tensors]
