"""What the results of a study say of each arm at its best learning rate: the numbers of the page and of the figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.study.results import Results, RunResult
from reinforce_ada.study.statistics import best_rate, bootstrap, cost_until, is_at_edge, mean_and_half, most_coverage, paired
from reinforce_ada.training.costs import COSTS

_UNEQUAL = 1.1  # a larger quotient of costs is worth a line
_FEW_SEEDS = 6  # from here on the bootstrap interval can cover 95 %


@dataclass(frozen=True)
class ArmResult:
    """The runs of an arm at its best learning rate, one for each finished seed; no rate and no runs if none is finished."""

    name: str
    rate: float | None
    runs: tuple[RunResult, ...]

    def finals(self) -> dict[int, float]:
        """Return the final held-out reward of every seed."""
        return {run.seed: run.final.reward for run in self.runs}

    def costs(self, name: str) -> list[float]:
        """Return one cost of every whole run."""
        return [run.final.costs[name] for run in self.runs]

    def rewards_at(self, name: str, amount: float) -> dict[int, float]:
        """Return the held-out reward of every seed at one cost, interpolated linearly between evaluations."""
        return {run.seed: float(rewards_along(run, name, amount)) for run in self.runs}

    def until(self, name: str, target: float) -> list[float]:
        """Return the cost until the target of every seed, nan where it was not reached."""
        return [cost_until([e.costs[name] for e in run.evaluations], [e.reward for e in run.evaluations], target) for run in self.runs]


def rewards_along(run: RunResult, name: str, amounts: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the held-out reward at amounts of one cost, interpolated linearly between evaluations, in their shape."""
    return np.asarray(np.interp(amounts, [e.costs[name] for e in run.evaluations], [e.reward for e in run.evaluations]))


@dataclass(frozen=True)
class Difference:
    """The held-out reward of an arm minus that of the baseline, over the seeds of both; nan where there is nothing to say."""

    mean: float
    low: float
    high: float


def arms_of(results: Results) -> list[ArmResult]:
    """Return every arm at its best learning rate."""
    found = []
    for name in results.arms:
        rate = best_rate(finals_by_rate(results, name))
        runs = tuple(sorted((r for r in results.runs if r.arm == name and r.learning_rate == rate), key=lambda r: r.seed))
        found.append(ArmResult(name, rate, runs))
    return found


def finals_by_rate(results: Results, arm: str) -> dict[float, list[float]]:
    """Return the final held-out rewards of the finished seeds at each learning rate of an arm."""
    return {
        rate: [r.final.reward for r in results.runs if r.arm == arm and r.learning_rate == rate] for rate in results.learning_rates[arm]
    }


def difference(rewards: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Return the paired difference of the rewards of two arms, which are given by seed; the interval is over seeds."""
    differences = paired(rewards, baseline)
    low, high = bootstrap(differences)
    return Difference(mean_and_half(differences)[0], low, high)


def difference_at_the_end(arm: ArmResult, baseline: ArmResult) -> Difference:
    """Return the paired difference of the final rewards; the interval is over seeds and held-out prompts."""
    ours, theirs = ({run.seed: run.per_prompt for run in side.runs} for side in (arm, baseline))
    pairs = np.array([np.subtract(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())], ndmin=2)
    low, high = bootstrap(pairs[:, ~np.isnan(pairs).any(axis=0)])
    return Difference(mean_and_half(paired(arm.finals(), baseline.finals()))[0], low, high)


def curve(runs: Sequence[RunResult], axis: str, num_points: int = 200) -> tuple[list[float], list[float], list[float]]:
    """Return x, mean reward and its standard error over seeds, each seed interpolated linearly between its evaluations.

    The curve ends where the first seed ends, so that every point is a mean over the same seeds. On the axis of steps the points are the
    evaluations that all seeds have.
    """
    if axis == "steps":
        x = np.array(sorted(set.intersection(*({float(e.step) for e in run.evaluations} for run in runs))))
    else:
        x = np.linspace(0, min(run.final.costs[axis] for run in runs), num_points)
    y = np.array([rewards_along(run, axis, x) for run in runs])
    error = y.std(axis=0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.zeros(len(x))
    return x.tolist(), y.mean(axis=0).tolist(), error.tolist()


def warnings_of(results: Results, arms: Sequence[ArmResult]) -> Iterator[str]:
    """Yield what a reader must know before believing the tables."""
    missing = results.num_planned - len(results.runs)
    if missing:
        yield f"{missing} of {results.num_planned} runs are not finished, and not in these numbers."
    for arm in arms:
        yield from _warnings_of_arm(results, arm)
    yield from _warnings_of_costs(results, arms)
    few = len(results.seeds)
    if 1 < few < _FEW_SEEDS:
        yield (
            f"With {few} seeds a bootstrap interval lies between the smallest and the largest difference, so it covers the true one with a "
            f"probability of {most_coverage(few):.0%} at most, whatever it is called."
        )
    if few == 1:
        yield "With one seed there are no intervals, and a difference may be chance alone."
    if any(len(rates) > 1 for rates in results.learning_rates.values()):
        yield "The best learning rate was chosen on the same seeds that are reported, which flatters every arm that tried several."


def _warnings_of_arm(results: Results, arm: ArmResult) -> Iterator[str]:
    grid = results.learning_rates[arm.name]
    if arm.rate is None:
        yield f"{arm.name}: no run is finished."
        return
    if is_at_edge(arm.rate, grid):
        end = "smallest" if arm.rate == min(grid) else "largest"
        yield f"{arm.name}: the best learning rate, {arm.rate:g}, is the {end} that was tried; a better one may lie beyond it."
    if 0 < len(arm.runs) < len(results.seeds):
        yield f"{arm.name}: {len(arm.runs)} of {len(results.seeds)} seeds are finished at its best learning rate."
    short = [run.seed for run in arm.runs if run.final.costs[results.budget_unit] < results.budget_amount]
    if short:
        yield f"{arm.name}: {len(short)} runs ended at the limit of steps, before the budget of {results.budget} was spent."


def _warnings_of_costs(results: Results, arms: Sequence[ArmResult]) -> Iterator[str]:
    generated = {arm.name: mean_cost(arm, "generated_completions") for arm in arms if arm.runs}
    if results.budget_unit != "steps" or not generated:
        return
    least, most = min(generated, key=generated.__getitem__), max(generated, key=generated.__getitem__)
    if generated[most] > _UNEQUAL * generated[least] > 0:
        yield (
            f"In the same number of steps {most} generated {generated[most] / generated[least]:.1f} times as many completions as {least}: "
            "the rewards at the end do not compare them at the same cost."
        )


def axis_label(name: str) -> str:
    """Return a cost in words."""
    return name.replace("_", " ")


def common_cost(arms: Sequence[ArmResult], name: str) -> float:
    """Return the largest cost that every run of every arm reached; nan without runs."""
    return min((cost for arm in arms for cost in arm.costs(name)), default=math.nan)


def mean_cost(arm: ArmResult, name: str) -> float:
    """Return the mean cost of a whole run of an arm."""
    return mean_and_half(arm.costs(name))[0]


def mean_until(arm: ArmResult, target: float) -> Mapping[str, tuple[float, int]]:
    """Return, for each cost, its mean until the target (nan unless every seed reached it) and the number of seeds that did."""
    found = {name: arm.until(name, target) for name in COSTS}
    return {name: (mean_and_half(costs)[0], sum(not math.isnan(c) for c in costs)) for name, costs in found.items()}
