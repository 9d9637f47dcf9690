"""`policy_loss`: literal numbers, a truth written sequence by sequence with autograd in float64, and every build against it."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import assert_no_worse, assert_repeatable, assert_same_bits, builds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import linear_policy_loss, policy_loss
from reinforce_ada.ops.policy_loss import KL_ESTIMATORS, LOSS_AGGS, LOSSES, METRICS, RolloutCorrection
from reinforce_ada.ops.policy_loss import cpu as cpu_form
from reinforce_ada.ops.policy_loss.contract import Settings, numbers

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


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same sequences as rows [N, L], with poison in the padding."""
    lengths = batch["cu_seqlens"].diff().tolist()
    rows = {}
    for name, x in batch.items():
        if name == "cu_seqlens" or x.shape == (len(lengths),):
            continue
        out = torch.zeros(len(lengths), max(lengths), dtype=x.dtype)
        if x.dtype != torch.bool:
            out.fill_(math.nan)
        for i, part in enumerate(x.split(lengths)):
            out[i, : len(part)] = part
        rows[name] = out
    return {**rows, "advantages": batch["advantages"]}


def run(batch: dict[str, Tensor], dtype: torch.dtype = torch.float64, scale: float = 1.0, **options: Any) -> Run:
    """Loss, metrics and the gradient of scale * loss; inputs that no option reads are left out."""
    reads = {"rollout_logprobs": options.pop("rollout", "rollout_correction" in options), "ref_logprobs": "kl" in options}
    reads["entropy"] = "entropy_coef" in options
    call = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if reads.get(k, True)}
    leaf = call.pop("logprobs").requires_grad_()
    loss, metrics = policy_loss(leaf, call.pop("advantages"), call.pop("mask"), **call, **options)
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    return loss.detach(), metrics, grad


def truth(
    batch: dict[str, Tensor],
    loss: str = "ppo",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    log_ratio_bound: float | None = 20.0,
    loss_agg: str = "token-mean",
    rollout_correction: RolloutCorrection | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    kl_weighting: str = "none",
    kl_bound: float | None = 10.0,
    entropy_coef: float | None = None,
) -> Run:
    """The formulas, one sequence at a time over its counted tokens only; packed, float64."""
    leaf = batch["logprobs"].clone().requires_grad_()
    spans = list(zip(batch["cu_seqlens"][:-1].tolist(), batch["cu_seqlens"][1:].tolist(), strict=True))
    kept = [torch.arange(a, b)[batch["mask"][a:b]] for a, b in spans]
    counted = [ids for ids in kept if len(ids)]
    num_tokens, num_seqs = sum(map(len, counted)), len(counted)
    longest = max(b - a for a, b in spans)
    bound = math.inf if log_ratio_bound is None else log_ratio_bound
    low, high = 1 - clip_low, 1 + clip_high
    total = leaf.new_zeros(())
    seen: dict[str, list[Tensor]] = {}

    for i, ids in enumerate(kept):
        if not len(ids):
            continue
        logp, adv = leaf[ids], batch["advantages"][i]
        old = batch["old_logprobs"][ids] if "old_logprobs" in batch else logp.detach()
        d = logp - old
        ratio = (d if ratio_level == "token" else d.mean().expand(len(ids))).clamp(-bound, bound).exp()
        if loss == "gspo":
            ratio = (logp - logp.detach() + d.mean().detach()).clamp(max=10).exp()
        if loss in ("ppo", "gspo"):
            value = -torch.min(adv * ratio, adv * ratio.clamp(low, high))
            is_low, is_high = (ratio < low) & (adv < 0), (ratio > high) & (adv > 0)
            if dual_clip is not None:
                seen.setdefault("clip_fraction_dual", []).append((value > -adv * dual_clip) & (adv < 0))
                value = torch.min(value, -adv * dual_clip) if adv < 0 else value
        elif loss == "cispo":
            value = -ratio.clamp(low, high).detach() * adv * logp
            is_low, is_high = ratio < low, ratio > high
        elif loss == "sapo":
            tau = 1.0 if adv > 0 else 1.05
            value = -adv * (4 / tau) / (1 + (-tau * (ratio - 1)).exp())
        else:
            value = -adv * logp
        if loss in ("ppo", "gspo", "cispo"):
            seen.setdefault("clip_fraction_low", []).append(is_low)
            seen.setdefault("clip_fraction_high", []).append(is_high)
        x = d.detach().clamp(-bound, bound)
        seen.setdefault("approx_kl_k1", []).append(-x)
        seen.setdefault("approx_kl_k3", []).append(x.expm1() - x)
        seen.setdefault("ratio", []).append(ratio.detach())
        if rollout_correction is not None:
            gap = (old - batch["rollout_logprobs"][ids]).detach()
            rho = (gap.sum().expand(len(ids)) if rollout_correction.level == "sequence" else gap).clamp(-bound, bound).exp()
            low_weight, high_weight = rollout_correction.low or 0, rollout_correction.high
            if rollout_correction.mode == "truncate":
                weight = rho.clamp(low_weight, high_weight) / rollout_correction.normalizer
            else:
                weight = rho * ((rho <= high_weight) & (rho >= low_weight)) / rollout_correction.normalizer
            gap = gap.clamp(-bound, bound)
            value = value * weight
            seen.setdefault("rollout_kl_k1", []).append(-gap)
            seen.setdefault("rollout_kl_k3", []).append(gap.expm1() - gap)
            seen.setdefault("rollout_weight", []).append(weight)
        if kl is not None:
            x = logp - batch["ref_logprobs"][ids]
            k3 = (-x).exp() - 1 + x
            estimates = {"k1": x, "abs": x.abs(), "k2": x**2 / 2, "k3": k3 if kl_bound is None else k3.clamp(max=kl_bound)}
            estimate = estimates[kl.rstrip("+")]
            if kl.endswith("+"):
                estimate = estimate.detach() + (estimates["k2"] - estimates["k2"].detach())
            value = value + kl_coef * estimate * (ratio if kl_weighting == "ratio" else 1)
            seen.setdefault("kl", []).append(estimate.detach())
        if entropy_coef is not None:
            value = value - entropy_coef * batch["entropy"][ids]
            seen.setdefault("entropy", []).append(batch["entropy"][ids])
        total = (
            total
            + value.sum()
            / {
                "token-mean": num_tokens,
                "seq-mean-token-mean": num_seqs * len(ids),
                "seq-mean-token-sum": num_seqs,
                "seq-mean-token-sum-norm": num_seqs * longest,
            }[loss_agg]
        )

    every = {name: torch.cat(parts).double() for name, parts in seen.items()}
    metrics = {name: x.mean() for name, x in every.items() if name not in ("ratio", "rollout_weight")}
    metrics["num_tokens"] = torch.tensor(float(num_tokens))
    metrics["num_masked"] = torch.tensor(float(len(leaf) - num_tokens))
    metrics |= {f"ratio_{name}": f(every["ratio"]) for name, f in (("mean", torch.mean), ("min", torch.min), ("max", torch.max))}
    if "rollout_weight" in every:
        w = every["rollout_weight"]
        metrics |= {"rollout_weight_mean": w.mean(), "rollout_weight_max": w.max()}
        metrics["effective_sample_size"] = w.sum() ** 2 / (len(w) * (w * w).sum())
    (grad,) = torch.autograd.grad(total, leaf)
    return total.detach(), metrics, grad


