"""The policy losses in plain PyTorch: readable, differentiable by autograd, float64-capable; the truth for every other form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reinforce_ada.ops._ragged import sequence_of
from reinforce_ada.ops.policy_loss import custom
from reinforce_ada.ops.policy_loss.contract import Settings
from reinforce_ada.ops.policy_loss.settings import (
    KL_LOG_RATIO_BOUND,
    METRICS,
    SAPO_TAU,
    SEQUENCE_LOG_RATIO_BOUND,
    RolloutCorrection,
)


@dataclass(frozen=True, slots=True)
class Sequences:
    """The mask, and sums over each sequence, for packed tokens [T] and padded rows [N, L] alike."""

    mask: Tensor  # bool, [T] or [N, L]
    seq_of: Tensor | None  # [T], packed only
    num_seqs: int
    longest: Tensor | int  # tokens of the longest sequence, or the padded width

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None) -> Sequences:
        if cu_seqlens is None:
            return cls(mask != 0, None, mask.shape[0], mask.shape[1])
        lengths = cu_seqlens.diff()
        return cls(mask != 0, sequence_of(cu_seqlens, mask.shape[0]), lengths.shape[0], lengths.max() if lengths.shape[0] else 0)

    def clean(self, x: Tensor) -> Tensor:
        """Return `x` with 0 where the mask is 0: a NaN there reaches neither value nor gradient."""
        return torch.where(self.mask, x, 0.0)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over each sequence's counted tokens, [N]."""
        if self.seq_of is None:
            return self.clean(x).sum(-1)
        return x.new_zeros(self.num_seqs).index_add(0, self.seq_of, self.clean(x))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over each sequence's counted tokens, [N]; 0 where there is none."""
        return self.sum(x) / self.sum(torch.ones_like(x)).clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """Return one value per token from [N]."""
        return x[:, None].expand(self.mask.shape) if self.seq_of is None else x[self.seq_of]

    def token_mean(self, x: Tensor) -> Tensor:
        """Return the mean over all counted tokens; 0 where there is none."""
        return self.clean(x).sum() / self.mask.sum().clamp(min=1)

    def extremum(self, x: Tensor, largest: bool) -> Tensor:
        """Return the smallest or largest value of a counted token; 0 where there is none."""
        if not x.numel():
            return x.new_zeros(())
        worst = -torch.inf if largest else torch.inf
        x = torch.where(self.mask, x, worst)
        return torch.where(self.mask.any(), x.max() if largest else x.min(), 0.0)


class Terms(NamedTuple):
    """The values that a loss gives for each token, before weights and aggregation."""

    loss: Tensor
    ratio: Tensor
    low: Tensor | None = None  # bool: clipped from below
    high: Tensor | None = None
    dual: Tensor | None = None


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
    """Return (loss, metrics in the order of `METRICS`, 0 for those that do not apply); the arguments are those of `ops.policy_loss`."""
    seqs = Sequences.of(mask, cu_seqlens)
    logp = seqs.clean(logprobs)
    adv = seqs.clean(advantages if settings.advantages_per_token else seqs.spread(advantages))
    old = logp.detach() if old_logprobs is None else seqs.clean(old_logprobs)

    terms = _terms(logp, old, adv, seqs, settings)
    loss = terms.loss
    measured = {"num_tokens": seqs.mask.sum(), "num_masked": (~seqs.mask).sum(), **_drift(terms, logp - old, seqs, settings)}
    if rollout_logprobs is not None:
        gap = rollout_gap(old, seqs.clean(rollout_logprobs), settings)
        measured |= _rollout_gap(gap, seqs, settings)
        if settings.rollout_correction is not None:
            weight = rollout_weight(gap, seqs, settings.rollout_correction, settings)
            loss = loss * weight
            measured |= _rollout_weights(weight, seqs)
    if ref_logprobs is not None and settings.kl is not None:
        kl = kl_estimate(logp - seqs.clean(ref_logprobs), settings.kl, settings.kl_bound)
        loss = loss + settings.kl_coef * (kl * terms.ratio if settings.kl_weighting == "ratio" else kl)
        measured["kl"] = seqs.token_mean(kl)
    if entropy is not None:
        loss = loss - settings.entropy_coef * seqs.clean(entropy)
        measured["entropy"] = seqs.token_mean(entropy)

    zero = logp.new_zeros((), dtype=torch.float64)
    metrics = torch.stack([measured.get(name, zero).detach().double() for name in METRICS])
    return aggregate(loss, seqs, settings), metrics


