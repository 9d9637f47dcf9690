"""Exact values of the stopping rules, to the digits they are published with, and the real sampler against them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pytest
from sampling_world import answer, drawn, finish, outcome, prompts_of, sequential

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdaptiveSampler, Balance, Counts, History, Policy, Positive, Rounds, Verdict, preset, stopping_table
from reinforce_ada.sampling.statistics import Terminal, pool_mean, samples, signal, terminals_of
from reinforce_ada.types import CompletionId

POS, BALANCE = "reinforce-ada-pos", "reinforce-ada-balance"


def close(value: float, printed: str) -> bool:
    """Return whether `value` rounds to the printed digits (a half may round either way)."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-digits + 1e-12


def bias(policy: Policy, p: float) -> float:
    return stopping_table(policy).expect(pool_mean, p) - p


FIVE = (0.02, 0.1, 0.3, 0.8, 0.95)
SIX = (0.02, 0.1, 0.3, 0.5, 0.8, 0.95)
PER_COMPLETION = {"decide_every": 1, "min_pool": 4}


@pytest.mark.parametrize(
    ("name", "overrides", "rates", "num_samples", "p_signal", "pool_bias"),
    [
        (POS, {}, FIVE, "25.5 13.6 8.5 8.0 8.0", ".476 .966 1.00 .83 .34", ".016 .030 .009 .000 .000"),
        (BALANCE, {}, FIVE, "30.9 21.0 10.3 13.4 27.3", ".476 .966 1.00 1.00 .806", ".004 .032 .028 -.038 -.016"),
        (
            POS,
            PER_COMPLETION,
            SIX,
            "23.9 10.2 4.8 4.1 4.0 4.0",
            ".476 .966 .992 .937 .590 .185",
            ".031 .065 .036 .011 .000 .000",
        ),
        (
            BALANCE,
            PER_COMPLETION,
            SIX,
            "30.5 18.1 7.1 5.5 10.1 25.7",
            ".476 .966 1.00 1.00 1.00 .806",
            ".007 .054 .060 .000 -.071 -.027",
        ),
    ],
)
def test_published_values(name: str, overrides: dict, rates: tuple, num_samples: str, p_signal: str, pool_bias: str) -> None:
    policy = preset(name, **overrides)
    table = stopping_table(policy)
    for p, drawn_, with_signal, biased in zip(rates, num_samples.split(), p_signal.split(), pool_bias.split(), strict=True):
        assert close(table.expect(samples, p), drawn_)
        assert close(table.expect(signal, p), with_signal)
        assert close(bias(policy, p), biased)


def test_pos_without_min_pool_destroys_the_group() -> None:
    table = stopping_table(preset(POS, decide_every=1, min_pool=0))
    for p, printed in zip(SIX, [".456", ".866", ".700", ".500", ".200", ".050"], strict=True):
        assert close(table.expect(signal, p), printed)


@pytest.mark.parametrize(
    ("rates", "grpo", "pos", "balance", "balance_each", "pos_each"),
    [
        ((0.5, 2.5), ".380 .526 .647 .743", ".739 16.9", ".743 21.1", ".743 19.1", ".725 14.3"),
        ((1.0, 2.0), ".600 .778 .882 .939", ".919 11.1", ".939 14.7", ".939 11.9", ".875 7.6"),
        ((2.5, 0.6), ".430 .587 .710 .802", ".592 8.1", ".802 19.6", ".802 17.4", ".452 4.1"),
    ],
)
def test_published_populations(rates: tuple, grpo: str, pos: str, balance: str, balance_each: str, pos_each: str) -> None:
    for size, printed in zip((4, 8, 16, 32), grpo.split(), strict=True):
        assert close(stopping_table(preset("grpo", group_size=size)).expect_beta(signal, *rates), printed)
    rows = [(preset(POS), pos), (preset(BALANCE), balance)]
    rows += [(preset(BALANCE, decide_every=1), balance_each), (preset(POS, **PER_COMPLETION), pos_each)]
    for policy, printed in rows:
        fraction, num_samples = printed.split()
        assert close(stopping_table(policy).expect_beta(signal, *rates), fraction)
        assert close(stopping_table(policy).expect_beta(samples, *rates), num_samples)


@pytest.mark.parametrize("p", [0.0, 0.02, 0.5, 1.0])
def test_probabilities_add_up(p: float) -> None:
    for name in (POS, BALANCE, "grpo", "dapo"):
        assert math.isclose(stopping_table(preset(name)).expect(lambda t: 1.0, p), 1.0, rel_tol=1e-12)
        assert math.isclose(stopping_table(preset(name)).expect_beta(lambda t: 1.0, 0.5, 2.5), 1.0, rel_tol=1e-12)


