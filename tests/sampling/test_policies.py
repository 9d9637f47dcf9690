from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_world import finish, prompts_of, scored

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import (
    PRESETS,
    AdaptiveSampler,
    AdvantageSpec,
    All,
    AllPrompts,
    Balance,
    Balanced,
    Band,
    Budgeted,
    Centered,
    Counts,
    DropOneClass,
    First,
    History,
    InverseSqrtRate,
    Knapsack,
    MaxVariance,
    NearestRate,
    Never,
    Policy,
    Positive,
    Refill,
    Rounds,
    SkipStreaks,
    Verdict,
    preset,
)

GO, STOP, DROP = Verdict.CONTINUE, Verdict.STOP, Verdict.DROP


def select(rule, outcomes: str, group_size: int) -> list[int]:
    correct = np.array([c == "+" for c in outcomes], dtype=bool)
    return rule(correct.astype(np.float64), correct, group_size)


@pytest.mark.parametrize(
    ("outcomes", "group_size", "kept"),
    [
        ("+-+-", 4, [0, 1, 2, 3]),
        ("++++++++--", 4, [0, 1, 8, 9]),
        ("--------", 4, [0, 1, 2, 3]),
        ("-----+-+", 4, [0, 1, 5, 7]),
        ("++++++++", 4, [0, 1, 2, 3]),
        ("+++++++-", 4, [0, 1, 2, 7]),  # one wrong: the correct class fills
        ("-------+", 4, [0, 1, 2, 7]),
        ("+-", 4, [0, 1]),  # fewer than n: keep what there is
        ("", 4, []),
        ("++--", 3, [0, 2, 3]),  # odd: the extra place is wrong's
        ("++-", 3, [0, 1, 2]),
        ("++--", 1, [2]),
        ("++", 1, [0]),
    ],
)
def test_balanced_keeps_the_earliest_of_each_class(outcomes: str, group_size: int, kept: list[int]) -> None:
    assert select(Balanced(), outcomes, group_size) == kept


def test_balanced_on_every_short_pool() -> None:
    for length, group_size in itertools.product(range(8), range(1, 6)):
        for chars in itertools.product("+-", repeat=length):
            kept = select(Balanced(), "".join(chars), group_size)
            right, wrong = chars.count("+"), chars.count("-")
            num_right = sum(chars[i] == "+" for i in kept)
            assert kept == sorted(set(kept))
            assert len(kept) == min(length, group_size)
            assert num_right <= group_size // 2 or len(kept) - num_right == wrong
            assert len(kept) - num_right <= group_size - group_size // 2 or num_right == right
            for char in "+-":  # earliest: whatever of the class is left out comes after what is kept
                positions = [i for i, c in enumerate(chars) if c == char]
                assert [i for i in kept if chars[i] == char] == positions[: sum(chars[i] == char for i in kept)]


def test_first_and_all() -> None:
    assert select(First(), "+-+-", 3) == [0, 1, 2]
    assert select(First(), "+-", 3) == [0, 1]
    assert select(All(), "+-+-", 3) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rewards", "group_size", "kept"),
    [
        ([1, 0, 0, 1, 1, 0], 4, [0, 1, 2, 3]),  # two highest and two lowest, the earliest of each
        ([0, 0, 0, 0, 0, 1], 4, [0, 1, 2, 5]),
        ([1, 1, 1, 0], 3, [0, 1, 3]),  # one wrong only
        ([1, 1, 0, 0], 3, [0, 2, 3]),  # {1, 0, 0} and {1, 1, 0} vary alike: the extra place is the lower one's
        ([0.1, 0.9, 0.5, 0.4], 2, [0, 1]),
        ([5, 1, 2, 3, 4, -9], 3, [0, 4, 5]),
        ([7, 7, 7], 2, [0, 1]),
        ([1e9, 1e9 + 1, 1e9, 1e9], 2, [0, 1]),  # small differences of large rewards
        ([3, 1], 4, [0, 1]),  # fewer than the group
        ([2], 1, [0]),
        ([], 4, []),
    ],
)
def test_max_variance(rewards: list[float], group_size: int, kept: list[int]) -> None:
    values = np.array(rewards, dtype=np.float64)
    assert MaxVariance()(values, values > 0.7, group_size) == kept


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.integers(1, 6))
def test_max_variance_is_the_best_of_all_subsets(rewards: list[int], group_size: int) -> None:
    values = np.array(rewards, dtype=np.float64) / 4  # quarters: sums are exact
    num = min(len(values), group_size)
    kept = MaxVariance()(values, values > 0.7, group_size)
    assert kept == sorted(set(kept))
    assert len(kept) == num
    assert np.var(values[kept]) == pytest.approx(max(np.var(values[list(s)]) for s in itertools.combinations(range(len(values)), num)))


