"""`linear_policy_loss`: a hand-sized head, float64 autograd through the spelled-out composition, and what never matters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance import builds
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import RolloutCorrection, linear_policy_loss, policy_loss
from reinforce_ada.ops.policy_loss import LOSS_AGGS, LOSSES

every_form = pytest.mark.parametrize("backend", builds("linear_policy_loss", every_isa=False), indirect=True)

LENGTHS = (1, 4, 0, 7)
T, D, V = sum(LENGTHS), 5, 11


def draw(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    mask = torch.rand(T) < 0.7
    mask[0] = True
    batch = {name: -torch.rand(T, dtype=dtype) * 2 - 1 for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    return {
        "hidden": torch.randn(T, D, dtype=dtype),
        "weight": torch.randn(V, D, dtype=dtype),
        "bias": torch.randn(V, dtype=dtype),
        "token_ids": torch.randint(V, (T,)),
        "advantages": torch.randn(len(LENGTHS), dtype=dtype),
        "mask": mask,
        "cu_seqlens": torch.tensor([0, 1, 5, 5, 12]),
        **batch,
    }


def run(batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    leaves = {k: batch[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    rest = {k: v for k, v in batch.items() if k not in ("hidden", "weight", "token_ids", "advantages", "mask")}
    if "kl" not in options:
        rest.pop("ref_logprobs")
    rest |= {"bias": leaves["bias"], **options}
    loss, metrics = linear_policy_loss(leaves["hidden"], leaves["weight"], batch["token_ids"], batch["advantages"], batch["mask"], **rest)
    return loss, metrics, list(torch.autograd.grad(loss, list(leaves.values())))


@every_form
def test_by_hand(backend: str) -> None:
    """Two tokens with odds 3:1; on-policy. The gradient of -log p is p - [j == y], the entropy's -p (log p + H)."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], requires_grad=True)
    ids, cu = torch.tensor([0, 1]), torch.tensor([0, 2])
    loss, metrics = linear_policy_loss(
        hidden, weight, ids, torch.tensor([1.0, 2.0]), torch.ones(2), cu_seqlens=cu, loss="reinforce", entropy_coef=0.5, backend=backend
    )
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics["entropy"].item() == pytest.approx(entropy, rel=1e-6)
    assert set(metrics) == {"entropy", "num_tokens", "num_masked"}
    assert loss.item() == pytest.approx(-(math.log(0.75) + 2 * math.log(0.25)) / 2 - 0.5 * entropy, rel=1e-6)
    loss.backward()
    of_logits = [-0.25 * 1 + 0.75 * 2, 0.25 * 1 - 0.75 * 2]  # sum over tokens of A (p - [j == y])
    of_entropy = -0.75 * (math.log(0.75) + entropy)
    want = [of_logits[0] / 2 - 0.5 * of_entropy, of_logits[1] / 2 + 0.5 * of_entropy]
    torch.testing.assert_close(weight.grad.flatten(), torch.tensor(want), rtol=1e-5, atol=1e-7)


