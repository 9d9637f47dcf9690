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


class Corpus:
    """The calls by name, and the tensors they share; `dtype` is that of logits, heads, logprobs and rewards."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.calls = dtype, dict[str, Call]()
        self._g = torch.Generator().manual_seed(7)
        self.ids = self.whole(V, T)
        self.ids[2] = -100
        self.head = {"hidden": self.normal(T, D).to(dtype), "weight": self.normal(V, D).to(dtype), "bias": self.normal(V).to(dtype)}
        self.temperatures = {"temperature": self.uniform(T) + 0.5}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._g, dtype=torch.float32, device="cpu")

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._g, dtype=torch.float32, device="cpu")

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._g, dtype=torch.int64, device="cpu")

    def add(self, name: str, operator: str, tensors: Mapping[str, Tensor], **options: Any) -> None:
        self.calls[f"{operator} {name}"] = Call(operator, dict(tensors), options)


def calls(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The corpus, by name."""
    corpus = Corpus(dtype)
    for add in (_scores, _advantages, _losses):
        add(corpus)
    return corpus.calls


def _scores(c: Corpus) -> None:
    head = {**c.head, "token_ids": c.ids}
    for operator, scored in (
        ("token_logprobs", {"logits": c.normal(T, V).to(c.dtype), "token_ids": c.ids}),
        ("linear_token_logprobs", head),
    ):
        c.add("plain", operator, scored)
        c.add("everything", operator, scored, temperature=0.7, logit_scale=0.5, soft_cap=3.0, entropy=True, sum_p2=True)
        c.add("temperatures", operator, {**scored, **c.temperatures}, entropy=True)
    c.add("in chunks", "linear_token_logprobs", head, entropy=True, max_extra_bytes=3 * V * 80)


def _advantages(c: Corpus) -> None:
    rewards = {"rewards": c.normal(T).to(c.dtype)}
    grouped = {**rewards, "group_of": c.whole(G, T)}
    for baseline in ("pool", "group", "leave-one-out"):
        for scale in ("none", "pool", "group", "batch"):
            c.add(f"{baseline} {scale}", "group_advantages", grouped, baseline=baseline, scale=scale)
    stats = (c.whole(5, G) + 4, c.normal(G), c.normal(G).abs() + 1, -c.normal(G).abs() - 4, c.normal(G).abs() + 4)
    pool = {name: x.double() for name, x in zip(POOL, stats, strict=True)}
    c.add("pool given", "group_advantages", {**grouped, **pool}, scale="pool")
    weights = {"class_weights": c.normal(G, 2), "baseline": c.normal(G)}
    c.add("weights", "group_advantages", {**grouped, **weights}, scale="batch", ddof=0)
    offsets = {"cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int64, device="cpu")}
    c.add("offsets", "group_advantages", {**rewards, **offsets}, scale="group", singleton="reward")


def _losses(c: Corpus) -> None:
    logprobs = -c.normal(T).abs().to(c.dtype)
    packed = {
        "advantages": c.normal(N),
        "mask": c.uniform(T) > 0.2,
        "cu_seqlens": torch.tensor([0, 2, 2, 5, 9], dtype=torch.int64, device="cpu"),
    }
    old, rollout, ref = ({name: logprobs.float() + 0.2 * c.normal(T)} for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"))
    head = {**c.head, "token_ids": c.ids.clamp(min=0)}
    for operator, scored in (("policy_loss", {"logprobs": logprobs}), ("linear_policy_loss", head)):
        tensors = {**scored, **packed}
        for loss in LOSSES:
            c.add(loss, operator, {**tensors, **old}, loss=loss)
            c.add(f"{loss} on policy", operator, tensors, loss=loss)
        for loss_agg in LOSS_AGGS:
            c.add(loss_agg, operator, {**tensors, **old}, loss_agg=loss_agg)
            c.add(f"{loss_agg} gspo", operator, {**tensors, **old}, loss="gspo", loss_agg=loss_agg)
        for kl in KL_ESTIMATORS:
            c.add(kl, operator, {**tensors, **old, **ref}, kl=kl, kl_coef=0.1, kl_weighting="ratio")
        for level in ("token", "sequence"):
            correction = {"rollout_correction": RolloutCorrection(level), "ratio_level": level, "dual_clip": 3.0}
            c.add(f"corrected {level}", operator, {**tensors, **old, **rollout}, **correction)
        c.add("per token", operator, {**tensors, **old, "advantages": c.normal(T)}, num_tokens_global=20.0)
    c.add("entropy", "policy_loss", {"logprobs": logprobs, **packed, "entropy": c.normal(T).abs().to(c.dtype)}, entropy_coef=0.1)
    c.add("entropy", "linear_policy_loss", {**head, **packed, **c.temperatures}, entropy_coef=0.1)
    rows = {"advantages": c.normal(N), "mask": c.uniform(N, L) > 0.2, "old_logprobs": -c.normal(N, L).abs()}
    c.add("padded", "policy_loss", {"logprobs": -c.normal(N, L).abs().to(c.dtype), **rows})
    wide = {"hidden": c.normal(N, L, D).to(c.dtype), "weight": head["weight"], "token_ids": c.whole(V, N, L)}
    c.add("padded", "linear_policy_loss", {**wide, **rows})
