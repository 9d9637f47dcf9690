"""The figure of a study: held-out reward against steps and against generated tokens. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.files import replace_file
from reinforce_ada.outside import literal_names
from reinforce_ada.study.results import Results
from reinforce_ada.study.settings import WHERE
from reinforce_ada.study.summary import ArmResult, arms_of, axis_label, curve

_COLORS = ("#1f6cb0", "#d1661e", "#2a8c55", "#9a5fb4", "#b3343a", "#6b7480", "#c2a11c", "#17808f")
_STYLES = ("-", "--", ":")
_INK, _GREY, _GRID = "#2b2f36", "#9aa1ab", "#e6e8eb"
_SIZE_IN, _DPI = (10.5, 4.2), 150
_AXES = ("steps", "generated_tokens")


def draw(results: Results, path: Path) -> None:
    """Draw the mean over seeds of each arm at its best learning rate, with a band of one standard error."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with literal_names():
        figure = Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained", facecolor="white")
        arms = [arm for arm in arms_of(results) if arm.runs]
        for panel, axis in zip(figure.subplots(1, 2, sharey=True), _AXES, strict=True):
            _panel(panel, axis, arms, results.target)
        replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}), where=WHERE)


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
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_INK)
    if arms:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="best", title="mean ± standard error over seeds", title_fontsize=8)
