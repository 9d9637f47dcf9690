"""The figure of `reinforce-ada explain`: curves over the pass rate. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reinforce_ada import plots
from reinforce_ada.explain.page import Explanation

_SIZE_IN, _DPI = (10.5, 7.2), 130
_RATES = np.linspace(0.005, 0.995, 199)


def draw(explanations: Sequence[Explanation], path: Path) -> None:
    """Draw w(p), the implied objective f(p) / f(1), E[N] and P(signal) of each policy."""
    figure = plots.new_figure(*_SIZE_IN, dpi=_DPI)
    looks = plots.looks([e.label for e in explanations])
    (weight, objective), (samples, signal) = figure.subplots(2, 2)
    for e in explanations:
        style = {"color": looks[e.label].color(), "linestyle": looks[e.label].dash, "label": e.label}
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
    weight.yaxis.set_minor_formatter(plots.few)
    _panel(weight, "Weight of a prompt: w(p)")
    _panel(objective, "Implied objective: f(p) / f(1)")
    _panel(samples, "Completions per prompt: E[N]")
    _panel(signal, "Pools with both classes: P(signal)")
    figure.legend(
        *samples.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, labelcolor=plots.LIGHT.ink
    )
    plots.save(figure, path, where="explain")


def _panel(axes: Any, title: str) -> None:
    plots.plain(axes, grid="both")
    plots.name_axes(axes, title, "pass rate p")
    axes.set_xlim(0, 1)
