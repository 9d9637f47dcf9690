"""From a sampling result to advantages, over whole pools; every trainer that takes the sampler's groups needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from reinforce_ada import ops
from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdvantageSpec, Policy
from reinforce_ada.types import SamplingResult


def advantages_of(result: SamplingResult, policy: Policy) -> list[list[float]]:
    """Return the advantage of each kept completion, one list for each of `result.groups`.

    The policy's weight hook says how: baseline, scale and class weights, over the statistics of the whole pools.
    Raises: InputError for a policy whose advantages need predicted pass rates.
    """
    if policy.needs_prediction:
        given = f"policy {policy.name!r}, whose baseline is predicted"
        raise InputError("advantages_of", given, "a trainer that predicts pass rates: reinforce-ada train", "baseline 'memory' needs none")
    return advantages_before_prediction(result, policy)[0]


def advantages_before_prediction(result: SamplingResult, policy: Policy) -> tuple[list[list[float]], list[float]]:
    """Return the advantages, and for each group the factor of the predicted pass rate that is still to be subtracted from its own.

    The factors are 0 for a policy that needs no prediction.
    """
    if not any(g.kept for g in result.groups):
        return [[] for _ in result.groups], [0.0] * len(result.groups)
    raw = np.array([s.reward for g in result.groups for s in g.kept])
    group_of = torch.tensor([i for i, g in enumerate(result.groups) for _ in g.kept])
    spec = policy.weight(result.groups, policy)
    rewards = torch.as_tensor(spec.rewards(raw), dtype=torch.float64)  # float32 would not tell 1e9 from 1e9 + 1
    advantages = iter(ops.group_advantages(rewards, group_of, pool=result.pool_stats(), **_arguments(spec)).tolist())
    factors = [0.0] * len(result.groups) if spec.prediction_weights is None else spec.prediction_weights.tolist()
    return [[next(advantages) for _ in g.kept] for g in result.groups], factors


def _arguments(spec: AdvantageSpec) -> dict[str, Any]:
    given = {"baseline": spec.baseline, "scale": spec.scale, "ddof": spec.ddof, "eps": spec.eps, "class_weights": spec.class_weights}
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
