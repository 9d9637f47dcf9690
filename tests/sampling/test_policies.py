from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import (
    PRESETS,
    AdvantageSpec,
    All,
    AllPrompts,
    Balance,
    Balanced,
    Centered,
    Counts,
    DropOneClass,
    First,
    Never,
    Policy,
    Positive,
    Refill,
    Rounds,
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
    ],
)
def test_exit_rules(rule, correct: int, wrong: int, verdict: Verdict) -> None:
    assert rule(Counts(correct, wrong)) is verdict


def test_rounds_budget() -> None:
    rounds = Rounds(8, 4)
    assert rounds.cap == 32
    assert [rounds(Counts(n, 0)) for n in (0, 7, 8, 24, 31, 32)] == [8, 8, 16, 32, 32, 32]


def test_propose() -> None:
    assert AllPrompts()(8, 5) == 8
    assert [Refill(1.5)(8, dropped) for dropped in (0, 3, 4, 5)] == [8, 11, 12, 12]


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
        (lambda: Refill(0.5), "Refill: max_prompts_factor 0.5; at least 1"),
        (lambda: Refill(float("nan")), "Refill: max_prompts_factor nan"),
        (lambda: Balance(-1, 2), "Balance: num_correct -1"),
    ],
)
def test_input_errors_are_one_line(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_policies_are_values(name: str) -> None:
    assert preset(name) == preset(name)
    assert hash(preset(name)) == hash(preset(name))
    assert isinstance(preset(name), Policy)
