"""The pool of a prompt that is still being sampled."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.sampling.policies.contracts import Counts
from reinforce_ada.sampling.rules import CORRECT, unit_of
from reinforce_ada.types import Completion, CompletionId, ExitReason, Outcome, Pool, Prompt, Scored


class GrowingPool:
    """The answers of one prompt by request index. Those before `committed` form the pool; the others wait for an earlier answer."""

    __slots__ = (
        "_answered_correct",
        "_answered_void",
        "_answered_wrong",
        "_first",
        "_threshold",
        "answers",
        "committed",
        "correct",
        "has_signal",
        "wrong",
    )

    def __init__(self, positive_threshold: float) -> None:
        self._threshold = positive_threshold
        self.answers: list[Outcome | None] = []
        self.committed = self.correct = self.wrong = 0
        self._answered_correct = self._answered_wrong = self._answered_void = 0
        self.has_signal = False  # any two rewards differ
        self._first: float | None = None

    @property
    def counts(self) -> Counts:
        return Counts(self.correct, self.wrong, self.committed - self.correct - self.wrong)

    def put(self, index: int, outcome: Outcome) -> None:
        """Store the answer of the request with this index until it can be committed."""
        self.answers.extend([None] * (index + 1 - len(self.answers)))
        self.answers[index] = outcome
        self._count(outcome, 1)

    def has(self, index: int) -> bool:
        return index < len(self.answers) and self.answers[index] is not None

    def commit_next(self) -> Outcome | None:
        """Commit the next answer in request order and return it, or None if it has not arrived. A Failed one enters no statistic."""
        outcome = self.answers[self.committed] if self.committed < len(self.answers) else None
        if outcome is None:
            return None
        self.committed += 1
        if isinstance(outcome, Scored):
            if self._first is None:
                self._first = outcome.reward
            self.has_signal |= outcome.reward != self._first
            if unit_of(outcome, self._threshold) is CORRECT:
                self.correct += 1
            else:
                self.wrong += 1
        return outcome

    @property
    def later(self) -> list[Counts | None]:
        """Return what each request from index `committed` on brought: CORRECT, WRONG, VOID, or None if it is unanswered."""
        return [None if answer is None else unit_of(answer, self._threshold) for answer in self.answers[self.committed :]]

    @property
    def answered(self) -> Counts:
        """Return the counts of all answers, including those that wait for an earlier one."""
        return Counts(self._answered_correct, self._answered_wrong, self._answered_void)

    def _count(self, outcome: Outcome, change: int) -> None:
        correct, wrong, void = unit_of(outcome, self._threshold)
        self._answered_correct += change * correct
        self._answered_wrong += change * wrong
        self._answered_void += change * void

    def cut(self, first: int) -> list[tuple[int, Outcome]]:
        """Remove the answers from index `first` on and return them as (index, answer)."""
        removed = [(index, answer) for index, answer in enumerate(self.answers[first:], first) if answer is not None]
        del self.answers[first:]
        for _, answer in removed:
            self._count(answer, -1)
        return removed

    def freeze(self, prompt: Prompt, num_issued: int, reason: ExitReason, cap: int, prior: tuple[float, float] = (1.0, 1.0)) -> Pool:
        """Return the finished pool, with the statistics of its raw rewards."""
        outcomes = tuple(answer for answer in self.answers[: self.committed] if answer is not None)
        mean, m2, low, high = reward_statistics([o.reward for o in outcomes if isinstance(o, Scored)])
        return Pool(
            prompt=prompt,
            outcomes=outcomes,
            num_correct=self.correct,
            num_wrong=self.wrong,
            num_void=self.committed - self.correct - self.wrong,
            mean=mean,
            m2=m2,
            min=low,
            max=high,
            num_issued=num_issued,
            exit=reason,
            cap=cap,
            prior=prior,
        )


@lru_cache(maxsize=1 << 10)
def only_reward(reward: float) -> Scored:
    """Return a Scored that holds a reward and an empty completion; equal rewards share one object."""
    return Scored(Completion(CompletionId(-1, "", -1), np.empty(0, np.int32), np.empty(0, np.float32), "", "", -1), reward)


def reward_statistics(rewards: list[float]) -> tuple[float, float, float, float]:
    """Return mean, centred second moment, minimum and maximum. Sums are rounded once, so the order of the rewards has no effect.

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
    """Return the raw rewards [count] float64, in request order."""
    return np.fromiter((s.reward for s in scored), dtype=np.float64, count=len(scored))