def aggregate(x: Tensor, seqs: Sequences, settings: Settings) -> Tensor:
    """Return one number from one per token, by `settings.loss_agg` and its denominators."""
    if settings.loss_agg == "token-mean":
        return seqs.clean(x).sum() / (settings.num_tokens_global or seqs.mask.sum().clamp(min=1))
    num_seqs = settings.num_seqs_global or (seqs.sum(torch.ones_like(x)) > 0).sum().clamp(min=1)
    if settings.loss_agg == "seq-mean-token-mean":
        return seqs.mean(x).sum() / num_seqs
    total = seqs.clean(x).sum() / num_seqs
    if settings.loss_agg == "seq-mean-token-sum":
        return total
    if settings.norm_length is not None:
        return total / settings.norm_length
    longest = seqs.longest
    return total / (longest.clamp(min=1) if isinstance(longest, Tensor) else max(longest, 1))


def _terms(logp: Tensor, old: Tensor, adv: Tensor, seqs: Sequences, settings: Settings) -> Terms:
    if isinstance(settings.loss, str):
        return BUILT_IN[settings.loss](logp, logp - old, adv, seqs, settings)
    return Terms(custom.evaluate(settings.loss, logp, old, adv, seqs.mask), _ratio(logp - old, seqs, settings))


def _reinforce(logp: Tensor, d: Tensor, adv: Tensor, seqs: Sequences, settings: Settings) -> Terms:
    return Terms(-adv * logp, _ratio(d, seqs, settings))


def _ppo(logp: Tensor, d: Tensor, adv: Tensor, seqs: Sequences, settings: Settings) -> Terms:
    return _clipped(_ratio(d, seqs, settings), adv, settings)


def _gspo(logp: Tensor, d: Tensor, adv: Tensor, seqs: Sequences, settings: Settings) -> Terms:
    """Return the terms of gspo: the value of the ratio is the sequence's (a geometric mean), its gradient is the token's own."""
    log_ratio = logp - logp.detach() + seqs.spread(seqs.mean(d)).detach()
    return _clipped(log_ratio.clamp(max=SEQUENCE_LOG_RATIO_BOUND).exp(), adv, settings)


def _clipped(ratio: Tensor, adv: Tensor, settings: Settings) -> Terms:
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(low, high))
    dual = None
    if settings.dual_clip is not None:
        dual = (adv < 0) & (loss > -adv * settings.dual_clip)
        loss = torch.where(dual, -adv * settings.dual_clip, loss)
    return Terms(loss, ratio, (adv < 0) & (ratio < low), (adv > 0) & (ratio > high), dual)


