"""`policy_loss`: literal numbers, a truth written sequence by sequence with autograd in float64, and every build against it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conformance import assert_no_worse, assert_repeatable, assert_same_bits, builds
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import policy_loss
from reinforce_ada.ops.policy_loss import KL_ESTIMATORS, LOSS_AGGS, LOSSES, METRICS, RolloutCorrection
from reinforce_ada.ops.policy_loss import cpu as cpu_form

every_build = pytest.mark.parametrize("backend", builds("policy_loss"), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("policy_loss", every_isa=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("policy_loss", reference=False, every_isa=False), indirect=True)

CORRECTIONS = (
    None,
    RolloutCorrection("token", "truncate", high=1.1),
    RolloutCorrection("token", "mask", low=0.9, high=1.2),
    RolloutCorrection("sequence", "truncate", high=1.2),
    RolloutCorrection("sequence", "mask", high=1.3),
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
    for i, name in enumerate(("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs")):
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
    call = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if reads.get(k, True)}
    leaf = call.pop("logprobs").requires_grad_()
    loss, metrics = policy_loss(leaf, call.pop("advantages"), call.pop("mask"), **call, **options)
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    return loss.detach(), metrics, grad


def truth(
    batch: dict[str, Tensor],
    loss: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    loss_agg: str = "token-mean",
    rollout_correction: RolloutCorrection | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    longest: int | None = None,
) -> Run:
    """The formulas, one sequence at a time over its counted tokens only; packed, float64."""
    leaf = batch["logprobs"].clone().requires_grad_()
    spans = list(zip(batch["cu_seqlens"][:-1].tolist(), batch["cu_seqlens"][1:].tolist(), strict=True))
    kept = [torch.arange(a, b)[batch["mask"][a:b]] for a, b in spans]
    counted = [ids for ids in kept if len(ids)]
    num_tokens, num_seqs = sum(map(len, counted)), len(counted)
    longest = longest or max(b - a for a, b in spans)
    low, high = 1 - clip_low, 1 + clip_high
    total = leaf.new_zeros(())
    seen: dict[str, list[Tensor]] = {}

    for i, ids in enumerate(kept):
        if not len(ids):
            continue
        logp, adv = leaf[ids], batch["advantages"][i]
        old = batch["old_logprobs"][ids] if "old_logprobs" in batch else logp.detach()
        d = logp - old
        ratio = d.clamp(-20, 20).exp()
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
        x = d.detach().clamp(-20, 20)
        seen.setdefault("approx_kl_k1", []).append(-x)
        seen.setdefault("approx_kl_k3", []).append(x.expm1() - x)
        seen.setdefault("ratio", []).append(ratio.detach())
        if rollout_correction is not None:
            gap = (old - batch["rollout_logprobs"][ids]).detach()
            rho = (gap.sum().expand(len(ids)) if rollout_correction.level == "sequence" else gap).clamp(-20, 20).exp()
            if rollout_correction.mode == "truncate":
                weight = rho.clamp(max=rollout_correction.high)
            else:
                weight = rho * ((rho <= rollout_correction.high) & (rho >= (rollout_correction.low or 0)))
            value = value * weight
            seen.setdefault("rollout_kl_k1", []).append(-gap)
            seen.setdefault("rollout_kl_k3", []).append(gap.expm1() - gap)
            seen.setdefault("rollout_weight", []).append(weight)
        if kl is not None:
            x = logp - batch["ref_logprobs"][ids]
            estimates = {"k1": x, "abs": x.abs(), "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}
            estimate = estimates[kl.rstrip("+")]
            if kl.endswith("+"):
                estimate = estimate.detach() + (estimates["k2"] - estimates["k2"].detach())
            value = value + kl_coef * estimate
            seen.setdefault("kl", []).append(estimate.detach())
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
    for given in ({}, {"old_logprobs": batch["logprobs"]}):
        value, metrics, grad = run({**batch, **given}, torch.float32, loss=loss, backend=backend)
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)
        level = {"reinforce": batch["logprobs"], "cispo": batch["logprobs"], "sapo": torch.tensor([[2 / 1.0], [2 / 1.05]])}
        expected = -(batch["advantages"][:, None] * level.get(loss, torch.ones(2, 3))).expand(2, 3).mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert ("ratio_mean" in metrics) == bool(given)


@every_form
def test_presets_of_trainers(backend: str) -> None:
    """What TRL, verl and Reinforce-Ada compute, spelled out, from the arguments that mean it."""
    batch = padded(draw(3, (4, 7, 2, 9)))
    m = batch["mask"].double()
    clean = {k: torch.where(batch["mask"], v, 0) for k, v in batch.items() if k.endswith("logprobs")}
    r = (clean["logprobs"] - clean["old_logprobs"]).exp()
    adv = batch["advantages"][:, None]

    def clipped(low: float, high: float) -> Tensor:
        return -torch.min(r * adv, r.clamp(1 - low, 1 + high) * adv) * m

    k3 = ((clean["ref_logprobs"] - clean["logprobs"]).exp() - 1 - (clean["ref_logprobs"] - clean["logprobs"])) * m
    cases = [
        ("TRL grpo", {"loss_agg": "seq-mean-token-mean", "clip_high": 0.2}, (clipped(0.2, 0.2).sum(1) / m.sum(1)).mean()),
        ("TRL dr_grpo", {"loss_agg": "seq-mean-token-sum-norm", "clip_high": 0.2, "norm_length": 32},
         clipped(0.2, 0.2).sum() / (4 * 32)),
        ("TRL dapo", {"num_tokens_global": 100}, clipped(0.2, 0.28).sum() / 100),
        ("TRL cispo", {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},  # epsilon_high=5: the cap itself
         -(r.clamp(max=5) * adv * clean["logprobs"] * m).sum() / m.sum()),
        ("verl vanilla", {"clip_high": 0.2, "dual_clip": 3.0},
         torch.where(adv < 0, torch.min(clipped(0.2, 0.2), -3 * adv * m), clipped(0.2, 0.2)).sum() / m.sum()),
        ("verl kl loss", {"clip_high": 0.2, "kl": "k3", "kl_coef": 0.001},
         (clipped(0.2, 0.2) + 0.001 * k3).sum() / m.sum()),
        ("Reinforce-Ada", {"dual_clip": 10.0},
         torch.where(adv < 0, torch.min(clipped(0.2, 0.28), -10 * adv * m), clipped(0.2, 0.28)).sum() / m.sum()),
    ]  # fmt: skip
    for name, options, want in cases:
        dtype = torch.float64 if backend == "reference" else torch.float32
        assert run(batch, dtype, backend=backend, **options)[0].item() == pytest.approx(want.item(), rel=2e-6), name


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
                torch.testing.assert_close(kept, got[2][batch["mask"]], rtol=1e-6, atol=1e-9)
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


@every_form
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
def test_micro_batches_add_up_to_the_big_batch(backend: str, loss_agg: str) -> None:
    """With global denominators the sum over micro-batches is the loss and gradient of one batch, whatever their sizes."""
    batch = draw(1, (5, 1, 16, 3, 9, 33))
    dtype, rtol = (torch.float64, 1e-12) if backend == "reference" else (torch.float32, 2e-6)
    cu = batch["cu_seqlens"]
    seqs = sum(bool(batch["mask"][a:b].any()) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    shared: dict[str, Any] = {"num_tokens_global": int(batch["mask"].sum()), "num_seqs_global": seqs}
    if loss_agg.endswith("norm"):
        shared["norm_length"] = 64
    for loss in ("ppo", "gspo"):
        options: dict[str, Any] = {"loss": loss, "loss_agg": loss_agg, "backend": backend, "kl": "k2", "kl_coef": 0.1,
                                   "rollout_correction": CORRECTIONS[3]}  # fmt: skip
        local = {"norm_length": 64} if loss_agg.endswith("norm") else {}
        whole = run(batch, dtype, **options, **local)
        value, grads = torch.zeros((), dtype=dtype), []
        for first, last in ((0, 1), (1, 4), (4, 6)):
            a, b = int(cu[first]), int(cu[last])
            part = {k: v[a:b] for k, v in batch.items() if v.shape == batch["mask"].shape}
            part |= {"advantages": batch["advantages"][first:last], "cu_seqlens": cu[first : last + 1] - a}
            piece = run(part, dtype, **options, **shared)
            value += piece[0]
            grads.append(piece[2])
        torch.testing.assert_close(value, whole[0], rtol=rtol, atol=0)
        torch.testing.assert_close(torch.cat(grads), whole[2], rtol=rtol, atol=0)


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
        ({"logprobs": torch.zeros(2, 3).bfloat16()}, r"logprobs is \[2, 3\] bfloat16 on cpu; float32 or float64"),
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
        ({"clip_low": 1.5}, "clip_low=1.5, clip_high=0.28"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 with loss='ppo'; dual_clip > 1"),
        ({"dual_clip": 3.0, "loss": "gspo"}, "dual_clip=3.0 with loss='gspo'"),
        ({"num_tokens_global": 0}, "num_tokens_global=0; num_tokens_global > 0"),
        ({"norm_length": 5}, "norm_length=5 with loss_agg='token-mean'"),
        ({"backend": "cuda"}, 'backend "cuda" cannot run here: this version has no such form'),
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
        ({"low": 0.5}, 'low=0.5 with mode="truncate"; truncation only has high; use mode="mask"'),
        ({"low": 3.0, "mode": "mask"}, "low=3.0, high=2.0; 0 <= low <= high"),
    ],
)
def test_corrections_that_cannot_hold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^RolloutCorrection: {message}"):
        RolloutCorrection(**arguments)


# torch


@native_form
def test_opcheck(backend: str) -> None:
    batch = {k: v.float() if v.is_floating_point() else v for k, v in draw(4, (3, 0, 5)).items()}
    mask = torch.ones(8, dtype=torch.bool)
    names = ("old_logprobs", "rollout_logprobs", "ref_logprobs")
    others = [torch.randn(8) for _ in names]
    settings = (1, 0.2, 0.28, 3.0, 1, 0.0, 0.0, 0.0, 3, 0.0, 2.0, 2, False, 0.1)
    for leaf in (torch.randn(8, requires_grad=True), torch.randn(8)):
        args = (leaf, batch["advantages"], False, mask, *others, batch["cu_seqlens"], *settings)
        torch.library.opcheck(cpu_form._op.op, args)
    rows = (torch.randn(2, 4, requires_grad=True), torch.randn(2, 4), True, torch.ones(2, 4), None, None, None, None)
    torch.library.opcheck(cpu_form._op.op, (*rows, 3, 0.2, 0.28, math.inf, 0, 7.0, 0.0, 0.0, 0, 0.0, 2.0, 0, False, 0.0))


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


def test_the_metrics_are_documented() -> None:
    for name in METRICS:
        assert name in (policy_loss.__doc__ or ""), name
