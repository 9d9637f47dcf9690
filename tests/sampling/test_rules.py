"""The rules as tables, and the settled end against an enumeration of all outcomes."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_world import scored

from reinforce_ada.sampling import Balance, Balanced, Band, Centered, Counts, Never, Policy, Positive, Rounds, Verdict
from reinforce_ada.sampling.policies.contracts import Decide
from reinforce_ada.sampling.policies.decide import DropOneClass
from reinforce_ada.sampling.rules import (
    CORRECT,
    VOID,
    WRONG,
    always_exits,
    exit_reason,
    has_room,
    next_decision,
    settled_end,
    shared_window,
    unit_of,
    window_needed,
)
from reinforce_ada.types import CompletionId, Failed

UNITS = {"+": CORRECT, "-": WRONG, "v": VOID, "?": None}


def policy_of(decide: Decide, *, cap: int = 12, every: int = 1, min_pool: int = 0) -> Policy:
    return Policy("own", 1, Rounds(cap, 1), decide, Balanced(), Centered(), decide_every=every, min_pool=min_pool)


def counts_of(text: str) -> Counts:
    return Counts(text.count("+"), text.count("-"), text.count("v"))


@pytest.mark.parametrize(("reward", "unit"), [(0.9, CORRECT), (0.7, WRONG), (0.1, WRONG), (-3.0, WRONG)])
def test_a_reward_is_correct_strictly_above_the_threshold(reward: float, unit: Counts) -> None:
    assert unit_of(scored(CompletionId(0, "a", 0), reward), 0.7) is unit


def test_a_failed_reward_is_a_void() -> None:
    assert unit_of(Failed(CompletionId(0, "a", 0), 0, "late"), 0.7) is VOID


@pytest.mark.parametrize(
    ("decide", "every", "min_pool", "cap", "committed", "reason"),
    [
        (Positive(1), 1, 0, 12, "-", None),
        (Positive(1), 1, 0, 12, "-+", "satisfied"),
        (Positive(1), 4, 0, 12, "-+-", None),  # no decision point
        (Positive(1), 4, 0, 12, "-+--", "satisfied"),
        (Positive(1), 1, 3, 12, "+v-", None),  # two scored
        (Positive(1), 1, 3, 12, "+v--", "satisfied"),
        (Positive(1), 4, 0, 6, "--+---", "satisfied"),  # the cap is a decision point
        (Positive(1), 4, 5, 6, "--+-vv", "exhausted"),  # and min_pool holds there too
        (Never(), 1, 0, 3, "++", None),
        (Never(), 1, 0, 3, "+++", "exhausted"),
        (Balance(2, 2), 1, 0, 12, "++-", None),
        (Balance(2, 2), 1, 0, 12, "++--", "satisfied"),
        (DropOneClass(), 4, 0, 12, "+++", None),
        (DropOneClass(), 4, 0, 12, "++++", "dropped"),
        (DropOneClass(), 4, 0, 4, "++++", "dropped"),  # the rule speaks before the cap
        (DropOneClass(), 4, 0, 12, "+++-", "satisfied"),
        (Band(pilot=4), 4, 0, 12, "----", "dropped"),
    ],
)
def test_exit_reason(decide: Decide, every: int, min_pool: int, cap: int, committed: str, reason: str | None) -> None:
    assert exit_reason(policy_of(decide, every=every, min_pool=min_pool), counts_of(committed), cap) == reason


def test_a_budget_of_ones_own_is_the_last_decision_point() -> None:
    policy = policy_of(Positive(1), cap=12, every=8)
    assert [exit_reason(policy, counts_of("+----"), cap) for cap in (12, 5)] == [None, "satisfied"]


@pytest.mark.parametrize(("committed", "every", "expected"), [(0, 1, 1), (3, 1, 4), (0, 8, 8), (7, 8, 8), (8, 8, 16), (9, 8, 16)])
def test_next_decision(committed: int, every: int, expected: int) -> None:
    assert next_decision(committed, every) == expected


@pytest.mark.parametrize(
    ("num_issued", "committed", "every", "expected"),
    [
        (0, 0, 8, 1),
        (5, 2, 8, 4),
        (7, 2, 8, 6),  # the last one before the decision at 8
        (8, 2, 8, 9),  # the first past it: wider than decide_every
        (8, 7, 8, 9),
        (8, 8, 8, 1),  # the decision is behind
        (20, 2, 8, 19),
        (1, 0, 1, 2),  # every request past the first is past a decision
        (4, 0, 1, 5),
    ],
)
def test_window_needed(num_issued: int, committed: int, every: int, expected: int) -> None:
    assert window_needed(num_issued, committed, every) == expected


@pytest.mark.parametrize(
    ("capacity", "num_active", "expected"),
    [(64, 8, 8), (65, 8, 9), (8, 8, 4), (0, 8, 4), (1000, 8, 32), (20, 0, 20)],  # round_size 4, cap 32
)
def test_shared_window(capacity: int, num_active: int, expected: int) -> None:
    assert shared_window(capacity, num_active, 4, 32) == expected


@pytest.mark.parametrize(
    ("window", "num_issued", "num_answered", "expected"),
    [(1, 0, 0, True), (1, 1, 0, False), (3, 4, 2, True), (3, 5, 2, False), (0, 2, 2, True), (-5, 2, 2, True), (0, 3, 2, False)],
)
def test_has_room(window: int, num_issued: int, num_answered: int, expected: bool) -> None:
    assert has_room(window, num_issued, num_answered) is expected


@pytest.mark.parametrize(
    ("decide", "known", "num_open", "expected"),
    [
        (Positive(1), "+", 5, True),
        (Positive(1), "-", 1, False),
        (Balance(1, 1), "+-", 3, True),
        (Balance(1, 1), "+", 0, False),
        (DropOneClass(), "", 2, True),  # it ends a prompt in any case
        (Never(), "+-", 0, False),
    ],
)
def test_always_exits(decide: Decide, known: str, num_open: int, expected: bool) -> None:
    assert always_exits(policy_of(decide), counts_of(known), num_open, 12) is expected


@pytest.mark.parametrize(
    ("decide", "every", "committed", "later", "expected"),
    [
        (Positive(1), 1, "", "?+", 2),  # whatever index 0 brings, the rule ends at 2
        (Positive(1), 4, "", "?+", 4),
        (Positive(1), 1, "--", "??+?", 5),
        (Positive(1), 1, "--", "?-?", 12),
        (Balance(1, 1), 1, "+", "?-", 3),
        (Balance(2, 2), 1, "", "?++--", 5),
        (Balance(2, 2), 1, "", "?++-?", 12),
        (DropOneClass(), 8, "", "", 12),  # nothing is known: the search ends where knowledge does
        (DropOneClass(), 8, "", "?", 8),
        (Never(), 1, "+", "?+", 12),
    ],
)
def test_settled_end(decide: Decide, every: int, committed: str, later: str, expected: int) -> None:
    units = [UNITS[char] for char in later]
    assert settled_end(policy_of(decide, every=every), counts_of(committed), units, 12) == expected


@given(
    seed=st.integers(0, 2**32),
    every=st.integers(1, 3),
    committed=st.integers(0, 4),
    later=st.lists(st.sampled_from([CORRECT, WRONG, VOID, None, None]), max_size=5),
)
def test_a_settled_end_is_one_for_all_ways_the_open_ones_can_turn_out(seed: int, every: int, committed: int, later: list) -> None:
    """Compare with an enumeration of all outcomes, for rules that are drawn at random."""
    cap = 12

    def decide(counts: Counts) -> Verdict:
        return random.Random(f"{seed} {counts}").choices([Verdict.CONTINUE, Verdict.STOP, Verdict.DROP], [1, 6, 6])[0]

    known = Counts(committed, 0)
    expected, units = cap, [*later, *[None] * (-(committed + len(later)) % every)]
    for end in range(committed + len(units), committed, -1):
        ways = itertools.product(*([CORRECT, WRONG, VOID] if u is None else [u] for u in units[: end - committed]))
        totals = {Counts(*map(sum, zip(known, *way, strict=True))) for way in ways}
        if end % every == 0 and all(decide(counts) is not Verdict.CONTINUE for counts in totals):
            expected = end
    assert settled_end(policy_of(decide, every=every), known, later, cap) == expected
