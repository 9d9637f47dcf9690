"""The statistics of a study: intervals over seeds, paired differences, the cost until a target, the best learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_NUM_RESAMPLES = 10_000
# Student's t at 0.975, for 1, 2, .. degrees of freedom; rounded to the fourth digit.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z = 1.959964


def t_quantile(degrees: int) -> float:
    """Return Student's t at 0.975; past 30 degrees of freedom by the expansion around the normal quantile, to the fourth digit."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = _Z
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half of its 95 % interval by Student's t; nan for that below two values."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, t_quantile(n - 1) * deviation / math.sqrt(n)


def paired(ours: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Return ours - baseline for every seed that both have, in the order of the seeds."""
    return [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]


@lru_cache(maxsize=4)
def resamples(num: int, seed: int = 0) -> NDArray[np.float64]:
    """Return weights [10 000, num] of a bootstrap: each row is a draw with replacement, divided by `num`."""
    return np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=_NUM_RESAMPLES) / num


def bootstrap(differences: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean when seeds are drawn with replacement; nan below two seeds, or without prompts.

    Args:
        differences: one for each seed; or [S, Q], of every prompt too, and prompts are drawn with replacement as well.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or values.size == 0:
        return math.nan, math.nan
    means = resamples(len(values)) @ values
    if values.ndim == 2:
        means = (means * resamples(values.shape[1], seed=1)).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def most_coverage(num_seeds: int) -> float:
    """Return the largest coverage that the bootstrap interval of n seeds can have: it lies within the extremes, 1 - 2^(1 - n)."""
    return 1 - 2.0 ** (1 - num_seeds)


def cost_until(costs: Sequence[float], rewards: Sequence[float], target: float) -> float:
    """Return the cost at which the reward first reaches the target, by linear interpolation between evaluations; nan if it never does."""
    for i, (cost, reward) in enumerate(zip(costs, rewards, strict=True)):
        if reward < target:
            continue
        if i == 0:
            return cost
        before = rewards[i - 1]
        return costs[i - 1] + (cost - costs[i - 1]) * (target - before) / (reward - before)
    return math.nan


def best_rate(finals: Mapping[float, Sequence[float]]) -> float | None:
    """Return the learning rate of the highest mean final reward, the smaller one of equals, among those with the most finished seeds.

    It is None if no run is finished. A rate that lacks seeds is not compared: the runs that failed may have been its worst.
    """
    most = max(map(len, finals.values()), default=0)
    if most == 0:
        return None
    whole = sorted(rate for rate, values in finals.items() if len(values) == most)
    return max(whole, key=lambda rate: math.fsum(finals[rate]) / most)


def is_at_edge(rate: float, grid: Sequence[float]) -> bool:
    """Return whether the best learning rate is the smallest or the largest of several, so that a better one may lie outside."""
    return len(grid) > 1 and rate in (min(grid), max(grid))
