"""From a sampling result to advantages, over whole pools; every trainer that takes the sampler's groups needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from reinforce_ada import ops
from reinforce_ada.sampling import AdvantageSpec, Policy
from reinforce_ada.types import SamplingResult


def advantages_of(result: SamplingResult, policy: Policy) -> list[list[float]]:
    """Return the advantage of each kept completion, one list for each of `result.groups`.

    The policy's weight hook says how: baseline, scale and class weights, over the statistics of the whole pools.
    """
    if not any(g.kept for g in result.groups):
        return [[] for _ in result.groups]
    raw = np.array([s.reward for g in result.groups for s in g.kept])
    group_of = torch.tensor([i for i, g in enumerate(result.groups) for _ in g.kept])
    spec = policy.weight(result.groups, policy)
    rewards = torch.as_tensor(spec.rewards(raw), dtype=torch.float64)  # float32 would not tell 1e9 from 1e9 + 1
    advantages = iter(ops.group_advantages(rewards, group_of, pool=result.pool_stats(), **_arguments(spec)).tolist())
    return [[next(advantages) for _ in g.kept] for g in result.groups]


def _arguments(spec: AdvantageSpec) -> dict[str, Any]:
    given = {"baseline": spec.baseline, "scale": spec.scale, "ddof": spec.ddof, "eps": spec.eps, "class_weights": spec.class_weights}
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
