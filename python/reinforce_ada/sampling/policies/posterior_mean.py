"""The baseline that remembers: the posterior mean of the prompt's pass rate, given its earlier pools and the other completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import AdvantageSpec, Weighting
from reinforce_ada.sampling.policies.decide import Never
from reinforce_ada.types import Group

if TYPE_CHECKING:
    from reinforce_ada.sampling.policies.policy import Policy

_BASELINE = 0.5  # halfway between the rewards 0 and 1, so that the class weights multiply advantages of -1/2 and +1/2


@dataclass(frozen=True)
class PosteriorMean(Weighting):
    """Set advantage = reward - (a + correct others) / (a + b + others), with Beta(a, b) of the prompt from memory.

        A+ = (b + l) / (a + b + n - 1) * N / n,   A- = -(a + k) / (a + b + n - 1) * N / n

    for k correct and l wrong completions, n = k + l, and N = group_size (N = n unless completions are voids). The baseline is the posterior
    mean of the pass rate without the completion's own reward, so that the expected gradient is that of the mean pass rate, whatever is
    remembered: a poor memory costs variance only. A single completion has a baseline too, so that every draw can go to another prompt.

    All completions have to be kept, and their number must not depend on their outcomes.
    Source: the leave-one-out baseline, arXiv 2402.14740; one that remembers, arXiv 2509.13232.

    Args:
        predicted: the prior is not Beta(1, 1) but Beta(2 m, 2 (1 - m)), with the pass rate m that the trainer predicts for the prompt
            without its outcomes. The advantages are those for m = 0; 2 m / (a + b + n - 1) * N / n is still to be subtracted from them.
    """

    predicted: bool = False

    objective = "mean"
    needs_memory = True

    @property
    def needs_prediction(self) -> bool:  # type: ignore[override]
        return self.predicted

    def __call__(self, groups: Sequence[Group], policy: Policy, /) -> AdvantageSpec:
        weights, predictions = np.zeros((len(groups), 2)), np.zeros(len(groups))
        prior = float(self.predicted)  # what the memory's Beta(1, 1) counts as correct, and counts as wrong at m = 0
        for i, pool in enumerate(group.pool for group in groups):
            (a, b), k, n = pool.prior, pool.num_correct, pool.count
            if n:
                scale = policy.group_size / n / (a + b + n - 1)
                weights[i] = np.array([a - prior + k, b + prior + n - k]) * scale / _BASELINE
                predictions[i] = 2 * scale
        return AdvantageSpec(
            np.full(len(groups), _BASELINE), "none", class_weights=weights, threshold=policy.positive_threshold,
            prediction_weights=predictions if self.predicted else None,
        )  # fmt: skip

    def check(self, policy: Policy) -> None:
        """Raise InputError where the number or choice of kept completions depends on outcomes."""
        where = f"Policy {policy.name!r}: baseline {'predicted' if self.predicted else 'memory'!r}"
        needed = "a fixed number of completions is needed, all of them kept"
        if not isinstance(policy.decide, Never):
            raise InputError(where, f"{type(policy.decide).__name__}, which stops because of outcomes", needed)
        if policy.cap != policy.group_size:
            raise InputError(where, f"{policy.cap} completions a prompt, of which {policy.group_size} are kept", needed)
        if policy.degenerate == "drop":
            raise InputError(where, 'degenerate "drop", which leaves out pools because of their outcomes', needed, 'degenerate "keep"')
        n = policy.group_size
        for num_correct in {0, n // 2, n}:
            correct = np.arange(n) < num_correct
            if len(policy.select(correct.astype(np.float64), correct, n)) != n:
                raise InputError(where, f"{type(policy.select).__name__}, which leaves completions out", needed, "select All() or First()")
