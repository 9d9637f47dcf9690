"""Weights whose expected gradient is that of a stated objective, whatever stopped the sampling.

For binary rewards E[gradient of a prompt] = w(p) * grad p: stopping, selection and baseline only change the factor w, so each policy
ascends f(p) = integral of w over its prompts. Here f is given, and the weights make w = f'(p).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.sampling.policies.contracts import AdvantageSpec, Counts, Verdict, Weighting
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.statistics import Terminal, stopping_table, terminals_of
from reinforce_ada.types import Group

ObjectiveName: TypeAlias = Literal["as-published", "mean", "log", "power"]
OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)

_BASELINE = 0.5  # halfway between the rewards 0 and 1, so that the class weights multiply advantages of -1/2 and +1/2


@dataclass(frozen=True)
class ObjectiveWeight(Weighting):
    """Set advantages whose expected gradient is that of f(p), summed over the prompts that entered.

        A+ = +t n / a,  A- = -t n / b,  t = f'(p~) * theta~;  0 where a or b is 0
        f' = 1 ("mean") | 1 / p ("log") | alpha p^(alpha - 1) ("power")

    with a correct and b wrong completions kept, n = group_size, and the unbiased estimates p~ of p and theta~ of p (1 - p) from the
    stopped pool (see `statistics.Terminal`). The sum over a group is t * (mean score of its correct - mean score of its wrong), whose
    expectation given the pool is t * (1/p + 1/(1-p)) * grad p = t / (p (1-p)) * grad p; with "mean" that is exactly grad p. "log" and
    "power" use p~, clipped from below at 1 / cap, the smallest rate that a pool can distinguish from 0.

    The denominator is fixed: the advantages contain n where a group's mean would have a + b (the same for a full group), so the sum
    over all kept tokens must be divided by n * (prompts that entered). A group made smaller by voids then needs no special case, and
    it makes no difference whether groups without signal are kept or dropped. The trainer divides so; see `training.loss`.

    Args:
        objective: "mean" | "log" | "power".
        alpha: the positive exponent of "power"; 1 is "mean".
    Source: arXiv 2510.04996 v3 (non-linear objectives); the estimates, Girshick, Mosteller, Savage 1946.
    """

    objective: ObjectiveName = "mean"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVE_NAMES[1:]:
            raise unknown_name("ObjectiveWeight", "objective", self.objective, OBJECTIVE_NAMES[1:])
        if not 0 < self.alpha < math.inf:
            raise InputError("ObjectiveWeight", f"alpha {self.alpha}", "a positive number is needed")
        if self.objective != "power" and self.alpha != 1:
            raise InputError("ObjectiveWeight", f"alpha {self.alpha} with objective {self.objective!r}", 'it belongs to objective "power"')

    def __call__(self, groups: Sequence[Group], policy: Policy, /) -> AdvantageSpec:
        """Return the advantages. Raises: InputError for a prompt with a budget of one completion, which has no estimate of p (1 - p)."""
        if any(group.pool.cap < 2 for group in groups):
            raise InputError(f"Policy {policy.name!r}: objective {self.objective!r}", "a budget of 1 completion", "at least 2 are needed")
        weights = np.zeros((len(groups), 2))
        for row, group, terminal in zip(weights, groups, terminals_of((g.pool for g in groups), policy), strict=True):
            correct = sum(s.reward > policy.positive_threshold for s in group.kept)
            wrong = len(group.kept) - correct
            if correct and wrong:
                t = self.slope(terminal.pass_rate, group.pool.cap) * terminal.reward_variance * policy.group_size / _BASELINE
                row[:] = t / wrong, t / correct
        return AdvantageSpec(np.full(len(groups), _BASELINE), "none", class_weights=weights, threshold=policy.positive_threshold)

    def slope(self, pass_rate: float, cap: int) -> float:
        """Return f'(p) at an estimate of the pass rate, clipped to [1 / cap, 1]."""
        p = max(pass_rate, 1 / cap)
        return {"mean": 1.0, "log": 1 / p}.get(self.objective, self.alpha * math.pow(p, self.alpha - 1))

    def check(self, policy: Policy) -> None:
        """Raise InputError if no unbiased estimate exists for this policy; the message names the part that prevents it."""
        where = f"Policy {policy.name!r}: objective {self.objective!r}"
        if policy.group_size < 2:
            raise InputError(where, f"group_size {policy.group_size}", "at least 2 is needed, to keep both classes")
        if policy.refills:
            given = f"{type(policy.propose).__name__}, which admits prompts because others were dropped"
            raise InputError(where, given, "a fixed number of prompts is needed")
        for cap in {policy.allocate.floor or policy.cap, policy.cap}:
            _check_rule(where, policy, stopping_table(policy, cap).terminals)
        _check_selection(where, policy)


def _check_rule(where: str, policy: Policy, terminals: Sequence[Terminal]) -> None:
    if any(t.verdict is Verdict.DROP for t in terminals):
        given = f"{type(policy.decide).__name__}, which drops prompts because of their outcomes"
        raise InputError(where, given, "a rule that keeps every prompt is needed")
    short = [t for t in terminals if t.count < 2]
    if short:
        given = f"a pool that can end after {short[0].count} draw ({short[0].correct} correct, {short[0].wrong} wrong)"
        raise InputError(where, given, "two draws are needed to estimate p (1 - p)", "min_pool 2 or decide_every 2 or more")


def _check_selection(where: str, policy: Policy) -> None:
    for counts in _small_pools(policy):
        for chars in ("+" * counts.correct + "-" * counts.wrong, "-" * counts.wrong + "+" * counts.correct):
            correct = np.array([c == "+" for c in chars])
            kept = policy.select(correct.astype(np.float64), correct, policy.group_size)
            if len(set(correct[list(kept)].tolist())) < 2:
                given = f"{type(policy.select).__name__}, which keeps one class of {chars!r}"
                raise InputError(where, given, "a selection that keeps both classes of every pool with both is needed", "Balanced()")


def _small_pools(policy: Policy) -> Iterator[Counts]:
    """Yield pools with both classes, around the sizes where a selection of `group_size` changes its choice."""
    n = policy.group_size
    sizes = sorted({1, 2, n // 2, n - n // 2, n - 1, n, n + 1, policy.cap - 1} - {0})
    yield from (Counts(k, w) for k in sizes for w in sizes if k + w <= policy.cap)