SMALL = [
    preset(POS, group_size=2, round_size=4, max_rounds=2),
    preset(BALANCE, group_size=4, round_size=4, max_rounds=2),
    preset(BALANCE, group_size=3, round_size=4, max_rounds=2, decide_every=1),
    preset(POS, group_size=2, round_size=4, max_rounds=2, decide_every=1, min_pool=0),
    preset(POS, group_size=2, round_size=4, max_rounds=2, decide_every=3, min_pool=4),
    preset("dapo", group_size=8),
]


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: f"{p.name}-{p.decide_every}-{p.min_pool}")
def test_every_outcome_string_through_the_real_sampler(policy: Policy) -> None:
    """Draw all 2^8 strings in one step: the terminal states and the unbiased reward agree with the path counts, exactly."""
    strings = {"".join(chars): "".join(chars) for chars in itertools.product("+-", repeat=policy.cap)}
    source = iter(prompts_of(list(strings)))
    sampler = AdaptiveSampler(source, policy, num_prompts=len(strings))
    pools = finish(sampler, answer(strings), slots=300, rng=random.Random(1)).pools
    reached: dict[tuple[int, int], set[str]] = {}
    for pool in pools:
        reached.setdefault((pool.num_correct, pool.num_wrong), set()).add(drawn(pool)[0])
    table = stopping_table(policy)
    counted = {s: (len(paths), sum(x[0] == "+" for x in paths), sum(x[:2] == "+-" for x in paths)) for s, paths in reached.items()}
    assert {(t.correct, t.wrong): t.paths for t in table.terminals} == counted

    p, always = 0.3, policy.num_always_drawn
    first_reward = sum(
        0.3 ** s.count("+") * 0.7 ** s.count("-") * sum(o.reward for o in pool.outcomes[:always]) / always
        for s, pool in zip(strings, pools, strict=True)
    )
    assert math.isclose(first_reward, p, rel_tol=1e-12)


NUM_PROMPTS = 600


def measure(policy: Policy, schedule: str, rates: Sequence[float]) -> Mapping[str, float]:
    """Return the metrics of a step with one prompt for each pass rate; wrong answers are slow, which completion order underrates."""
    rng = random.Random(f"{policy.name} {policy.decide_every} {rates[0]}")
    rate_of = {f"p{i}": p for i, p in enumerate(rates)}
    sampler = AdaptiveSampler(prompts_of(list(rate_of)), policy, schedule=schedule)
    running: list[tuple[float, CompletionId, str]] = []
    now = 0.0
    while not sampler.done:
        for request in sampler.next_requests(512 - len(running)):
            char = "+" if random.Random(request.seed).random() < rate_of[request.id.prompt_id] else "-"
            running.append((now + rng.random() * (1 if char == "+" else 4), request.id, char))
        running.sort()
        batch, running = running[:64], running[64:]
        aborted: set[CompletionId] = set()
        for now, request_id, char in batch:  # noqa: B007
            aborted.update(sampler.receive(outcome(request_id, char)))
        running = [r for r in running if r[1] not in aborted]
    return sampler.result().metrics


@pytest.mark.parametrize(("p", "schedule"), [*zip(SIX, ("stream", "rounds") * 3, strict=True)])
@pytest.mark.parametrize(("name", "overrides"), [(POS, {}), (BALANCE, {}), (POS, PER_COMPLETION), (BALANCE, PER_COMPLETION)])
def test_monte_carlo_through_the_real_sampler(name: str, overrides: dict, p: float, schedule: str) -> None:
    """Check the tables above by sampling, each mean within 4 exact standard errors."""
    policy = preset(name, **overrides)
    table, metrics = stopping_table(policy), measure(policy, schedule, [p] * NUM_PROMPTS)
    for value, measured in (
        (samples, metrics["samples_per_prompt"]),
        (signal, metrics["signal_fraction"]),
        (pool_mean, metrics["pool_reward"]),
        (Terminal.pass_rate.fget, metrics["pass_rate"]),
    ):
        mean = table.expect(value, p)
        variance = table.expect(lambda t, value=value, mean=mean: (value(t) - mean) ** 2, p)
        assert abs(measured - mean) <= 4 * math.sqrt(variance / NUM_PROMPTS) + 1e-9
    always = policy.num_always_drawn
    assert abs(metrics["first_round_reward"] - p) <= 4 * math.sqrt(p * (1 - p) / (NUM_PROMPTS * always))


