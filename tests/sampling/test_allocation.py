"""What a prompt's budget is, and which prompts enter a step: allocation and proposal by past pass rates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_world import bag, est

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import (
    AllPrompts,
    Budgeted,
    Counts,
    History,
    Knapsack,
    NearestRate,
    Refill,
    SkipStreaks,
    Verdict,
    preset,
)

GO, STOP, DROP = Verdict.CONTINUE, Verdict.STOP, Verdict.DROP


# -------------------- allocate


def seen(correct: float, wrong: float) -> History:
    """Return the history of a prompt with these completions remembered."""
    return History(1 + correct, 1 + wrong)


@pytest.mark.parametrize(
    ("histories", "budgets"),
    [
        ([], []),
        ([History()] * 3, [8, 8, 8]),  # nothing remembered: as GRPO
        # p = 1/16, 1/4, 1/4, 1: weights 4, 2, 2, 1
        ([History(1, 15), History(1, 3), History(1, 3), History(1, 0)], [14, 7, 7, 4]),  # 32 = 4 + 28 * (4, 2, 2)/8
        ([History(1, 63), History(1, 3), History(1, 3), History(1, 3)], [18, 5, 5, 4]),  # 8, 2, 2, 2 of 32: 18.3, 4.57 thrice
        ([History(1, 9999), History(1, 1), History(1, 1), History(1, 1), History(1, 1)], [24, 4, 4, 4, 4]),  # the floor takes the rest
        ([History(1, 9999)] + [History(1, 1)] * 9, [32, 6, 6, 6, 5, 5, 5, 5, 5, 5]),  # the cap
    ],
)
def test_budgets_by_the_inverse_square_root_of_the_rate(histories: list[History], budgets: list[int]) -> None:
    assert est().budgets(histories) == budgets


@pytest.mark.parametrize(
    ("counts", "budgets"),
    [
        ([(0, 0), (8, 0), (0, 8)], [9, 2, 13]),  # 17, 25/9 and 25 times 24 / 44.78: 9.11, 1.49 and 13.40
        ([(0, 0)] * 3, [8, 8, 8]),
        ([(16, 0), (0, 16)], [1, 15]),  # 33/17 and 33 times 16 / 34.94: .89 and 15.11
    ],
)
def test_budgets_by_the_rate_itself_with_the_prior_of_the_authors_code(counts: list[tuple[int, int]], budgets: list[int]) -> None:
    allocate = est(floor=1, exponent=1.0, prior=(1.0, 16.0))
    assert allocate.budgets([seen(*c) for c in counts]) == budgets
    assert preset("reinforce-ada-est", exponent=1.0, prior=(1.0, 16.0)).allocate == est(exponent=1.0, prior=(1.0, 16.0))


@pytest.mark.parametrize("others", [{"exponent": 0.0}, {"exponent": math.nan}, {"prior": (0.0, 1.0)}, {"prior": (1.0, math.inf)}])
def test_exponents_and_priors_that_make_no_budget(others: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="InversePowerRate: "):
        est(**others)


rates = st.integers(1, 9999).map(lambda n: n / 10_000)  # apart by more than a rounding of 1/sqrt(p)


@settings(max_examples=200, deadline=None)
@given(st.lists(rates, min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 8), st.integers(0, 40))
def test_budgets_by_rate_sum_up_stay_in_bounds_and_fall_with_the_rate(rate_of: list[float], floor: int, more: int, room: int) -> None:
    allocate = est(floor + more, floor, floor + more + room)
    budgets = allocate.budgets([History(100 * p, 100 * (1 - p)) for p in rate_of])
    assert sum(budgets) == allocate.mean * len(rate_of)
    assert min(budgets) >= floor
    assert max(budgets) <= allocate.cap
    means = [History(100 * p, 100 * (1 - p)).mean for p in rate_of]
    for i, j in itertools.combinations(range(len(rate_of)), 2):
        if means[i] != means[j]:
            assert (budgets[i] - budgets[j]) * (means[i] - means[j]) <= 0
        else:
            assert 0 <= budgets[i] - budgets[j] <= 1  # ties to the earlier


def value(num: int, p: float) -> float:
    return (1 - p**num - (1 - p) ** num) * p * (1 - p) ** 2


def best_value(rate_of: list[float], total: int, floor: int, cap: int) -> float:
    """Return the largest value of any division of `total`, by trying all."""
    best = {0: 0.0}
    for p in rate_of:
        reached: dict[int, float] = {}
        for spent, so_far in best.items():
            for num in range(floor, cap + 1):
                reached[spent + num] = max(reached.get(spent + num, -math.inf), so_far + value(num, p))
        best = reached
    return best[total]


def divided(counts: list[tuple[int, int]], floor: int, more: int, room: int) -> tuple[Knapsack, list[int]]:
    """Return a knapsack and its budgets for prompts with these counts, and check that they sum up and stay in bounds."""
    allocate = bag(floor + more, floor, floor + more + room)
    budgets = allocate.budgets([seen(*c) for c in counts])
    assert sum(budgets) == allocate.mean * len(counts)
    assert all(floor <= budget <= allocate.cap for budget in budgets)
    return allocate, budgets


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_knapsack_budgets_have_the_largest_value(counts: list[tuple[int, int]], floor: int, more: int, room: int) -> None:
    allocate, budgets = divided(counts, floor, more, room)
    rate_of = [correct / (correct + wrong) for correct, wrong in counts]
    best = best_value(rate_of, allocate.mean * len(counts), floor, allocate.cap)
    assert sum(map(value, budgets, rate_of)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    ("histories", "budgets"),
    [
        ([], []),
        ([History()] * 3, [8, 8, 8]),
        ([seen(8, 0), seen(8, 0)], [8, 8]),  # nothing to gain anywhere: equal parts
        ([seen(0, 8), seen(8, 0)], [14, 2]),  # what the others do not need goes to the unsolved
        ([seen(0, 8), seen(0, 8), seen(8, 0)], [11, 11, 2]),
        ([seen(0, 8), History(), seen(8, 0)], [14, 8, 2]),
        ([seen(4, 4), seen(8, 0)], [14, 2]),
        # .9 of a chance of both classes at p = 1/2 needs 3 (ln .1 / ln .5 = 3.3): 1 beyond the floor
        ([seen(4, 4), seen(0, 8)], [3, 13]),
        # at 1/8 it needs 17: both could use all there is, and a solution of the hard one is worth seven times more
        ([seen(1, 7), seen(7, 1), seen(0, 8)], [18, 4, 2]),
        ([seen(0.2, 0.3), seen(8, 0)], [8, 8]),  # less than one completion is remembered
        # faded to a rate of 2e-17, or to 1: it could use all there is, and it is worth nothing
        ([seen(2.3e-16, 10), seen(0, 8)], [14, 2]),
        ([seen(10, 2.3e-16), seen(0, 8)], [14, 2]),
    ],
)
def test_knapsack_where_the_value_says_nothing(histories: list[History], budgets: list[int]) -> None:
    assert bag().budgets(histories) == budgets


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 60),
)
def test_knapsack_budgets_sum_up_and_stay_in_bounds(counts: list[tuple[int, int]], floor: int, more: int, room: int) -> None:
    divided(counts, floor, more, room)


def test_a_budget_function_of_ones_own() -> None:
    allocate = Budgeted(function=lambda histories: [12 if h.mean < 0.3 else 4 for h in histories], cap=16, round_size=4)
    assert allocate.budgets([History(), seen(0, 8)]) == [4, 12]
    assert [allocate(Counts(n, 0)) for n in (0, 3, 4, 15, 16)] == [4, 4, 8, 16, 16]
    for function, message in (
        (lambda histories: [1], "1 budgets for 2 prompts; one for each is needed"),
        (lambda histories: [1, 17], "a budget of 17; integers from 1 to the cap of 16 are needed"),
        (lambda histories: [1, 2.0], "a budget of 2.0; integers from 1"),
        (lambda histories: [0, 2], "a budget of 0; "),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(allocate, function=function).budgets([History()] * 2)


# -------------------- propose


def test_nearest_rate_picks_what_is_known_to_be_near_the_target() -> None:
    histories = [seen(*c) for c in ((0, 1000), (500, 500), (1000, 0), (480, 520), (300, 700), (250, 750))]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert NearestRate().choose(histories, 2, rng) == [1, 3]
        assert NearestRate(target=0.3).choose(histories, 2, rng) == [4, 5]


def test_nearest_rate_looks_at_the_unknown_in_the_measure_of_what_it_may_be() -> None:
    """The theta of an unknown prompt is uniform: it is nearer to 1/2 than a known .3 with probability .4 (4 standard errors: .04)."""
    histories = [seen(300_000, 700_000), History()]
    picks = [NearestRate().choose(histories, 1, np.random.default_rng(seed))[0] for seed in range(2500)]
    assert np.mean(picks) == pytest.approx(0.4, abs=0.04)


def test_streaks_are_skipped_in_the_measure_of_their_length() -> None:
    """A streak of z is kept with explore^z; a later candidate without one takes the place (2500 draws; 4 standard errors: .04)."""
    for history, rate in (
        (History(streak=1, all_correct=True), 0.8),
        (History(streak=3, all_correct=True), 0.512),
        (History(streak=2, all_correct=False), 0.25),
        (History(), 1.0),
    ):
        rule = SkipStreaks(explore_easy=0.8, explore_hard=0.5)
        picks = [tuple(rule.choose([history, History()], 1, np.random.default_rng(seed))) for seed in range(2500)]
        assert picks.count((0,)) / 2500 == pytest.approx(rate, abs=0.04)
        assert set(picks) <= {(0,), (1,)}


def test_skipped_prompts_fill_up_where_too_few_are_left() -> None:
    never = SkipStreaks(explore_easy=0, explore_hard=0)
    histories = [History(streak=2), History(), History(streak=1, all_correct=True), History(streak=9)]
    assert [never.choose(histories, num, np.random.default_rng(0)) for num in range(1, 6)] == [
        [1],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


@pytest.mark.parametrize("rule", [AllPrompts(), Refill(), NearestRate(), SkipStreaks()])
def test_choose_gives_exactly_so_many_and_the_same_again(rule) -> None:
    histories = [History(1 + i % 3, 1 + i % 5, i % 4, i % 2 == 0) for i in range(12)]
    for count, num in itertools.product((0, 1, 5, 12), (1, 4, 12, 20)):
        chosen, again = (list(rule.choose(histories[:count], num, np.random.default_rng(num))) for _ in range(2))
        assert chosen == again == sorted(set(chosen))
        assert len(chosen) == min(num, count)
        assert set(chosen) <= set(range(count))


@pytest.mark.parametrize("rule", [NearestRate, SkipStreaks])
def test_choosing_and_refilling_go_together(rule) -> None:
    assert [rule()(8, dropped) for dropped in (0, 3)] == [8, 8]
    assert [rule(max_prompts_factor=1.5)(8, dropped) for dropped in (0, 3, 4, 5)] == [8, 11, 12, 12]
