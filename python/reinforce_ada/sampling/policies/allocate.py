"""The allocate hook: how many requests a prompt gets."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import Allocation, History, at_least

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Rounds(Allocation):
    """Request `max_rounds` rounds of `round_size` completions; the cap is their product. GRPO is `Rounds(group_size, 1)`."""

    round_size: int
    max_rounds: int

    def __post_init__(self) -> None:
        at_least(1, "Rounds", round_size=self.round_size, max_rounds=self.max_rounds)

    @property
    def cap(self) -> int:
        return self.round_size * self.max_rounds

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        return [self.cap] * len(histories)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Allocation):
    """Take the budgets from a function of your own.

    Args:
        function: takes the histories of the prompts that enter together and returns a budget in [1, cap] for each; the same
            histories must give the same budgets.
        cap: the largest budget.
        round_size: completions requested together.
        needs_memory: False for a function that uses only the number of prompts.
    """

    function: Callable[[Sequence[History]], Sequence[int]]
    cap: int
    round_size: int
    needs_memory: bool = True

    def __post_init__(self) -> None:
        _check_sizes("Budgeted", self.round_size, self.cap)

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        """Return the function's budgets. Raises: InputError for another number of budgets, or one that is not an integer in [1, cap]."""
        budgets = list(self.function(histories))
        where = f"Budgeted({getattr(self.function, '__name__', self.function)})"
        if len(budgets) != len(histories):
            raise InputError(where, f"{len(budgets)} budgets for {len(histories)} prompts", "one for each is needed")
        for budget in budgets:
            if not isinstance(budget, (int, np.integer)) or not 1 <= budget <= self.cap:
                raise InputError(where, f"a budget of {budget!r}", f"integers from 1 to the cap of {self.cap} are needed")
        return [int(budget) for budget in budgets]


@dataclass(frozen=True, kw_only=True)
class BatchBudget(Allocation):
    """A budget shared by all prompts that enter together: `mean` for each on average, and between `floor` and `cap` for any one.

    Subclasses distribute it; the sum is exactly mean * prompts. A prompt's budget depends on the other prompts that enter, so a policy
    that refills dropped prompts one by one cannot use it.
    """

    mean: int
    floor: int = field()  # field() so that it does not take the default of the base class
    cap: int
    round_size: int  # completions requested together
    needs_memory = True
    is_batch_wide = True

    def __post_init__(self) -> None:
        where = type(self).__name__
        _check_sizes(where, self.round_size, self.cap)
        at_least(1, where, floor=self.floor)
        at_least(self.floor, where, mean=self.mean)
        at_least(self.mean, where, cap=self.cap)


@dataclass(frozen=True, kw_only=True)
class InversePowerRate(BatchBudget):
    """Set budgets in proportion to a negative power of the pass rate (Reinforce-Ada-Est).

        budget_i = clip(s / p_i^exponent, floor, cap),  s such that the sum is mean * prompts
        p_i = (a + correct_i) / (a + b + correct_i + wrong_i)  by the counts of the memory and the prior Beta(a, b)

    They are rounded to integers by largest remainder, ties to the earlier prompt. Source: Reinforce-Ada, arXiv 2510.04996v3 (the
    estimation-based variant, at the total budget of uniform sampling: exponent 1/2). The authors' own code has exponent 1 and the prior
    Beta(1, 16).
    """

    exponent: float = 0.5
    prior: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.exponent <= 4:
            raise InputError("InversePowerRate", f"exponent {self.exponent}", "a number above 0 and up to 4 is needed")
        if not all(0 < x <= 1e6 for x in self.prior):
            raise InputError("InversePowerRate", f"prior {self.prior}", "Beta(a, b) with a and b above 0 and up to 1e6 is needed")

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        total, (a, b) = self.mean * len(histories), self.prior
        rates = np.array([(h.a - 1 + a) / (h.a + h.b - 2 + a + b) for h in histories])
        return _rounded(_scaled(rates**-self.exponent, total, self.floor, self.cap), total) if total else []


