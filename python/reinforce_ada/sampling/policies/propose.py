"""The propose hook: which prompts enter a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import History, at_least


@dataclass(frozen=True)
class AllPrompts:
    """Admit as many prompts as groups are wanted; a dropped prompt is not replaced."""

    needs_memory = False

    @property
    def candidates_per_prompt(self) -> int:
        return 1

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int:
        return num_prompts

    def choose(self, histories: Sequence[History], num: int, rng: np.random.Generator, /) -> Sequence[int]:
        return range(min(num, len(histories)))


@dataclass(frozen=True)
class Refill(AllPrompts):
    """Admit one more prompt for every dropped one, up to `max_prompts_factor` times the number wanted (DAPO); 1 refills nothing.

    The prompts that enter are the shortest prefix of the source with enough undropped prompts, so timing cannot change them.
    """

    max_prompts_factor: float = 10.0

    def __post_init__(self) -> None:
        where = type(self).__name__
        if not 1 <= self.max_prompts_factor < math.inf:
            raise InputError(where, f"max_prompts_factor {self.max_prompts_factor}", "a finite number of at least 1 is needed")
        at_least(1, where, candidates_per_prompt=self.candidates_per_prompt)

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int:
        return min(num_prompts + num_dropped, math.floor(self.max_prompts_factor * num_prompts))


@dataclass(frozen=True, kw_only=True)
class NearestRate(Refill):
    """Admit the prompts whose pass rate is probably nearest to `target`, from `candidates_per_prompt` candidates for each place (MoPPS).

        one draw theta_i ~ Beta(a_i, b_i) per candidate; the num candidates with the smallest |theta_i - target| enter

    A draw from the posterior, instead of its mean, also explores unknown prompts (Thompson sampling). Prompts that are passed over
    return in the next epoch. Source: Qu et al. 2025, arXiv 2507.04632.
    """

    target: float = 0.5
    candidates_per_prompt: int = 4
    max_prompts_factor: float = 1.0
    needs_memory = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_probabilities("NearestRate", target=self.target)

    def choose(self, histories: Sequence[History], num: int, rng: np.random.Generator, /) -> Sequence[int]:
        rates = rng.beta([h.a for h in histories], [h.b for h in histories])
        return _best(np.abs(rates - self.target), num)


@dataclass(frozen=True, kw_only=True)
class SkipStreaks(Refill):
    """Skip a prompt whose latest z pools had one class with probability 1 - explore^z (GRESO).

    `explore_easy` applies to streaks of all-correct pools, `explore_hard` to all-wrong ones. The first num candidates that are not
    skipped enter; if there are too few, the earliest skipped ones fill the places, so a step never starves. Both probabilities are
    constants here; the paper adapts them to a target share of one-class pools.
    Source: Zheng et al. 2025, arXiv 2506.02177 (both start at .5).
    """

    explore_easy: float = 0.5
    explore_hard: float = 0.5
    candidates_per_prompt: int = 2
    max_prompts_factor: float = 1.0
    needs_memory = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_probabilities("SkipStreaks", explore_easy=self.explore_easy, explore_hard=self.explore_hard)

    def choose(self, histories: Sequence[History], num: int, rng: np.random.Generator, /) -> Sequence[int]:
        explore = [self.explore_easy if h.all_correct else self.explore_hard for h in histories]
        enters = rng.random(len(histories)) < np.power(explore, [h.streak for h in histories])
        return _best((~enters).astype(np.float64), num)


def _best(scores: NDArray[np.float64], num: int) -> list[int]:
    """Return the positions of the `num` lowest scores, ties to the earliest, in increasing order."""
    return sorted(np.argsort(scores, kind="stable")[:num].tolist())


def _check_probabilities(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(where, f"{name} {value}", "a number from 0 to 1 is needed")
