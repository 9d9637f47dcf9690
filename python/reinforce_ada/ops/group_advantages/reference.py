"""Advantages in plain PyTorch, with float64 inside. Every other form is measured against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.types import PoolStats


def group_advantages(
    rewards: Tensor,
    group_of: Tensor,
    num_groups: int,
    pool: PoolStats | None,
    baseline: str | Tensor,
    scale: str,
    class_weights: Tensor | None,
    ddof: int,
    eps: float,
    singleton: str,
) -> Tensor:
    """Return `(reward - baseline) / (std + eps) * class weight` of each completion; the arguments are those of `ops.group_advantages`."""
    r = rewards.double()
    group = moments(r, group_of, num_groups)
    pool = group if pool is None else pool
    compared = group if isinstance(baseline, str) and baseline == "group" else pool
    alone = (compared.count <= 1)[group_of]

    advantages = r - _baseline(r, group_of, compared, baseline)
    if singleton == "reward" and not isinstance(baseline, Tensor):
        advantages = torch.where(alone, r, advantages)
    if scale == "batch":
        everything = moments(r, torch.zeros_like(group_of), 1)
        advantages = advantages / _divisor(everything, ddof, eps)
    elif scale != "none":
        advantages = advantages / _divisor(group if scale == "group" else pool, ddof, eps)[group_of]
    if class_weights is not None:
        advantages = advantages * class_weights[group_of, (advantages >= 0).long()]
    if not isinstance(baseline, Tensor):
        no_signal = (compared.min == compared.max)[group_of]
        advantages = advantages.masked_fill(no_signal & ~alone if singleton == "reward" else no_signal, 0.0)
    return advantages.to(rewards.dtype)


def moments(r: Tensor, group_of: Tensor, num_groups: int) -> PoolStats:
    """Return count, mean, centred second moment, min and max of `r` [N] in each of `num_groups` groups, each [G] float64."""
    zeros = r.new_zeros(num_groups)
    count = zeros.index_add(0, group_of, torch.ones_like(r))
    mean = zeros.index_add(0, group_of, r) / count.clamp(min=1)
    m2 = zeros.index_add(0, group_of, (r - mean[group_of]) ** 2)
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, group_of, r, "amin")
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, group_of, r, "amax")
    return PoolStats(count, mean, m2, low, high)


def _baseline(r: Tensor, group_of: Tensor, stats: PoolStats, baseline: str | Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        return baseline[group_of]
    mean: Tensor = stats.mean[group_of]
    if baseline == "leave-one-out":
        count = stats.count[group_of]
        return torch.where(count > 1, (count * mean - r) / (count - 1), r)  # nobody else to compare with: advantage 0
    return mean


def _divisor(stats: PoolStats, ddof: int, eps: float) -> Tensor:
    """Return std + eps, [G]; 1 where there is no spread to divide by."""
    degrees = stats.count - ddof
    std = (stats.m2 / degrees.clamp(min=1)).sqrt()
    return torch.where((degrees > 0) & (stats.min != stats.max), std + eps, 1.0)
