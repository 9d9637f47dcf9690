"""Progress for cost: how far a step's gradient reaches along that of the mean pass rate, per completion generated or trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reinforce_ada.explain.effective import Array, effective_weight
from reinforce_ada.sampling import History, Policy, stopping_table
from reinforce_ada.sampling.statistics import StoppingTable, Terminal, log_beta, samples

PassRates = Mapping[tuple[float, float], float]  # (a, b) -> share of the prompts whose pass rates are Beta(a, b); the shares add up to 1
_CONCENTRATIONS = (0.1, 1000.0)  # bounds of a + b where measured rates leave it open: all of them 0 or 1, or all alike


@dataclass(frozen=True)
class Efficiency:
    """What a prompt costs and gives on average, over prompts with given pass rates.

        per cost = progress^2 / (second_moment * cost),   cost = generated + cost_ratio * trained

    A gradient that is the mean over P prompts has E[|gradient|^2] = (progress^2 + (second_moment - progress^2) / P) if the gradients of
    different prompts have nothing in common, so that for a given cost the squared length of its projection on the gradient of the mean pass
    rate, relative to its variance, grows with this number. Ratios between policies are what it is for.
    """

    generated: float  # completions a prompt
    trained: float
    progress: float  # projection of the expected gradient of a prompt on the direction of the gradient of the mean pass rate
    second_moment: float  # E[|gradient of a prompt|^2]

    def per_generated(self) -> float:
        """Return the efficiency per generated completion."""
        return self._per(self.generated)

    def per_trained(self) -> float:
        """Return the efficiency per trained completion."""
        return self._per(self.trained)

    def per_cost(self, cost_ratio: float) -> float:
        """Return the efficiency per unit of cost, if training on a completion costs `cost_ratio` times as much as generating one."""
        return self._per(self.generated + cost_ratio * self.trained)

    def _per(self, cost: float) -> float:
        return self.progress**2 / (self.second_moment * cost) if self.second_moment and cost else 0.0


def posteriors(measured: Sequence[float], k: int) -> PassRates:
    """Return the posterior pass rate of every prompt, given that Avg@k measured `measured`.

    Each is Beta(a + correct, b + k - correct). The prior Beta(a, b) is that with the mean and the spread of the prompts themselves,
    estimated without bias: E[p^2] by the mean of correct (correct - 1) / (k (k - 1)). With large k the posteriors are the measured rates,
    with small k a prompt of which none was correct is not taken for one that is never solved.

    Args:
        k: completions of each prompt, at least 2.
    """
    correct = [round(rate * k) for rate in measured]
    mean = (math.fsum(correct) + 0.5) / (k * len(correct) + 1)
    square = math.fsum(c * (c - 1) for c in correct) / (k * (k - 1) * len(correct))
    variance = square - mean**2
    least, most = _CONCENTRATIONS
    both = min(max(mean * (1 - mean) / variance - 1, least), most) if variance > 0 else most
    found = Counter((both * mean + c, both * (1 - mean) + k - c) for c in correct)
    return {ab: count / len(correct) for ab, count in found.items()}


def efficiency(policy: Policy, rates: PassRates, *, remembered: int = 0, score_variance: float = 1.0) -> Efficiency:
    """Return the exact efficiency of a policy for rewards of 0 and 1, in units in which |grad p| = p (1 - p).

        progress      = E[w(p) s^2] / sqrt(E[s^2]),   s = p (1 - p)
        second_moment = E[score_variance * noise(p) + (variance(p) + w(p)^2) s^2]

    with w, variance and noise of `EffectiveWeight`. All are polynomials in p, whose expectations are quotients of beta functions.

    Args:
        policy: any policy that has a w(p); its budget is that of a prompt never seen.
        rates: the pass rates of the prompts.
        remembered: earlier completions of each prompt that the memory holds, for a weight that reads it.
        score_variance: variance of a completion's score within its class.
    Raises: InputError for a policy without w(p).
    """
    cap = policy.allocate.budgets([History()])[0]
    parts = [_at(policy, cap, rates, seen, remembered, score_variance) for seen in range(remembered + 1)]
    trained, along, second = np.sum(parts, axis=0).tolist()
    generated = expected(stopping_table(policy, cap), samples, rates)
    length = math.sqrt(_moments(rates, np.array(2.0), np.array(2.0)))
    return Efficiency(generated, trained, along / length if length else 0.0, second)


def expected(table: StoppingTable, value: Callable[[Terminal], float], rates: PassRates) -> float:
    """Return E[value] over the prompts and over the outcomes of each."""
    return math.fsum(share * table.expect_beta(value, a, b) for (a, b), share in rates.items())


def _at(policy: Policy, cap: int, rates: PassRates, seen: int, remembered: int, score_variance: float) -> tuple[float, float, float]:
    """Return the part of (trained, E[w s^2], second moment) with `seen` correct completions among those remembered."""
    found = effective_weight(policy, cap, (1.0 + seen, 1.0 + remembered - seen))
    k, w, times = found.correct + seen, found.wrong + remembered - seen, found.paths * math.comb(remembered, seen)
    here = _moments(rates, k, w)
    along = found.plus * _moments(rates, k + 1, w + 2) + found.minus * _moments(rates, k + 2, w + 1)
    squares = found.plus**2 * _moments(rates, k, w + 2) + found.minus**2 * _moments(rates, k + 2, w)
    squares += 2 * found.plus * found.minus * _moments(rates, k + 1, w + 1)
    second = score_variance * found.noise_terms * here + squares
    trained, projection, second_moment = (float((times * x).sum()) for x in (found.kept * here, along, second))
    return trained, projection, second_moment


def _moments(rates: PassRates, i: Array, j: Array) -> Array:
    """Return E[p^i (1 - p)^j] over the prompts."""
    powers = list(zip(np.ravel(i).tolist(), np.ravel(j).tolist(), strict=True))
    found = np.zeros(len(powers))
    for (a, b), share in rates.items():
        whole = log_beta(a, b)
        found += share * np.exp([log_beta(a + x, b + y) - whole for x, y in powers])
    return found.reshape(np.shape(i))
