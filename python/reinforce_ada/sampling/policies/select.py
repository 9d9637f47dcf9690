"""Which completions of a pool train."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class First:
    """The first `group_size` scored completions."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return list(range(min(len(rewards), group_size)))


@dataclass(frozen=True)
class All:
    """Every scored completion."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return list(range(len(rewards)))


@dataclass(frozen=True)
class Balanced:
    """n//2 correct and n - n//2 wrong completions, the earliest of each; a short class is filled from the other."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        right, wrong = np.flatnonzero(correct).tolist(), np.flatnonzero(~correct).tolist()
        num_right = min(len(right), max(group_size // 2, group_size - len(wrong)))
        return sorted(right[:num_right] + wrong[: group_size - num_right])
