"""The page of a study, page.md, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reinforce_ada.study.prediction import Prediction, relative
from reinforce_ada.study.progress import AXES, Progress, progress_of, rank_correlation
from reinforce_ada.study.results import Results
from reinforce_ada.study.statistics import mean_and_half
from reinforce_ada.study.summary import (
    ArmResult,
    arms_of,
    axis_label,
    common_cost,
    difference,
    difference_at_the_end,
    finals_by_rate,
    mean_cost,
    mean_until,
    warnings_of,
)
from reinforce_ada.training.costs import COSTS

FIGURE = "figure.png"
PROGRESS_FIGURE = "progress.png"


def page(results: Results, *, has_figure: bool) -> str:
    """Return the page."""
    arms = arms_of(results)
    baseline = next(arm for arm in arms if arm.name == results.baseline)
    parts = [f"# {results.name}", _about(results)]
    parts += ["\n".join(f"- {warning}" for warning in warnings_of(results, arms))]
    parts += ["## Held-out reward at the end", _table(*_rewards(arms, baseline))]
    about = (
        "Each row compares all arms at the largest cost that every one of these runs reached, interpolated linearly between evaluations: "
        f"the mean, and the paired difference to {baseline.name} with its 95 % bootstrap interval over the seeds."
    )
    parts += ["## Held-out reward at the same cost", about, _table(*_equal(arms, baseline))]
    if has_figure:
        parts.append(f"![held-out reward against steps and against generated tokens]({FIGURE})")
    parts += ["## Costs of a run", "Means over the seeds; evaluations cost nothing.", _table(*_costs(arms))]
    if results.target is not None:
        about = "Means over the seeds, interpolated linearly between evaluations; a mean needs every seed to reach it."
        parts += [f"## Costs until a held-out reward of {results.target:g}", about, _table(*_until(arms, results.target))]
    progress = progress_of(results, arms)
    parts += ["## Predicted and observed progress", _about_progress(results), _table(*_progress(results, progress))]
    parts += _correlations(progress)
    if has_figure and results.runs:
        parts.append(f"![predicted and observed quotients of costs]({PROGRESS_FIGURE})")
    parts += ["## Learning rates", _table(*_rates(results, arms))]
    about = "The expectations are exact for prompts with the pass rates that the untrained model showed on the held-out prompts."
    parts += ["## Predicted before the runs", about, prediction_table(results.predictions, results.baseline)]
    return "\n\n".join(part for part in parts if part) + "\n"


def prediction_table(predictions: Sequence[Prediction], baseline: str) -> str:
    """Return the predictions as a table; the last two columns are efficiencies relative to that of the baseline."""
    heads = ["arm", "prompts per step", "completions per prompt", "completions per step", "P(signal)"]
    axes = [relative(predictions, baseline, name) for name in ("per_generated", "per_trained")]
    rows = []
    for p in predictions:
        per_step = p.prompts_per_step * p.completions_per_prompt
        row = [p.arm, str(p.prompts_per_step), f"{p.completions_per_prompt:.1f}", f"{per_step:.0f}", f"{p.signal:.3f}"]
        rows.append([*row, *(_number(axis[p.arm], ".2f") for axis in axes)])
    return _table([*heads, "progress per generated", "per trained completion"], rows)


def _about(results: Results) -> str:
    return (
        f"Every run ended after the step in which it had reached {results.budget}. {len(results.runs)} of {results.num_planned} runs are "
        f"finished: {len(results.arms)} arms with seeds {', '.join(map(str, results.seeds))}. The reward is Avg@k on the held-out "
        f"questions, at the learning rate at which the arm's mean is highest. Its interval is Student's t over the seeds; differences to "
        f"{results.baseline} are paired by seed, with 95 % bootstrap intervals over the seeds and the questions."
    )


def _rewards(arms: Sequence[ArmResult], baseline: ArmResult) -> tuple[list[str], list[list[str]]]:
    heads = ["arm", "learning rate", "seeds", "held-out reward", "95 % interval", f"difference to {baseline.name}", "95 % interval"]
    rows = []
    for arm in arms:
        mean, half = mean_and_half(list(arm.finals().values()))
        row = [arm.name, _rate(arm.rate), str(len(arm.runs)), _number(mean), _interval(mean - half, mean + half)]
        d = difference_at_the_end(arm, baseline)
        rows.append([*row, "–", "–"] if arm is baseline else [*row, _number(d.mean, "+.3f"), _interval(d.low, d.high, "+.3f")])
    return heads, rows


def _equal(arms: Sequence[ArmResult], baseline: ArmResult) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name in COSTS:
        most = common_cost(arms, name)
        row = [axis_label(name), _amount(most)]
        for arm in arms:
            rewards = arm.rewards_at(name, most)
            d = difference(rewards, baseline.rewards_at(name, most))
            found = "" if arm is baseline else f" ({_number(d.mean, '+.3f')}, {_interval(d.low, d.high, '+.3f')})"
            row.append(_number(mean_and_half(list(rewards.values()))[0]) + (found if rewards else ""))
        rows.append(row)
    return ["cost", "amount", *(arm.name for arm in arms)], rows


def _costs(arms: Sequence[ArmResult]) -> tuple[list[str], list[list[str]]]:
    return ["arm", *map(axis_label, COSTS)], [[arm.name, *(_amount(mean_cost(arm, name)) for name in COSTS)] for arm in arms]


def _until(arms: Sequence[ArmResult], target: float) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm in arms:
        found = mean_until(arm, target)
        rows.append([arm.name, *(_reached(*found[name], len(arm.runs)) for name in COSTS)])
    return ["arm", *map(axis_label, COSTS)], rows


def _reached(mean: float, num_reached: int, num_seeds: int) -> str:
    if math.isnan(mean):
        return f"not reached by {num_seeds - num_reached} of {num_seeds}" if num_reached else "not reached"
    return _amount(mean)


def _about_progress(results: Results) -> str:
    target = f"{results.target:g}" if results.target is not None else "the lower of those at which the two end"
    return (
        f"Observed is the cost of {results.baseline} divided by that of the arm until the mean over the seeds reaches a held-out reward, "
        f"{target}, with its 95 % bootstrap interval over the seeds; 0 means that the arm does not reach it. Predicted is the exact "
        "efficiency for the pass rates of the untrained model, relative to that of the baseline. The training changes the pass rates."
    )


def _progress(results: Results, progress: Sequence[Progress]) -> tuple[list[str], list[list[str]]]:
    heads, rows = ["arm"], {arm: [arm] for arm in results.arms}
    for axis, name in AXES.items():
        heads += [*(["predicted"] if name else []), axis_label(axis)]
    for p in progress:
        found = (
            "1" if p.arm == results.baseline else f"{_number(p.observed.mean, '.2f')} ({_interval(p.observed.low, p.observed.high, '.2f')})"
        )
        rows[p.arm] += [*([_number(p.predicted, ".2f")] if AXES[p.axis] else []), found]
    return heads, list(rows.values())


def _correlations(progress: Sequence[Progress]) -> list[str]:
    """Return a sentence for each axis on which at least three arms have both numbers."""
    found = {axis: rank_correlation([p for p in progress if p.axis == axis]) for axis in AXES}
    return [
        f"Rank correlation of predicted and observed, {axis_label(axis)}: {correlation:.2f}."
        for axis, correlation in found.items()
        if not math.isnan(correlation)
    ]


def _rates(results: Results, arms: Sequence[ArmResult]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm in arms:
        for rate, finals in finals_by_rate(results, arm.name).items():
            mark = "best" if rate == arm.rate else ""
            rows.append([arm.name, _rate(rate), str(len(finals)), _number(mean_and_half(finals)[0]), mark])
    return ["arm", "learning rate", "seeds", "held-out reward", ""], rows


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose columns are aligned, so that a terminal can show it too."""
    widths = [max(3, *map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines)


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:g}"


def _number(value: float, form: str = ".3f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def _amount(cost: float) -> str:
    return _number(cost, ",.0f" if cost >= 100 else ".3g")


def _interval(low: float, high: float, form: str = ".3f") -> str:
    return "–" if math.isnan(low) else f"{format(low, form)} to {format(high, form)}"