@pytest.mark.parametrize(
    ("rule", "correct", "wrong", "verdict"),
    [
        (Never(), 9, 9, GO),
        (Positive(), 0, 9, GO),
        (Positive(), 1, 0, STOP),
        (Positive(3), 2, 5, GO),
        (Positive(3), 3, 0, STOP),
        (Balance(2, 2), 2, 1, GO),
        (Balance(2, 2), 1, 7, GO),
        (Balance(2, 2), 2, 2, STOP),
        (Balance(1, 2), 1, 2, STOP),
        (DropOneClass(), 4, 0, DROP),
        (DropOneClass(), 0, 4, DROP),
        (DropOneClass(), 0, 0, DROP),
        (DropOneClass(), 1, 3, STOP),
        (Band(pilot=4), 0, 4, DROP),
        (Band(pilot=4), 4, 0, DROP),
        (Band(pilot=4), 1, 3, GO),
        (Band(pilot=4), 8, 0, GO),  # past the pilot nothing is dropped
        (Band(pilot=4), 2, 0, GO),  # nor before
        (Band(0.25, 0.75, pilot=4), 1, 3, DROP),  # the band is open
        (Band(0.25, 0.75, pilot=4), 3, 1, DROP),
        (Band(0.25, 0.75, pilot=4), 2, 2, GO),
        (Band(pilot=4, then=Balance(2, 2)), 2, 2, STOP),
        (Band(pilot=4, then=Balance(2, 2)), 1, 3, GO),
        (Band(pilot=4, then=Balance(2, 2)), 0, 4, DROP),
        (Band(pilot=4, then=Balance(2, 2)), 2, 4, STOP),
    ],
)
def test_exit_rules(rule, correct: int, wrong: int, verdict: Verdict) -> None:
    assert rule(Counts(correct, wrong)) is verdict


def test_a_band_looks_at_scored_completions_and_keeps_the_promise_of_its_rule() -> None:
    band = Band(0.25, 0.75, pilot=4)
    assert band(Counts(1, 1, void=2)) is GO
    assert band(Counts(1, 2, void=1)) is GO
    assert band(Counts(0, 0, void=4)) is DROP
    assert Band(then=Balance(2, 2)).needs == (2, 2)
    assert Band(then=lambda counts: Verdict.CONTINUE).needs == (0, 0)


def test_rounds_budget() -> None:
    rounds = Rounds(8, 4)
    assert rounds.cap == 32
    assert [rounds(Counts(n, 0)) for n in (0, 7, 8, 24, 31, 32)] == [8, 8, 16, 32, 32, 32]


def test_propose() -> None:
    assert AllPrompts()(8, 5) == 8
    assert [Refill(1.5)(8, dropped) for dropped in (0, 3, 4, 5)] == [8, 11, 12, 12]


# -------------------- allocate


def seen(correct: float, wrong: float) -> History:
    """Return the history of a prompt with these completions remembered."""
    return History(1 + correct, 1 + wrong)


def est(mean: int = 8, floor: int = 4, cap: int = 32) -> InverseSqrtRate:
    return InverseSqrtRate(mean=mean, floor=floor, cap=cap, round_size=cap)


def bag(mean: int = 8, floor: int = 2, cap: int = 128, **others) -> Knapsack:
    return Knapsack(mean=mean, floor=floor, cap=cap, round_size=cap, **others)


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


# -------------------- the policy


def test_verdict_is_asked_at_multiples_and_at_the_cap_from_min_pool_on() -> None:
    policy = dataclasses.replace(preset("reinforce-ada-pos"), allocate=Rounds(5, 2), decide_every=4, min_pool=3)
    asked = [n for n in range(1, 11) if policy.verdict(Counts(n, 0)) is STOP]
    assert asked == [4, 8, 10]
    assert policy.verdict(Counts(2, 0, void=2)) is GO  # voids are committed but do not fill the pool
    assert policy.verdict(Counts(3, 0, void=1)) is STOP


