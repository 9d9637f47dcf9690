"""`policy_loss`: literal numbers, and every build against the truth written sequence by sequence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conformance import assert_no_worse, padded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_loss_truth import CORRECTIONS, LENGTHS, VARIANTS, assert_agrees, draw, every_build, every_form, native_form, run, truth
from torch import Tensor

from reinforce_ada.ops import policy_loss
from reinforce_ada.ops.policy_loss import KL_ESTIMATORS, LOSS_AGGS, LOSSES, RolloutCorrection

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
