"""Exact values of the stopping rules, to the digits they are published with, and the real sampler against them."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from sampling_world import answer, drawn, finish, outcome, prompts_of

from reinforce_ada.sampling import AdaptiveSampler, Policy, preset, stopping_table
from reinforce_ada.sampling.statistics import pool_mean, samples, signal
from reinforce_ada.types import CompletionId

POS, BALANCE = "reinforce-ada-pos", "reinforce-ada-balance"


def close(value: float, printed: str) -> bool:
    """Whether `value` rounds to the printed digits (a half may round either way)."""
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
    """All 2^8 strings, in one step: the terminal states and the unbiased reward agree with the path counts, exactly."""
    strings = {"".join(chars): "".join(chars) for chars in itertools.product("+-", repeat=policy.cap)}
    source = iter(prompts_of(list(strings)))
    sampler = AdaptiveSampler(source, policy, num_prompts=len(strings))
    pools = finish(sampler, answer(strings), slots=300, rng=random.Random(1)).pools
    reached: dict[tuple[int, int], set[str]] = {}
    for pool in pools:
        reached.setdefault((pool.num_correct, pool.num_wrong), set()).add(drawn(pool)[0])
    table = stopping_table(policy)
    assert {(t.correct, t.wrong): t.num_paths for t in table.terminals} == {s: len(paths) for s, paths in reached.items()}

    p, always = 0.3, policy.num_always_drawn
    first_reward = sum(
        0.3 ** s.count("+") * 0.7 ** s.count("-") * sum(o.reward for o in pool.outcomes[:always]) / always
        for s, pool in zip(strings, pools, strict=True)
    )
    assert math.isclose(first_reward, p, rel_tol=1e-12)


@pytest.mark.parametrize("schedule", ["stream", "rounds"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(("name", "decide_every"), [(POS, 8), (BALANCE, 8), (BALANCE, 1)])
def test_monte_carlo_through_the_real_sampler(name: str, decide_every: int, p: float, schedule: str) -> None:
    """600 prompts; wrong answers are the slow ones, which a sampler in completion order would mistake for rare ones."""
    policy, num_prompts = preset(name, decide_every=decide_every), 600
    rng = random.Random(f"{name} {decide_every} {p}")
    sampler = AdaptiveSampler(prompts_of([f"p{i}" for i in range(num_prompts)]), policy, schedule=schedule)
    running: list[tuple[float, CompletionId, str]] = []
    now = 0.0
    while not sampler.done:
        for request in sampler.next_requests(512 - len(running)):
            char = "+" if random.Random(request.seed).random() < p else "-"
            running.append((now + rng.random() * (1 if char == "+" else 4), request.id, char))
        running.sort()
        batch, running = running[:64], running[64:]
        aborted: set[CompletionId] = set()
        for now, request_id, char in batch:  # noqa: B007
            aborted.update(sampler.receive(outcome(request_id, char)))
        running = [r for r in running if r[1] not in aborted]
    table, result = stopping_table(policy), sampler.result()
    for value, measured in (
        (samples, result.metrics["samples_per_prompt"]),
        (signal, result.metrics["signal_fraction"]),
        (pool_mean, result.metrics["pool_reward"]),
    ):
        mean = table.expect(value, p)
        variance = table.expect(lambda t, value=value, mean=mean: (value(t) - mean) ** 2, p)
        assert abs(measured - mean) <= 4 * math.sqrt(variance / num_prompts) + 1e-9
    always = policy.num_always_drawn
    assert abs(result.metrics["first_round_reward"] - p) <= 4 * math.sqrt(p * (1 - p) / (num_prompts * always))