@every_form
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_is_the_composition(backend: str, loss: str, loss_agg: str) -> None:
    """In float64 against matmul, log_softmax, gather, `policy_loss` and an entropy bonus with the same denominators."""
    batch = draw()
    options: dict[str, Any] = {"loss": loss, "loss_agg": loss_agg, "kl": "k3", "kl_coef": 0.1,
                               "rollout_correction": RolloutCorrection("sequence")}  # fmt: skip
    got = run(batch, **options, logit_scale=0.7, soft_cap=3.0, temperature=1.3, entropy_coef=0.2, backend=backend)

    hidden, weight, bias = (batch[k].clone().requires_grad_() for k in ("hidden", "weight", "bias"))
    logp = ((3 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 3)) / 1.3).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp[torch.arange(T), batch["token_ids"]]
    rest = {k: batch[k] for k in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "cu_seqlens")}
    value, metrics = policy_loss(chosen, batch["advantages"], batch["mask"], **rest, **options)
    # reinforce with advantage -1 on the entropies is their plain aggregate.
    bonus, _ = policy_loss(
        entropy, -torch.ones(len(LENGTHS)), batch["mask"], cu_seqlens=batch["cu_seqlens"], loss="reinforce", loss_agg=loss_agg
    )
    total = value - 0.2 * bonus
    torch.testing.assert_close(got[0], total, rtol=1e-12, atol=1e-12)
    for ours, plain in zip(got[2], torch.autograd.grad(total, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    assert got[1].pop("entropy").item() == pytest.approx(entropy[batch["mask"]].mean().item())
    assert {k: v.item() for k, v in got[1].items()} == pytest.approx({k: v.item() for k, v in metrics.items()})


@every_form
def test_padded_is_packed(backend: str) -> None:
    batch = draw()
    lengths = list(LENGTHS)
    rows: dict[str, Tensor] = {}
    for name in ("hidden", "token_ids", "mask", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        x = batch[name]
        rows[name] = x.new_zeros(len(lengths), max(lengths), *x.shape[1:])
        for i, part in enumerate(x.split(lengths)):
            rows[name][i, : len(part)] = part
    temperature = torch.linspace(0.5, 2, T)
    wide = torch.ones(len(lengths), max(lengths))
    for i, part in enumerate(temperature.split(lengths)):
        wide[i, : len(part)] = part
    rows |= {k: batch[k] for k in ("weight", "bias", "advantages")}
    options: dict[str, Any] = {"loss_agg": "seq-mean-token-mean", "entropy_coef": 0.1, "kl": "k2", "backend": backend}
    packed, flat = run(rows, temperature=wide, **options), run(batch, temperature=temperature, **options)
    torch.testing.assert_close(packed[0], flat[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(packed[2][1:], flat[2][1:], rtol=1e-10, atol=1e-12)


@every_form
def test_masked_positions_never_matter(backend: str) -> None:
    """NaN hidden states and ids outside the vocabulary under the mask reach neither the loss nor any gradient."""
    batch = draw()
    want = run(batch, entropy_coef=0.1, backend=backend)
    poisoned = dict(batch)
    poisoned["hidden"] = torch.where(batch["mask"][:, None], batch["hidden"], math.nan)
    poisoned["token_ids"] = torch.where(batch["mask"], batch["token_ids"], 10**6)
    for name in ("old_logprobs", "rollout_logprobs"):
        poisoned[name] = torch.where(batch["mask"], batch[name], math.inf)
    got = run(poisoned, entropy_coef=0.1, backend=backend)
    torch.testing.assert_close([got[0], *got[2]], [want[0], *want[2]], rtol=0, atol=0)
    nothing = run({**poisoned, "hidden": torch.full_like(batch["hidden"], math.nan), "mask": torch.zeros(T)}, backend=backend)
    assert nothing[0].item() == 0
    assert not any(grad.any() for grad in nothing[2])


@every_form
def test_low_precision_and_no_tokens(backend: str) -> None:
    batch = {k: v.bfloat16() if k in ("hidden", "weight", "bias") else v for k, v in draw(torch.float32).items()}
    loss, _, grads = run(batch, backend=backend)
    assert loss.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    wide = run({k: v.float() if v.is_floating_point() else v for k, v in batch.items()}, backend=backend)
    torch.testing.assert_close(loss, wide[0], rtol=0.05, atol=0.05)
    empty = {k: v[:0] if v.shape[:1] == (T,) else v for k, v in batch.items()} | {"cu_seqlens": torch.zeros(5, dtype=torch.int64)}
    assert run(empty, backend=backend)[0].item() == 0


@every_form
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(T, D + 1)}, r"hidden is \[12, 6\] .*, weight \[11, 5\] .*; \[12, 5\] and \[V, 5\] of one dtype"),
        ({"hidden": torch.zeros(T, D).bfloat16()}, "hidden is .* bfloat16"),
        ({"token_ids": torch.full((T,), V)}, r"token_ids\[\d+\] = 11; ids in \[0, 11\)"),
        ({"token_ids": torch.zeros(T)}, r"token_ids is \[12\] float32"),
        ({"token_ids": torch.zeros(3, 4, dtype=torch.int64)}, r"token_ids of shape \[3, 4\] with cu_seqlens"),
        ({"bias": torch.zeros(V + 1)}, r"bias is \[12\]"),
        ({"temperature": 0.0}, "temperature=0.0; a positive finite number"),
        ({"temperature": torch.ones(T + 1)}, r"temperature is \[13\]"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"mask": torch.ones(T + 1)}, r"mask is \[13\]"),
        ({"cu_seqlens": torch.tensor([0, 1, 5, 5, 13])}, r"cu_seqlens\[4\] = 13"),
        ({"loss": "pppo"}, "unknown loss 'pppo'.*did you mean 'ppo'"),
        ({"kl": "k1"}, "kl='k1' without ref_logprobs"),
        ({"backend": "cpu"}, 'backend "cpu" cannot run here: this version has no such form. Usable: reference'),
    ],
)
def test_errors_are_one_line(backend: str, arguments: dict[str, Any], message: str) -> None:
    batch = draw(torch.float32)
    batch["mask"][:] = True
    call = {**batch, "backend": backend, **arguments}
    call.pop("ref_logprobs")
    with pytest.raises(InputError, match=f"^linear_policy_loss: .*{message}") as error:
        linear_policy_loss(**call)
    assert "\n" not in str(error.value)
