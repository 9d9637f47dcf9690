"""The cost of the exact objectives: the variance of the gradient per completion, by exact statistics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from reinforce_ada.sampling import (
    Policy,
    preset,
    stopping_table,
)
from reinforce_ada.sampling.statistics import Terminal, samples

POS, BALANCE, EXACT = "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact"


# -------------------- what it costs

POPULATIONS = ((0.5, 2.5), (1.0, 2.0), (2.5, 0.6))


def second_moment(policy: Policy, a: float, b: float) -> float:
    """Return E[|gradient of a prompt|^2] over prompts that are drawn from Beta(a, b) pass rates: what a step's variance is, per prompt.

    The gradient is theta * (mean of the kept correct - mean of the kept wrong). Its factor of grad p is theta / (p q), and for scores of
    variance 1 within a class the means have variances 1 / kept; where |grad p| = p q that is theta^2 (1 + 1 / correct + 1 / wrong).
    """
    table, n = stopping_table(policy), policy.group_size

    def squared(t: Terminal) -> float:
        correct = min(t.correct, max(n // 2, n - t.wrong))
        wrong = min(t.wrong, n - correct)
        return t.reward_variance**2 * (1 + 1 / correct + 1 / wrong) if correct and wrong else 0.0

    return table.expect_beta(squared, a, b)


def cost(policy: Policy, a: float, b: float) -> float:
    """Return the second moment times completions per prompt."""
    return second_moment(policy, a, b) * stopping_table(policy).expect_beta(samples, a, b)


def without_the_prompts(policy: Policy, a: float, b: float) -> float:
    """Return the cost of a prompt's own variance with the prompts given: E[(w |grad p|)^2] = E[(p q)^2] is subtracted."""
    between = a * (a + 1) * b * (b + 1) / math.prod(a + b + i for i in range(4))
    return (second_moment(policy, a, b) - between) * stopping_table(policy).expect_beta(samples, a, b)


@pytest.mark.parametrize(
    ("policy", "printed"),
    [
        (preset(BALANCE, objective="mean"), ".906 1.106 .974"),
        (preset(BALANCE, objective="mean", min_pool=16), ".951 1.363 1.050"),
        (preset(EXACT, min_pool=4), ".872 .950 .918"),
        (preset(EXACT, min_pool=6), ".859 .963 .908"),
        (preset(EXACT), ".856 1.006 .912"),
        (preset(EXACT, min_pool=12), ".881 1.149 .954"),
        (preset(POS, objective="mean"), ".790 .872 .430"),
        (preset(POS, objective="mean", decide_every=1), ".910 .782 .296"),
        (preset(POS, objective="mean", decide_every=1, min_pool=8), ".751 .826 .429"),
        (preset("grpo", objective="mean", group_size=2), ".312 .500 .354"),
        (preset("grpo", objective="mean", group_size=4), ".255 .411 .290"),
        (preset("grpo", objective="mean", group_size=8), ".301 .500 .344"),
        (preset("grpo", objective="mean", group_size=16), ".436 .749 .502"),
        (preset("grpo", objective="mean", group_size=32), ".723 1.274 .836"),
    ],
)
def test_the_variance_of_the_gradient_per_completion(policy: Policy, printed: str) -> None:
    """Check the table of docs/statistics.md."""
    assert [f"{cost(policy, *rates):.3f}".removeprefix("0") for rates in POPULATIONS] == printed.split()
    page = (Path(__file__).parents[2] / "docs/statistics.md").read_text()
    assert f"| {' | '.join(printed.split())} |" in page


def test_small_groups_win_where_the_prompts_are_drawn() -> None:
    """The savings are large with the prompts given, which is the other half of the page's claim."""
    for rates in POPULATIONS:
        fixed = {n: cost(preset("grpo", objective="mean", group_size=n), *rates) for n in (2, 3, 4, 8, 16, 32)}
        assert min(fixed, key=fixed.__getitem__) in (3, 4)
        assert 0.8 < fixed[4] / fixed[8] < 0.86
        assert 2.6 < cost(preset(BALANCE, objective="mean"), *rates) / fixed[4] < 3.6
        given = {n: without_the_prompts(preset("grpo", objective="mean", group_size=n), *rates) for n in fixed}
        assert min(given, key=given.__getitem__) == 32
        both = (
            second_moment(preset("grpo", objective="mean", group_size=4), *rates),
            second_moment(preset(BALANCE, objective="mean"), *rates),
        )
        assert 1.36 < both[0] / both[1] < 1.5


def test_the_presets_timing_is_within_two_percent_of_the_smallest_variance() -> None:
    total = {
        (every, min_pool): sum(cost(preset(EXACT, decide_every=every, min_pool=min_pool), *rates) for rates in POPULATIONS)
        for every in (1, 2, 4, 8, 16)
        for min_pool in (2, 4, 6, 8, 10, 12, 16)
    }
    assert min(total, key=total.__getitem__) == (1, 6)
    assert (preset(EXACT).decide_every, preset(EXACT).min_pool) == (1, 8)
    assert total[1, 8] < 1.02 * total[1, 6]
