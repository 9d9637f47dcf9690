"""Logits of any finite size, up to the largest of the dtype: what float64 gives. One row of each kind, in every build."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance import builds
from torch import Tensor

from reinforce_ada.ops import linear_policy_loss, linear_token_logprobs, token_logprobs

every_build = pytest.mark.parametrize("backend", builds("token_logprobs"), indirect=True)
native_build = pytest.mark.parametrize("backend", builds("token_logprobs", reference=False), indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
SIZES = (1e4, 4e6, 1e7, 1e10, 1e20, 1e30, 3e38)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 1e4},
    "hottest": {"temperature": 1e38},
    "negative": {"logit_scale": -0.5},
    "small": {"logit_scale": 1e-38},
    "capped": {"soft_cap": 30.0},
    "all": {"logit_scale": 2e-3, "soft_cap": 50.0, "temperature": 1.5},
}


def rows(size: float, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [9, vocab] of a spread of 3 among which some, most or all are as large as `size`, and a token for each row."""
    x = torch.randn(9, vocab, dtype=torch.float32) * 3
    x[0, 3] = size  # one high, and another token asked for
    x[1] = -size  # all masked alike
    x[2, :-2] = -size  # all masked but two
    x[3, -2:] = size  # two high ones at the end
    x[4] = size
    x[5, vocab // 2 :] = -size
    x[6, vocab // 2 :], x[6, 1] = size, -math.inf
    x[7] *= size / 20
    x[8, ::2], x[8, 1::2] = size, -size
    return x.to(dtype), torch.tensor([1, 2, vocab - 1, vocab - 1, 0, 1, vocab - 1, 5, 2])


def evaluate(logits: Tensor, ids: Tensor, backend: str, **head: Any) -> dict[str, Tensor]:
    leaf = logits.clone().requires_grad_()
    out = token_logprobs(leaf, ids, entropy=True, sum_p2=True, backend=backend, **head)
    g = torch.linspace(0.5, 2, len(ids), dtype=torch.float64)
    (grad,) = torch.autograd.grad([out.logprobs, out.entropy], leaf, [g.to(out.logprobs), g.flip(0).to(out.logprobs)])
    return {"logprobs": out.logprobs.detach(), "entropy": out.entropy.detach(), "sum_p2": out.sum_p2, "gradient": grad}


def assert_as_float64(actual: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Within 2e-6 of a logprob up to 1 and of its size beyond; infinities and NaN where float64 has them."""
    for name, exact in truth.items():
        expected, found = exact.float(), actual[name].float()
        same = (found == expected) | (found.isnan() & expected.isnan())
        allowed = 2e-6 * exact.abs().clamp(min=1) if name != "gradient" else 3e-6 + torch.finfo(dtype).eps * exact.abs()
        error = (found.double() - exact).abs()
        wrong = ~(same | (error <= allowed))
        assert not wrong.any(), f"{name}: off by {error[wrong].max():.3g} at {wrong.nonzero()[:5].tolist()}"


@native_build
@dtypes
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_any_size_gives_what_float64_gives(backend: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    """Vocabularies of less than a vector, and of two blocks with the large logits in either."""
    largest = torch.finfo(dtype).max
    for size in (*(s for s in SIZES if s < largest), largest):
        for vocab in (7, 4099):
            logits, ids = rows(size, vocab, dtype)
            if "negative" in head or head.get("logit_scale", 1) < 0:
                logits = logits.masked_fill(logits.isinf(), -size)  # -inf times a negative scale is no forbidden token
            assert_as_float64(evaluate(logits, ids, backend, **head), evaluate(logits.double(), ids, "reference", **head), dtype)


@every_build
@pytest.mark.parametrize("size", [1e10, 1e30, 3e38])
def test_one_large_logit_by_hand(backend: str, size: float) -> None:
    """Another token's logprob is minus the size, its gradient 1, that of the large one -1, and the entropy 0."""
    if backend == "reference":
        size = min(size, 1e37)  # it is float32 throughout, also where it multiplies a gradient of 2 with a logprob
    logits = torch.tensor([[0.0, size, -1.0], [size, size, 0.0]])
    out = evaluate(logits, torch.tensor([0, 1]), backend)
    assert out["logprobs"].tolist() == [-torch.tensor(size).item(), pytest.approx(-math.log(2))]
    assert out["entropy"].tolist() == pytest.approx([0, math.log(2)], abs=1e-6)
    assert out["gradient"][0].tolist() == pytest.approx([0.5, -0.5, 0])
    assert out["gradient"][1].tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


@native_build
@pytest.mark.parametrize("size", [1e8, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_heads_with_large_logits(backend: str, size: float, dtype: torch.dtype) -> None:
    """Weights that are whole powers of 2, so that the products are exact: rows of a large, a small and an opposite logit."""
    scale = 2.0 ** round(math.log2(size))
    hidden = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-1.0, 2.0], [1.0, 0.0]]).to(dtype)
    weight = torch.tensor([[scale, 1.0], [0.0, 2.0], [-scale, 0.5], [scale, 1.0], [0.0, -1.0]]).to(dtype)
    ids = torch.tensor([1, 1, 2, 3])

    def scores(dtype: torch.dtype, form: str) -> list[Tensor]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        out = linear_token_logprobs(h, w, ids, entropy=True, sum_p2=True, backend=form)
        grads = torch.autograd.grad([out.logprobs, out.entropy], [h, w], [torch.ones_like(out.logprobs)] * 2)
        return [*(x.detach() for x in out), *grads]

    def loss(dtype: torch.dtype, form: str) -> list[Tensor]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        offsets, advantages = torch.tensor([0, 1, 4]), torch.tensor([1.0, -2.0])
        value, _ = linear_policy_loss(
            h, w, ids, advantages, torch.ones(4, dtype=torch.bool), cu_seqlens=offsets, loss="reinforce", entropy_coef=0.1, backend=form
        )
        return [value.detach(), *torch.autograd.grad(value, [h, w])]

    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for f in (scores, loss):
        *results, of_hidden, of_weight = zip(f(dtype, backend), f(torch.float64, "reference"), strict=True)
        for a, exact in (*results, of_weight):
            torch.testing.assert_close(a.double(), exact.double(), rtol=2 * tolerance, atol=2 * tolerance)
        a, exact = of_hidden  # sums of gradients of logits, each rounded, times weights of that size
        torch.testing.assert_close(a.double(), exact.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan, 1e-39, 1e39, 10**400])
def test_temperatures_outside_of_float32_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature="):
        token_logprobs(torch.zeros(1, 2), torch.tensor([0]), temperature=temperature)
