"""The gradients of `linear_policy_loss`: which are computed, what is held meanwhile, and where the weight's goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import Peak, assert_same_bits
from linear_policy_loss_scene import (
    CASES,
    LEAVES,
    LENGTHS,
    D,
    T,
    V,
    assert_as_good,
    draw,
    dtypes,
    evaluate,
    every_build,
    every_form,
    inputs_of,
    native_build,
    native_form,
)
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import _products, _torch, linear_policy_loss
from reinforce_ada.ops.linear_policy_loss import cpu as cpu_form
from reinforce_ada.ops.linear_token_logprobs import cpu as scoring

# Gradients


@native_build
@pytest.mark.parametrize("case", ["on-policy", "sequence ratio"])
@dtypes
def test_frozen_parts_cost_nothing(backend: str, dtype: torch.dtype, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not wanted is neither computed nor allocated, and the others do not notice."""
    batch, options = inputs_of(dtype), {**CASES[case], "backend": backend}
    want = evaluate(batch, **options)
    rest = {k: batch[k] for k in ("token_ids", "advantages", "mask", "cu_seqlens")} | {"old": batch["old_logprobs"]}
    old = {} if options.pop("old", True) is False else {"old_logprobs": rest["old"]}
    del rest["old"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed a gradient that nobody wants")

    for frozen, product in (("weight", (_products.Hidden, "add_weight_gradient")), ("hidden", (None, "add_hidden_gradient"))):
        with monkeypatch.context() as patched:
            for module in (cpu_form, scoring) if product[0] is None else (product[0],):
                patched.setattr(module, product[1], refuse)
            leaves = {k: batch[k].detach().requires_grad_(k != frozen) for k in LEAVES}
            loss, _ = linear_policy_loss(**leaves, **rest, **old, **options)
            assert loss.grad_fn.saved_tensors[LEAVES.index(frozen)].numel() == 0
            loss.backward()
        assert leaves[frozen].grad is None
        assert_same_bits([leaves[k].grad for k in LEAVES if k != frozen], [want[k] for k in LEAVES if k != frozen])
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(scoring, "gradient_over_logits", refuse)
            for k in LEAVES:
                leaves[k].requires_grad_()
            loss, _ = linear_policy_loss(**leaves, **rest, **old, **options)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, want["loss"], rtol=1e-6, atol=1e-6)


