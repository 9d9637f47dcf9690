"""Exact statistics of a stopping rule, by counting paths over (correct, wrong) states in integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies import Counts, Policy, Verdict
from reinforce_ada.types import Failed, Pool


class Paths(NamedTuple):
    """Numbers of draw sequences, exact."""

    all: int = 0
    first_correct: int = 0  # those whose first draw is correct
    correct_then_wrong: int = 0  # those whose first two draws are correct, then wrong; one that ends before its second draw is not

    def __add__(self, other: Paths) -> Paths:  # type: ignore[override]  # of counts, not of tuples
        return Paths(self[0] + other[0], self[1] + other[1], self[2] + other[2])


@dataclass(frozen=True)
class Terminal:
    """A state the sampler can end in, and the draw sequences that end there.

        pass_rate       = paths.first_correct / paths.all         unbiased for p
        reward_variance = paths.correct_then_wrong / paths.all    unbiased for p (1 - p) where every sequence has two draws

    Given the terminal every sequence that ends there is equally likely, so these are P(first draw correct | terminal) and P(first
    two draws correct, wrong | terminal): whatever stopped the sampling, their expectations are those of the first draws.
    Source: Girshick, Mosteller, Savage 1946, "Unbiased estimates for certain binomial sampling problems".
    """

    correct: int
    wrong: int
    paths: Paths
    verdict: Verdict  # CONTINUE where the cap was reached
    void: int = 0

    @property
    def num_paths(self) -> int:
        return self.paths.all

    @property
    def count(self) -> int:
        """Scored draws."""
        return self.correct + self.wrong

    @property
    def pass_rate(self) -> float:
        """Unbiased estimate of the pass rate p, in [0, 1]; nan without a scored draw."""
        return self.paths.first_correct / self.paths.all if self.count else math.nan

    @property
    def reward_variance(self) -> float:
        """Unbiased estimate of p (1 - p), in [0, 1]; 0 with fewer than two scored draws, where there is none."""
        return self.paths.correct_then_wrong / self.paths.all


@dataclass(frozen=True)
class StoppingTable:
    """Every terminal state of a policy's stopping rule, for binary rewards.

    A sequence that ends with k correct and w wrong has probability p^k (1-p)^w at pass rate p, so
        E[f] = sum over terminals of num_paths * p^k (1-p)^w * f(terminal).
    Path counts are exact integers: there are up to C(32, 16) = 6.0e8 at the published cap and 1e19 at a cap of 68, past int64.
    """

    terminals: tuple[Terminal, ...]

    def at(self, counts: Counts) -> Terminal:
        """The terminal with these counts. Raises: InputError where the rule cannot end there."""
        found = self._by_counts.get(counts)
        if found is None:
            raise InputError("StoppingTable", f"a pool with {_words(counts)}", "counts that the stopping rule can end with")
        return found

    @cached_property
    def _by_counts(self) -> dict[Counts, Terminal]:
        return {Counts(t.correct, t.wrong, t.void): t for t in self.terminals}

    def expect(self, value: Callable[[Terminal], float], p: float) -> float:
        """E[value] at pass rate `p` in [0, 1]."""
        return math.fsum(t.num_paths * p**t.correct * (1 - p) ** t.wrong * value(t) for t in self.terminals)

    def expect_beta(self, value: Callable[[Terminal], float], a: float, b: float) -> float:
        """E[value] over a population of prompts with pass rates Beta(a, b): E[p^k (1-p)^w] = B(a+k, b+w) / B(a, b)."""
        return math.fsum(
            value(t) * math.exp(math.log(t.num_paths) + _log_beta(a + t.correct, b + t.wrong) - _log_beta(a, b)) for t in self.terminals
        )


def stopping_table(policy: Policy, cap: int | None = None, voids: tuple[int, ...] = ()) -> StoppingTable:
    """The terminal states of `policy`'s exit rule, one draw after another from nothing, never through an earlier stop.

    Tables are kept: asking again costs a look-up (under 10 us), building one at a cap of 32 about 2 ms. The work grows with the states
    that go on: at a cap of 1000 it is 50 ms for the published rules, and 2 s for a rule that never stops.

    Args:
        policy: its `verdict(counts, cap)` is the rule.
        cap: the prompt's own, where `allocate` gives each its budget; None is the policy's.
        voids: indices, increasing, of the completions without a reward. The table is the one given these positions: a void advances
            the prefix, the decision points and the cap, and is no draw.
    Returns: a StoppingTable.
    """
    return _table(policy, policy.cap if cap is None else cap, voids)


@lru_cache(maxsize=4096)  # a pattern of voids has its own table, of some 60 terminals
def _table(policy: Policy, cap: int, voids: tuple[int, ...]) -> StoppingTable:
    terminals = []
    for _, ended in _draw_by_draw(policy, cap, voids):
        terminals += ended
    return StoppingTable(tuple(terminals))


def live_sequences(policy: Policy, cap: int) -> dict[Counts, int]:
    """Draw sequences that lead to each state from which `policy` goes on: up to cap^2 / 2 of them, so they are no part of a table."""
    return {counts: paths.all for live, _ in _draw_by_draw(policy, cap, ()) for counts, paths in live.items()}


def _draw_by_draw(policy: Policy, cap: int, voids: tuple[int, ...]) -> Iterator[tuple[dict[Counts, Paths], list[Terminal]]]:
    """The states that go on before each draw, and the terminals that it leads to."""
    live = {Counts(0, 0): Paths(1)}
    for index in range(cap):
        reached: dict[Counts, Paths] = {}
        for counts, paths in live.items():
            for after, extended in _void(counts, paths) if index in voids else _draws(counts, paths):
                reached[after] = reached[after] + extended if after in reached else extended
        going_on, ended = {}, []
        for counts, paths in reached.items():
            verdict = policy.verdict(counts, cap)
            if verdict is Verdict.CONTINUE and counts.committed < cap:
                going_on[counts] = paths
            else:
                ended.append(Terminal(counts.correct, counts.wrong, paths, verdict, counts.void))
        yield live, ended
        live = going_on


def _void(counts: Counts, paths: Paths) -> Iterator[tuple[Counts, Paths]]:
    yield Counts(counts.correct, counts.wrong, counts.void + 1), paths


def _draws(counts: Counts, paths: Paths) -> Iterator[tuple[Counts, Paths]]:
    """Both outcomes of the next draw, with the sequences extended by it."""
    correct, wrong, void = counts
    is_first, is_second_after_correct = correct + wrong == 0, (correct, wrong) == (1, 0)
    yield Counts(correct + 1, wrong, void), Paths(paths.all, paths.all, 0) if is_first else paths
    yield Counts(correct, wrong + 1, void), Paths(paths.all, paths.all, paths.all) if is_second_after_correct else paths


def terminals_of(pools: Iterable[Pool], policy: Policy) -> Iterator[Terminal]:
    """The terminal each finished pool ended in, given its own cap and the positions of its voids.

    Raises: InputError for a pool that `policy` cannot have ended.
    """
    tables: dict[int, StoppingTable] = {}
    for pool in pools:
        if pool.num_void:
            table = stopping_table(policy, pool.cap, tuple(i for i, o in enumerate(pool.outcomes) if isinstance(o, Failed)))
        elif (found := tables.get(pool.cap)) is not None:
            table = found
        else:
            table = tables[pool.cap] = stopping_table(policy, pool.cap)
        yield table.at(Counts(pool.num_correct, pool.num_wrong, pool.num_void))


def samples(terminal: Terminal) -> float:
    """Completions committed; its expectation is E[N]."""
    return terminal.count + terminal.void


def signal(terminal: Terminal) -> float:
    """1 where both classes are there; its expectation is P(signal)."""
    return float(terminal.correct > 0 and terminal.wrong > 0)


def pool_mean(terminal: Terminal) -> float:
    """Mean of the binary rewards; its expectation minus p is the bias by optional stopping."""
    return terminal.correct / terminal.count


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _words(counts: Counts) -> str:
    return f"{counts.correct} correct, {counts.wrong} wrong and {counts.void} void"
