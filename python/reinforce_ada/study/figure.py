"""The figures of a study: held-out reward against costs, and predicted against observed progress. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.files import replace_file
from reinforce_ada.outside import literal_names
from reinforce_ada.study.progress import AXES, Progress, progress_of
from reinforce_ada.study.results import Results
from reinforce_ada.study.settings import WHERE
from reinforce_ada.study.summary import ArmResult, arms_of, axis_label, curve

_COLORS = ("#1f6cb0", "#d1661e", "#2a8c55", "#9a5fb4", "#b3343a", "#6b7480", "#c2a11c", "#17808f")
_STYLES = ("-", "--", ":")
_INK, _GREY, _GRID = "#2b2f36", "#9aa1ab", "#e6e8eb"
_SIZE_IN, _DPI = (10.5, 4.6), 110
_AXES = ("steps", "generated_tokens")
_MOST_COLUMNS = 5  # of the legend


def draw(results: Results, path: Path) -> None:
    """Draw the mean over seeds of each arm at its best learning rate, with a band of one standard error."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with literal_names():
        figure = Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained", facecolor="white")
        arms = [arm for arm in arms_of(results) if arm.runs]
        for panel, axis in zip(figure.subplots(1, 2, sharey=True), _AXES, strict=True):
            _panel(panel, axis, arms, results.target)
        if arms:
            figure.legend(
                *panel.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), _MOST_COLUMNS), frameon=False,
                fontsize=8.5, labelcolor=_INK, title="mean ± standard error over seeds", title_fontsize=8,
            )  # fmt: skip
        replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}), where=WHERE)


def draw_progress(results: Results, path: Path) -> None:
    """Draw the quotients of costs that were predicted and observed, a point for each arm, on logarithmic axes."""
    from matplotlib.figure import Figure

    with literal_names():
        figure = Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained", facecolor="white")
        progress = progress_of(results, arms_of(results))
        axes = [axis for axis, name in AXES.items() if name]
        for panel, axis in zip(figure.subplots(1, len(axes)), axes, strict=True):
            _progress_panel(panel, axis, [p for p in progress if p.axis == axis], results.baseline)
        replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}), where=WHERE)


def _progress_panel(axes: Any, axis: str, progress: Sequence[Progress], baseline: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    shown = []
    for i, p in enumerate(progress):
        x, y, color = p.predicted, p.observed.mean, _COLORS[i % len(_COLORS)]
        if not (0 < x < math.inf and 0 < y < math.inf):
            continue
        shown += [x, y]
        if p.observed.low > 0 and p.observed.high < math.inf:
            axes.plot([x, x], [p.observed.low, p.observed.high], color=color, linewidth=1.5)
        axes.plot(x, y, "o", color=color, markersize=6)
        axes.annotate(p.arm, (x, y), textcoords="offset points", xytext=(7, -3), fontsize=8.5, color=_INK)
    if shown:
        ends = [min(shown) / 1.2, max(shown) * 1.2]
        axes.plot(ends, ends, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(LogLocator(base=2))
            side.set_major_formatter(lambda value, _: f"{value:g}")
            side.set_minor_locator(NullLocator())
    axes.set_title(f"Progress per {axis_label(axis).removesuffix('s')}", loc="left", fontsize=11, color=_INK, pad=8)
    axes.set_xlabel(f"predicted, relative to {baseline}", fontsize=9.5, color=_INK)
    axes.set_ylabel("observed", fontsize=9.5, color=_INK)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_INK)


def _panel(axes: Any, axis: str, arms: Sequence[ArmResult], target: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, arm in enumerate(arms):
        x, mean, error = curve(arm.runs, axis)
        color, style = _COLORS[i % len(_COLORS)], _STYLES[i // len(_COLORS) % len(_STYLES)]
        axes.fill_between(x, [m - e for m, e in zip(mean, error, strict=True)], [m + e for m, e in zip(mean, error, strict=True)],
                          color=color, alpha=0.18, linewidth=0)  # fmt: skip
        axes.plot(x, mean, color=color, linestyle=style, linewidth=2.0, label=f"{arm.name}, lr {arm.rate:g}")
    if target is not None:
        axes.axhline(target, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_title(f"Held-out reward against {axis_label(axis)}", loc="left", fontsize=11, color=_INK, pad=8)
    axes.set_xlabel(axis_label(axis), fontsize=9.5, color=_INK)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    _plain(axes)