@pytest.mark.parametrize(
    ("decide_every", "min_pool", "always"), [(8, 4, 8), (1, 4, 4), (1, 0, 1), (3, 4, 6), (16, 4, 8), (8, 9, 8), (64, 4, 8)]
)
def test_completions_always_drawn(decide_every: int, min_pool: int, always: int) -> None:
    assert preset("reinforce-ada-pos", decide_every=decide_every, min_pool=min_pool).num_always_drawn == always


def test_weight_is_a_specification_for_group_advantages() -> None:
    spec = Centered("group", "pool", ddof=0, eps=1e-4)((), preset("grpo"))
    assert spec == AdvantageSpec("group", "pool", ddof=0, eps=1e-4, class_weights=None, threshold=None)


def test_published_presets() -> None:
    for name, needs in (("reinforce-ada-pos", (1, 0)), ("reinforce-ada-balance", (2, 2))):
        policy = preset(name)
        assert (policy.name, policy.group_size, policy.allocate, policy.decide_every) == (name, 4, Rounds(8, 4), 8)
        assert (policy.min_pool, policy.positive_threshold, policy.degenerate) == (4, 0.7, "keep")
        assert policy.needs == needs
        assert policy.weight((), policy) == AdvantageSpec("pool", "none")
    grpo = preset("grpo")
    assert (grpo.group_size, grpo.allocate, grpo.decide) == (8, Rounds(8, 1), Never())
    assert grpo.weight((), grpo) == AdvantageSpec("group", "group", ddof=1, eps=1e-6)
    dapo = preset("dapo")
    assert (dapo.group_size, dapo.decide, dapo.propose, dapo.degenerate) == (16, DropOneClass(), Refill(10.0), "drop")


