"""Pools, and the advantages written with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance import builds
from torch import Tensor

from reinforce_ada.types import PoolStats

every_build = pytest.mark.parametrize("backend", builds("group_advantages"), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("group_advantages", every_isa=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("group_advantages", reference=False, every_isa=False), indirect=True)

BASELINES = ("pool", "group", "leave-one-out", "values")
SCALES = ("none", "pool", "group", "batch")


def pool_of(*pools: list[float]) -> PoolStats:
    """Statistics of literal pools."""
    rows = []
    for pool in pools:
        r = np.asarray(pool, dtype=np.float64)
        rows.append((len(r), r.mean(), ((r - r.mean()) ** 2).sum(), r.min(), r.max()) if len(r) else (0, 0, 0, math.inf, -math.inf))
    return PoolStats(*np.asarray(rows, dtype=np.float64).T)


def truth(
    rewards: Tensor,
    group_of: Tensor,
    pools: list[list[float]] | None,
    baseline: str | Tensor,
    scale: str,
    class_weights: Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """The definition, one completion at a time, in Python floats. `pools` are the rewards themselves, not their statistics."""

    def std(values: list[float]) -> float | None:
        if len(values) <= ddof or min(values) == max(values):
            return None
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))

    r = [float(x) for x in rewards]
    out = []
    for i, g in enumerate(group_of.tolist()):
        group = [x for x, h in zip(r, group_of.tolist(), strict=True) if h == g]
        pool = group if pools is None else pools[g]
        if isinstance(baseline, Tensor):
            a = r[i] - float(baseline[g])
        elif baseline == "leave-one-out":
            a = r[i] - (math.fsum(pool) - r[i]) / (len(pool) - 1) if len(pool) > 1 else 0.0
        else:
            base = group if baseline == "group" else pool
            a = r[i] - math.fsum(base) / len(base)
        if not isinstance(baseline, Tensor):
            base = group if baseline == "group" else pool
            a = 0.0 if min(base) == max(base) else a
            a = r[i] if singleton == "reward" and len(base) <= 1 else a
        spread = std({"none": [], "pool": pool, "group": group, "batch": r}[scale])
        a = a if spread is None else a / (spread + eps)
        out.append(a if class_weights is None else a * float(class_weights[g, int(a >= 0)]))
    return torch.tensor(out, dtype=torch.float64)
