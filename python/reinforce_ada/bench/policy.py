"""The cases of policy_loss: forward, backward and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.bench.baselines import FULL, PPO, LossInputs, compiled, ppo, ppo_with_correction_and_kl, reading
from reinforce_ada.bench.case import Candidate, Case, Goal, Setup
from reinforce_ada.bench.checks import close, close_in_norm
from reinforce_ada.ops import RolloutCorrection, policy_loss

_OP = "policy_loss"
# extra_mb: the gradient is a result, so only the pages of a few scalars are extra
_GOALS = (Goal("speedup", 4.5, "inductor"), Goal("speedup", 40, "eager"), Goal("extra_mb", 1))
_FULL_ARGUMENTS: dict[str, Any] = {"kl": "k3", "kl_coef": 0.01, "rollout_correction": RolloutCorrection("token", "truncate", high=2.0)}


def cases() -> Iterator[Case]:
    """Yield cases with packed long and short sequences and with padded ones; plain PPO, and with a correction and KL."""
    for layout, (seqs, length) in (("packed", (1024, 1024)), ("packed", (65536, 16)), ("padded", (2048, 512))):
        for full in (False, True):
            shape = {"N": seqs, "L": length}
            name = f"{'ppo with correction and kl' if full else 'ppo'}, {layout}"
            quick = {"N": 128, "L": 1024} if seqs == 1024 else None
            build = partial(_build, packed=layout == "packed", full=full)
            yield Case(_OP, name, shape, "float32", build, _GOALS, "eager", quick)


def batch(shape: tuple[int, ...], cu_seqlens: Tensor | None, num_seqs: int, device: str) -> LossInputs:
    """Return logprobs, those of the old, rollout and reference policies, advantages, and a mask without a tenth of the tokens."""
    logprobs = -torch.rand(shape, device=device)
    old = logprobs + 0.2 * torch.randn(shape, device=device)
    found = {
        "logprobs": logprobs,
        "old": old,
        "rollout": old + 0.1 * torch.randn(shape, device=device),
        "ref": logprobs + 0.3 * torch.randn(shape, device=device),
        "advantages": torch.randn(num_seqs, device=device),
        "mask": torch.rand(shape, device=device) < 0.9,
    }
    return found if cu_seqlens is None else {**found, "cu_seqlens": cu_seqlens}


def _build(case: Case, device: str, packed: bool, full: bool) -> Setup:
    seqs, length = case.shape["N"], case.shape["L"]
    offsets = torch.arange(0, seqs * length + 1, length, device=device) if packed else None
    b = batch((seqs * length,) if packed else (seqs, length), offsets, seqs, device)
    b["logprobs"].requires_grad_()
    form, names = (ppo_with_correction_and_kl, FULL) if full else (ppo, PPO)

    def ours(b: LossInputs = b, backend: str = "auto") -> tuple[Tensor, dict[str, Tensor]]:
        more = {**_FULL_ARGUMENTS, "rollout_logprobs": b["rollout"], "ref_logprobs": b["ref"]} if full else {}
        return policy_loss(
            b["logprobs"], b["advantages"], b["mask"], old_logprobs=b["old"], cu_seqlens=b.get("cu_seqlens"), backend=backend, **more
        )

    def step(form: Callable[[LossInputs], Any], b: LossInputs = b) -> tuple[Tensor, Any]:
        """Return the gradient, and the loss with its metrics."""
        results = form(b)
        return torch.autograd.grad(results[0], b["logprobs"])[0], results

    truth = {name: x.detach().double() if x.is_floating_point() else x for name, x in b.items()}
    truth["logprobs"].requires_grad_()
    expected, (loss, metrics) = step(partial(ours, backend="reference"), truth)
    assert set(metrics) == set(names), "the baselines compute other metrics"

    def check(results: Any, loose: bool) -> None:
        gradient, (found, *rest) = results
        close_in_norm("gradient", gradient, expected, 1e-4 if loose else 2e-6)
        close("loss", found, loss, 1e-4 if loose else 2e-6)
        values = dict(zip(names, rest, strict=True)) if loose else rest[0]
        for name in names:
            close(name, values[name], metrics[name], 1e-4 if loose else 1e-5, 1e-3 if loose else 1e-4)

    moved = sum(b[name].nbytes for name in ("logprobs", "old", "mask", *(("rollout", "ref") if full else ()))) + b["logprobs"].nbytes
    return Setup(
        subject=partial(step, ours),
        others=[
            Candidate("eager", partial(step, form)),
            Candidate("inductor", partial(step, compiled(form))),
            reading(moved, device),
        ],
        check=check,
        held=[*b.values()],
        moved_bytes=moved,
    )