def test_preset_overrides() -> None:
    policy = preset("reinforce-ada-balance", group_size=5, round_size=4, max_rounds=6, positive_threshold=0.5, degenerate="drop")
    assert (policy.cap, policy.decide_every, policy.min_pool) == (24, 4, 5)  # they follow round_size and group_size
    assert policy.decide == Balance(2, 3)
    assert (policy.positive_threshold, policy.degenerate) == (0.5, "drop")
    assert preset("reinforce-ada-pos", decide_every=1, min_pool=0, num_correct=2).decide == Positive(2)
    assert preset("grpo", group_size=16, scale="none").allocate == Rounds(16, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("grop"), "preset: unknown name 'grop'; known: dapo, grpo, .*; did you mean 'grpo'?"),
        (lambda: preset("grpo", group_sise=4), "preset 'grpo': unknown override 'group_sise'; .*did you mean 'group_size'?"),
        (lambda: preset("grpo", group_size=0), "grpo: group_size 0; an integer of at least 1 is needed"),
        (lambda: preset("dapo", group_size=1), "Policy 'dapo': an exit rule that needs 2 completions; .* room for 1"),
        (lambda: preset("grpo", group_size=2049), "cap of 2049 completions per prompt; at most 2048"),
        (lambda: preset("reinforce-ada-balance", max_rounds=10**30), "at most 2048"),
        (lambda: preset("reinforce-ada-pos", group_size=33), "cap of 32 completions per prompt; at least group_size 33"),
        (lambda: preset("reinforce-ada-balance", group_size=0), "group_size 0"),
        (lambda: preset("reinforce-ada-pos", round_size=0), "Rounds: round_size 0; an integer of at least 1"),
        (lambda: preset("reinforce-ada-pos", max_rounds=0), "Rounds: max_rounds 0"),
        (lambda: preset("reinforce-ada-pos", round_size=2.5), "Rounds: round_size 2.5; an integer"),
        (lambda: preset("reinforce-ada-pos", decide_every=0), "decide_every 0; an integer of at least 1"),
        (lambda: preset("reinforce-ada-pos", min_pool=-1), "min_pool -1; an integer of at least 0"),
        (lambda: preset("reinforce-ada-pos", min_pool=33), "min_pool 33; at most the cap of 32"),
        (lambda: preset("reinforce-ada-pos", num_correct=0), "Positive: num_correct 0"),
        (lambda: preset("reinforce-ada-balance", num_correct=20, num_wrong=20), "needs 40 completions"),
        (lambda: preset("reinforce-ada-pos", degenerate="kep"), "unknown value of degenerate 'kep'; .*did you mean 'keep'?"),
        (lambda: preset("reinforce-ada-pos", positive_threshold=float("nan")), "positive_threshold nan; a finite number"),
        (lambda: preset("grpo", baseline="pol"), "Centered: unknown baseline 'pol'; .*did you mean 'pool'?"),
        (lambda: preset("grpo", scale="grup"), "Centered: unknown scale 'grup'; .*did you mean 'group'?"),
        (lambda: Refill(0.5), "Refill: max_prompts_factor 0.5; a finite number of at least 1"),
        (lambda: Refill(float("nan")), "Refill: max_prompts_factor nan"),
        (lambda: Refill(math.inf), "Refill: max_prompts_factor inf; a finite number of at least 1"),
        (lambda: Balance(-1, 2), "Balance: num_correct -1"),
        (lambda: Band(0.5, 0.5), "Band: low 0.5 and high 0.5; 0 <= low < high <= 1 is needed"),
        (lambda: Band(pilot=0), "Band: pilot 0; an integer of at least 1"),
        (lambda: NearestRate(target=1.5), "NearestRate: target 1.5; a number from 0 to 1"),
        (lambda: NearestRate(candidates_per_prompt=0), "NearestRate: candidates_per_prompt 0; an integer of at least 1"),
        (lambda: NearestRate(max_prompts_factor=0.5), "NearestRate: max_prompts_factor 0.5; a finite number of at least 1"),
        (lambda: SkipStreaks(explore_easy=-0.1), "SkipStreaks: explore_easy -0.1; a number from 0 to 1"),
        (lambda: SkipStreaks(explore_hard=float("nan")), "SkipStreaks: explore_hard nan"),
        (lambda: est(mean=3), "InverseSqrtRate: mean 3; an integer of at least 4"),
        (lambda: est(mean=33), "InverseSqrtRate: cap 32; an integer of at least 33"),
        (lambda: bag(floor=0), "Knapsack: floor 0; an integer of at least 1"),
        (lambda: bag(confidence=1.0), "Knapsack: confidence 1.0; a number between 0 and 1"),
        (lambda: InverseSqrtRate(mean=8, floor=4, cap=32, round_size=33), "InverseSqrtRate: cap 32; an integer of at least 33"),
        (lambda: Budgeted(function=len, cap=4, round_size=8), "Budgeted: cap 4; an integer of at least 8"),
        (lambda: preset("reinforce-ada-est", mean_budget=2), "InverseSqrtRate: mean 2; an integer of at least 4"),
        (lambda: preset("pods", num_completions=8), "Policy 'pods': a cap of 8 completions per prompt; at least group_size 16"),
    ],
)
def test_input_errors_are_one_line(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def changed(name: str, **parts) -> Policy:
    return dataclasses.replace(preset(name), **parts)


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        (lambda: changed("grpo", decide=Band(pilot=16)), "a pilot of 16 completions; at most the cap of 8 is possible"),
        (
            lambda: changed("reinforce-ada-pos", decide=Band(pilot=8), min_pool=12),
            "a pilot of 8 completions with min_pool 12; at least min_pool",
        ),
        (
            lambda: changed("reinforce-ada-pos", decide=Band(pilot=12)),
            "a pilot of 12 completions; a multiple of decide_every 8 .*never asked",
        ),
        (
            lambda: changed("reinforce-ada-balance", allocate=est(floor=2)),
            r"budgets from 2 completions on; at least group_size 4 is needed to fill every group; raise floor, .*select All\(\)",
        ),
        (
            lambda: changed("knapsack", propose=Refill()),
            "a budget for the whole batch with a propose that refills; prompts that enter together are needed; max_prompts_factor=1",
        ),
        (
            lambda: changed("knapsack", propose=SkipStreaks(max_prompts_factor=1.01)),
            "a budget for the whole batch with a propose that refills",
        ),
        (
            lambda: changed("grpo", allocate=lambda histories: [8]),
            r"allocate <function .*; an object with .budgets\(\) is needed; Budgeted wraps",
        ),
        (
            lambda: changed("grpo", propose=lambda num, dropped: num),
            r"propose <function .*; an object with .choose\(\) is needed; see AllPrompts",
        ),
        (
            lambda: changed("grpo", allocate=SimpleNamespace(budgets=len, cap=8, __call__=len)),
            r"allocate namespace.*; an object with .round_size is needed; Budgeted wraps",
        ),
        (
            lambda: changed("grpo", allocate=SimpleNamespace(budgets=len, cap=8, round_size=8, __call__=len)),
            r"allocate namespace.*; an object with .floor is needed; Budgeted wraps",
        ),
        (
            lambda: changed("grpo", propose=SimpleNamespace(choose=len, candidates_per_prompt=1, __call__=len)),
            "propose namespace.*; an object with .needs_memory is needed; see AllPrompts",
        ),
        (
            lambda: changed("grpo", propose=SimpleNamespace(choose=len, __call__=len)),
            "propose namespace.*; an object with .candidates_per_prompt is needed; see AllPrompts",
        ),
        (
            lambda: changed("grpo", decide=SimpleNamespace(needs=(1, 0), __call__=len)),
            r"decide namespace.* with .needs; a class derived from ExitRule is needed",
        ),
        (
            lambda: changed("grpo", weight=SimpleNamespace(check=len, __call__=len)),
            r"weight namespace.* with .check; a class derived from Weighting is needed",
        ),
        (
            lambda: changed("grpo", weight=Centered(class_weights=[1, 2])),
            r"weight Centered\(.*; a hashable one is needed: tables are kept by policy; @dataclass\(frozen=True\), and tuples for lists",
        ),
        (lambda: changed("grpo", decide=Band(pilot=8, then=Balance(5, 5))), "an exit rule that needs 10 completions; a cap of 8"),
    ],
)
def test_parts_that_make_no_sense_together_are_named_in_one_line(combine, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        combine()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Policy '")


@pytest.mark.parametrize("allocate", [Rounds(8, 4), est(), bag(floor=4, cap=32), Budgeted(function=len, cap=32, round_size=8)])
@pytest.mark.parametrize("decide", [Never(), Positive(), Balance(2, 2), DropOneClass(), Band(pilot=8), Band(pilot=8, then=Positive())])
@pytest.mark.parametrize("select_rule", [First(), All(), Balanced(), MaxVariance()])
@pytest.mark.parametrize("propose", [AllPrompts(), NearestRate(), SkipStreaks()])
def test_whatever_else_goes_together(allocate, decide, select_rule, propose) -> None:
    policy = changed("reinforce-ada-balance", allocate=allocate, decide=decide, select=select_rule, propose=propose)
    assert policy.cap == 32
    assert not policy.refills
    assert policy.needs_memory == (not isinstance(allocate, Rounds) or not isinstance(propose, AllPrompts) or isinstance(propose, Refill))


def test_presets_that_look_back_say_so() -> None:
    assert {name for name in PRESETS if preset(name).needs_memory} == {"reinforce-ada-est", "knapsack"}
    assert {name for name in PRESETS if preset(name).refills} == {"dapo"}
    with pytest.raises(InputError, match=r"policy 'knapsack' without memory; .*memory=Memory"):
        AdaptiveSampler(prompts_of("ab"), preset("knapsack"))


def test_presets_of_budgets_and_selection() -> None:
    est_preset = preset("reinforce-ada-est", group_size=6, max_budget=24)
    assert est_preset.allocate == InverseSqrtRate(mean=8, floor=6, cap=24, round_size=24)
    assert (est_preset.decide, est_preset.select, est_preset.weight) == (Never(), Balanced(), Centered("pool", "none"))
    pods = preset("pods")
    assert (pods.group_size, pods.cap, pods.select, pods.weight) == (16, 64, MaxVariance(), Centered("group", "group"))
    knapsack = preset("knapsack", mean_budget=4)
    assert knapsack.allocate == Knapsack(mean=4, floor=2, cap=128, round_size=128)
    assert (knapsack.select, knapsack.weight) == (All(), Centered("group", "group"))


def test_plain_functions_decide_select_and_weigh() -> None:
    def enough(counts: Counts) -> Verdict:
        return STOP if counts.correct >= 2 else GO

    def longest(rewards, correct, group_size: int) -> list[int]:
        return list(range(len(rewards)))[-group_size:]

    def unscaled(groups, policy: Policy) -> AdvantageSpec:
        return AdvantageSpec("pool", "none")

    policy = changed("reinforce-ada-pos", decide=enough, select=longest, weight=unscaled, decide_every=1)
    assert policy.needs == (0, 0)
    sampler = AdaptiveSampler(prompts_of("a"), policy)
    result = finish(sampler, lambda request_id: scored(request_id, float(request_id.index in (1, 5))))
    assert [o.id.index for o in result.groups[0].kept] == [2, 3, 4, 5]
    assert result.pools[0].exit == "satisfied"
    assert policy.weight(result.groups, policy) == AdvantageSpec("pool", "none")


@pytest.mark.parametrize("name", PRESETS)
def test_policies_are_values(name: str) -> None:
    assert preset(name) == preset(name)
    assert hash(preset(name)) == hash(preset(name))
    assert isinstance(preset(name), Policy)
