"""How many requests a prompt may have unanswered: the window that follows the posterior of the draws it still needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies import Counts, History, Policy, Verdict, Window


@dataclass(frozen=True)
class PosteriorWindow:
    """As many unanswered requests as a prompt will probably need; a `Window`.

    With pass rate p ~ Beta(a + correct, b + wrong), (a, b) being the prompt's history,
        S_j = P(the policy has not ended the prompt j completions from now),
    and a request goes out while at least `min_survival` of S is left: window = #{j >= 0 : S_j >= min_survival}. S_0 is 1. A prompt that
    keeps failing is given its whole budget at once, an easy one stays narrow. S is exact for any rule on counts: the Beta-binomial
    program over (correct, wrong), through `policy.verdict`. The window steers which requests are out, never what is committed.

    Args:
        policy: its exit rule, decision points and `min_pool`.
        min_survival: in (0, 1]. Small: few barriers, more waste. 1 asks only for what is certainly needed.
    Raises: InputError for a `min_survival` outside.
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
        """The windows [cap + 1, cap + 1] int16 of all (correct, wrong), for so many voids; at least 1 everywhere.

        The prior is rounded to half powers of two, so that prompts share tables; a and b take 29 values each.
        """
        key = (_half_power(history.a), _half_power(history.b), void, cap)
        if (found := self._tables.get(key)) is None:
            survival = survival_table(self.policy, History(key[0], key[1]), void=void, cap=cap)
            found = np.maximum((survival >= self.min_survival - 1e-12).sum(axis=2), 1).astype(np.int16)
            self._tables[key] = found
        return found


def window_of(settings: Any, policy: Policy, *, latency_bound: bool) -> int | Window | None:
    """The window that `settings.schedule` and `settings.window` ask for, as `config.sampling` has them.

    None asks for what suits the engine. Where decode is bound by latency (a GPU whose batch has room) a longer batch is nearly free, and
    requests follow the posterior; elsewhere (a CPU) every surplus request costs its full time, and a window of `round_size` wastes nothing.
    """
    given = settings.window
    if settings.schedule == "rounds" or isinstance(given, int):
        number: int | None = given
        return number
    return PosteriorWindow(policy) if given == "posterior" or latency_bound else policy.allocate.round_size


def survival_table(policy: Policy, history: History, *, void: int = 0, cap: int | None = None) -> NDArray[np.float64]:
    """P(the prompt is still open after j more completions), by its counts.

        S_0 = [open];  S_j(c, w) = [open] * (m S_{j-1}(c + 1, w) + (1 - m) S_{j-1}(c, w + 1)),  m = (a + c) / (a + b + c + w)
    where open means below the cap and not ended by `policy.verdict` at these counts.

    Args:
        policy: its exit rule, decision points and `min_pool`.
        history: Beta(a, b) prior of the pass rate.
        void: completions without a reward so far; none is expected among the coming ones.
        cap: the prompt's; None is the policy's.
    Returns: [cap + 1, cap + 1, cap + 1] float64 by (correct, wrong, j); 0 where correct + wrong + void exceeds the cap.
    """
    cap = policy.cap if cap is None else cap
    survival = np.zeros((cap + 1, cap + 1, cap + 1))
    for scored in range(cap - void - 1, -1, -1):
        correct = np.arange(scored + 1)
        wrong = scored - correct
        open_ = np.array(
            [scored + void == 0 or policy.verdict(Counts(c, scored - c, void), cap) is Verdict.CONTINUE for c in correct.tolist()]
        )
        mean = ((history.a + correct) / (history.a + history.b + scored))[:, None]
        later = mean * survival[correct + 1, wrong, :-1] + (1 - mean) * survival[correct, wrong + 1, :-1]
        survival[correct, wrong, 0] = open_
        survival[correct, wrong, 1:] = open_[:, None] * later
    return survival


def _half_power(value: float) -> float:
    """`value` > 0 to the nearest of .., 1/2, 0.7, 1, 1.4, 2, .., between 1/16 and 1024."""
    return math.pow(2, min(max(round(2 * math.log2(value)), -8), 20) / 2)
