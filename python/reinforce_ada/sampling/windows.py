"""The posterior window: how many unanswered requests a prompt may have, by how many more completions it will probably need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import Counts, History, Verdict, Window
from reinforce_ada.sampling.policies.decide import Never
from reinforce_ada.sampling.policies.policy import Policy

_TABLE_BYTES = 64 << 20
_BLOCK = 1 << 14  # numbers, 128 KB


@dataclass(frozen=True)
class CertainWindow:
    """A `Window` of the requests that are needed for certain: fewer completions end the prompt whatever their rewards are.

        window = min{j >= 1 : some k in 0..j has policy.verdict(correct + k, wrong + j - k) != CONTINUE}, at most up to the cap

    Nothing is wasted. Voids among them only make a prompt need more.
    """

    policy: Policy

    def __call__(self, counts: Counts, history: History, cap: int, /) -> int:
        return _least_to_end(self.policy, counts, cap)


@lru_cache(maxsize=1 << 14)
def _least_to_end(policy: Policy, counts: Counts, cap: int) -> int:
    left = cap - counts.committed
    if isinstance(policy.decide, Never):
        return max(left, 1)
    for more in range(1, left):
        if policy.is_asked(counts.scored + more, counts.committed + more, cap):
            ends = (Counts(counts.correct + k, counts.wrong + more - k, counts.void) for k in range(more + 1))
            if any(policy.decide(end) is not Verdict.CONTINUE for end in ends):
                return more
    return max(left, 1)


@dataclass(frozen=True)
class PosteriorWindow:
    """A `Window` that allows as many unanswered requests as the prompt will probably need.

    With pass rate p ~ Beta(a + correct, b + wrong), where (a, b) is the prompt's history,
        S_j = P(the policy has not ended the prompt j completions from now),
    and the window is the number of j at which S_j is large enough: window = #{j >= 0 : S_j >= min_survival}, with S_0 = 1. A prompt that
    keeps failing gets its whole budget at once; an easy prompt keeps a narrow window. S is exact for any exit rule on counts: it is the
    Beta-binomial program over (correct, wrong), through `policy.verdict`. The window sets which requests are out, never what is committed.

    Args:
        policy: supplies the exit rule, the decision points and `min_pool`.
        min_survival: in (0, 1]. A small value means few barriers and more waste; 1 requests only what is certainly needed.
    Raises: InputError for a `min_survival` outside (0, 1].
    """

    policy: Policy
    min_survival: float = 0.4
    _tables: dict[tuple[float, float, int, int], NDArray[np.int16]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.min_survival <= 1:
            raise InputError("PosteriorWindow", f"min_survival {self.min_survival}", "a probability above 0 is needed")

    def __call__(self, counts: Counts, history: History, cap: int, /) -> int:
        return int(self.table(history, counts.void, cap)[counts.correct, counts.wrong])

    def table(self, history: History, void: int, cap: int) -> NDArray[np.int16]:
        """Return the windows [cap + 1, cap + 1] int16 by (correct, wrong) for a number of voids; each is at least 1.

        The prior is rounded to half powers of two, so that prompts share tables; a and b take 29 values each. At a cap of 1024 a table
        takes 2 MB and about half a second to build; the oldest tables are deleted when all together pass 64 MB.
        """
        key = (_half_power(history.a), _half_power(history.b), void, cap)
        if (found := self._tables.get(key)) is None:
            found = np.ones((cap + 1, cap + 1), np.int16)
            for scored, survival in survivals(self.policy, History(key[0], key[1]), void=void, cap=cap):
                correct = np.arange(scored + 1)
                found[correct, scored - correct] = np.maximum(_num_at_least(survival, self.min_survival - 1e-12), 1)
            while self._tables and (len(self._tables) + 1) * found.nbytes > _TABLE_BYTES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = found
        return found


def window_of(settings: Any, policy: Policy, *, latency_bound: bool) -> int | Window | None:
    """Return the window for `settings.schedule` and `settings.window`, which have the values of `config.sampling`.

    A window of None means the one that suits the engine. If decode is bound by latency (a GPU with room in its batch), a longer batch is
    nearly free and requests follow the posterior; otherwise (a CPU) a surplus request costs its full time, and `round_size` wastes none.
    """
    given = settings.window
    if settings.schedule == "rounds" or isinstance(given, int):
        number: int | None = given
        return number
    return PosteriorWindow(policy) if given == "posterior" or latency_bound else policy.allocate.round_size


def survivals(policy: Policy, history: History, *, void: int = 0, cap: int | None = None) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield P(the prompt is still open after j more completions), from the states with most completions to the first one.

        S_0 = [open];  S_j(c, w) = [open] * (m S_{j-1}(c + 1, w) + (1 - m) S_{j-1}(c, w + 1)),  m = (a + c) / (a + b + c + w)
    where open means below the cap and not ended by `policy.verdict` at these counts. S falls with j.

    Args:
        policy: supplies the exit rule, the decision points and `min_pool`.
        history: Beta(a, b) prior of the pass rate.
        void: completions without a reward so far; the coming ones are assumed to have a reward each.
        cap: the prompt's budget; None means the policy's cap.
    Yields: scored = cap - void - 1, .., 0 and S [scored + 1, cap - void - scored] float64 by (correct, j), with wrong = scored - correct;
        at larger j it is 0. The next step overwrites the array, so that memory holds one of them instead of cap.
    """
    cap = policy.cap if cap is None else cap
    last = max(cap - void, 0)
    survival = np.zeros((last + 1, last + 1))  # by correct and scored + j, so that a state and its successors share a column
    for scored, is_open in zip(range(last - 1, -1, -1), _open_states(policy, void, cap), strict=True):
        correct = np.arange(scored + 1)
        mean = np.asarray((history.a + correct) / (history.a + history.b + scored), np.float64)[:, None]
        rows = np.flatnonzero(is_open)
        if 4 * len(rows) < scored:  # few states are open if the rule is asked after every completion
            survival[rows, scored + 1 :] += mean[rows] * (survival[rows + 1, scored + 1 :] - survival[rows, scored + 1 :])
        else:
            _mix(survival[: scored + 2, scored + 1 :], mean)
        survival[: scored + 1, scored] = is_open
        survival[np.flatnonzero(~is_open), scored:] = 0
        yield scored, survival[: scored + 1, scored:last]


