"""The select hook: which completions of a pool are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class First:
    """Keep the first `group_size` scored completions."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return list(range(min(len(rewards), group_size)))


@dataclass(frozen=True)
class All:
    """Keep every scored completion."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return list(range(len(rewards)))


@dataclass(frozen=True)
class Balanced:
    """Keep n//2 correct and n - n//2 wrong completions, the earliest of each; if one class is short, the other fills its places."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        right, wrong = np.flatnonzero(correct).tolist(), np.flatnonzero(~correct).tolist()
        num_right = min(len(right), max(group_size // 2, group_size - len(wrong)))
        return sorted(right[:num_right] + wrong[: group_size - num_right])


@dataclass(frozen=True)
class MaxVariance:
    """Keep the `group_size` completions whose rewards have the largest variance (PODS).

    They are the i highest and the group_size - i lowest rewards for the best i, found by a sort and running sums in O(n log n). Ties go to
    the smallest i and to the earliest in request order. Source: Xu et al. 2025, arXiv 2504.13818.
    """

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        num = min(len(rewards), group_size)
        if num == 0:
            return []
        shifted = rewards - rewards.min()  # exact for 0/1 rewards, where ties are the rule
        falling, rising = np.argsort(-shifted, kind="stable"), np.argsort(shifted, kind="stable")
        highest, lowest = _running_sums(shifted[falling]), _running_sums(shifted[rising])
        total, squares = highest[:, : num + 1] + lowest[:, num::-1]  # of the i highest and num - i lowest, i = 0 .. num
        num_high = int(np.argmax(num * squares - total**2))  # num^2 times the variance
        high = falling[:num_high]
        rest = rising[~np.isin(rising, high)]
        return sorted([*high.tolist(), *rest[: num - num_high].tolist()])


def _running_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of the first k values and of their squares, k = 0 .. n: [2, n + 1]."""
    return np.cumsum(np.pad([values, values**2], [(0, 0), (1, 0)]), axis=1)
