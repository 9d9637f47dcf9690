"""The conventions of other trainers as arguments of `group_advantages`: `group_advantages(rewards, group_of, **CONVENTIONS["trl-group"])`.

With R the rewards of a group of K completions, std with the `ddof` of the entry, and without a pool unless one is named:

| name | advantage | ddof | singleton | source |
|---|---|---|---|---|
| verl-grpo | (R - mean) / (std + 1e-6) | 1 | R | verl 0.9.1, `grpo`, `grpo_vectorized` |
| verl-dr-grpo | R - mean | | R | verl 0.9.1, `grpo` with `norm_adv_by_std_in_grpo=False` |
| verl-rloo | (R - mean) K / (K - 1) | | R | verl 0.9.1, `rloo` |
| verl-rloo-vectorized | (R - mean) K / (K - 1) | | 0 | verl 0.9.1, `rloo_vectorized` |
| trl-group | (R - mean) / (std + 1e-4) | 1 | 0 | TRL 1.16, GRPOTrainer, `scale_rewards="group"` |
| trl-batch | (R - mean) / (std of the batch + 1e-4) | 1 | 0 | TRL 1.16, GRPOTrainer, `scale_rewards="batch"` |
| trl-none | R - mean | | 0 | TRL 1.16, GRPOTrainer, `scale_rewards="none"` |
| trl-rloo | R - mean of the other K - 1 | | 0 | TRL 1.16, RLOOTrainer, before its batch normalization |
| trl-async | (R - mean) / (std + 1e-8) | 0 | 0 | TRL 1.16, AsyncGRPO |
| openrlhf-group-norm | (R - mean) / (std + 1e-9) | 1 | 0 | OpenRLHF 0.11.2, `group_norm` |
| openrlhf-dr-grpo | R - mean | | 0 | OpenRLHF 0.11.2, `dr_grpo`, `reinforce_baseline` before its batch normalization |
| openrlhf-rloo | (R - mean) K / (K - 1) | | 0 | OpenRLHF 0.11.2, `rloo` |
| skyrl-grpo | (R - mean) / (std + 1e-6) | 1 | R | SkyRL 0.3.0, `grpo` |
| skyrl-rloo | (R - mean) K / (K - 1) | | 0 | SkyRL 0.3.0, `rloo` |
| slime | (R - mean) / (std + 1e-6) | 1 | 0 | slime, groups of equal size |
| prime-rl | R - mean | | 0 | prime-rl, `grpo` |
| reinforce-ada | R - mean of the pool | | R | the official code as its script runs it, without std |
| reinforce-ada-std | (R - mean of the pool) / (std of the pool + 1e-6) | 1 | R | the official code with `norm_adv_by_std_in_grpo=True` |

The official Reinforce-Ada code takes its pool statistics of rewards made 0 or 1: pass `pool=binary_pool(correct, wrong)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from reinforce_ada.types import PoolStats


class Convention(TypedDict):
    """Arguments of `group_advantages`."""

    baseline: str
    scale: str
    ddof: int
    eps: float
    singleton: str


def _convention(baseline: str, scale: str = "none", eps: float = 1e-6, ddof: int = 1, singleton: str = "zero") -> Convention:
    return {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": eps, "singleton": singleton}


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "verl-grpo": _convention("group", "group", 1e-6, singleton="reward"),
        "verl-dr-grpo": _convention("group", singleton="reward"),
        "verl-rloo": _convention("leave-one-out", singleton="reward"),
        "verl-rloo-vectorized": _convention("leave-one-out"),
        "trl-group": _convention("group", "group", 1e-4),
        "trl-batch": _convention("group", "batch", 1e-4),
        "trl-none": _convention("group"),
        "trl-rloo": _convention("leave-one-out"),
        "trl-async": _convention("group", "group", 1e-8, ddof=0),
        "openrlhf-group-norm": _convention("group", "group", 1e-9),
        "openrlhf-dr-grpo": _convention("group"),
        "openrlhf-rloo": _convention("leave-one-out"),
        "skyrl-grpo": _convention("group", "group", 1e-6, singleton="reward"),
        "skyrl-rloo": _convention("leave-one-out"),
        "slime": _convention("group", "group", 1e-6),
        "prime-rl": _convention("group"),
        "reinforce-ada": _convention("pool", singleton="reward"),
        "reinforce-ada-std": _convention("pool", "pool", 1e-6, singleton="reward"),
    }
)


def binary_pool(correct: npt.ArrayLike, wrong: npt.ArrayLike) -> PoolStats:
    """Return the statistics of pools whose rewards are 1 for the correct and 0 for the wrong completions.

        n = correct + wrong,  mean = correct / n,  m2 = correct wrong / n

    Args:
        correct, wrong: [G], how many completions of each pool have a reward above the threshold (0.7 in the official code), and not.

    Returns:
        PoolStats of [G] float64 arrays.

    Source: `compute_grpo_outcome_advantage` with `global_stat_est=True` in the official Reinforce-Ada code, arXiv 2510.04996.
    """
    c, w = np.asarray(correct, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
    count = c + w
    some = np.maximum(count, 1)
    low = np.where(w > 0, 0.0, np.where(c > 0, 1.0, np.inf))
    high = np.where(c > 0, 1.0, np.where(w > 0, 0.0, -np.inf))
    return PoolStats(count, c / some, c * w / some, low, high)
