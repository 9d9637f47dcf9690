"""The exact statistics of a stopping rule, from integer counts of the paths over (correct, wrong) states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import Counts, Verdict
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.types import Failed, Pool


class Paths(NamedTuple):
    """Exact numbers of draw sequences."""

    all: int = 0
    first_correct: int = 0  # those whose first draw is correct
    correct_then_wrong: int = 0  # those whose first draw is correct and second wrong; a sequence of one draw is not among them

    def __add__(self, other: Paths) -> Paths:  # type: ignore[override]  # adds counts instead of joining tuples
        return Paths(self[0] + other[0], self[1] + other[1], self[2] + other[2])


@dataclass(frozen=True)
class Terminal:
    """A state in which the sampler can end, and the draw sequences that end there.

        pass_rate       = paths.first_correct / paths.all         unbiased for p
        reward_variance = paths.correct_then_wrong / paths.all    unbiased for p (1 - p) where every sequence has two draws

    All sequences that end in one terminal are equally likely, so these are P(first draw correct | terminal) and P(first two draws
    correct, wrong | terminal): whatever stopped the sampling, their expectations are those of the first draws.
    Source: Girshick, Mosteller, Savage 1946, "Unbiased estimates for certain binomial sampling problems".
    """

    correct: int
    wrong: int
    paths: Paths
    verdict: Verdict  # CONTINUE if the cap was reached
    void: int = 0

    @property
    def num_paths(self) -> int:
        return self.paths.all

    @property
    def count(self) -> int:
        """Return the number of scored draws."""
        return self.correct + self.wrong

    @property
    def pass_rate(self) -> float:
        """Return the unbiased estimate of the pass rate p, in [0, 1]; nan without a scored draw."""
        return self.paths.first_correct / self.paths.all if self.count else math.nan

    @property
    def reward_variance(self) -> float:
        """Return the unbiased estimate of p (1 - p), in [0, 1]; 0 with fewer than two scored draws, for which no estimate exists."""
        return self.paths.correct_then_wrong / self.paths.all


@dataclass(frozen=True)
class StoppingTable:
    """All terminal states of a policy's stopping rule, for binary rewards.

    A sequence that ends with k correct and w wrong has probability p^k (1-p)^w at pass rate p, so
        E[f] = sum over terminals of num_paths * p^k (1-p)^w * f(terminal).
    Path counts are Python integers: they reach C(32, 16) = 6.0e8 at the published cap and 1e19, past int64, at a cap of 68.
    """

    terminals: tuple[Terminal, ...]

    def at(self, counts: Counts) -> Terminal:
        """Return the terminal with these counts. Raises: InputError if the rule cannot end there."""
        found = self._by_counts.get(counts)
        if found is None:
            raise InputError("StoppingTable", f"a pool with {_words(counts)}", "counts that the stopping rule can end with are needed")
        return found

    @cached_property
    def _by_counts(self) -> dict[Counts, Terminal]:
        return {Counts(t.correct, t.wrong, t.void): t for t in self.terminals}

    def expect(self, value: Callable[[Terminal], float], p: float) -> float:
        """Return E[value] at pass rate `p` in [0, 1]."""
        return math.fsum(t.num_paths * p**t.correct * (1 - p) ** t.wrong * value(t) for t in self.terminals)

    def expect_beta(self, value: Callable[[Terminal], float], a: float, b: float) -> float:
        """Return E[value] over a population of prompts with pass rates Beta(a, b): E[p^k (1-p)^w] = B(a+k, b+w) / B(a, b)."""
        return math.fsum(
            value(t) * math.exp(math.log(t.num_paths) + log_beta(a + t.correct, b + t.wrong) - log_beta(a, b)) for t in self.terminals
        )


def stopping_table(policy: Policy, cap: int | None = None, voids: tuple[int, ...] = ()) -> StoppingTable:
    """Return the terminal states of `policy`'s exit rule, reached draw by draw and never through an earlier stop.

    Tables are cached: a second call costs a look-up (under 10 us), building one at a cap of 32 about 2 ms. The work grows with the number
    of states that go on: at a cap of 1000 it is 50 ms for the published rules, and 2 s for a rule that never stops.

    Args:
        policy: supplies the rule, `verdict(counts, cap)`.
        cap: the prompt's budget, if `allocate` gives each its own; None means the policy's cap.
        voids: increasing indices of the completions without a reward. The table is conditional on these positions: a void advances the
            prefix, the decision points and the cap, and is no draw.
    """
    return _table(policy, policy.cap if cap is None else cap, voids)


@lru_cache(maxsize=4096)  # a pattern of voids has its own table, of some 60 terminals
def _table(policy: Policy, cap: int, voids: tuple[int, ...]) -> StoppingTable:
    terminals = []
    for _, ended in _draw_by_draw(policy, cap, voids):
        terminals += ended
    return StoppingTable(tuple(terminals))


def live_sequences(policy: Policy, cap: int) -> dict[Counts, int]:
    """Return the number of draw sequences to each state from which `policy` goes on: up to cap^2 / 2 states, too many for a table."""
    return {counts: paths.all for live, _ in _draw_by_draw(policy, cap, ()) for counts, paths in live.items()}


def _draw_by_draw(policy: Policy, cap: int, voids: tuple[int, ...]) -> Iterator[tuple[dict[Counts, Paths], list[Terminal]]]:
    """Yield, for each draw, the states that go on before it and the terminals that it leads to."""
    live = {Counts(0, 0): Paths(1)}
    for index in range(cap):
        reached: dict[Counts, Paths] = {}
        for counts, paths in live.items():
            for after, extended in _draws(counts, paths, is_void=index in voids):
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


def _draws(counts: Counts, paths: Paths, is_void: bool) -> Iterator[tuple[Counts, Paths]]:
    """Yield the void, or both outcomes of the next draw, with the sequences that it extends."""
    correct, wrong, void = counts
    if is_void:
        yield Counts(correct, wrong, void + 1), paths
        return
    is_first, is_second_after_correct = correct + wrong == 0, (correct, wrong) == (1, 0)
    yield Counts(correct + 1, wrong, void), Paths(paths.all, paths.all, 0) if is_first else paths
    yield Counts(correct, wrong + 1, void), Paths(paths.all, paths.all, paths.all) if is_second_after_correct else paths


def terminals_of(pools: Iterable[Pool], policy: Policy) -> Iterator[Terminal]:
    """Yield the terminal in which each finished pool ended, given its own cap and the positions of its voids.

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
    """Return the number of committed completions; its expectation is E[N]."""
    return terminal.count + terminal.void


def signal(terminal: Terminal) -> float:
    """Return 1 if both classes are present, else 0; its expectation is P(signal)."""
    return float(terminal.correct > 0 and terminal.wrong > 0)


def pool_mean(terminal: Terminal) -> float:
    """Return the mean of the binary rewards; its expectation minus p is the bias by optional stopping."""
    return terminal.correct / terminal.count


def log_beta(a: float, b: float) -> float:
    """Return the logarithm of the beta function B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _words(counts: Counts) -> str:
    return f"{counts.correct} correct, {counts.wrong} wrong and {counts.void} void"