def _cispo(logp: Tensor, d: Tensor, adv: Tensor, seqs: Sequences, settings: Settings) -> Terms:
    """Return the terms of cispo: the clipped ratio weighs the gradient, and no token loses it."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    ratio = _ratio(d, seqs, settings)
    return Terms(-ratio.clamp(low, high).detach() * adv * logp, ratio, ratio < low, ratio > high)


def _sapo(logp: Tensor, d: Tensor, adv: Tensor, seqs: Sequences, settings: Settings) -> Terms:
    """Return the terms of sapo, a sigmoid gate around ratio 1 in place of the clip."""
    ratio = _ratio(d, seqs, settings)
    tau = torch.full_like(adv, SAPO_TAU[1]).masked_fill(adv > 0, SAPO_TAU[0])
    return Terms(-adv * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, ratio)


BUILT_IN: dict[str, Callable[[Tensor, Tensor, Tensor, Sequences, Settings], Terms]] = {
    "reinforce": _reinforce,
    "ppo": _ppo,
    "gspo": _gspo,
    "cispo": _cispo,
    "sapo": _sapo,
}


def _ratio(d: Tensor, seqs: Sequences, settings: Settings) -> Tensor:
    """Return the ratio of each token, or of its sequence, whose gradient then goes to all tokens of the sequence."""
    if settings.ratio_level == "sequence":
        d = seqs.spread(seqs.mean(d))
    return _bounded(d, settings.log_ratio_bound).exp()


def _bounded(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def rollout_gap(old: Tensor, rollout: Tensor, settings: Settings) -> Tensor:
    """Return old minus rollout, without gradient; 0 where the engine gave no logprob and the correction allows that."""
    gap = (old - rollout).detach()
    if settings.rollout_correction is not None and settings.rollout_correction.allow_missing:
        return gap.masked_fill(rollout.isnan(), 0.0)
    return gap


def rollout_weight(gap: Tensor, seqs: Sequences, correction: RolloutCorrection, settings: Settings) -> Tensor:
    """Return one weight per token from `gap`, old minus rollout."""
    total = seqs.spread(seqs.sum(gap)) if correction.level == "sequence" else gap
    weight = _bounded(total, settings.log_ratio_bound).exp()
    low = correction.low or 0.0
    if correction.mode == "truncate":
        return weight.clamp(low, correction.high) / correction.normalizer
    return weight.masked_fill((weight > correction.high) | (weight < low), 0.0) / correction.normalizer


def kl_estimate(x: Tensor, kind: str, bound: float | None) -> Tensor:
    """Return the KL estimate of each token from `x`, logprobs minus ref_logprobs; with a "+" its gradient is that of k2.

    `bound` is the largest value of k3, None for none.
    """
    if kind.endswith("+"):
        k2 = x * x / 2
        return kl_estimate(x, kind[:-1], bound).detach() + k2 - k2.detach()
    if kind == "k1":
        return x
    if kind == "abs":
        return x.abs()
    if kind == "k2":
        return x * x / 2
    if bound is None:
        return (-x).exp() + x - 1
    y = (-x).clamp(-KL_LOG_RATIO_BOUND, KL_LOG_RATIO_BOUND)
    return (y.exp() - y - 1).clamp(max=bound)


def _drift(terms: Terms, d: Tensor, seqs: Sequences, settings: Settings) -> dict[str, Tensor]:
    """Return metrics of how far the policy has moved from the one to which ratios refer."""
    x = _bounded(d.detach(), settings.log_ratio_bound)
    ratio = terms.ratio.detach()
    measured = {
        "approx_kl_k1": seqs.token_mean(-x),
        "approx_kl_k3": seqs.token_mean(x.exp() - 1 - x),
        "ratio_mean": seqs.token_mean(ratio),
        "ratio_min": seqs.extremum(ratio, largest=False),
        "ratio_max": seqs.extremum(ratio, largest=True),
    }
    clipped = {"clip_fraction_low": terms.low, "clip_fraction_high": terms.high, "clip_fraction_dual": terms.dual}
    return measured | {name: seqs.token_mean(flag.to(d.dtype)) for name, flag in clipped.items() if flag is not None}


def _rollout_gap(gap: Tensor, seqs: Sequences, settings: Settings) -> dict[str, Tensor]:
    """Return the distance between the policy that sampled and the one that trains: k1 and k3 of KL(rollout || old)."""
    x = _bounded(gap, settings.log_ratio_bound)
    return {"rollout_kl_k1": seqs.token_mean(-x), "rollout_kl_k3": seqs.token_mean(x.exp() - 1 - x)}


def _rollout_weights(weight: Tensor, seqs: Sequences) -> dict[str, Tensor]:
    """Return the metrics of the weights as used, after truncation or masking; the effective sample size is a fraction of the tokens."""
    mean, mean_square = seqs.token_mean(weight), seqs.token_mean(weight * weight)
    return {
        "rollout_weight_mean": mean,
        "rollout_weight_max": seqs.extremum(weight, largest=True),
        "effective_sample_size": torch.where(mean_square > 0, mean * mean / mean_square, 0.0),
    }
