from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_world import bag, est, finish, prompts_of, scored

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
    InversePowerRate,
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
        (lambda: est(mean=3), "InversePowerRate: mean 3; an integer of at least 4"),
        (lambda: est(mean=33), "InversePowerRate: cap 32; an integer of at least 33"),
        (lambda: bag(floor=0), "Knapsack: floor 0; an integer of at least 1"),
        (lambda: bag(confidence=1.0), "Knapsack: confidence 1.0; a number between 0 and 1"),
        (lambda: InversePowerRate(mean=8, floor=4, cap=32, round_size=33), "InversePowerRate: cap 32; an integer of at least 33"),
        (lambda: Budgeted(function=len, cap=4, round_size=8), "Budgeted: cap 4; an integer of at least 8"),
        (lambda: preset("reinforce-ada-est", mean_budget=2), "InversePowerRate: mean 2; an integer of at least 4"),
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
    assert {name for name in PRESETS if preset(name).needs_memory} == {"reinforce-ada-est", "reinforce-ada-memory", "knapsack"}
    assert {name for name in PRESETS if preset(name).refills} == {"dapo"}
    with pytest.raises(InputError, match=r"policy 'knapsack' without memory; .*memory=Memory"):
        AdaptiveSampler(prompts_of("ab"), preset("knapsack"))


def test_presets_of_budgets_and_selection() -> None:
    est_preset = preset("reinforce-ada-est", group_size=6, max_budget=24)
    assert est_preset.allocate == InversePowerRate(mean=8, floor=6, cap=24, round_size=24)
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
