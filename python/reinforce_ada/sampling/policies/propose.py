"""Which prompts enter a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import History


@dataclass(frozen=True)
class AllPrompts:
    """As many prompts enter as groups are wanted; a dropped one is not replaced."""

    @property
    def candidates_per_prompt(self) -> int:
        return 1

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int:
        return num_prompts

    def choose(self, histories: Sequence[History], num: int, rng: np.random.Generator, /) -> Sequence[int]:
        return range(min(num, len(histories)))


@dataclass(frozen=True)
class Refill(AllPrompts):
    """One more prompt enters for every dropped one, up to `max_prompts_factor` times the number wanted (DAPO).

    The prompts that enter are the shortest prefix of the source with enough undropped ones, so timing cannot change them.
    """

    max_prompts_factor: float = 10.0

    def __post_init__(self) -> None:
        if not self.max_prompts_factor >= 1:
            raise InputError("Refill", f"max_prompts_factor {self.max_prompts_factor}", "at least 1 is needed")

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int:
        return min(num_prompts + num_dropped, math.floor(self.max_prompts_factor * num_prompts))
