from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_world import scored

from reinforce_ada.sampling.policies.contracts import Counts, History
from reinforce_ada.sampling.pool import GrowingPool, reward_statistics, rewards_of
from reinforce_ada.sampling.prompt_state import PromptState, indices_of
from reinforce_ada.types import CompletionId, Failed, Prompt

rewards_lists = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(rewards_lists)
def test_statistics_against_rationals(rewards: list[float]) -> None:
    mean, m2, low, high = reward_statistics(rewards)
    exact_mean = sum(map(Fraction, rewards)) / len(rewards)
    exact_m2 = sum((Fraction(r) - exact_mean) ** 2 for r in rewards)
    assert (low, high) == (min(rewards), max(rewards))
    assert abs(Fraction(mean) - exact_mean) <= 2 * Fraction(math.ulp(mean))
    assert math.isclose(m2, exact_m2, rel_tol=1e-9, abs_tol=1e-9 * max(abs(low), abs(high)) ** 2 * 1e-9)


@given(rewards_lists, st.randoms(use_true_random=False))
def test_statistics_do_not_depend_on_order(rewards: list[float], rng) -> None:
    shuffled = rng.sample(rewards, len(rewards))
    assert reward_statistics(shuffled) == reward_statistics(rewards)


def test_a_one_valued_pool_has_no_spread_at_all() -> None:
    for value in (0.1, 1 / 3, 1e300):
        assert reward_statistics([value] * 3) == (value, 0.0, value, value)


def test_an_empty_pool() -> None:
    assert reward_statistics([]) == (0.0, 0.0, math.inf, -math.inf)


def test_raw_rewards_and_strict_threshold() -> None:
    """The mean is that of the raw rewards, never of the binarised ones; a reward of exactly the threshold is wrong."""
    pool = GrowingPool(0.7)
    for index, reward in enumerate((0.8, 0.7, 0.2, 0.9)):
        pool.put(index, scored(CompletionId(0, "a", index), reward))
        assert pool.commit_next() is pool.answers[index]
    assert pool.counts == Counts(correct=2, wrong=2)
    record = pool.freeze(Prompt("a"), 4, "exhausted", 8)
    assert record.mean == pytest.approx(0.65, abs=1e-15)
    assert record.m2 == pytest.approx(0.29, abs=1e-15)
    assert (record.min, record.max, record.count, record.has_signal) == (0.2, 0.9, 4, True)


def test_answers_count_before_their_commit_and_no_more_once_cut() -> None:
    pool = GrowingPool(0.7)
    for index, reward in ((0, 1.0), (2, 0.0), (3, 1.0)):
        pool.put(index, scored(CompletionId(0, "a", index), reward))
    pool.put(5, Failed(CompletionId(0, "a", 5), 0, "void"))
    pool.commit_next()
    assert (pool.counts, pool.answered) == (Counts(1, 0), Counts(2, 1, 1))
    assert [index for index, _ in pool.cut(3)] == [3, 5]
    assert pool.answered == Counts(1, 1)


def test_the_books_of_a_prompt() -> None:
    """Among 6 requests, 0 is committed, 2 waits for 1, 3 is lost, 5 came too late to count, and 1 and 4 are out."""
    state = PromptState(0, Prompt("a"), History(), 8, 0.7)
    state.num_issued, state.outstanding, state.lost, state.discarded = 6, 0b010010, 0b001000, 0b100000
    for index in (0, 2):
        state.put(index, scored(CompletionId(0, "a", index), 1.0))
    state.commit_next()
    assert [index for index in range(8) if state.is_answered(index)] == [0, 2, 5]
    assert [index for index in range(8) if state.is_lost(index)] == [3]
    assert [index for index in range(8) if state.is_open(index)] == [1, 3, 4, 5]
    state.limit = 4
    assert [index for index in range(8) if state.is_open(index)] == [1, 3]
    assert (state.abort(4), indices_of(state.outstanding), state.abort(4)) == ([4], [1], [])


def test_voids_enter_no_statistic() -> None:
    pool = GrowingPool(0.7)
    pool.put(0, scored(CompletionId(0, "a", 0), 1.0))
    pool.put(1, Failed(CompletionId(0, "a", 1), 0, "void"))
    pool.put(2, scored(CompletionId(0, "a", 2), 1.0))
    assert [pool.commit_next() for _ in range(4)] == [*pool.answers, None]
    assert pool.counts == Counts(2, 0, 1)
    assert (pool.counts.scored, pool.counts.committed) == (2, 3)
    record = pool.freeze(Prompt("a"), 5, "exhausted", 8)
    assert (record.count, record.num_void, record.mean, record.m2, record.has_signal) == (2, 1, 1.0, 0.0, False)
    assert [s.id.index for s in record.scored] == [0, 2]
    assert rewards_of(record.scored).tolist() == [1.0, 1.0]


def test_answers_wait_for_an_earlier_one() -> None:
    pool = GrowingPool(0.7)
    late, early, gap = (scored(CompletionId(0, "a", index), 1.0) for index in (3, 1, 0))
    pool.put(3, late)
    pool.put(1, early)
    assert pool.commit_next() is None
    assert [pool.has(index) for index in range(5)] == [False, True, False, True, False]
    pool.put(0, gap)
    assert (pool.commit_next(), pool.commit_next(), pool.commit_next()) == (gap, early, None)
    assert (pool.committed, pool.counts) == (2, Counts(2, 0, 0))
    assert pool.cut(2) == [(3, late)]
    assert pool.answers == [gap, early]
    assert not pool.has_signal