@pytest.mark.parametrize("rates", [(0.5, 2.5), (1.0, 2.0), (2.5, 0.6)])
@pytest.mark.parametrize(("name", "overrides"), [("grpo", {}), (POS, {}), (BALANCE, {}), (POS, PER_COMPLETION)])
def test_monte_carlo_over_populations(name: str, overrides: dict, rates: tuple[float, float]) -> None:
    policy, rng = preset(name, **overrides), random.Random(17)
    metrics = measure(policy, "stream", [rng.betavariate(*rates) for _ in range(NUM_PROMPTS)])
    table = stopping_table(policy)
    for value, measured in ((samples, metrics["samples_per_prompt"]), (signal, metrics["signal_fraction"])):
        mean = table.expect_beta(value, *rates)
        variance = table.expect_beta(lambda t, value=value, mean=mean: (value(t) - mean) ** 2, *rates)
        assert abs(measured - mean) <= 4 * math.sqrt(variance / NUM_PROMPTS) + 1e-9


# -------------------- unbiased estimates


def adaptive(rule: Positive | Balance, cap: int, decide_every: int, min_pool: int) -> Policy:
    allocate = Rounds(cap, 1)
    return dataclasses.replace(preset(BALANCE, group_size=2), decide=rule, allocate=allocate, decide_every=decide_every, min_pool=min_pool)


def expectations(policy: Policy, cap: int, voids: Sequence[int], p: Fraction) -> tuple[Fraction, Fraction]:
    """Return E[pass_rate] and E[reward_variance] as a sum over all strings, with the rule asked where it is due."""
    free = [i for i in range(cap) if i not in voids]
    first, second = Fraction(0), Fraction(0)
    for bits in itertools.product("+-", repeat=len(free)):
        chars = ["v"] * cap
        for i, bit in zip(free, bits, strict=True):
            chars[i] = bit
        pool = sequential("".join(chars), policy)[0]
        seen = tuple(i for i in voids if i < len(pool))  # what a pool shows of the voids
        counts = Counts(pool.count("+"), pool.count("-"), len(seen))
        t = stopping_table(policy, cap, seen).at(counts)
        probability = p ** bits.count("+") * (1 - p) ** bits.count("-")
        first += probability * Fraction(t.paths.first_correct, t.paths.all)
        second += probability * Fraction(t.paths.correct_then_wrong, t.paths.all)
    return first, second


# The sums are polynomials in p with integer coefficients below 10^5. One that vanishes at a rate whose denominator is a prime above that
# has a leading coefficient the prime divides, so it is zero: equality at this rate is equality at all.
RATE = Fraction(300007, 1000003)


@pytest.mark.parametrize("rule", [Positive(1), Positive(3), Balance(2, 2), Balance(1, 2)], ids=str)
@pytest.mark.parametrize(("cap", "decide_every", "min_pool"), [*itertools.product((5, 8), (1, 2, 3, 8), (2, 4))])
def test_estimates_are_unbiased_over_all_strings(rule: Positive | Balance, cap: int, decide_every: int, min_pool: int) -> None:
    policy = adaptive(rule, cap, decide_every, min_pool)
    assert expectations(policy, cap, (), RATE) == (RATE, RATE * (1 - RATE))


@pytest.mark.parametrize("voids", [(0,), (1,), (4,), (0, 1), (2, 5), (0, 3, 4, 7)])
@pytest.mark.parametrize("rule", [Positive(1), Balance(2, 2)], ids=str)
@pytest.mark.parametrize(("cap", "decide_every", "min_pool"), [(8, 1, 2), (8, 3, 2), (8, 4, 4), (9, 8, 3)])
def test_estimates_are_unbiased_given_where_the_voids_are(
    rule: Positive | Balance, cap: int, decide_every: int, min_pool: int, voids: tuple[int, ...]
) -> None:
    policy = adaptive(rule, cap, decide_every, min_pool)
    assert expectations(policy, cap, voids, RATE) == (RATE, RATE * (1 - RATE))


def test_the_test_above_has_teeth() -> None:
    """With pos asked from the first completion on, pools of one draw carry no p (1 - p); the pass rate stays unbiased."""
    first, second = expectations(adaptive(Positive(1), 6, 1, 0), 6, (), RATE)
    assert first == RATE
    assert second == 0
    table = stopping_table(preset(POS))
    assert table.expect(lambda t: t.correct * t.wrong / (t.count * (t.count - 1)), 0.1) > 1.2 * 0.1 * 0.9  # the plain plug-in


