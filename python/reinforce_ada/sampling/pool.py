"""The pool of a prompt while it grows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.sampling.policies import Counts
from reinforce_ada.types import ExitReason, Outcome, Pool, Prompt, Scored


class GrowingPool:
    """Committed outcomes of one prompt, in request order."""

    __slots__ = ("_first", "_threshold", "correct", "has_signal", "outcomes", "void", "wrong")

    def __init__(self, positive_threshold: float) -> None:
        self._threshold = positive_threshold
        self.outcomes: list[Outcome] = []
        self.correct = self.wrong = self.void = 0
        self.has_signal = False  # any two rewards differ
        self._first: float | None = None

    @property
    def counts(self) -> Counts:
        return Counts(self.correct, self.wrong, self.void)

    def add(self, outcome: Outcome) -> None:
        """Commit the next outcome; a Failed one is a void and enters no statistic."""
        self.outcomes.append(outcome)
        if not isinstance(outcome, Scored):
            self.void += 1
            return
        if self._first is None:
            self._first = outcome.reward
        self.has_signal |= outcome.reward != self._first
        if outcome.reward > self._threshold:
            self.correct += 1
        else:
            self.wrong += 1

    def freeze(self, prompt: Prompt, num_issued: int, reason: ExitReason, cap: int) -> Pool:
        """The finished record, with the statistics of the raw rewards."""
        mean, m2, low, high = reward_statistics([o.reward for o in self.outcomes if isinstance(o, Scored)])
        return Pool(
            prompt=prompt,
            outcomes=tuple(self.outcomes),
            num_correct=self.correct,
            num_wrong=self.wrong,
            num_void=self.void,
            mean=mean,
            m2=m2,
            min=low,
            max=high,
            num_issued=num_issued,
            exit=reason,
            cap=cap,
        )


def reward_statistics(rewards: list[float]) -> tuple[float, float, float, float]:
    """Mean, centred second moment, minimum and maximum, the sums rounded once (so independent of order).

    mean = sum(r) / n;  m2 = sum((r - mean)^2);  an empty pool has 0, 0, +inf, -inf.
    """
    if not rewards:
        return 0.0, 0.0, math.inf, -math.inf
    low, high = min(rewards), max(rewards)
    if low == high:  # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in float64: a one-valued pool must have m2 exactly 0
        return low, 0.0, low, high
    mean = math.fsum(rewards) / len(rewards)
    return mean, math.fsum((r - mean) ** 2 for r in rewards), low, high


def rewards_of(scored: tuple[Scored, ...]) -> NDArray[np.float64]:
    """Raw rewards [count] float64, in request order."""
    return np.fromiter((s.reward for s in scored), dtype=np.float64, count=len(scored))