@dataclass(frozen=True, kw_only=True)
class Knapsack(BatchBudget):
    """Set the budgets with the largest total value (Knapsack RL).

        max sum_i V(N_i, p_i)  under  sum_i N_i = mean * prompts,  floor <= N_i <= cap
        V(N, p) = (1 - p^N - (1-p)^N) * p (1-p)^2:  P(both classes) times the gain in pass rate that a gradient step is worth
        p_i = correct_i / (correct_i + wrong_i), from the memory, without the prior

    The (N+1)-th completion adds (p^N (1-p) + (1-p)^N p) * p (1-p)^2, which falls with N from 1 on, so it is exact to give one completion
    after another to the prompt where it adds most. Where V says nothing, the fallbacks are the paper's: a prompt never seen (less than one
    completion is remembered) gets `mean`; one never solved or always solved gets `floor`. While some prompts are unsolved, those that are
    sometimes solved together get at most sum_i log(1 - confidence) / log(max(p_i, 1-p_i)); the unsolved share the rest in equal parts.
    Source: Li et al. 2025, arXiv 2509.25849 (floor 2, cap 128, confidence .9).
    """

    confidence: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.confidence < 1:
            raise InputError("Knapsack", f"confidence {self.confidence}", "a number between 0 and 1 is needed")

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        correct, wrong = (np.array([getattr(h, side) - 1 for h in histories]) for side in ("a", "b"))  # without the Beta(1, 1) prior
        seen = correct + wrong >= 1
        between, unsolved = (np.flatnonzero(seen & (wrong > 0) & some) for some in (correct > 0, correct == 0))
        rates = np.divide(correct, correct + wrong, out=np.zeros(len(histories)), where=seen)
        budgets: Integers = np.where(seen, self.floor, self.mean).astype(np.int64)
        left = self.mean * len(histories) - int(budgets.sum())

        def value(prompts: Integers, drawn: Integers) -> Floats:
            p: Floats = rates[prompts]
            return (p**drawn * (1 - p) + (1 - p) ** drawn * p) * p * (1 - p) ** 2

        def equal_parts(prompts: Integers, drawn: Integers) -> Floats:
            return -drawn.astype(np.float64)

        wanted = min(left, self._enough(rates[between])) if len(unsolved) else left
        left -= self._give(budgets, between, wanted, value)
        left -= self._give(budgets, unsolved, left, equal_parts)
        left -= self._give(budgets, between, left, value)
        self._give(budgets, np.arange(len(histories)), left, equal_parts)
        return [int(budget) for budget in budgets]

    def _enough(self, rates: Floats) -> int:
        """Return how many completions beyond the floor give each of these prompts its rarer class with probability `confidence`."""
        rarer = np.maximum(np.minimum(rates, 1 - rates), 1e-9)  # a class that faded below one in 1e16 leaves a rate of 0 or 1
        needed = np.log(1 - self.confidence) / np.log1p(-rarer)
        return int(np.maximum(np.minimum(needed, self.cap).astype(np.int64) - self.floor, 0).sum())

    def _give(self, budgets: Integers, prompts: Integers, amount: int, gain: Callable[[Integers, Integers], Floats]) -> int:
        """Add up to `amount` completions where each gains most (ties: fewest so far, then earliest), and return how many were added."""
        row, drawn = np.nonzero(np.arange(self.cap) >= budgets[prompts][:, None])
        best = np.lexsort((row, drawn, -gain(prompts[row], drawn)))[:amount]
        np.add.at(budgets, prompts[row[best]], 1)
        return len(best)


def _check_sizes(where: str, round_size: int, cap: int) -> None:
    at_least(1, where, round_size=round_size)
    at_least(round_size, where, cap=cap)


def _scaled(weights: Floats, total: float, floor: int, cap: int) -> Floats:
    """Return clip(s * weights, floor, cap) with s such that the sum is `total`, which must lie in [floor, cap] * len(weights).

    The sum is linear in s between the points where a scaled weight reaches floor or cap.
    """

    def filled(s: float) -> Floats:
        return np.clip(s * weights, floor, cap)

    breaks = np.unique(np.concatenate([floor / weights, cap / weights]))
    i = min(bisect.bisect_left(breaks, total, key=lambda s: float(filled(s).sum())), len(breaks) - 1)
    low, high = filled(breaks[max(i - 1, 0)]), filled(breaks[i])
    rise = high.sum() - low.sum()
    return low + min((total - low.sum()) / rise, 1.0) * (high - low) if rise > 0 else high


def _rounded(amounts: Floats, total: int) -> list[int]:
    """Return integers that sum to `total`: amounts rounded down, except the largest remainders, which are rounded up (ties: earliest)."""
    whole = np.floor(amounts + 1e-9)  # 7.999999999 is an 8 after a division
    order = np.argsort(whole - amounts, kind="stable")
    whole[order[: total - math.floor(whole.sum())]] += 1
    return [int(amount) for amount in whole]