@native_build
@dtypes
def test_the_incoming_gradient_scales(backend: str, dtype: torch.dtype) -> None:
    batch = draw(dtype)
    one, three = evaluate(batch, backend=backend), evaluate(batch, scale=3.0, backend=backend)
    for name in LEAVES:
        torch.testing.assert_close(three[name], 3 * one[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def leaf_call(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    batch = inputs_of(dtype)
    leaves = {k: batch[k].detach().clone().requires_grad_() for k in LEAVES}
    rest = {k: batch[k] for k in ("token_ids", "advantages", "mask", "old_logprobs", "cu_seqlens")}
    return linear_policy_loss(**leaves, **rest, **options, backend=backend)[0], leaves


@native_form
def test_a_second_backward_is_right_or_raises(backend: str) -> None:
    """As often as wanted of the loss as it is; a scaled one was multiplied in place, and a second one finds that out."""
    loss, leaves = leaf_call(backend)
    loss.backward(retain_graph=True)
    first = {k: leaf.grad.clone() for k, leaf in leaves.items()}
    for times in (2, 3):
        loss.backward(retain_graph=True)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, times * first[name])
    handed_out = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    handed_out[1].mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    loss, leaves = leaf_call(backend)
    (3 * loss).backward(retain_graph=True)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 3 * first[name])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@native_form
def test_a_second_derivative_raises(backend: str) -> None:
    for power in (1, 2):
        loss, leaves = leaf_call(backend)
        (grad,) = torch.autograd.grad(loss**power, leaves["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.square().sum().backward()


@native_form
@dtypes
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_weight_takes_the_gradient_over(backend: str, dtype: torch.dtype, scale: float) -> None:
    """No copy of [V, D] on the way to `weight.grad`, nor where the loss is scaled."""
    loss, leaves = leaf_call(backend, dtype)
    held = [x.data_ptr() for x in loss.grad_fn.saved_tensors[:3]]
    (loss * scale).backward()
    assert [leaves[k].grad.data_ptr() for k in LEAVES] == held


@every_build
@pytest.mark.parametrize("onto", [False, True], ids=["autograd", "weight_grad"])
@pytest.mark.parametrize("case", ["old", "sequence truncate", "everything"])
def test_micro_batches_add_up(backend: str, case: str, onto: bool) -> None:
    """Each with the denominators of the whole."""
    batch = draw(torch.float32)
    options = {**CASES[case], "loss_agg": "seq-mean-token-mean", "backend": backend}
    temperature = options.pop("temperature", 1.0)
    seqs = [int(part.any()) for part in batch["mask"].split(LENGTHS)]
    want = evaluate(batch, temperature=temperature, **options)
    leaves = {k: batch[k].clone().requires_grad_() for k in LEAVES}
    into = torch.zeros(V, D) if onto else None
    total, cu = 0.0, batch["cu_seqlens"].tolist()
    for first, last in ((0, 3), (3, 4), (4, len(LENGTHS))):
        rows = slice(cu[first], cu[last])
        call = {k: v[rows] for k, v in batch.items() if len(v) == T and k != "hidden"} | {"hidden": leaves["hidden"][rows]}
        call |= {"weight": leaves["weight"], "bias": leaves["bias"], "advantages": batch["advantages"][first:last]}
        call["cu_seqlens"] = batch["cu_seqlens"][first : last + 1] - cu[first]
        call["temperature"] = temperature[rows] if isinstance(temperature, Tensor) else temperature
        if "rollout_correction" not in options:
            del call["rollout_logprobs"]
        if "kl" not in options:
            del call["ref_logprobs"]
        loss, _ = linear_policy_loss(**call, **options, num_seqs_global=sum(seqs), weight_grad=into)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(want["loss"].item(), rel=1e-5, abs=1e-6)
    got = {k: leaf.grad for k, leaf in leaves.items()}
    if onto:
        assert got["weight"] is None
        got["weight"] = into
    for name in LEAVES:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


@every_form
@dtypes
def test_weight_grad_is_added_to(backend: str, dtype: torch.dtype) -> None:
    """What is there stays, also where nothing but the weight has a gradient, nothing is counted, or the weight is frozen."""
    batch = inputs_of(dtype)
    want = evaluate(batch, backend=backend)["weight"]
    rest = {k: v for k, v in batch.items() if k not in ("weight", "rollout_logprobs", "ref_logprobs")}
    weight, into = batch["weight"].clone().requires_grad_(), torch.ones_like(batch["weight"])
    linear_policy_loss(weight=weight, **rest, weight_grad=into, backend=backend)[0].backward()
    assert weight.grad is None
    torch.testing.assert_close(into, 1 + want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    before = into.clone()
    linear_policy_loss(weight=weight, **{**rest, "mask": torch.zeros(T)}, weight_grad=into, backend=backend)[0].backward()
    linear_policy_loss(weight=weight.detach(), **rest, weight_grad=into, backend=backend)
    with torch.no_grad():
        linear_policy_loss(weight=weight, **rest, weight_grad=into, backend=backend)
    assert_same_bits([into], [before])


@native_form
def test_weight_grad_takes_one_backward_of_the_loss_as_it_is(backend: str) -> None:
    """It has been added in the forward, as it was, and once."""
    loss, _ = leaf_call(backend, weight_grad=torch.zeros(V, D))
    with pytest.raises(InputError, match=r"weight_grad and a loss that is multiplied by 3 afterwards; loss.backward"):
        (3 * loss).backward()
    loss, _ = leaf_call(backend, weight_grad=torch.zeros(V, D))
    loss.backward(retain_graph=True)
    with pytest.raises(InputError, match="weight_grad and a second backward; one"):
        loss.backward()
    into = torch.zeros(V, D)
    into.requires_grad_()
    with pytest.raises(InputError, match=r"weight_grad is .*without a gradient of its own"):
        leaf_call(backend, weight_grad=into)


@native_build
@pytest.mark.parametrize("case", ["on-policy", "sequence ratio"])
def test_tiny_shares_do_not_vanish_in_float16(backend: str, case: str) -> None:
    """Shares of 1e-6 are below half of the smallest float16 that has all its bits; the loss scale comes after the forward."""
    batch, scale = inputs_of(torch.float16), 65536.0
    options = {**CASES[case], "num_tokens_global": 1e6}
    truth = evaluate(batch, torch.float64, scale, **options, backend="reference")
    plain = evaluate(batch, None, scale, **options, backend="reference")
    got = evaluate(batch, None, scale, **options, backend=backend)
    assert all(got[name].any() for name in LEAVES)
    assert_as_good(got, truth, plain, 0, case)


@native_form
@pytest.mark.parametrize("case", ["on-policy", "sequence ratio"])
def test_sums_of_many_tokens_do_not_overflow_in_float16(backend: str, case: str) -> None:
    """8192 hidden states around 100 that pull at one token: a gradient of 64 for shares that add up to 1, 5e5 for shares of 1 each."""
    num_tokens = 8192
    options = {k: v for k, v in CASES[case].items() if k != "old"}
    batch = {
        "hidden": (torch.randn(num_tokens, 3).abs() * 100).half(), "weight": (torch.randn(5, 3) / 500).half(),
        "token_ids": torch.zeros(num_tokens, dtype=torch.int64), "advantages": torch.ones(1), "mask": torch.ones(num_tokens),
        "cu_seqlens": torch.tensor([0, num_tokens]),
    }  # fmt: skip
    got, want = (evaluate(batch, None, 64.0, **options, bias=False, old=False, backend=b) for b in (backend, "reference"))
    assert got["weight"].isfinite().all()
    torch.testing.assert_close(got["weight"], want["weight"], rtol=0.01, atol=10)


# Memory


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way of eager calls, which `Peak` looks into, even under it; the dispatcher's way shows only what comes out."""
    for module in (_torch, cpu_form):
        monkeypatch.setattr(module, "is_eager", lambda args: True)


@native_form
@dtypes
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("num_tokens", "vocab", "extra"),
    [(200, 151_936, None), (3, 151_936, None), (3, 151_936, 40 * 151_936), (3000, 512, 2_500_000)],
    ids=str,
)
def test_extra_memory_is_bounded(backend: str, dtype: torch.dtype, num_tokens: int, vocab: int, extra: int | None) -> None:
    """Beyond results, gradients and 128 bytes a token; the products have `scratch_bytes` of their own inside the bound."""
    hidden, weight, bias = torch.randn(num_tokens, 8).to(dtype), torch.randn(vocab, 8).to(dtype), torch.randn(vocab).to(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    ids, cu = torch.randint(vocab, (num_tokens,)), torch.tensor([0, num_tokens])
    for loss in ("ppo", "gspo"):
        with Peak() as measured:
            value, _ = linear_policy_loss(
                hidden, weight, ids, torch.ones(1), torch.ones(num_tokens), bias=bias, cu_seqlens=cu, loss=loss, entropy_coef=0.1,
                old_logprobs=torch.full(ids.shape, -9.0), soft_cap=5.0, max_extra_bytes=extra, backend=backend,
            )  # fmt: skip
            grads = torch.autograd.grad(value, leaves)
        kept = sum(x.nbytes for x in grads) + 128 * num_tokens
        assert measured.bytes > kept  # it looked inside
        assert measured.bytes - kept <= scoring.for_logits(extra or 62_000_000, dtype)


@native_form
@pytest.mark.usefixtures("eager")
def test_weight_grad_saves_the_second_gradient(backend: str) -> None:
    hidden, weight, into = torch.randn(40, 100).requires_grad_(), torch.randn(2000, 100).requires_grad_(), torch.zeros(2000, 100)
    ids, cu = torch.randint(2000, (40,)), torch.tensor([0, 40])
    with Peak() as measured:
        for _ in range(2):
            linear_policy_loss(
                hidden,
                weight,
                ids,
                torch.ones(1),
                torch.ones(40),
                cu_seqlens=cu,
                weight_grad=into,
                max_extra_bytes=1_200_000,
                backend=backend,
            )[0].backward()
    assert measured.bytes < into.nbytes
