"""policy_loss on the CPU, forward and backward with its metrics, against naive eager PyTorch and torch.compile of it.

pytest benchmarks/bench_policy_loss.py --benchmark-json=policy_loss.json -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reinforce_ada.ops import RolloutCorrection, policy_loss

SHAPES = [(1024, 1024), (65536, 16)]  # sequences x tokens, 1M packed tokens
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
# torch's own, on importing inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

Batch = dict[str, Tensor]


def make(sequences: int, length: int) -> Batch:
    tokens = sequences * length
    logprobs = -torch.rand(tokens)
    old = logprobs + 0.2 * torch.randn(tokens)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old": old,
        "rollout": old + 0.1 * torch.randn(tokens),
        "ref": logprobs.detach() + 0.3 * torch.randn(tokens),
        "advantages": torch.randn(sequences),
        "mask": torch.rand(tokens) < 0.9,
        "cu_seqlens": torch.arange(0, tokens + 1, length),
    }


def plain_ppo(b: Batch) -> list[Tensor]:
    """Loss and the metrics a trainer logs: clip fractions, KL to the old policy, ratio."""
    mask, tokens = b["mask"], b["mask"].sum()
    adv = torch.repeat_interleave(b["advantages"], b["cu_seqlens"].diff(), output_size=len(mask))
    d = (b["logprobs"] - b["old"]).clamp(-20, 20)
    ratio = d.exp()
    loss = (torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.28)) * mask).sum() / tokens
    with torch.no_grad():
        low, high = (adv < 0) & (ratio < 0.8) & mask, (adv > 0) & (ratio > 1.28) & mask
        metrics = [low.sum() / tokens, high.sum() / tokens, -(d * mask).sum() / tokens, ((ratio - 1 - d) * mask).sum() / tokens]
        metrics += [(ratio * mask).sum() / tokens, ratio.where(mask, torch.inf).min(), ratio.where(mask, -torch.inf).max()]
    return [loss, *metrics]


def full_ppo(b: Batch) -> list[Tensor]:
    """The same with a truncated correction, k3 to a reference and their metrics."""
    mask, tokens = b["mask"], b["mask"].sum()
    adv = torch.repeat_interleave(b["advantages"], b["cu_seqlens"].diff(), output_size=len(mask))
    d = (b["logprobs"] - b["old"]).clamp(-20, 20)
    ratio = d.exp()
    gap = (b["old"] - b["rollout"]).clamp(-20, 20)
    weight = gap.exp().clamp(max=2)
    y = (b["ref"] - b["logprobs"]).clamp(-20, 20)
    kl = (y.exp() - y - 1).clamp(max=10)
    loss = ((torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.28)) * weight + 0.01 * kl) * mask).sum() / tokens
    with torch.no_grad():
        low, high = (adv < 0) & (ratio < 0.8) & mask, (adv > 0) & (ratio > 1.28) & mask
        metrics = [low.sum() / tokens, high.sum() / tokens, -(d * mask).sum() / tokens, ((ratio - 1 - d) * mask).sum() / tokens]
        metrics += [(ratio * mask).sum() / tokens, ratio.where(mask, torch.inf).min(), ratio.where(mask, -torch.inf).max()]
        w = weight * mask
        metrics += [w.sum() / tokens, w.max(), w.sum() ** 2 / (tokens * (w * w).sum()), (kl * mask).sum() / tokens]
        metrics += [-(gap * mask).sum() / tokens, ((gap.exp() - 1 - gap) * mask).sum() / tokens]
    return [loss, *metrics]


PLAIN = ["clip_fraction_low", "clip_fraction_high", "approx_kl_k1", "approx_kl_k3", "ratio_mean", "ratio_min", "ratio_max"]
FULL = [*PLAIN, "rollout_weight_mean", "rollout_weight_max", "effective_sample_size", "kl", "rollout_kl_k1", "rollout_kl_k3"]


@cases
@pytest.mark.parametrize("full", [False, True], ids=["ppo", "ppo with correction and kl"])
def test_forward_and_backward(interleave: Callable[..., dict[str, float]], shape: tuple[int, int], full: bool) -> None:
    batch = make(*shape)
    more = {"rollout_logprobs": batch["rollout"], "ref_logprobs": batch["ref"], "kl": "k3", "kl_coef": 0.01,
            "rollout_correction": RolloutCorrection("token", "truncate", high=2.0)} if full else {}  # fmt: skip
    form, names = (full_ppo, FULL) if full else (plain_ppo, PLAIN)

    def ours() -> list[Tensor]:
        loss, metrics = policy_loss(
            batch["logprobs"], batch["advantages"], batch["mask"], old_logprobs=batch["old"], cu_seqlens=batch["cu_seqlens"],
            backend="cpu", **more,
        )  # fmt: skip
        return [loss, *(metrics[name] for name in names)]

    def step(form: Callable[[], list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        results = form()
        return torch.autograd.grad(results[0], batch["logprobs"])[0], results

    gradient, results = step(ours)
    expected, plain = step(lambda: form(batch))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-12)
    for name, a, b in zip(["loss", *names], results, plain, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.compiler.reset()
    inductor = torch.compile(form, dynamic=False)
    tokens = len(batch["mask"])
    ratios = interleave(
        lambda: step(ours),
        {"eager": lambda: step(lambda: form(batch)), "inductor": lambda: step(lambda: inductor(batch))},
        moved_bytes=tokens * (4 * (4 if full else 2) + 1 + 4),
        op=f"policy_loss forward, backward and metrics, {'correction and kl' if full else 'ppo'}",
        dtype=torch.float32,
        shape=shape,
    )
    assert ratios["eager"] >= 2
