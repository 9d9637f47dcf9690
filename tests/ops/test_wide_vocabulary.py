"""A head of 262 144 words and 640 dimensions, as Gemma 3 270M has: logprobs, gradients and memory."""

from __future__ import annotations

import pytest
import torch

from reinforce_ada import ops
from reinforce_ada.bench import memory

V, D, T = 262_144, 640, 60  # a whole chunk of the default bound, 48 tokens, and a part of one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(memory.missing("cpu") is not None, reason=str(memory.missing("cpu"))),
]


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator).mul_(0.1)
    ids = torch.randint(V, (T,), generator=generator)
    weight[ids] += 0.01 * hidden  # or no token would be likely, and all of the gradient would be that of the token itself
    return hidden, weight, ids, torch.linspace(-1, 1, T)


def true_logprobs(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In float64, a piece of the vocabulary at a time."""
    h = hidden.double()
    parts = torch.stack([(h @ piece.double().T).logsumexp(1) for piece in weight.split(V // 16)])
    return (h * weight[ids].double()).sum(1) - parts.logsumexp(0)


def true_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sum(factors * logprobs), in float64: that of the hidden states, and these rows of that of the weight."""
    h, f = hidden.double(), factors.double()[:, None]
    normalizer = ((h * weight[ids].double()).sum(1) - true_logprobs(hidden, weight, ids))[:, None]
    mean = torch.zeros_like(h)
    for piece in weight.split(V // 16):
        mean += (h @ piece.double().T - normalizer).exp() @ piece.double()
    of_logits = (ids[:, None] == rows).double() - (h @ weight[rows].double().T - normalizer).exp()
    return f * (weight[ids].double() - mean), (f * of_logits).T @ h


@pytest.mark.parametrize("max_extra_bytes", [None, 24_000_000], ids=["default", "24 MB"])
def test_the_loss_and_its_gradients_within_the_bound(inputs: tuple[torch.Tensor, ...], max_extra_bytes: int | None) -> None:
    hidden, weight, ids, advantages = inputs
    leaves = [hidden.clone().requires_grad_(), weight.requires_grad_()]

    def run() -> list[torch.Tensor]:
        loss, _ = ops.linear_policy_loss(
            *leaves, ids, advantages, torch.ones(T, dtype=torch.bool), cu_seqlens=torch.arange(T + 1), loss="reinforce",
            max_extra_bytes=max_extra_bytes, backend="cpu",
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    extra, (loss, grad_hidden, grad_weight) = memory.peak_extra_bytes(run, [*inputs, *leaves], "cpu")
    bound = max_extra_bytes or 62_000_000
    print(f"{extra / 1e6:.1f} MB of {bound / 1e6:.0f} beside {weight.nbytes / 1e6:.0f} MB of weights and as many of their gradient")
    assert extra < bound
    with torch.no_grad():
        truth = true_logprobs(hidden, weight, ids)
        assert float(loss) == pytest.approx(float(-(advantages * truth).mean()), abs=1e-5)
        rows = torch.cat([ids, torch.arange(0, V, V // 100)])
        of_hidden, of_weight = true_gradients(hidden, weight, ids, -advantages / T, rows)
        assert float((grad_hidden - of_hidden).abs().max()) < 1e-5 * float(of_hidden.abs().max())
        assert float((grad_weight[rows] - of_weight).abs().max()) < 1e-5 * float(of_weight.abs().max())


def test_logprobs_within_the_bound(inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, ids, _ = inputs
    extra, got = memory.peak_extra_bytes(
        lambda: ops.linear_token_logprobs(hidden, weight.detach(), ids, max_extra_bytes=11_000_000, backend="cpu"), inputs, "cpu"
    )
    assert extra < 11_000_000
    assert float((got - true_logprobs(hidden, weight.detach(), ids)).abs().max()) < 1e-4
