"""Calls of every operator with every loss and option, small, as data: what holds whatever the call is tested on all of them.

A call is an operator, its tensors by name and its other arguments. `evaluate` gives everything that can be seen of it: results, metrics and
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reinforce_ada.ops import (
    RolloutCorrection,
    group_advantages,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from reinforce_ada.ops.policy_loss import KL_ESTIMATORS, LOSS_AGGS, LOSSES
from reinforce_ada.types import PoolStats

T, N, L, D, V, G = 9, 4, 5, 6, 13, 3
OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (token_logprobs, linear_token_logprobs, group_advantages, policy_loss, linear_policy_loss)
}
LEAVES = ("logits", "hidden", "weight", "bias", "logprobs", "entropy")  # what an operator is differentiable in, where it is a tensor
POOL = tuple(f"pool.{name}" for name in PoolStats._fields)


class Call(NamedTuple):
    operator: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """With each tensor changed."""
        return self._replace(tensors={name: change(name, x) for name, x in self.tensors.items()})

    def results(self, backend: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors that the operator returns."""
        given: dict[str, Any] = {name: x for name, x in tensors.items() if name not in POOL}
        if any(name in tensors for name in POOL):
            given["pool"] = PoolStats(*(tensors[name] for name in POOL))
        return [x for x in tree_leaves(OPERATORS[self.operator](**given, **self.options, backend=backend)) if isinstance(x, Tensor)]

    def leaves(self) -> list[str]:
        return [name for name in LEAVES if name in self.tensors]

    def evaluate(self, backend: str, incoming: Callable[[Tensor], Tensor] = torch.ones_like) -> list[Tensor]:
        """Results and gradients; `incoming` makes the gradient of a result."""
        return self.evaluate_with(lambda *tensors: self.results(backend, dict(zip(self.tensors, tensors, strict=True))), incoming)

    def evaluate_with(self, run: Callable[..., list[Tensor]], incoming: Callable[[Tensor], Tensor] = torch.ones_like) -> list[Tensor]:
        """The same of a function of the tensors."""
        tensors = {name: x.detach().requires_grad_() if name in self.leaves() else x for name, x in self.tensors.items()}
        results = run(*tensors.values())
        differentiable = [x for x in results if x.requires_grad]
        if not differentiable:
            return results
        leaves = [tensors[name] for name in self.leaves()]
        grads = torch.autograd.grad(differentiable, leaves, [incoming(x) for x in differentiable], allow_unused=True)
        return [x.detach() for x in (*results, *grads) if x is not None]


def calls(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The corpus, by name; `dtype` is that of logits, heads, logprobs and rewards."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu")

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g, dtype=torch.int64, device="cpu")

    ids = whole(V, T)
    ids[2] = -100
    scores = {"logits": normal(T, V).to(dtype), "token_ids": ids}
    head = {"hidden": normal(T, D).to(dtype), "weight": normal(V, D).to(dtype), "bias": normal(V).to(dtype), "token_ids": ids}
    temperatures = {"temperature": torch.rand(T, generator=g, dtype=torch.float32, device="cpu") + 0.5}
    logprobs = -normal(T).abs().to(dtype)

    def near() -> Tensor:
        return logprobs.float() + 0.2 * normal(T)

    packed = {
        "advantages": normal(N),
        "mask": torch.rand(T, generator=g, dtype=torch.float32, device="cpu") > 0.2,
        "cu_seqlens": torch.tensor([0, 2, 2, 5, 9], dtype=torch.int64, device="cpu"),
    }
    others = {"old_logprobs": near(), "rollout_logprobs": near(), "ref_logprobs": near()}
    group_of = whole(G, T)
    pool = dict(zip(POOL, (whole(5, G) + 4, normal(G), normal(G).abs() + 1, -normal(G).abs() - 4, normal(G).abs() + 4), strict=True))
    pool = {name: x.double() for name, x in pool.items()}
    rewards = {"rewards": normal(T).to(dtype)}

    found: dict[str, Call] = {}

    def add(name: str, operator: str, tensors: Mapping[str, Tensor], **options: Any) -> None:
        found[f"{operator} {name}"] = Call(operator, dict(tensors), options)

    for operator, scored in (("token_logprobs", scores), ("linear_token_logprobs", head)):
        add("plain", operator, scored)
        add("everything", operator, scored, temperature=0.7, logit_scale=0.5, soft_cap=3.0, entropy=True, sum_p2=True)
        add("temperatures", operator, {**scored, **temperatures}, entropy=True)
    add("in chunks", "linear_token_logprobs", head, entropy=True, max_extra_bytes=3 * V * 80)

    for baseline in ("pool", "group", "leave-one-out"):
        for scale in ("none", "pool", "group", "batch"):
            add(f"{baseline} {scale}", "group_advantages", {**rewards, "group_of": group_of}, baseline=baseline, scale=scale)
    add("pool given", "group_advantages", {**rewards, "group_of": group_of, **pool}, scale="pool")
    weights = {"class_weights": normal(G, 2), "baseline": normal(G)}
    add("weights", "group_advantages", {**rewards, "group_of": group_of, **weights}, scale="batch", ddof=0)
    offsets = {"cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int64, device="cpu")}
    add("offsets", "group_advantages", {**rewards, **offsets}, scale="group", singleton="reward")

    padded = torch.rand(N, L, generator=g, dtype=torch.float32, device="cpu") > 0.2
    for operator, scored in (("policy_loss", {"logprobs": logprobs}), ("linear_policy_loss", {**head, "token_ids": ids.clamp(min=0)})):
        tensors = {**scored, **packed}
        old = {name: others[name] for name in ("old_logprobs",)}
        for loss in LOSSES:
            add(loss, operator, {**tensors, **old}, loss=loss)
            add(f"{loss} on policy", operator, tensors, loss=loss)
        for loss_agg in LOSS_AGGS:
            add(loss_agg, operator, {**tensors, **old}, loss_agg=loss_agg)
            add(f"{loss_agg} gspo", operator, {**tensors, **old}, loss="gspo", loss_agg=loss_agg)
        for kl in KL_ESTIMATORS:
            add(kl, operator, {**tensors, **old, "ref_logprobs": others["ref_logprobs"]}, kl=kl, kl_coef=0.1, kl_weighting="ratio")
        for level in ("token", "sequence"):
            corrected = {**tensors, **old, "rollout_logprobs": others["rollout_logprobs"]}
            add(f"corrected {level}", operator, corrected, rollout_correction=RolloutCorrection(level), ratio_level=level, dual_clip=3.0)
        add("per token", operator, {**tensors, **old, "advantages": normal(T)}, num_tokens_global=20.0)
    add("entropy", "policy_loss", {"logprobs": logprobs, **packed, "entropy": normal(T).abs().to(dtype)}, entropy_coef=0.1)
    add("entropy", "linear_policy_loss", {**head, "token_ids": ids.clamp(min=0), **packed, **temperatures}, entropy_coef=0.1)
    rows = {"advantages": normal(N), "mask": padded}
    add("padded", "policy_loss", {"logprobs": -normal(N, L).abs().to(dtype), "old_logprobs": -normal(N, L).abs(), **rows})
    wide = {"hidden": normal(N, L, D).to(dtype), "weight": head["weight"], "token_ids": whole(V, N, L), "old_logprobs": -normal(N, L).abs()}
    add("padded", "linear_policy_loss", {**wide, **rows})
    return found
