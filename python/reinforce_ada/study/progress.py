"""How much less an arm costs than the baseline until the same held-out reward: predicted before the runs, and observed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.study.prediction import relative
from reinforce_ada.study.results import Results
from reinforce_ada.study.statistics import resamples
from reinforce_ada.study.summary import ArmResult, rewards_along

Array = NDArray[np.float64]

# The axes of an observed quotient of costs, and the efficiency that predicts each (steps have none: they differ in size).
AXES: Mapping[str, str | None] = {"steps": None, "generated_completions": "per_generated", "trained_completions": "per_trained"}
_NUM_POINTS = 400  # of a curve, between which the target is interpolated


@dataclass(frozen=True)
class Quotient:
    """Cost of the baseline / cost of an arm until the target, with its 95 % bootstrap interval over seeds; nan if there is none.

    An arm that does not reach the target has 0, and inf stands where the baseline alone does not.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Progress:
    """The quotients of one arm on one axis."""

    arm: str
    axis: str
    predicted: float  # nan where there is none
    observed: Quotient


def progress_of(results: Results, arms: Sequence[ArmResult]) -> list[Progress]:
    """Return the progress of every arm on every axis of `AXES`."""
    baseline = next(arm for arm in arms if arm.name == results.baseline)
    found = []
    for axis, name in AXES.items():
        expectations = relative(results.predictions, results.baseline, name) if name else {}
        for arm in arms:
            quotient = observed(arm, baseline, axis, results.target)
            found.append(Progress(arm.name, axis, expectations.get(arm.name, math.nan), quotient))
    return found


def observed(arm: ArmResult, baseline: ArmResult, axis: str, target: float | None) -> Quotient:
    """Return the quotient of the costs until the mean over seeds reaches the target, by the seeds that both have.

    Args:
        target: a held-out reward; None is the lower of the two means at their ends, which every resample computes anew.
    """
    seeds = sorted(arm.finals().keys() & baseline.finals().keys())
    if not seeds:
        return Quotient(math.nan, math.nan, math.nan)
    weights = np.vstack([np.full(len(seeds), 1 / len(seeds)), resamples(len(seeds)) if len(seeds) > 1 else np.empty((0, len(seeds)))])
    (x, theirs), (z, ours) = ((costs, weights @ rewards) for costs, rewards in (_curves(side, axis, seeds) for side in (baseline, arm)))
    targets = np.minimum(theirs[:, -1], ours[:, -1]) if target is None else np.full(len(weights), target)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _costs_until(x, theirs, targets) / _costs_until(z, ours, targets)
    if len(seeds) < 2 or math.isnan(found[0]):
        return Quotient(float(found[0]), math.nan, math.nan)
    low, high = np.quantile(found[1:][~np.isnan(found[1:])], (0.025, 0.975), method="nearest")  # others would subtract inf from inf
    return Quotient(float(found[0]), float(low), float(high))


def _curves(arm: ArmResult, axis: str, seeds: Sequence[int]) -> tuple[Array, Array]:
    """Return costs [X] and held-out rewards [S, X] of these seeds, up to the cost that all of them reached."""
    runs = [run for run in arm.runs if run.seed in seeds]
    x = np.linspace(0, min(run.final.costs[axis] for run in runs), _NUM_POINTS)
    return x, np.array([rewards_along(run, axis, x) for run in runs])


def _costs_until(x: Array, curves: Array, targets: Array) -> Array:
    """Return where each curve [R, X] first reaches its target; inf if it never does."""
    reached = curves >= targets[:, None]
    first = reached.argmax(axis=1)
    rows, before = np.arange(len(curves)), np.maximum(first - 1, 0)
    low, high = curves[rows, before], curves[rows, first]
    share = np.divide(targets - low, high - low, out=np.ones(len(curves)), where=high > low)
    return np.where(reached.any(axis=1), x[before] + (x[first] - x[before]) * share, np.inf)


def rank_correlation(progress: Sequence[Progress]) -> float:
    """Return Spearman's rank correlation of predicted and observed, equal values with their mean rank.

    It is nan for fewer than three arms that have both, and where one of the two is the same for all.
    """
    known = [(p.predicted, p.observed.mean) for p in progress if not (math.isnan(p.predicted) or math.isnan(p.observed.mean))]
    if len(known) < 3:
        return math.nan
    a, b = (_ranks(np.array(column)) for column in zip(*known, strict=True))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Array) -> Array:
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