def test_fixed_sizes_have_the_textbook_estimates() -> None:
    for t in stopping_table(preset("grpo", group_size=9)).terminals:
        assert t.pass_rate == t.correct / 9
        assert math.isclose(t.reward_variance, t.correct * t.wrong / (9 * 8), abs_tol=1e-15)


def test_stopping_at_the_kth_success_has_haldanes_estimate() -> None:
    """The estimate is (K - 1) / (N - 1) where the rule stopped, and another one at the cap, where it did not."""
    for t in stopping_table(adaptive(Positive(3), 12, 1, 0)).terminals:
        if t.verdict is Verdict.STOP:
            assert math.isclose(t.pass_rate, 2 / (t.count - 1), rel_tol=1e-15)
        else:
            assert t.pass_rate == t.correct / 12  # all orders of at most two correct ones lead there


@pytest.mark.parametrize(("rule", "decide_every"), [(Balance(2, 2), 1), (Positive(1), 8)], ids=str)
def test_estimates_at_the_published_cap(rule: Positive | Balance, decide_every: int) -> None:
    table = stopping_table(adaptive(rule, 32, decide_every, 4))
    for p in (0.02, 0.1, 0.5, 0.9, 0.98):
        assert math.isclose(table.expect(lambda t: t.pass_rate, p), p, rel_tol=1e-12)
        assert math.isclose(table.expect(lambda t: t.reward_variance, p), p * (1 - p), rel_tol=1e-12)


@dataclass(frozen=True)
class Budgeted(Rounds):
    """Prompts get 5, 6, 8, 5, 6, 8, ... completions."""

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        return [(5, 6, 8)[i % 3] for i in range(len(histories))]


@pytest.mark.parametrize("rule", [Positive(1), Balance(2, 1)], ids=str)
def test_each_cap_and_pattern_of_voids_has_its_table(rule: Positive | Balance) -> None:
    """Run the real sampler over all strings with a void at 2 and nothing else, each with three caps; sums are 1, p and p (1 - p)."""
    policy = dataclasses.replace(adaptive(rule, 8, 2, 2), allocate=Budgeted(8, 1))
    strings = ["".join((*x[:2], "v", *x[2:])) for x in itertools.product("+-", repeat=7)]
    script = {f"{s} {i}": s for s in strings for i in range(3)}
    result = finish(AdaptiveSampler(prompts_of(list(script)), policy), answer(script), slots=100, rng=random.Random(3))
    sums = {cap: [0.0, 0.0] for cap in (5, 6, 8)}
    for pool, t in zip(result.pools, terminals_of(result.pools, policy), strict=True):
        probability = 0.3 ** pool.prompt.prompt_id.count("+") * 0.7 ** pool.prompt.prompt_id.count("-")
        sums[pool.cap][0] += probability * t.pass_rate
        sums[pool.cap][1] += probability * t.reward_variance
    for first, second in sums.values():
        assert math.isclose(first, 0.3, rel_tol=1e-12)
        assert math.isclose(second, 0.21, rel_tol=1e-12)


def test_pass_rate_is_the_mean_of_the_estimates() -> None:
    policy = preset(POS, group_size=2, round_size=4, max_rounds=2, decide_every=1)
    script = {"a": "-+vvvvvv", "b": "v--+vvvv", "c": "vvvvvvvv"}  # c has no score and counts in no mean
    result = finish(AdaptiveSampler(prompts_of(list(script)), policy), answer(script))
    # a: of +-, -+ the rule stops at both, so 1/1 and 0/1. b: after the void and 2 draws, of --+ only (two draws are the min_pool).
    assert [t.pass_rate for t in terminals_of(result.pools[:2], policy)] == [0.5, 0.0]
    assert result.metrics["pass_rate"] == 0.25


def test_a_pool_the_rule_cannot_have_ended() -> None:
    with pytest.raises(InputError, match="StoppingTable: a pool with 9 correct, 0 wrong and 0 void; counts that the stopping rule can end"):
        stopping_table(preset(POS)).at(Counts(9, 0))


def test_tables_are_kept_and_looking_up_is_cheap() -> None:
    policy = preset(BALANCE)
    assert stopping_table(policy) is stopping_table(preset(BALANCE), 32)
    assert stopping_table(policy, 16) is not stopping_table(policy)
    script = {f"{i}": "+-" * 16 for i in range(1000)}
    pools = finish(AdaptiveSampler(prompts_of(list(script)), policy), answer(script)).pools
    start = time.perf_counter()
    list(terminals_of(pools, policy))
    assert time.perf_counter() - start < 0.05  # 1 us a pool; 50 leaves room for a busy machine
