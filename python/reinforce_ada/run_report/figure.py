"""The panels of a run, or of several beside each other: as one figure, or each alone as an SVG picture. They need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada import plots
from reinforce_ada.outside import literal_names
from reinforce_ada.plots import LIGHT, Theme
from reinforce_ada.run_report.reading import WHERE, PassRates, Run, as_float

_WIDTH_IN, _HEIGHT_IN, _DPI = 10.5, 7.4, 150
_ALONE_IN = (5.4, 3.3)
_MANY = 400  # steps: lines and areas of more are one image in an SVG picture, which bounds its size (20 000 steps would take 27 MB)
Array = NDArray[np.float64]

# Classes of pass rates. None and all are apart: only prompts between them have a signal.
_CLASSES = ("none", "under ¼", "¼ to ½", "½ to ¾", "¾ or more", "all")


@dataclass(frozen=True)
class Panel:
    """One picture: what it shows, for those who cannot see it, and the function that draws it."""

    about: str
    draw: Callable[[Any, Sequence[Run], Theme], None]


def draw_figure(runs: Sequence[Run], path: Path) -> None:
    """Write the four main panels of one run, or of several with different presets, as a PNG file."""
    with literal_names():
        figure = plots.new_figure(_WIDTH_IN, _HEIGHT_IN, dpi=_DPI)
        figure.get_layout_engine().set(h_pad=0.14, w_pad=0.14)  # inches
        title = runs[0].title if len(runs) == 1 else " beside ".join(run.label for run in runs)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=LIGHT.ink)
        names = ("reward" if len(runs) == 1 else "reward_by_cost", "signal", "samples", "pass_rates")
        for axes, name in zip(figure.subplots(2, 2).flat, names, strict=True):
            draw_panel(axes, name, runs, LIGHT)
        plots.save(figure, path, where=WHERE)


def draw_panel(axes: Any, name: str, runs: Sequence[Run], theme: Theme) -> None:
    """Draw one of `PANELS`."""
    plots.plain(axes, theme)
    if max(len(run.steps) for run in runs) > _MANY:
        axes.set_rasterization_zorder(2.1)  # above lines and below ticks
    PANELS[name].draw(axes, runs, theme)


def svg(name: str, run: Run, theme: Theme) -> bytes:
    """Return one of `PANELS` as an SVG picture, in which texts are outlines and the same numbers give the same bytes."""
    import matplotlib as mpl

    with literal_names(), mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure = plots.new_figure(*_ALONE_IN, dpi=150, theme=theme)
        draw_panel(figure.subplots(), name, [run], theme)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


# -------------------- parts


def _colored(runs: Sequence[Run], theme: Theme) -> Iterator[tuple[Run, str]]:
    """Yield each run with the colour of its preset, by which runs beside each other are told apart."""
    found = plots.looks([run.label for run in runs])
    yield from ((run, found[run.label].color(theme)) for run in runs)


def _of(runs: Sequence[Run], run: Run, what: str) -> str:
    """Return the name of a series: with that of its run if there are several."""
    return what if len(runs) == 1 else f"{run.label}, {what}"


def _step_axis(axes: Any, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    numbers = [r["step"] for run in runs for r in (*run.steps, *run.evals)]
    axes.set_xlim(min(numbers) - 0.5, max(*numbers, min(numbers) + 1) + 0.5)


def _trend(axes: Any, x: Array, y: Array, color: str, label: str) -> None:
    """Draw the steps as dots, and their running mean (over a tenth of the run) as a line once a trend can be seen."""
    window = max(1, len(y) // 10)
    alpha = max(0.05, 0.35 * min(1.0, 150 / len(y))) if window > 1 else 1.0
    axes.plot(x, y, "o", color=color, markersize=_dot_size(x), alpha=alpha, markeredgewidth=0)
    axes.plot(x, running_mean(y, window), color=color, linewidth=2.0, label=label)


def _readable(values: Array) -> Array:
    """Return the values, of many steps their running mean over a hundredth of the run: a line through all would fill the panel."""
    return running_mean(values, len(values) // 100) if len(values) > _MANY else values


def _dot_size(x: Array) -> float:
    return 5.0 if len(x) < 20 else 3.5


def running_mean(values: Array, window: int) -> Array:
    """Return the centred mean over up to 2 * window - 1 values, fewer at the ends; nan values are left out."""
    if window == 1:
        return values
    known = ~np.isnan(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    at = np.arange(len(values))
    low, high = np.maximum(at - window + 1, 0), np.minimum(at + window, len(values))
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]))


# -------------------- what was learned


def _reward(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Reward", "step", theme=theme)
    _draw_reward(axes, runs, theme, lambda run, steps: np.array(steps, dtype=np.float64))
    _step_axis(axes, runs)


def _reward_by_cost(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Reward: training (lines), held-out ± standard error (diamonds)", "completions generated", theme=theme)
    _draw_reward(axes, runs, theme, Run.generated_until)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # with room for the first diamond
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_reward(axes: Any, runs: Sequence[Run], theme: Theme, x_of: Callable[[Run, Sequence[int]], Array]) -> None:
    """Draw one run with a name for each series, or several with the name of each run."""
    alone = len(runs) == 1
    for run, color in _colored(runs, theme):
        if run.steps:
            x = x_of(run, [r["step"] for r in run.steps])
            _trend(axes, x, run.series("first_round_reward"), color, "training prompts, first round" if alone else run.label)
        if run.evals:
            y, errors = (np.array([as_float(e.get(key)) for e in run.evals]) for key in ("avg_at_k", "stderr"))
            label = f"held-out Avg@{run.evals[-1]['k']} ± standard error" if alone else None
            marks = {"fmt": "D", "markersize": 6, "markerfacecolor": theme.background, "markeredgewidth": 1.6}
            bars = {"capsize": 3, "linewidth": 1.6, "color": color, "label": label, "zorder": 4}
            axes.errorbar(x_of(run, [e["step"] for e in run.evals]), y, np.nan_to_num(errors), **marks, **bars)
    bottom, top = min(0.0, axes.get_ylim()[0]), axes.get_ylim()[1]
    axes.set_ylim(bottom, top + (0.2 * (top - bottom) if alone else 0.0))  # from zero, with room for the legend
    plots.legend(axes, theme, **({} if alone else {"loc": "lower right"}))


def _pass_rates(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Pass rates of the prompts", "correct completions of those scored", "share of prompts", theme)
    groups = list(_pass_rate_groups(runs, theme))
    width = 0.8 / max(len(groups), 1)
    for i, (label, rates, color) in enumerate(groups):
        at = np.arange(len(_CLASSES)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(at, class_shares(rates), width, color=color, edgecolor=theme.muted, linewidth=0.8, label=label)
    axes.set_xticks(np.arange(len(_CLASSES)), _CLASSES)
    axes.set_xlim(-0.5, len(_CLASSES) - 0.5)
    axes.set_ylim(0, 1)
    plots.percent(axes.yaxis)
    if groups:
        plots.legend(axes, theme)


def _pass_rate_groups(runs: Sequence[Run], theme: Theme) -> Iterator[tuple[str, PassRates, str]]:
    """Yield the bars: of one run the first and the last quarter of its steps, of several the last quarter of each."""
    for run, color in _colored(runs, theme):
        if len(runs) == 1 and run.early is not None and run.early is not run.late:
            yield str(run.early), run.early, theme.pale
        if run.late is not None:
            yield _of(runs, run, str(run.late)), run.late, color


def class_shares(rates: PassRates) -> Array:
    """Return the share of the pools in each class of pass rate, [6]: 0, then quarters without 0 and 1, then 1; voids count in no rate."""
    counts = np.zeros(len(_CLASSES))
    for correct, wrong, number in rates.counts:
        if correct + wrong:
            place = 0 if correct == 0 else 5 if wrong == 0 else 1 + 4 * correct // (correct + wrong)
            counts[place] += number
    return np.asarray(counts / max(float(counts.sum()), 1.0))


# -------------------- what it cost


def _signal(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Prompts with a learning signal", "step", theme=theme)
    for run, color in _colored(runs, theme):
        _trend(axes, run.series("step"), run.series("signal_fraction"), color, run.label)
    plots.percent(axes.yaxis)
    axes.set_ylim(0, 1.03)
    if len(runs) > 1:
        plots.legend(axes, theme)
    _step_axis(axes, runs)


def _samples(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Samples per prompt", "step", theme=theme)
    highest = 1.0
    for run, color in _colored(runs, theme):
        x, used, issued = run.series("step"), *(_readable(run.series(name)) for name in ("samples_per_prompt", "issued_per_prompt"))
        if np.any(issued > used):
            axes.fill_between(x, used, issued, color=theme.pale, linewidth=0, label=_of(runs, run, "issued, then wasted"))
            axes.vlines(x, used, issued, color=theme.pale, linewidth=2)  # a single step has no area
        marks = {"marker": "o", "markersize": _dot_size(x), "markeredgewidth": 0} if len(x) <= _MANY else {}
        axes.plot(x, used, color=color, linewidth=2.0, label=_of(runs, run, "used"), **marks)
        highest = max(np.nanmax(issued, initial=highest), run.cap or 0)
        if run.cap:
            axes.axhline(run.cap, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
            where = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 4), "textcoords": "offset points"}
            text = _of(runs, run, f"cap {run.cap}")
            axes.annotate(text, (1, run.cap), ha="right", fontsize=plots.LABEL_PT, color=theme.ink, **where)
    axes.set_ylim(0, 1.12 * highest)
    plots.legend(axes, theme)
    _step_axis(axes, runs)


def _length(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Length of the completions", "step", "tokens", theme)
    for run, color in _colored(runs, theme):
        _trend(axes, run.series("step"), run.series("completion_length_mean"), color, _of(runs, run, "mean"))
    axes.set_ylim(bottom=0)
    _step_axis(axes, runs)


def _time(axes: Any, runs: Sequence[Run], theme: Theme) -> None:
    plots.name_axes(axes, "Time of a step", "step", "seconds", theme)
    for run, color in _colored(runs, theme):
        x, sampling, training = run.series("step"), *(np.nan_to_num(_readable(run.series(name))) for name in ("sampling_s", "training_s"))
        for label, low, high, area in (("training", sampling, sampling + training, theme.pale), ("sampling", 0 * x, sampling, color)):
            if len(x) > _MANY:  # a bar is a Python object
                axes.fill_between(x, low, high, step="mid", color=area, linewidth=0, label=_of(runs, run, label))
            else:
                axes.bar(x, high - low, 1.0, bottom=low, color=area, label=_of(runs, run, label))
        axes.set_ylim(0, 1.25 * max(float((sampling + training).max(initial=0.0)), 1e-9))
    plots.legend(axes, theme, ncols=2, loc="upper right")
    _step_axis(axes, runs)


PANELS: Mapping[str, Panel] = {
    "reward": Panel("reward of the training prompts and of the held-out prompts against the steps", _reward),
    "reward_by_cost": Panel("the same rewards against the completions generated", _reward_by_cost),
    "pass_rates": Panel("pass rates of the prompts in the first and in the last quarter of the steps", _pass_rates),
    "signal": Panel("share of the prompts with a learning signal against the steps", _signal),
    "samples": Panel("completions used and wasted per prompt against the steps", _samples),
    "length": Panel("mean length of the completions against the steps", _length),
    "time": Panel("seconds of sampling and of training against the steps", _time),
}
