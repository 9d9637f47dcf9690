"""Draws of tokens, and the policy losses written sequence by sequence in float64 with autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conformance import builds
from torch import Tensor

from reinforce_ada.ops import policy_loss
from reinforce_ada.ops.policy_loss import RolloutCorrection

every_build = pytest.mark.parametrize("backend", builds("policy_loss"), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("policy_loss", every_isa=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("policy_loss", reference=False, every_isa=False), indirect=True)

CORRECTIONS = (
    None,
    RolloutCorrection("token", "truncate", high=1.1),
    RolloutCorrection("token", "mask", low=0.9, high=1.2),
    RolloutCorrection("sequence", "truncate", high=1.2),
    RolloutCorrection("sequence", "mask", high=1.3),
    RolloutCorrection("token", "truncate", low=0.95, high=math.inf, normalizer=1.5),
)
# What trainers do differently; each meets every loss and aggregation.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"ratio_level": "sequence"},
    {"kl_weighting": "ratio"},
    {"entropy_coef": 0.2},
    {"log_ratio_bound": 0.25, "kl_bound": 0.2},
    {"ratio_level": "sequence", "kl_weighting": "ratio", "entropy_coef": 0.0},
    {"log_ratio_bound": None, "kl_bound": None},
)
# A one-token sequence, an empty one, one that is fully masked (index 4), lengths around the vector widths and past two vectors.
LENGTHS = (1, 5, 0, 16, 3, 17, 41)
BAD = (math.nan, math.inf, -math.inf)

Run = tuple[Tensor, dict[str, Tensor], Tensor]  # loss, metrics, gradient


def draw(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, spread: float = 0.3) -> dict[str, Tensor]:
    """A packed float64 batch; what lies under the mask is poison."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(total, dtype=torch.float64, generator=generator)

    batch = {"logprobs": -torch.rand(total, dtype=torch.float64, generator=generator) - 0.1}
    batch["old_logprobs"] = batch["logprobs"] + normal(spread)
    batch["rollout_logprobs"] = batch["old_logprobs"] + normal(0.15)
    batch["ref_logprobs"] = batch["logprobs"] + normal(0.4)
    batch["advantages"] = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    batch["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)])
    mask = torch.rand(total, generator=generator) < 0.8
    if len(lengths) > 5:
        mask[batch["cu_seqlens"][4] : batch["cu_seqlens"][5]] = False
    mask[0] = True
    batch["entropy"] = torch.rand(total, dtype=torch.float64, generator=generator)
    for i, name in enumerate(("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")):
        poison = torch.tensor(BAD, dtype=torch.float64)[(torch.arange(total) + i) % 3]
        batch[name] = torch.where(mask, batch[name], poison)
    return {**batch, "mask": mask}


def run(batch: dict[str, Tensor], dtype: torch.dtype = torch.float64, scale: float = 1.0, **options: Any) -> Run:
    """Loss, metrics and the gradient of scale * loss; inputs that no option reads are left out."""
    reads = {"rollout_logprobs": options.pop("rollout", "rollout_correction" in options), "ref_logprobs": "kl" in options}
    reads["entropy"] = "entropy_coef" in options
    call = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if reads.get(k, True)}
    leaf = call.pop("logprobs").requires_grad_()
    loss, metrics = policy_loss(leaf, call.pop("advantages"), call.pop("mask"), **call, **options)
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    return loss.detach(), metrics, grad


Seen = dict[str, list[Tensor]]  # metric -> its values at the tokens of each sequence


def truth(batch: dict[str, Tensor], loss_agg: str = "token-mean", log_ratio_bound: float | None = 20.0, **options: Any) -> Run:
    """The formulas, one sequence at a time over its counted tokens only; packed, float64."""
    leaf = batch["logprobs"].clone().requires_grad_()
    spans = list(zip(batch["cu_seqlens"][:-1].tolist(), batch["cu_seqlens"][1:].tolist(), strict=True))
    kept = [torch.arange(a, b)[batch["mask"][a:b]] for a, b in spans]
    counted = [ids for ids in kept if len(ids)]
    num_tokens, num_seqs = sum(map(len, counted)), len(counted)
    longest = max(b - a for a, b in spans)
    total, seen = leaf.new_zeros(()), {}  # type: ignore[var-annotated]
    for i, ids in enumerate(kept):
        if len(ids):
            old = batch["old_logprobs"][ids] if "old_logprobs" in batch else leaf[ids].detach()
            others = {name: batch[name][ids] for name in ("rollout_logprobs", "ref_logprobs", "entropy") if name in batch}
            bound = math.inf if log_ratio_bound is None else log_ratio_bound
            value = _losses(leaf[ids], old, batch["advantages"][i], others, bound, seen, **options)
            shares = {
                "token-mean": num_tokens,
                "seq-mean-token-mean": num_seqs * len(ids),
                "seq-mean-token-sum": num_seqs,
                "seq-mean-token-sum-norm": num_seqs * longest,
            }
            total = total + value.sum() / shares[loss_agg]
    (grad,) = torch.autograd.grad(total, leaf)
    return total.detach(), _metrics(seen, num_tokens, len(leaf) - num_tokens), grad


