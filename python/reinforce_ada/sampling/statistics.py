"""Exact statistics of a stopping rule, by counting paths over (correct, wrong) states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from reinforce_ada.sampling.policies import Counts, Policy, Verdict


@dataclass(frozen=True)
class Terminal:
    """A state the sampler can end in, and the number of draw sequences that end there."""

    correct: int
    wrong: int
    num_paths: int
    verdict: Verdict  # CONTINUE where the cap was reached

    @property
    def count(self) -> int:
        return self.correct + self.wrong


@dataclass(frozen=True)
class StoppingTable:
    """Every terminal state of a policy's stopping rule, for binary rewards and no voids.

    A sequence that ends with k correct and w wrong has probability p^k (1-p)^w at pass rate p, so
        E[f] = sum over terminals of num_paths * p^k (1-p)^w * f(terminal).
    Path counts are exact integers: there are up to C(32, 16) = 6.0e8 at the published cap and 1e19 at a cap of 68, past int64.
    """

    terminals: tuple[Terminal, ...]

    def expect(self, value: Callable[[Terminal], float], p: float) -> float:
        """E[value] at pass rate `p` in [0, 1]."""
        return math.fsum(t.num_paths * p**t.correct * (1 - p) ** t.wrong * value(t) for t in self.terminals)

    def expect_beta(self, value: Callable[[Terminal], float], a: float, b: float) -> float:
        """E[value] over a population of prompts with pass rates Beta(a, b): E[p^k (1-p)^w] = B(a+k, b+w) / B(a, b)."""
        return math.fsum(
            value(t) * math.exp(math.log(t.num_paths) + _log_beta(a + t.correct, b + t.wrong) - _log_beta(a, b)) for t in self.terminals
        )


def stopping_table(policy: Policy) -> StoppingTable:
    """The terminal states of `policy`'s exit rule, one draw after another from (0, 0), never through an earlier stop."""
    terminals: list[Terminal] = []
    live = {(0, 0): 1}
    for _ in range(policy.cap):
        reached: dict[tuple[int, int], int] = {}
        for (correct, wrong), num_paths in live.items():
            for state in ((correct + 1, wrong), (correct, wrong + 1)):
                reached[state] = reached.get(state, 0) + num_paths
        live = {}
        for (correct, wrong), num_paths in reached.items():
            verdict = policy.verdict(Counts(correct, wrong))
            if verdict is Verdict.CONTINUE and correct + wrong < policy.cap:
                live[correct, wrong] = num_paths
            else:
                terminals.append(Terminal(correct, wrong, num_paths, verdict))
    return StoppingTable(tuple(terminals))


def samples(terminal: Terminal) -> float:
    """Completions drawn; its expectation is E[N]."""
    return terminal.count


def signal(terminal: Terminal) -> float:
    """1 where both classes are there; its expectation is P(signal)."""
    return float(terminal.correct > 0 and terminal.wrong > 0)


def pool_mean(terminal: Terminal) -> float:
    """Mean of the binary rewards; its expectation minus p is the bias by optional stopping."""
    return terminal.correct / terminal.count


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