def _mix(survival: NDArray[np.float64], mean: NDArray[np.float64]) -> None:
    """Replace each row but the last by mean * (the row below) + (1 - mean) * itself, in blocks that stay in the cache."""
    height = max(_BLOCK // max(survival.shape[1], 1), 1)
    for top in range(0, len(mean), height):
        bottom = min(top + height, len(mean))
        change = survival[top + 1 : bottom + 1] - survival[top:bottom]
        change *= mean[top:bottom]
        survival[top:bottom] += change


@lru_cache(maxsize=8)  # half a megabyte each at a cap of 1024
def _open_states(policy: Policy, void: int, cap: int) -> tuple[NDArray[np.bool_], ...]:
    """Return whether a prompt goes on with 0, 1, .., scored correct completions, for scored = cap - void - 1, .., 0."""
    return tuple(_open(policy, scored, void, cap) for scored in range(cap - void - 1, -1, -1))


def _open(policy: Policy, scored: int, void: int, cap: int) -> NDArray[np.bool_]:
    if scored + void == 0 or not policy.is_asked(scored, scored + void, cap):
        return np.ones(scored + 1, np.bool_)
    decide, goes_on = policy.decide, Verdict.CONTINUE
    return np.array([decide(Counts(correct, scored - correct, void)) is goes_on for correct in range(scored + 1)])


def _num_at_least(survival: NDArray[np.float64], least: float) -> NDArray[np.int64]:
    """Return how many numbers of each falling row are at least `least`. All rows are bisected together."""
    rows, length = np.arange(len(survival)), survival.shape[1]
    found = np.zeros(len(survival), np.int64)
    for step in (1 << i for i in reversed(range(length.bit_length()))):
        beyond = found + step
        reaches = (beyond <= length) & (survival[rows, np.minimum(beyond, length) - 1] >= least)
        found = np.where(reaches, beyond, found)
    return found


@lru_cache(maxsize=1 << 12)
def _half_power(value: float) -> float:
    """Round `value` > 0 to the nearest of .., 1/2, 0.7, 1, 1.4, 2, .., between 1/16 and 1024."""
    return math.pow(2, min(max(round(2 * math.log2(value)), -8), 20) / 2)
