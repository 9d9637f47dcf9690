"""`policy_loss` at its edges: nothing counted, layouts and dtypes, errors, and what torch asks of an operator."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from conformance import assert_repeatable, assert_same_bits
from policy_loss_truth import (
    CORRECTIONS,
    LENGTHS,
    assert_agrees,
    draw,
    every_build,
    every_form,
    native_form,
    run,
    truth,
)
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import linear_policy_loss, policy_loss
from reinforce_ada.ops._dispatch import operator
from reinforce_ada.ops.policy_loss import LOSS_AGGS, LOSSES, METRICS, RolloutCorrection
from reinforce_ada.ops.policy_loss.contract import Settings, numbers

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
        torch.library.opcheck(operator("policy_loss", backend).op, args)
    rows = (torch.randn(2, 4, requires_grad=True), torch.randn(2, 4), torch.ones(2, 4), None, None, None, None, None)
    torch.library.opcheck(operator("policy_loss", backend).op, (*rows, True, False, numbers(Settings(num_tokens_global=7))))


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
