"""The figure of `reinforce-ada explain`: curves over the pass rate. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reinforce_ada.explain.page import Explanation
from reinforce_ada.files import replace_file

_COLORS = ("#1f6cb0", "#d1661e", "#2a8c55", "#9a5fb4", "#b3343a", "#6b7480", "#c2a11c", "#17808f")
_STYLES = ("-", "--", ":")
_INK, _GRID = "#2b2f36", "#e6e8eb"
_SIZE_IN, _DPI = (10.5, 7.2), 130
_RATES = np.linspace(0.005, 0.995, 199)


def draw(explanations: Sequence[Explanation], path: Path) -> None:
    """Draw w(p), the implied objective f(p) / f(1), E[N] and P(signal) of each policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    (weight, objective), (samples, signal) = figure.subplots(2, 2)
    for i, e in enumerate(explanations):
        style = {"color": _COLORS[i % len(_COLORS)], "linestyle": _STYLES[i // len(_COLORS) % len(_STYLES)], "label": e.label}
        found = {name: np.array(values) for name, values in e.at(_RATES.tolist()).items()}
        samples.plot(_RATES, found["samples"], **style)
        signal.plot(_RATES, found["signal"], **style)
        if e.weight is not None:
            weight.plot(_RATES, found["w"], **style)
            objective.plot(_RATES, found["f"] / e.weight.objective(np.ones(1)), **style)
    weight.set_yscale("log")
    low, high = weight.dataLim.intervaly
    if high < 2 * low:  # a weight of 1 everywhere differs from 1 in the 12th digit, which would fill the panel
        weight.set_ylim(low / 2, high * 2)
    weight.yaxis.set_major_formatter("{x:g}")
    weight.yaxis.set_minor_formatter("{x:g}")
    _panel(weight, "Weight of a prompt: w(p)")
    _panel(objective, "Implied objective: f(p) / f(1)")
    _panel(samples, "Completions per prompt: E[N]")
    _panel(signal, "Pools with both classes: P(signal)")
    samples.legend(fontsize=7.5, frameon=False, labelcolor=_INK)
    replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}))


def _panel(ax: Any, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=_INK)
    ax.set_xlim(0, 1)
    ax.set_xlabel("pass rate p", fontsize=8, color=_INK)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="both", which="both", length=0, labelcolor=_INK, labelsize=8)
