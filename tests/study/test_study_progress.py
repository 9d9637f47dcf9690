"""Quotients of costs until a held-out reward, against literal values and a program of the obvious kind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from study_world import result, results

from reinforce_ada.explain.efficiency import Efficiency
from reinforce_ada.study.page import page
from reinforce_ada.study.prediction import Prediction, relative
from reinforce_ada.study.progress import Progress, Quotient, observed, progress_of, rank_correlation
from reinforce_ada.study.results import RunResult
from reinforce_ada.study.summary import ArmResult, arms_of, difference_at_the_end


def arm(name: str, curves: Sequence[Sequence[float]], **per_step: float) -> ArmResult:
    return ArmResult(name, 1e-5, tuple(result(name, 1e-5, seed, rewards, per_step) for seed, rewards in enumerate(curves)))


SLOW = [[0.0, 0.2, 0.4, 0.6], [0.0, 0.2, 0.4, 0.6]]


@pytest.mark.parametrize(
    ("curves", "target", "quotient"),
    [
        ([[0.0, 0.4, 0.8, 0.8]] * 2, 0.4, 2.0),  # after 20 steps and after 10
        ([[0.0, 0.4, 0.8, 0.8]] * 2, None, 2.0),  # .6 after 30 and after 15
        ([[0.0, 0.1, 0.2, 0.3]] * 2, None, 0.5),  # .3 after 15 and after 30
        ([[0.0, 0.8, 0.8, 0.8], [0.0, 0.0, 0.0, 0.0]], 0.4, 2.0),  # the mean over the seeds, although one of them never has it
        ([[0.0, 0.1, 0.1, 0.1]] * 2, 0.4, 0.0),
        ([[0.0, 0.4]] * 2, 0.4, 2.0),  # it ends there
        ([[0.0, 0.4, 0.0, 0.0]] * 2, 0.4, 2.0),  # the first time counts
        ([[0.0, 0.4, 0.8, 0.8]] * 2, 0.7, math.inf),
    ],
)
def test_the_quotient(curves: Sequence[Sequence[float]], target: float | None, quotient: float) -> None:
    found = observed(arm("fast", curves), arm("slow", SLOW), "steps", target)
    assert found.mean == pytest.approx(quotient, rel=0.02)


def test_of_itself_it_is_one() -> None:
    slow = arm("slow", SLOW)
    assert [observed(slow, slow, axis, None).mean for axis in ("steps", "generated_completions")] == [1.0, 1.0]


def test_nothing_to_say() -> None:
    none = ArmResult("none", None, ())
    assert math.isnan(observed(none, arm("slow", SLOW), "steps", None).mean)
    assert math.isnan(observed(arm("slow", SLOW), none, "steps", None).mean)
    alone = observed(arm("fast", [[0.0, 0.4, 0.8, 0.8]]), arm("slow", SLOW), "steps", None)
    assert (alone.mean, alone.low) == (pytest.approx(2.0, rel=0.02), pytest.approx(math.nan, nan_ok=True))
    never = observed(arm("slow", SLOW), arm("slow", SLOW), "steps", 0.99)
    assert math.isnan(never.mean)


def test_the_interval_by_a_program_of_the_obvious_kind() -> None:
    """Seeds drawn with replacement, both mean curves, the target, and where straight lines reach it."""
    rng = np.random.default_rng(1)
    base = np.cumsum(rng.uniform(0.02, 0.1, (5, 9)), axis=1)
    ours = np.cumsum(rng.uniform(0.02, 0.16, (5, 9)), axis=1)
    found = observed(arm("ours", ours.tolist(), seconds=3.0), arm("base", base.tolist()), "seconds", None)
    draws = [[0, 1, 2, 3, 4], *rng.integers(5, size=(4000, 5)).tolist()]
    quotients = []
    for draw in draws:
        theirs, mine = base[draw].mean(0), ours[draw].mean(0)
        target = min(theirs[-1], mine[-1])
        quotients.append(cost_until(theirs, target, 1.0) / cost_until(mine, target, 3.0))
    assert found.mean == pytest.approx(quotients[0], rel=0.01)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(quotients[1:], (0.025, 0.975))), rel=0.03)
    assert found.low < found.mean < found.high


def cost_until(curve: np.ndarray, target: float, per_step: float) -> float:
    for i, reward in enumerate(curve):
        if reward >= target:
            return 10 * per_step * (i - 1 + (target - curve[i - 1]) / (reward - curve[i - 1])) if i else 0.0
    return math.inf


def test_the_interval_over_seeds_and_questions() -> None:
    """Two effects of the same spread: the interval of both is wider than that of the seeds by the square root of 2."""
    rng = np.random.default_rng(0)
    seeds, questions = rng.normal(size=30), rng.normal(size=30)
    values = (seeds - seeds.mean())[:, None] / seeds.std() + (questions - questions.mean()) / questions.std()
    sides = [ArmResult(name, 1e-5, tuple(RunResult(name, 1e-5, i, result(name, 1e-5, i, [row.mean()]).evaluations, tuple(row))
                                         for i, row in enumerate(rows))) for name, rows in (("a", values), ("b", 0 * values))]  # fmt: skip
    found = difference_at_the_end(*sides)
    assert found.mean == pytest.approx(0.0, abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(2 / 30), rel=0.05)


@pytest.mark.parametrize(
    ("pairs", "correlation"),
    [
        ([(1, 1), (2, 4), (3, 9)], 1.0),
        ([(1, 9), (2, 4), (3, 1)], -1.0),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([(1, 1), (1, 2), (2, 3)], math.sqrt(3) / 2),
        ([(1, 1), (2, 2)], math.nan),
        ([(1, 1), (2, 2), (math.nan, 3)], math.nan),
        ([(1, 5), (2, 5), (3, 5)], math.nan),
        ([(1, 1), (2, 0), (3, math.inf)], 0.5),
    ],
)
def test_the_rank_correlation(pairs: list[tuple[float, float]], correlation: float) -> None:
    progress = [Progress("arm", "steps", x, Quotient(y, math.nan, math.nan)) for x, y in pairs]
    assert rank_correlation(progress) == pytest.approx(correlation, nan_ok=True)


@pytest.mark.parametrize("reference", [None, Efficiency(8.0, 8.0, 0.0, 1.0), Efficiency(0.0, 0.0, 1.0, 0.0)])
def test_a_baseline_without_progress(reference: Efficiency | None) -> None:
    """Nothing is relative to it, and the page says so."""
    predictions = (Prediction("slow", 12, 8.0, 0.25, reference), Prediction("fast", 12, 8.0, 0.25, Efficiency(8.0, 8.0, 1.0, 1.0)))
    assert all(map(math.isnan, relative(predictions, "slow", "per_generated").values()))
    found = results([], dict.fromkeys(("slow", "fast"), (1e-5,)), predictions=predictions)
    assert "| fast | 12               | 8.0                    | 96                   | 0.250     | –" in page(found, has_figure=False)


def test_on_the_page() -> None:
    """Progress is 1, 4 and 1 / 2 per generated completion; two arms take half and a quarter of the steps, the first 4 completions each."""
    efficiencies = (Efficiency(8.0, 8.0, 1.0, 1.0), Efficiency(8.0, 4.0, 2.0, 1.0), Efficiency(8.0, 2.0, 1.0, 2.0))
    names = ("slow", "fast", "other")
    curves = ([0.0, 0.1, 0.2, 0.3, 0.4], [0.0, 0.2, 0.4, 0.4, 0.4], [0.0, 0.4, 0.4, 0.4, 0.4])
    per_step = ({}, {}, {"generated_completions": 10.0})
    runs = [result(n, 1e-5, seed, c, p) for n, c, p in zip(names, curves, per_step, strict=True) for seed in (0, 1)]
    found = results(
        runs, dict.fromkeys(names, (1e-5,)), (0, 1), target=None,
        predictions=tuple(Prediction(n, 12, 8.0, 0.25, e) for n, e in zip(names, efficiencies, strict=True)),
    )  # fmt: skip
    assert relative(found.predictions, "slow", "per_generated") == {"slow": 1.0, "fast": 4.0, "other": 0.5}
    assert relative(found.predictions, "slow", "per_trained") == {"slow": 1.0, "fast": 8.0, "other": 2.0}
    progress = progress_of(found, arms_of(found))
    assert [p.observed.mean for p in progress if p.axis == "generated_completions"] == pytest.approx([1.0, 2.0, 0.4], rel=0.01)
    assert [p.predicted for p in progress if p.axis == "trained_completions"] == [1.0, 8.0, 2.0]
    text = page(found, has_figure=True)
    assert "| fast  | 2.00 (2.00 to 2.00) | 4.00      | 2.00 (2.00 to 2.00)" in text
    assert "Rank correlation of predicted and observed, generated completions: 1.00." in text
    assert "(progress.png)" in text