def _losses(
    logp: Tensor,
    old: Tensor,
    adv: Tensor,
    others: dict[str, Tensor],
    bound: float,
    seen: Seen,
    rollout_correction: RolloutCorrection | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    kl_weighting: str = "none",
    kl_bound: float | None = 10.0,
    entropy_coef: float | None = None,
    **options: Any,
) -> Tensor:
    """The loss of each token of a sequence, with what the metrics see of it."""
    x = (logp - old).detach().clamp(-bound, bound)
    value, ratio = _surrogate(logp, old, adv, bound, seen, **options)
    _note(seen, approx_kl_k1=-x, approx_kl_k3=x.expm1() - x, ratio=ratio.detach())
    if rollout_correction is not None:
        value = value * _weight((old - others["rollout_logprobs"]).detach(), bound, rollout_correction, seen)
    if kl is not None:
        estimate = _kl(logp - others["ref_logprobs"], kl, kl_bound)
        value = value + kl_coef * estimate * (ratio if kl_weighting == "ratio" else 1)
        _note(seen, kl=estimate.detach())
    if entropy_coef is not None:
        value = value - entropy_coef * others["entropy"]
        _note(seen, entropy=others["entropy"])
    return value


def _surrogate(
    logp: Tensor,
    old: Tensor,
    adv: Tensor,
    bound: float,
    seen: Seen,
    loss: str = "ppo",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, ratio) of each token."""
    d, low, high = logp - old, 1 - clip_low, 1 + clip_high
    ratio = (d if ratio_level == "token" else d.mean().expand(len(d))).clamp(-bound, bound).exp()
    if loss == "gspo":
        ratio = (logp - logp.detach() + d.mean().detach()).clamp(max=10).exp()
    if loss in ("ppo", "gspo"):
        value = -torch.min(adv * ratio, adv * ratio.clamp(low, high))
        _note(seen, clip_fraction_low=(ratio < low) & (adv < 0), clip_fraction_high=(ratio > high) & (adv > 0))
        if dual_clip is not None:
            _note(seen, clip_fraction_dual=(value > -adv * dual_clip) & (adv < 0))
            value = torch.min(value, -adv * dual_clip) if adv < 0 else value
    elif loss == "cispo":
        value = -ratio.clamp(low, high).detach() * adv * logp
        _note(seen, clip_fraction_low=ratio < low, clip_fraction_high=ratio > high)
    elif loss == "sapo":
        tau = 1.0 if adv > 0 else 1.05
        value = -adv * (4 / tau) / (1 + (-tau * (ratio - 1)).exp())
    else:
        value = -adv * logp
    return value, ratio


def _weight(gap: Tensor, bound: float, correction: RolloutCorrection, seen: Seen) -> Tensor:
    """The rollout weight of each token, from old - rollout logprobs."""
    rho = (gap.sum().expand(len(gap)) if correction.level == "sequence" else gap).clamp(-bound, bound).exp()
    low, high = correction.low or 0, correction.high
    kept = rho.clamp(low, high) if correction.mode == "truncate" else rho * ((rho <= high) & (rho >= low))
    weight, gap = kept / correction.normalizer, gap.clamp(-bound, bound)
    _note(seen, rollout_kl_k1=-gap, rollout_kl_k3=gap.expm1() - gap, rollout_weight=weight)
    return weight


def _kl(x: Tensor, kl: str, kl_bound: float | None) -> Tensor:
    """The estimate from x = logprobs - ref_logprobs of each token."""
    k3 = (-x).exp() - 1 + x
    estimates = {"k1": x, "abs": x.abs(), "k2": x**2 / 2, "k3": k3 if kl_bound is None else k3.clamp(max=kl_bound)}
    estimate = estimates[kl.rstrip("+")]
    return estimate.detach() + (estimates["k2"] - estimates["k2"].detach()) if kl.endswith("+") else estimate


def _note(seen: Seen, **values: Tensor) -> None:
    for name, x in values.items():
        seen.setdefault(name, []).append(x)


def _metrics(seen: Seen, num_tokens: int, num_masked: int) -> dict[str, Tensor]:
    every = {name: torch.cat(parts).double() for name, parts in seen.items()}
    metrics = {name: x.mean() for name, x in every.items() if name not in ("ratio", "rollout_weight")}
    metrics |= {"num_tokens": torch.tensor(float(num_tokens)), "num_masked": torch.tensor(float(num_masked))}
    metrics |= {f"ratio_{name}": f(every["ratio"]) for name, f in (("mean", torch.mean), ("min", torch.min), ("max", torch.max))}
    if "rollout_weight" in every:
        w = every["rollout_weight"]
        metrics |= {"rollout_weight_mean": w.mean(), "rollout_weight_max": w.max()}
        metrics["effective_sample_size"] = w.sum() ** 2 / (len(w) * (w * w).sum())
    return metrics


def assert_agrees(got: Run, want: Run, rtol: float, what: str) -> None:
    assert set(got[1]) == set(want[1]), what
    assert all(x.dtype == torch.float64 and x.shape == () and not x.requires_grad for x in got[1].values())
    size = want[2].abs().max().item()
    torch.testing.assert_close(got[0].double(), want[0], rtol=rtol, atol=rtol, msg=lambda m: f"{what} loss: {m}")
    torch.testing.assert_close(got[2].double(), want[2], rtol=rtol, atol=rtol * size, msg=lambda m: f"{what} gradient: {m}")
    for name, x in want[1].items():
        torch.testing.assert_close(got[1][name], x.double(), rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{what} {n}: {m}")
