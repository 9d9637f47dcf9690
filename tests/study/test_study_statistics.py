"""The statistics of a study, against literal values and against every resample that there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from reinforce_ada.study.statistics import (
    best_rate,
    bootstrap,
    cost_until,
    is_at_edge,
    mean_and_half,
    most_coverage,
    paired,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (30, 2.0423), (31, 2.0395), (60, 2.0003), (1000, 1.9623)],
)
def test_t(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_the_interval_of_a_mean() -> None:
    mean, half = mean_and_half([0.4, 0.5, 0.9])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.3027 * math.sqrt(0.07) / math.sqrt(3))  # the variance is (.04 + .01 + .09) / 2
    assert mean_and_half([0.4])[0] == 0.4
    assert math.isnan(mean_and_half([0.4])[1])
    assert all(map(math.isnan, mean_and_half([])))


def test_differences_are_paired_by_seed() -> None:
    ours, baseline = {2: 0.5, 0: 0.25, 7: 1.0}, {0: 0.5, 1: 0.75, 2: 0.125}
    assert paired(ours, baseline) == [-0.25, 0.375]  # of seeds 0 and 2
    assert paired(ours, {}) == []


@pytest.mark.parametrize("differences", [[0.1, 0.3], [-0.2, 0.1, 0.4], [0.0, 0.0, 0.5, 0.6], [-0.3, 0.1, 0.2, 0.25, 0.7]])
def test_the_bootstrap_is_that_of_every_resample(differences: list[float]) -> None:
    """The quantiles over all n^n resamples; drawn ones may fall on a neighbouring mean, whose share is next to the tail's."""
    means = np.array([math.fsum(draw) / len(draw) for draw in itertools.product(differences, repeat=len(differences))])
    for found, tail in zip(bootstrap(differences), (0.025, 0.975), strict=True):
        assert np.mean(means < found - 1e-9) <= tail + 0.006
        assert np.mean(means <= found + 1e-9) >= tail - 0.006
    assert bootstrap(differences) == bootstrap(differences)


def test_the_bootstrap_of_few_seeds() -> None:
    assert bootstrap([0.1, 0.3]) == pytest.approx((0.1, 0.3))  # a quarter of the resamples each
    assert bootstrap([-0.2, 0.1, 0.4]) == pytest.approx((-0.2, 0.4))  # 1/27 each
    assert bootstrap([0.2, 0.2, 0.2]) == pytest.approx((0.2, 0.2))
    assert all(map(math.isnan, bootstrap([0.1])))
    assert all(map(math.isnan, bootstrap([])))
    assert all(map(math.isnan, bootstrap(np.zeros((3, 0)))))  # no prompt was scored in every run
    assert [most_coverage(n) for n in (2, 3, 6)] == [0.5, 0.75, 0.96875]


@pytest.mark.parametrize(
    ("costs", "rewards", "target", "expected"),
    [
        ([0, 100, 200], [0.1, 0.3, 0.7], 0.5, 150.0),
        ([0, 100, 200], [0.1, 0.3, 0.7], 0.3, 100.0),
        ([0, 100, 200], [0.1, 0.3, 0.7], 0.2, 50.0),
        ([0, 100, 200], [0.1, 0.6, 0.2], 0.5, 80.0),  # the first time counts
        ([0, 100, 200], [0.5, 0.6, 0.7], 0.5, 0.0),  # before any training
        ([0, 100, 300], [0.2, 0.2, 0.6], 0.3, 150.0),
        ([0, 100], [0.1, 0.49], 0.5, math.nan),
        ([0, 0], [0.1, 0.9], 0.5, 0.0),  # a step that cost nothing
        ([], [], 0.5, math.nan),
    ],
)
def test_the_cost_until_a_target(costs: list[float], rewards: list[float], target: float, expected: float) -> None:
    assert cost_until(costs, rewards, target) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        ({1e-5: [0.1, 0.2], 3e-5: [0.3, 0.4], 1e-4: [0.2, 0.2]}, 3e-5),
        ({1e-5: [0.5, 0.5], 3e-5: [0.5, 0.5]}, 1e-5),
        ({3e-5: [0.5, 0.5], 1e-5: [0.5, 0.5]}, 1e-5),
        ({1e-5: [0.1, 0.2], 3e-5: [0.9]}, 1e-5),  # one of its seeds is missing
        ({1e-5: [], 3e-5: [0.9]}, 3e-5),
        ({1e-5: [], 3e-5: []}, None),
        ({}, None),
    ],
)
def test_the_best_learning_rate(finals: dict[float, list[float]], expected: float | None) -> None:
    assert best_rate(finals) == expected


@pytest.mark.parametrize(
    ("rate", "grid", "expected"),
    [(1e-5, [1e-5], False), (1e-5, [1e-5, 3e-5], True), (3e-5, [1e-5, 3e-5], True), (3e-5, [1e-5, 3e-5, 1e-4], False)],
)
def test_the_edge_of_the_grid(rate: float, grid: list[float], expected: bool) -> None:
    assert is_at_edge(rate, grid) is expected