def assert_agrees(got: Run, want: Run, rtol: float, what: str) -> None:
    assert set(got[1]) == set(want[1]), what
    assert all(x.dtype == torch.float64 and x.shape == () and not x.requires_grad for x in got[1].values())
    size = want[2].abs().max().item()
    torch.testing.assert_close(got[0].double(), want[0], rtol=rtol, atol=rtol, msg=lambda m: f"{what} loss: {m}")
    torch.testing.assert_close(got[2].double(), want[2], rtol=rtol, atol=rtol * size, msg=lambda m: f"{what} gradient: {m}")
    for name, x in want[1].items():
        torch.testing.assert_close(got[1][name], x.double(), rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{what} {n}: {m}")


# The meaning


@every_form
def test_by_hand(backend: str) -> None:
    """Ratios 1.5 .5 1 and 2 .25; advantages +1 and -2; clip .8 to 1.28."""
    old = torch.full((2, 3), -2.0)
    logprobs = torch.tensor([[-2 + math.log(1.5), -2 + math.log(0.5), -2.0], [-2 + math.log(2), -2 + math.log(0.25), math.nan]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    batch = {"logprobs": logprobs, "old_logprobs": old, "advantages": torch.tensor([1.0, -2]), "mask": mask}
    losses = [-1.28, -0.5, -1.0, 4.0, 1.6]  # 2 * 2 and 2 * .8: a negative advantage is clipped from below only
    slopes = [0.0, -0.5, -1.0, 4.0, 0.0]
    for agg, share in (
        ("token-mean", [1 / 5] * 5),
        ("seq-mean-token-mean", [1 / 6] * 3 + [1 / 4] * 2),
        ("seq-mean-token-sum", [1 / 2] * 5),
        ("seq-mean-token-sum-norm", [1 / 6] * 5),
    ):
        loss, metrics, grad = run(batch, torch.float32, loss_agg=agg, backend=backend)
        assert loss.item() == pytest.approx(np.dot(losses, share), rel=1e-6)
        np.testing.assert_allclose(grad.flatten().numpy(), [*np.multiply(slopes, share), 0], rtol=1e-6)
    assert {name: pytest.approx(x.item(), rel=1e-6) for name, x in metrics.items()} == {
        "num_tokens": 5,
        "num_masked": 1,
        "approx_kl_k1": -(math.log(1.5) + math.log(0.5) + math.log(2) + math.log(0.25)) / 5,
        "approx_kl_k3": (0.5 - 0.5 + 0 + 1 - 0.75 - math.log(1.5 * 0.5 * 2 * 0.25)) / 5,
        "ratio_mean": 5.25 / 5,
        "ratio_min": 0.25,
        "ratio_max": 2,
        "clip_fraction_low": 1 / 5,
        "clip_fraction_high": 1 / 5,
    }
    loss, metrics, grad = run(batch, torch.float32, dual_clip=1.5, backend=backend)
    assert loss.item() == pytest.approx((-1.28 - 0.5 - 1.0 + 3.0 + 1.6) / 5, rel=1e-6)  # at most 2 * 1.5
    np.testing.assert_allclose(grad.flatten().numpy(), [0, -0.1, -0.2, 0, 0, 0], rtol=1e-6)
    assert metrics["clip_fraction_dual"].item() == pytest.approx(1 / 5)


@every_form
def test_corrections_by_hand(backend: str) -> None:
    """Token ratios to the engine 2, .5 and 4; of the sequence 4."""
    old = torch.tensor([-1.0, -2, -3])
    rollout = old - torch.tensor([2.0, 0.5, 4]).log()
    for correction, weights in (
        (RolloutCorrection("token", "truncate", high=2.0), [2, 0.5, 2]),
        (RolloutCorrection("token", "mask", high=2.5), [2, 0.5, 0]),
        (RolloutCorrection("token", "mask", low=1.0, high=2.5), [2, 0, 0]),
        (RolloutCorrection("sequence", "truncate", high=3.0), [3, 3, 3]),
        (RolloutCorrection("sequence", "mask", high=5.0), [4, 4, 4]),
        (RolloutCorrection("sequence", "mask", high=3.0), [0, 0, 0]),
    ):
        logprobs = old.clone().requires_grad_()
        loss, metrics = policy_loss(
            logprobs, torch.tensor([1.0]), torch.ones(3), rollout_logprobs=rollout, cu_seqlens=torch.tensor([0, 3]),
            rollout_correction=correction, backend=backend,
        )  # fmt: skip
        loss.backward()
        np.testing.assert_allclose(logprobs.grad.numpy(), np.asarray(weights) / -3, rtol=1e-5)
        n, n2 = sum(weights), sum(w * w for w in weights)
        assert metrics["rollout_weight_mean"].item() == pytest.approx(n / 3, rel=1e-5)
        assert metrics["rollout_weight_max"].item() == pytest.approx(max(weights), rel=1e-5)
        assert metrics["effective_sample_size"].item() == pytest.approx(n * n / (3 * n2) if n else 0, rel=1e-5)
        assert metrics["rollout_kl_k1"].item() == pytest.approx(-math.log(4) / 3, rel=1e-5)
        assert metrics["rollout_kl_k3"].item() == pytest.approx((6.5 - 3 - math.log(4)) / 3, rel=1e-5)
        assert set(metrics) == {"num_tokens", "num_masked", "rollout_kl_k1", "rollout_kl_k3", "rollout_weight_mean",
                                "rollout_weight_max", "effective_sample_size"}  # fmt: skip


@every_form
@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_is_the_plain_policy_gradient(backend: str, loss: str) -> None:
    """Every loss has the gradient -A at ratio 1, also where old_logprobs is not given."""
    batch = {"logprobs": -torch.rand(2, 3), "advantages": torch.tensor([1.5, -0.5]), "mask": torch.ones(2, 3)}
    want = torch.tensor([[-1.5], [0.5]]).expand(2, 3) / 6
    for more in ({}, {"old_logprobs": batch["logprobs"]}):
        value, metrics, grad = run({**batch, **more}, torch.float32, loss=loss, backend=backend)
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)
        level = {"reinforce": batch["logprobs"], "cispo": batch["logprobs"], "sapo": torch.tensor([[2 / 1.0], [2 / 1.05]])}
        expected = -(batch["advantages"][:, None] * level.get(loss, torch.ones(2, 3))).expand(2, 3).mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert ("ratio_mean" in metrics) == bool(more)


# Other trainers: their formulas spelled out on padded rows in float64, and the arguments of docs/operators.md that mean them.


class Trainer:
    """The tensors of a padded batch under the names of losses.md, and the aggregations of verl and TRL."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        def clean(name: str) -> Tensor:
            return torch.where(batch["mask"], batch[name], 0)

        self.leaf = clean("logprobs").requires_grad_()
        self.m = batch["mask"].double()
        self.adv = batch["advantages"][:, None]
        self.rows = len(self.m)
        self.d = self.leaf - clean("old_logprobs")
        self.rho = clean("old_logprobs") - clean("rollout_logprobs")
        self.to_ref = clean("ref_logprobs") - self.leaf
        self.entropy = clean("entropy")

    def mean(self, x: Tensor) -> Tensor:
        return (x * self.m).sum() / self.m.sum()

    def row_mean(self, x: Tensor) -> Tensor:
        return (x * self.m).sum(1) / self.m.sum(1).clamp(min=1)

    def verl_ratio(self) -> Tensor:
        return self.d.clamp(-20, 20).exp()

    def verl_vanilla(self, low: float = 0.2, high: float = 0.2, c: float = 3.0) -> Tensor:
        r = self.verl_ratio()
        first = torch.maximum(-self.adv * r, -self.adv * r.clamp(1 - low, 1 + high))
        return torch.where(self.adv < 0, torch.minimum(first, -self.adv * c), first)

    def verl_seq_mean(self, x: Tensor) -> Tensor:
        counted = self.m.sum(1) > 0
        return ((x * self.m).sum(1) / (self.m.sum(1) + 1e-8))[counted].sum() / counted.sum()

    def verl_gspo(self) -> Tensor:
        s = self.row_mean(self.d)[:, None]
        q = (self.leaf - self.leaf.detach() + s.detach()).clamp(max=10).exp()
        return torch.maximum(-self.adv * q, -self.adv * q.clamp(1 - 3e-4, 1 + 4e-4))

    def sapo(self, r: Tensor) -> Tensor:
        tau = torch.where(self.adv > 0, 1.0, 1.05)
        return -torch.sigmoid(tau * (r - 1)) * 4 / tau * self.adv

    def verl_cispo(self) -> Tensor:
        return -self.verl_ratio().clamp(0.8, 1.2).detach() * self.adv * self.leaf

    def low_var_kl(self) -> Tensor:
        y = self.to_ref.clamp(-20, 20)
        return (y.exp() - y - 1).clamp(-10, 10)

    def trl_c1(self, level: str) -> Tensor:
        return (self.row_mean(self.d)[:, None] if level == "sequence" else self.d).exp()

    def trl_clipped(self, level: str = "token", high: float = 0.2, delta: float | None = None) -> Tensor:
        c1 = self.trl_c1(level)
        bounded = c1 if delta is None else c1.clamp(max=delta)
        return -torch.minimum(bounded * self.adv, c1.clamp(0.8, 1 + high) * self.adv)

    def trl_kl(self, level: str = "token") -> Tensor:
        return (self.to_ref.exp() - self.to_ref - 1) * self.trl_c1(level)

    def trl_weight(self, mode: str, low: float | None, high: float) -> Tensor:
        ratio = ((self.rho * self.m).sum(1, keepdim=True) if "sequence" in mode else self.rho).exp()
        if "truncate" in mode:
            return ratio.clamp(low, high)
        return ratio.masked_fill((ratio > high) | (ratio < (low or 0)), 0.0)


def tis(x: Tensor, level: str, high: float) -> Tensor:
    """verl's truncated weights of x, a log-ratio."""
    total = x.sum(1, keepdim=True).expand_as(x) if level == "sequence" else x
    return total.clamp(-20, 20).exp().clamp(max=high)


TRL: dict[str, Any] = {"clip_high": 0.2, "log_ratio_bound": None}
ROWS: dict[str, Any] = {"num_seqs_global": 5}  # TRL averages over every row, whatever its mask
LOSSES_OF_TRAINERS: list[tuple[str, dict[str, Any], Callable[[Trainer], Tensor]]] = [
    ("verl vanilla", {"clip_high": 0.2, "dual_clip": 3.0}, lambda t: t.mean(t.verl_vanilla())),
    ("verl gspo", {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_agg": "seq-mean-token-mean"},
     lambda t: t.verl_seq_mean(t.verl_gspo())),
    ("verl sapo", {"loss": "sapo", "loss_agg": "seq-mean-token-mean"}, lambda t: t.verl_seq_mean(t.sapo(t.verl_ratio()))),
    ("verl cispo", {"loss": "cispo", "clip_high": 0.2}, lambda t: t.mean(t.verl_cispo())),
    ("verl kl loss and entropy", {"clip_high": 0.2, "dual_clip": 3.0, "kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.1},
     lambda t: t.mean(t.verl_vanilla()) - 0.1 * t.mean(t.entropy) + 0.3 * t.mean(t.low_var_kl())),
    ("verl token-mean over 2 ranks", {"clip_high": 0.2, "dual_clip": 3.0, "num_tokens_global": 90 / 2},
     lambda t: 2 * (t.verl_vanilla() * t.m).sum() / 90),
    ("verl token-level TIS", {"clip_high": 0.2, "dual_clip": 3.0, "rollout_correction": RolloutCorrection("token", high=1.1)},
     lambda t: t.mean(t.verl_vanilla() * tis(t.rho, "token", 1.1))),
    ("verl sequence-level TIS", {"clip_high": 0.2, "dual_clip": 3.0, "rollout_correction": RolloutCorrection("sequence", high=1.2)},
     lambda t: t.mean(t.verl_vanilla() * tis(t.rho, "sequence", 1.2))),
    ("verl IcePop", {"clip_high": 0.2, "dual_clip": 3.0, "rollout_correction": RolloutCorrection("token", "mask", low=0.9, high=1.1)},
     lambda t: t.mean(t.verl_vanilla() * t.rho.exp() * ((t.rho.exp() >= 0.9) & (t.rho.exp() <= 1.1)))),
    ("TRL grpo", {**TRL, **ROWS, "loss_agg": "seq-mean-token-mean"}, lambda t: t.row_mean(t.trl_clipped()).mean()),
    ("TRL bnpo", TRL, lambda t: t.mean(t.trl_clipped())),
    ("TRL dr_grpo", {**TRL, **ROWS, "loss_agg": "seq-mean-token-sum-norm", "norm_length": 32},
     lambda t: (t.trl_clipped() * t.m).sum() / (t.rows * 32)),
    ("TRL dapo", {**TRL, "num_tokens_global": 90 / 2 * 4 / 8},  # gradient_accumulation_steps=4, steps_per_generation=8
     lambda t: (t.trl_clipped() * t.m).sum() / (90 / 2 * (4 / 8))),
    ("TRL luspo", {**TRL, **ROWS, "ratio_level": "sequence", "loss_agg": "seq-mean-token-sum"},
     lambda t: (t.trl_clipped("sequence") * t.m).sum(1).mean()),
    ("TRL cispo", {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.1, "log_ratio_bound": None},  # epsilon_high=1.1
     lambda t: t.mean(-t.trl_c1("token").detach().clamp(max=1.1) * t.adv * t.leaf)),
    ("TRL sapo", {**ROWS, "loss": "sapo", "loss_agg": "seq-mean-token-mean", "log_ratio_bound": None},
     lambda t: t.row_mean(t.sapo(t.trl_c1("token"))).mean()),
    ("TRL gspo", {**TRL, **ROWS, "ratio_level": "sequence", "loss_agg": "seq-mean-token-mean"},
     lambda t: t.row_mean(t.trl_clipped("sequence").expand_as(t.m)).mean()),
    ("TRL delta", {**TRL, **ROWS, "dual_clip": 1.3, "loss_agg": "seq-mean-token-mean"},
     lambda t: t.row_mean(t.trl_clipped(delta=1.3)).mean()),
    ("TRL beta", {**TRL, "kl": "k3", "kl_coef": 0.3, "kl_weighting": "ratio", "kl_bound": None},
     lambda t: t.mean(t.trl_clipped() + 0.3 * t.trl_kl())),
    ("TRL beta, sequence level", {**TRL, "ratio_level": "sequence", "kl": "k3", "kl_coef": 0.3, "kl_weighting": "ratio", "kl_bound": None},
     lambda t: t.mean(t.trl_clipped("sequence") + 0.3 * t.trl_kl("sequence"))),
    ("TRL sequence_mask", {**TRL, "rollout_correction": RolloutCorrection("sequence", "mask", high=1.2, allow_missing=True)},
     lambda t: t.mean(t.trl_clipped() * t.trl_weight("sequence_mask", None, 1.2))),
    ("TRL token_truncate, sequence level", {**TRL, "ratio_level": "sequence",
                                            "rollout_correction": RolloutCorrection("token", "truncate", low=0.9, high=1.1)},
     lambda t: t.mean(t.trl_clipped("sequence") * t.trl_weight("token_truncate", 0.9, 1.1))),
    ("OpenRLHF gspo", {"clip_high": 0.2, "ratio_level": "sequence", "loss_agg": "seq-mean-token-mean"},
     lambda t: t.row_mean(t.trl_clipped("sequence").expand_as(t.m))[t.m.any(1)].mean()),
    ("Reinforce-Ada", {"dual_clip": 10.0}, lambda t: t.mean(t.verl_vanilla(0.2, 0.28, 10.0))),
]  # fmt: skip


@every_form
@pytest.mark.parametrize(("name", "options", "formula"), LOSSES_OF_TRAINERS, ids=[name for name, _, _ in LOSSES_OF_TRAINERS])
def test_losses_of_trainers(backend: str, name: str, options: dict[str, Any], formula: Callable[[Trainer], Tensor]) -> None:
    batch = padded(draw(3, (4, 7, 2, 9, 30)))
    trainer = Trainer(batch)
    want = formula(trainer)
    (grad,) = torch.autograd.grad(want, trainer.leaf)
    dtype, rtol = (torch.float64, 1e-7) if backend == "reference" else (torch.float32, 3e-6)
    got = run(batch, dtype, backend=backend, **options)
    assert got[0].item() == pytest.approx(want.item(), rel=rtol, abs=rtol)
    torch.testing.assert_close(got[2].double(), grad, rtol=rtol, atol=rtol * grad.abs().max().item())


def test_the_documentation_lists_these_trainers() -> None:
    page = (Path(__file__).parents[2] / "docs/operators.md").read_text()
    for name, _, _ in LOSSES_OF_TRAINERS:
        assert f"| {name} |" in page, name


@every_form
def test_batch_normalised_weights(backend: str) -> None:
    """verl divides the weights by their mean over the batch, which the metric of a first call over all of it is."""
    batch = padded(draw(3, (4, 7, 2, 9)))
    trainer = Trainer(batch)
    weight = tis(trainer.rho, "token", 1.1)
    want = trainer.mean(trainer.verl_vanilla() * weight / trainer.mean(weight))
    options: dict[str, Any] = {"clip_high": 0.2, "dual_clip": 3.0, "backend": backend}
    _, metrics, _ = run(batch, torch.float32, rollout_correction=RolloutCorrection("token", high=1.1), **options)
    mean = metrics["rollout_weight_mean"].item()
    value, metrics, _ = run(batch, torch.float32, rollout_correction=RolloutCorrection("token", high=1.1, normalizer=mean), **options)
    assert value.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["rollout_weight_mean"].item() == pytest.approx(1, rel=1e-6)


# Every form against the formulas


@every_build
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("loss", [*LOSSES, "ppo dual"])
def test_conforms(backend: str, loss: str, loss_agg: str) -> None:
    """Loss x aggregation x KL x correction x layout x kind of advantages and mask; masked values are NaN and infinite."""
    batch = draw()
    rows = padded(batch)
    per_token = batch["advantages"].repeat_interleave(batch["cu_seqlens"].diff())
    per_token = torch.where(batch["mask"], per_token, math.nan)
    base: dict[str, Any] = {"loss": loss.split()[0], "loss_agg": loss_agg}
    if "dual" in loss:
        base["dual_clip"] = 1.1
    shift = LOSS_AGGS.index(loss_agg) + len(loss)  # so that every correction meets every KL somewhere
    for i, kl in enumerate((None, *KL_ESTIMATORS)):
        correction = CORRECTIONS[(i + shift) % len(CORRECTIONS)]
        options = {**base, **({"kl": kl, "kl_coef": 0.3} if kl else {}), **({"rollout_correction": correction} if correction else {})}
        variant = VARIANTS[i % len(VARIANTS)]
        options |= {k: v for k, v in variant.items() if (kl or k != "kl_weighting") and (loss != "gspo" or k != "ratio_level")}
        what = f"{options}"
        want = truth(batch, **options)
        flat = {**batch, "mask": batch["mask"].float()} if i % 2 else batch
        if backend == "reference":
            assert_agrees(run(flat, backend=backend, **options), want, 1e-10, what)
        got = run(flat, torch.float32, backend=backend, **options)
        assert_agrees(got, want, 2e-5, what)
        plain = run(flat, torch.float32, backend="reference", **options)
        assert_no_worse(got[2], want[2], plain[2], 1e-6 * want[2].abs().max().item(), what)
        assert not got[2][~batch["mask"]].any()
        if i % 3 == 0:
            norm = {"norm_length": float(max(LENGTHS))} if loss_agg.endswith("norm") else {}
            wide = run(rows, torch.float32, backend=backend, **options, **norm)
            each = run({**batch, "advantages": per_token}, torch.float32, backend=backend, **options)
            for again, kept in ((wide, wide[2][rows["mask"]]), (each, each[2][batch["mask"]])):
                # Torch sums rows of another length in another order: with AVX-512 the reference differs by 3.8e-9 at 1.2e-3.
                atol = 1e-6 * got[2].abs().max().item() if backend == "reference" else 1e-9
                torch.testing.assert_close(kept, got[2][batch["mask"]], rtol=1e-6, atol=atol)
                torch.testing.assert_close(again[0], got[0], rtol=1e-6, atol=1e-9)


@every_build
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_ratios_stay_finite(backend: str, loss: str) -> None:
    """Log-ratios far past the bounds, up and down, with either sign of the advantage."""
    gap = torch.tensor([[-300.0, -40, -20.5, -19, 0, 19, 20.5, 40, 300]]).double()
    old = torch.full_like(gap, -1.0).expand(2, -1)
    batch = {"logprobs": old + gap, "old_logprobs": old, "ref_logprobs": old, "rollout_logprobs": old - gap}
    batch |= {"advantages": torch.tensor([1.0, -1.0]).double(), "mask": torch.ones(2, 9, dtype=torch.bool)}
    options: dict[str, Any] = {"loss": loss, "kl": "k3", "kl_coef": 0.1, "rollout_correction": RolloutCorrection("token")}
    got = run(batch, torch.float32, backend=backend, **options)
    want = run(batch, backend="reference", **options)
    assert got[0].isfinite()
    assert got[2].isfinite().all()
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    for name, x in want[1].items():
        torch.testing.assert_close(got[1][name], x, rtol=1e-5, atol=1e-6)


@every_build
def test_small_drift_is_resolved(backend: str) -> None:
    """k3 near 0 is d^2 / 2; computed as a difference of numbers near 1 in fp32 it would be noise at d = 1e-4."""
    old = torch.zeros(1, 64)
    logprobs = torch.full((1, 64), 1e-4)
    _, metrics = policy_loss(
        logprobs, torch.ones(1), torch.ones(1, 64), old_logprobs=old, ref_logprobs=old, rollout_logprobs=-logprobs, kl="k3",
        backend=backend,
    )  # fmt: skip
    tolerance = 1e-4 if backend != "reference" else 10  # the reference is as exact as its dtype
    for name in ("approx_kl_k3", "rollout_kl_k3", "kl"):
        assert metrics[name].item() == pytest.approx(5e-9, rel=tolerance), name


@every_form
def test_rollout_logprobs_may_be_missing(backend: str) -> None:
    """A NaN counts as the old logprob where the correction allows it: its own ratio is 1, the sequence's leaves it out."""
    old = torch.tensor([-1.0, -2, -3])
    rollout = torch.tensor([-1 - math.log(2), math.nan, -3 - math.log(1.25)])
    for level, weights in (("token", [2, 1, 1.25]), ("sequence", [2.5, 2.5, 2.5])):
        logprobs = old.clone().requires_grad_()
        loss, metrics = policy_loss(
            logprobs, torch.ones(1), torch.ones(3), old_logprobs=old, rollout_logprobs=rollout, cu_seqlens=torch.tensor([0, 3]),
            rollout_correction=RolloutCorrection(level, high=9, allow_missing=True), backend=backend,
        )  # fmt: skip
        loss.backward()
        np.testing.assert_allclose(logprobs.grad.numpy(), np.asarray(weights) / -3, rtol=1e-5)
        assert metrics["rollout_kl_k1"].item() == pytest.approx(-math.log(2.5) / 3, rel=1e-5)


@every_form
def test_nan_in_a_counted_token_is_not_hidden(backend: str) -> None:
    for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages"):
        batch = {k: torch.zeros(1, 4) for k in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs")}
        batch |= {"advantages": torch.ones(1, 4), "mask": torch.ones(1, 4)}
        batch[name] = torch.tensor([[0, math.nan, 0, 0]])
        for loss in LOSSES:
            for correction in CORRECTIONS[1:]:
                options: dict[str, Any] = {"loss": loss, "kl": "k3", "kl_coef": 0.1, "rollout_correction": correction}
                value, _, _ = run(batch, torch.float32, backend=backend, **options)
                assert value.isnan(), (name, options)


# Accumulation


def part_of(batch: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Sequences first up to last of a packed batch."""
    a, b = batch["cu_seqlens"][[first, last]].tolist()
    part = {k: v[a:b] for k, v in batch.items() if v.shape == batch["mask"].shape}
    return {**part, "advantages": batch["advantages"][first:last], "cu_seqlens": batch["cu_seqlens"][first : last + 1] - a}


@every_form
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("loss", [*LOSSES, "ppo of sequences"])
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=9),
    cuts=st.lists(st.integers(0, 9), max_size=5),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_split_adds_up_to_the_big_batch(
    backend: str, loss: str, loss_agg: str, lengths: list[int], cuts: list[int], ranks: int, seed: int
) -> None:
    """Micro-batches and ranks that share denominators give the loss and gradient of one batch, however it is cut.

    A rank sums its micro-batches and the ranks are averaged, so that each is given the global counts divided by their number.
    """
    batch = draw(seed, (1, *lengths))
    dtype, rtol = (torch.float64, 1e-12) if backend == "reference" else (torch.float32, 2e-6)
    options: dict[str, Any] = {
        "loss": loss.split()[0], "loss_agg": loss_agg, "backend": backend, "kl": "k3", "kl_coef": 0.1, "kl_weighting": "ratio",
        "entropy_coef": 0.2, "rollout_correction": CORRECTIONS[1 + seed % 5],
    }  # fmt: skip
    if "sequences" in loss:
        options["ratio_level"] = "sequence"
    if loss_agg.endswith("norm"):
        options["norm_length"] = 64
    whole = run(batch, dtype, **options)
    spans = itertools.pairwise(batch["cu_seqlens"].tolist())
    num_seqs = sum(bool(batch["mask"][a:b].any()) for a, b in spans)
    shared = {"num_tokens_global": int(batch["mask"].sum()) / ranks, "num_seqs_global": num_seqs / ranks}
    edges = sorted({0, *(min(c, len(lengths) + 1) for c in cuts), len(lengths) + 1})
    pieces = [run(part_of(batch, a, b), dtype, **options, **shared) for a, b in itertools.pairwise(edges)]
    size = whole[2].abs().max().item()
    grad = torch.cat([piece[2] for piece in pieces]) / ranks
    torch.testing.assert_close(grad, whole[2], rtol=rtol, atol=rtol * size)
    terms = whole[0].abs().item() + size * len(grad)
    torch.testing.assert_close(sum(piece[0] for piece in pieces) / ranks, whole[0], rtol=0, atol=rtol * terms)


@every_form
def test_the_incoming_gradient_scales(backend: str) -> None:
    batch = draw()
    one, half = run(batch, torch.float32, backend=backend), run(batch, torch.float32, scale=0.5, backend=backend)
    torch.testing.assert_close(half[2], one[2] * 0.5, rtol=1e-6, atol=0)
    leaf = torch.zeros(1, 2, requires_grad=True)
    loss, _ = policy_loss(leaf, torch.ones(1), torch.ones(1, 2), backend=backend)
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad.tolist() == [[-1.0, -1.0]]  # twice -1/2: the second backward finds the gradient as it was


@native_form
def test_second_derivative_raises(backend: str) -> None:
    """Of a square of the loss: what came through the incoming gradient alone would be a part of it."""
    leaf = torch.randn(1, 3, requires_grad=True)
    loss, _ = policy_loss(leaf, torch.ones(1), torch.ones(1, 3), old_logprobs=torch.zeros(1, 3), backend=backend)
    (grad,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


# Edges


@every_build
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counted(backend: str, loss: str) -> None:
    """Fully masked, no tokens, no sequences: loss 0, gradient 0, no NaN anywhere."""
    for loss_agg in LOSS_AGGS:
        for shape, cu in (((2, 3), None), ((6,), [0, 2, 6]), ((0,), [0, 0, 0]), ((0,), [0]), ((0, 3), None), ((2, 0), None)):
            poison = torch.full(shape, math.nan)
            batch = {"logprobs": poison, "old_logprobs": poison, "rollout_logprobs": poison, "ref_logprobs": poison}
            num_seqs = shape[0] if cu is None else len(cu) - 1
            batch |= {"advantages": torch.ones(num_seqs), "mask": torch.zeros(shape, dtype=torch.bool)}
            if cu is not None:
                batch["cu_seqlens"] = torch.tensor(cu)
            options: dict[str, Any] = {"kl": "k3", "kl_coef": 1.0, "rollout_correction": CORRECTIONS[4], "loss_agg": loss_agg}
            value, metrics, grad = run(batch, torch.float32, loss=loss, backend=backend, **options)
            assert value.item() == 0
            assert grad.shape == shape
            assert not grad.any()
            assert {name for name, x in metrics.items() if x.item() != 0} <= {"num_masked"}
            assert metrics["num_masked"].item() == math.prod(shape)


@every_build
def test_one_token_sequences(backend: str) -> None:
    batch = draw(2, (1,) * 50)
    batch["mask"][:] = torch.arange(50) % 3 != 0
    batch = {k: v.nan_to_num(0, 0, 0) if v.is_floating_point() else v for k, v in batch.items()}
    for loss in LOSSES:
        for loss_agg in LOSS_AGGS:
            got = run(batch, torch.float32, loss=loss, loss_agg=loss_agg, backend=backend)
            assert_agrees(got, truth(batch, loss=loss, loss_agg=loss_agg), 2e-5, f"{loss} {loss_agg}")


@every_form
def test_layouts_and_dtypes_it_takes(backend: str) -> None:
    """Strides, offset views, int32 offsets, half-precision companions, float64 masks."""
    batch = draw()
    want = run(batch, torch.float32, rollout=True, backend=backend)
    wide = {k: torch.stack([v, torch.full_like(v, 7)], -1)[..., 0] if v.shape == batch["mask"].shape else v for k, v in batch.items()}
    assert not wide["logprobs"].is_contiguous()
    wide |= {"cu_seqlens": batch["cu_seqlens"].int(), "mask": batch["mask"].double()}
    got = run(wide, torch.float32, rollout=True, backend=backend)
    assert_same_bits([want[0], want[2], *want[1].values()], [got[0], got[2], *got[1].values()])
    leaf = torch.zeros(1, 2, requires_grad=True)
    loss, _ = policy_loss(
        leaf, torch.ones(1).bfloat16(), torch.ones(1, 2).half(), old_logprobs=torch.zeros(1, 2).bfloat16(), backend=backend
    )
    assert loss.dtype == torch.float32
    assert loss.item() == -1


@every_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_read_and_written_as_it_is(backend: str, loss: str, dtype: torch.dtype) -> None:
    """Against float64 of the same rounded numbers: loss and metrics as exact as from float32, the gradient rounded once."""
    lengths = (*LENGTHS, 700)
    batch = {k: v.to(dtype).double() if k.endswith(("logprobs", "entropy")) else v for k, v in draw(6, lengths).items()}
    options: dict[str, Any] = {"loss": loss, "kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.1, "rollout_correction": CORRECTIONS[3]}
    want = run(batch, **options)
    for mixed in (False, True):  # companions of another dtype than logprobs
        call = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        for name in ("old_logprobs", "ref_logprobs", "entropy") if mixed else ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
            call[name] = call[name].to(dtype)
        leaf = call.pop("logprobs").to(dtype).requires_grad_()
        value, metrics = policy_loss(leaf, call.pop("advantages"), call.pop("mask"), backend=backend, **call, **options)
        (grad,) = torch.autograd.grad(value, leaf)
        assert (value.dtype, grad.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(value.double(), want[0], rtol=2e-5, atol=2e-5)
        for name, x in want[1].items():
            torch.testing.assert_close(metrics[name], x, rtol=2e-5, atol=2e-5)
        info, size = torch.finfo(dtype), want[2].abs().max().item()
        atol = 2e-6 * size + info.smallest_normal * info.eps / 2  # half a step of float16 near 0 is 3e-8
        torch.testing.assert_close(grad.double(), want[2], rtol=info.eps / 2 * 1.01, atol=atol)


@every_form
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
def test_entropy_bonus(backend: str, loss_agg: str) -> None:
    """It takes the aggregate of the entropies off the loss, and its gradient goes to them; without a coefficient it is a metric."""
    batch = {k: v.float() if v.is_floating_point() else v for k, v in draw().items()}
    layout = {"cu_seqlens": batch["cu_seqlens"], "loss_agg": loss_agg, "backend": backend}
    counted = batch["entropy"][batch["mask"]].double()
    for dtype in (torch.float32, torch.bfloat16):
        logprobs, entropy = (batch[k].to(dtype).requires_grad_() for k in ("logprobs", "entropy"))
        loss, metrics = policy_loss(logprobs, batch["advantages"], batch["mask"], entropy=entropy, entropy_coef=0.25, **layout)
        plain, _ = policy_loss(logprobs, batch["advantages"], batch["mask"], **layout)
        # reinforce with advantage -1 on the entropies is their plain aggregate.
        bonus, _ = policy_loss(entropy, -torch.ones(len(LENGTHS)), batch["mask"], loss="reinforce", **layout)
        torch.testing.assert_close(loss, plain - 0.25 * bonus, rtol=1e-6, atol=1e-7)
        want = torch.autograd.grad(plain - 0.25 * bonus, (logprobs, entropy))
        for got, expected in zip(torch.autograd.grad(loss, (logprobs, entropy)), want, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=0)
        assert metrics["entropy"].item() == pytest.approx(counted.mean().item(), rel=1e-6 if dtype == torch.float32 else 0.01)
    loss, metrics = policy_loss(batch["logprobs"], batch["advantages"], batch["mask"], entropy=batch["entropy"], **layout)
    assert loss.item() == pytest.approx(policy_loss(batch["logprobs"], batch["advantages"], batch["mask"], **layout)[0].item(), rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx(counted.mean().item(), rel=1e-6)


@native_form
def test_threads_memory_and_repetition_change_nothing(backend: str) -> None:
    """Past the grain and the chunk of the kernel: many short sequences, and one longer than a chunk."""
    lengths = (*[37] * 300, 20_000, *[501] * 10)
    batch = {k: v.nan_to_num(0, 0, 0) if v.is_floating_point() else v for k, v in draw(5, lengths).items()}
    for loss in LOSSES:
        options: dict[str, Any] = {"kl": "k3", "kl_coef": 0.1, "rollout_correction": CORRECTIONS[3], "loss_agg": "seq-mean-token-mean"}

        def results(loss: str = loss, options: dict[str, Any] = options) -> list[Tensor]:
            value, metrics, grad = run(batch, torch.float32, loss=loss, backend=backend, **options)
            return [value, grad, *metrics.values()]

        assert_repeatable(results)
        want = run(batch, loss=loss, **options)
        assert_agrees(run(batch, torch.float32, loss=loss, backend=backend, **options), want, 2e-5, loss)


# Errors

BASE = {"logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2), "mask": torch.ones(2, 3)}
PACKED = {"logprobs": torch.zeros(4), "advantages": torch.zeros(2), "mask": torch.ones(4)}


@every_form
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logprobs": torch.zeros(2, 3).int()}, r"logprobs is \[2, 3\] int32 on cpu; float32, bfloat16, float16 or float64"),
        ({"logprobs": torch.zeros(6)}, r"logprobs of shape \[6\] without cu_seqlens; packed \[T\] with cu_seqlens, or padded"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"logprobs of shape \[2, 3\] with cu_seqlens"),
        ({"mask": torch.ones(2, 2)}, r"mask is \[2, 2\] float32 on cpu; \[2, 3\] bool or floating on cpu"),
        ({"mask": torch.ones(2, 3, dtype=torch.int64)}, "mask is .* int64"),
        ({"advantages": torch.zeros(3)}, r"advantages is \[3\] .*\[2\] \(one a sequence\) or \[2, 3\] \(one a token\)"),
        ({"old_logprobs": torch.zeros(2)}, r"old_logprobs is \[2\]"),
        ({"rollout_logprobs": torch.zeros(2, 3, dtype=torch.int64)}, "rollout_logprobs is .* int64"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 3, 5])}, r"cu_seqlens\[2\] = 5; offsets from 0 that never decrease and end at 4"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 2, 3])}, r"cu_seqlens\[2\] = 3"),
        ({**PACKED, "cu_seqlens": torch.tensor([1, 2, 4])}, r"cu_seqlens\[0\] = 1"),
        ({**PACKED, "advantages": torch.zeros(3), "cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"cu_seqlens\[2\] = 2"),
        ({"loss": "grpo"}, "unknown loss 'grpo'; known: cispo, gspo, ppo, reinforce, sapo; did you mean"),
        ({"loss_agg": "seq-mean"}, "unknown loss_agg 'seq-mean'"),
        ({"kl": "k4", "ref_logprobs": torch.zeros(2, 3)}, "unknown kl 'k4'"),
        ({"kl": "k3"}, "kl='k3' without ref_logprobs; both or neither"),
        ({"ref_logprobs": torch.zeros(2, 3)}, "ref_logprobs without kl; both or neither"),
        ({"kl_coef": 0.1}, "kl_coef=0.1 without kl; kl, the estimator"),
        ({"rollout_correction": RolloutCorrection()}, "rollout_correction without rollout_logprobs"),
        ({"ratio_level": "batch"}, "unknown ratio_level 'batch'; known: sequence, token"),
        ({"ratio_level": "sequence", "loss": "gspo"}, 'ratio_level="sequence" with loss="gspo"; one of them; loss="ppo" where'),
        ({"log_ratio_bound": 0.0}, "log_ratio_bound=0.0; log_ratio_bound > 0"),
        ({"kl_bound": -1}, "kl_bound=-1; kl_bound > 0"),
        ({"kl_weighting": "ratio"}, "kl_weighting='ratio' without kl; kl, the estimator"),
        ({"kl_weighting": "all", "kl": "k3", "ref_logprobs": torch.zeros(2, 3)}, "unknown kl_weighting 'all'"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 without entropy; entropy, one value a token"),
        ({"entropy": torch.zeros(2)}, r"entropy is \[2\] float32 on cpu; \[2, 3\] floating on cpu, one value a token"),
        ({"clip_low": 1.5}, "clip_low=1.5, clip_high=0.28"),
        ({"clip_high": 10**400}, "clip_high is an integer of 1329 bits; a number that a float holds"),
        ({"num_tokens_global": 10**5000}, "num_tokens_global is an integer of 16610 bits"),
        ({"norm_length": -(10**400), "loss_agg": "seq-mean-token-sum-norm"}, "norm_length is an integer of 1329 bits"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 with loss='ppo'; dual_clip > 1"),
        ({"dual_clip": 3.0, "loss": "gspo"}, "dual_clip=3.0 with loss='gspo'"),
        ({"num_tokens_global": 0}, "num_tokens_global=0; num_tokens_global > 0"),
        ({"norm_length": 5}, "norm_length=5 with loss_agg='token-mean'"),
        ({"backend": "cuda"}, 'backend "cuda" cannot run here: '),
    ],
)
def test_errors_are_one_line(backend: str, arguments: dict[str, Any], message: str) -> None:
    call = {**BASE, "backend": backend, **arguments}
    with pytest.raises(InputError, match=f"^policy_loss: .*{message}") as error:
        policy_loss(call.pop("logprobs"), call.pop("advantages"), call.pop("mask"), **call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "batch"}, "unknown level 'batch'; known: sequence, token"),
        ({"mode": "clip"}, "unknown mode 'clip'"),
        ({"high": 0.0}, "high=0.0; high > 0"),
        ({"high": 10**400}, "high is an integer of 1329 bits"),
        ({"normalizer": 0.0}, "normalizer=0.0; a finite number > 0"),
        ({"low": 3.0, "mode": "mask"}, "low=3.0, high=2.0; 0 <= low <= high"),
    ],
)
def test_corrections_that_cannot_hold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^RolloutCorrection: {message}"):
        RolloutCorrection(**arguments)


# torch


@native_form
def test_opcheck(backend: str) -> None:
    cu = torch.tensor([0, 3, 3, 8])
    others = [torch.randn(8), torch.randn(8).bfloat16(), torch.randn(8)]
    chosen = Settings(dual_clip=3.0, loss_agg="seq-mean-token-mean", kl="k3", kl_coef=0.1, entropy_coef=0.1)
    for leaf, wants in ((torch.randn(8, requires_grad=True), True), (torch.randn(8).half(), False)):
        entropy = torch.rand(8, requires_grad=wants)
        mask = torch.ones(8, dtype=torch.bool)
        args = (leaf, torch.randn(3), mask, *others, entropy, cu, False, wants, numbers(chosen))
        torch.library.opcheck(cpu_form._op.op, args)
    rows = (torch.randn(2, 4, requires_grad=True), torch.randn(2, 4), torch.ones(2, 4), None, None, None, None, None)
    torch.library.opcheck(cpu_form._op.op, (*rows, True, False, numbers(Settings(num_tokens_global=7))))


@every_form
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(backend: str) -> None:
    batch = {k: v.float().nan_to_num(0, 0, 0) if v.is_floating_point() else v for k, v in draw().items()}
    order = ("logprobs", "advantages", "mask", "old_logprobs", "rollout_logprobs", "ref_logprobs", "cu_seqlens")

    def step(logprobs: Tensor, advantages: Tensor, mask: Tensor, old: Tensor, rollout: Tensor, ref: Tensor, cu: Tensor) -> Any:
        loss, metrics = policy_loss(
            logprobs * 1.0, advantages, mask, old_logprobs=old, rollout_logprobs=rollout, ref_logprobs=ref, cu_seqlens=cu, kl="k3+",
            kl_coef=0.1, rollout_correction=RolloutCorrection("sequence"), loss_agg="seq-mean-token-mean", backend=backend,
        )  # fmt: skip
        return loss * 0.5, metrics

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = batch["logprobs"].clone().requires_grad_()
        loss, metrics = f(leaf, *(batch[name] for name in order[1:]))
        loss.backward()
        results.append([loss.detach(), leaf.grad, *metrics.values()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


def test_linear_policy_loss_takes_the_same_options() -> None:
    """From a head that is the identity on log-probabilities, whatever the options."""
    mine, its = (inspect.signature(f).parameters for f in (policy_loss, linear_policy_loss))
    own = {"logprobs", "entropy"}  # what the head computes
    assert {k: its[k].default for k in mine if k not in own} == {k: x.default for k, x in mine.items() if k not in own}
    probs = torch.rand(6, 3, dtype=torch.float64).softmax(-1)
    ids, cu = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 2, 6])
    logprobs, entropy = probs.log()[torch.arange(6), ids], -(probs * probs.log()).sum(-1)
    adv, mask = torch.tensor([1.0, -2.0]).double(), torch.ones(6)
    options: dict[str, Any] = {
        "old_logprobs": logprobs - 0.3, "rollout_logprobs": logprobs - 0.2, "ref_logprobs": logprobs + 0.1, "cu_seqlens": cu,
        "ratio_level": "sequence", "log_ratio_bound": 0.25, "kl": "k3", "kl_coef": 0.1, "kl_weighting": "ratio", "kl_bound": 1e-3,
        "entropy_coef": 0.1, "rollout_correction": RolloutCorrection("token", high=1.05, normalizer=0.9),
    }  # fmt: skip
    want, metrics = policy_loss(logprobs, adv, mask, entropy=entropy, **options)
    got, its_metrics = linear_policy_loss(probs.log(), torch.eye(3, dtype=torch.float64), ids, adv, mask, **options)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert {k: v.item() for k, v in its_metrics.items()} == pytest.approx({k: v.item() for k, v in metrics.items()})


def test_the_metrics_are_documented() -> None:
    for name in METRICS:
        assert name in (policy_loss.__doc__ or ""), name
