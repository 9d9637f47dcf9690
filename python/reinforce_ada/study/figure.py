"""The figures of a study: held-out reward against costs, and predicted against observed progress. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce_ada import plots
from reinforce_ada.outside import literal_names, one_line
from reinforce_ada.plots import LIGHT, Look
from reinforce_ada.study.progress import AXES, Progress, observed, progress_of
from reinforce_ada.study.results import Results
from reinforce_ada.study.settings import WHERE
from reinforce_ada.study.summary import ArmResult, arms_of, axis_label, curve

_WIDTH_IN, _HEIGHT_IN, _ROW_IN, _DPI = 10.5, 4.6, 0.24, 110
_AXES = ("steps", "generated_tokens")
_COST = "generated_tokens"  # the axis of a comparison at the same cost


def draw(results: Results, path: Path) -> None:
    """Draw the mean over seeds of each arm at its best learning rate, with a band of one standard error."""
    with literal_names():
        arms = [arm for arm in arms_of(results) if arm.runs]
        figure = plots.new_figure(_WIDTH_IN, max(_HEIGHT_IN, 1.2 + _ROW_IN * len(arms)), dpi=_DPI)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, axis in zip(panels, _AXES, strict=True):
            plots.plain(axes)
            plots.name_axes(axes, f"Held-out reward against {axis_label(axis)}", axis_label(axis))
            _curves(axes, axis, arms, _looks(results))
            if results.target is not None:
                axes.axhline(results.target, color=LIGHT.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        _label(figure, panels[-1], arms, _looks(results), {arm.name: f"{arm.name}, lr {arm.rate:g}" for arm in arms})
        if arms:
            panels[-1].annotate("mean ± standard error over seeds", (1, 0), (0, 4), xycoords="axes fraction", textcoords="offset points",
                                ha="right", fontsize=plots.LABEL_PT, color=LIGHT.muted)  # fmt: skip
        plots.save(figure, path, where=WHERE)


def draw_against(results: Results, labels: Mapping[str, str], path: Path, *, title: str, about: str) -> None:
    """Draw some arms against generated tokens: every seed, the mean with a band of one standard error, and what the last arm saves.

    What it saves is the quotient of the tokens that another arm and this one take to the same mean reward, see `progress.observed`.

    Args:
        labels: of each arm what is written at its curve.
        about: what stands after the name of the axis.
    """
    with literal_names():
        by_name = {arm.name: arm for arm in arms_of(results)}
        arms = [by_name[name] for name in labels]
        figure = plots.new_figure(8.4, 4.4, dpi=150)
        axes = figure.subplots()
        plots.plain(axes)
        plots.name_axes(axes, title, f"{axis_label(_COST)}, {about}", "held-out accuracy")
        for arm in arms:
            color = _looks(results)[arm.name].color()
            for run in arm.runs:
                x, y = zip(*((e.costs[_COST], e.reward) for e in run.evaluations), strict=True)
                axes.plot(x, y, color=color, linewidth=0.6, alpha=0.3)
        _curves(axes, _COST, arms, _looks(results))
        _savings(axes, arms, labels)
        _label(figure, axes, arms, _looks(results), labels)
        plots.save(figure, path, where=WHERE)


def draw_progress(results: Results, path: Path) -> None:
    """Draw the quotients of costs that were predicted and observed, a row for each arm, on a logarithmic axis."""
    with literal_names():
        progress = progress_of(results, arms_of(results))
        axes = [axis for axis, name in AXES.items() if name]
        figure = plots.new_figure(_WIDTH_IN, 1.6 + 0.3 * len(results.arms), dpi=_DPI)
        panels = figure.subplots(1, len(axes), sharey=True)
        for panel, axis in zip(panels, axes, strict=True):
            _progress_panel(panel, axis, [p for p in progress if p.axis == axis], results)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=plots.LABEL_PT)
        plots.save(figure, path, where=WHERE)


def _looks(results: Results) -> dict[str, Look]:
    """Return the look of each arm, the same in every figure of a study."""
    return plots.looks(results.arms)


def _curves(axes: Any, axis: str, arms: Sequence[ArmResult], looks: dict[str, Look]) -> None:
    from matplotlib.ticker import MaxNLocator

    for arm in arms:
        x, mean, error = curve(arm.runs, axis)
        color = looks[arm.name].color()
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=color, linestyle=looks[arm.name].dash, linewidth=2.0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _label(figure: Any, axes: Any, arms: Sequence[ArmResult], looks: dict[str, Look], labels: Mapping[str, str]) -> None:
    """Name each curve at its end, once everything else has its place."""
    figure.canvas.draw()
    ends = [(curve(arm.runs, _COST)[1][-1], labels[arm.name], looks[arm.name].color()) for arm in arms]
    plots.label_ends(axes, ends)


def _savings(axes: Any, arms: Sequence[ArmResult], labels: Mapping[str, str]) -> None:
    """Say how many times fewer tokens the last arm takes to where each of the others ends; arrows show it."""
    *others, ours = arms
    said = [f"{labels[ours.name].partition(',')[0]} reaches the accuracy of"]
    for other in others:
        quotient = observed(ours, other, _COST, None)
        if 1 < quotient.mean < math.inf:
            x, mean, _ = curve(other.runs, _COST)
            arrow = {"arrowstyle": "->", "color": LIGHT.muted, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x[-1] / quotient.mean, mean[-1]), (x[-1], mean[-1]), arrowprops=arrow)
            interval = f"{quotient.low:.1f} to {quotient.high:.1f}"
            said.append(f"{labels[other.name]}, with {quotient.mean:.1f} times fewer tokens ({interval})")
    if len(said) > 1:
        said.append("(95 % bootstrap intervals over seeds)")
        style = {"ha": "right", "va": "bottom", "fontsize": plots.LABEL_PT, "color": LIGHT.ink, "linespacing": 1.5}
        axes.annotate("\n".join(said), (1, 0.04), xycoords="axes fraction", **style)


def _progress_panel(axes: Any, axis: str, progress: Sequence[Progress], results: Results) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    plots.plain(axes, grid="x")
    plots.name_axes(axes, f"Progress per {axis_label(axis).removesuffix('s')}", f"relative to {results.baseline}")
    axes.axvline(1, color=LIGHT.muted, linewidth=1.2)
    shown = [value for p in progress for value in _positive(p)]
    if shown:
        axes.set_xlim(min(shown) / 1.3, max(shown) * 1.3)
    for y, p in enumerate(progress):
        color = _looks(results)[p.arm].color()
        if p.observed.low > 0 and p.observed.high < math.inf:
            axes.plot([p.observed.low, p.observed.high], [y, y], color=color, linewidth=2.0)
        if 0 < p.observed.mean < math.inf:
            axes.plot(p.observed.mean, y, "o", color=color, markersize=7, label="observed, with its 95 % interval" if y == 0 else None)
        if 0 < p.predicted < math.inf:
            hollow = {"markeredgecolor": LIGHT.ink, "markerfacecolor": "none", "markersize": 7}
            axes.plot(p.predicted, y, "D", label="predicted" if y == 0 else None, **hollow)
    axes.set_yticks(range(len(progress)), [one_line(p.arm, 40) for p in progress])
    axes.set_ylim(len(progress) - 0.4, -0.6)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _positive(p: Progress) -> Iterator[float]:
    yield from (v for v in (p.predicted, p.observed.mean, p.observed.low, p.observed.high) if 0 < v < math.inf)
