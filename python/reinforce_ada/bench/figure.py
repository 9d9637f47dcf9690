"""The figure of the benchmarks: every goal that is a ratio, and the ratio reached. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.bench.case import SHORT, Goal, Kind
from reinforce_ada.bench.record import Record, Results, is_met, quantity
from reinforce_ada.files import replace_file

_COLORS = {"inductor": "#1f6cb0", "best": "#1f6cb0", "eager": "#9a5fb4", "TRL": "#9a5fb4"}
_OTHER, _INK, _GRID = "#d1661e", "#2b2f36", "#e6e8eb"
_ROW_IN, _WIDTH_IN, _DPI = 0.26, 10.5, 130

Line = tuple[str, str, str, str]  # operator, case, dtype, against


def draw(results: Results, path: Path) -> None:
    """Write the figure; each dot is one shape (full if the goal is met), the line its quartiles, the mark the goal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: tuple[Kind, ...] = ("speedup", "time")
    panels = [(kind, rows) for kind in kinds if (rows := _lines(results.records, kind))]
    heights = [len(rows) + 2.5 for _, rows in panels]
    figure = Figure(figsize=(_WIDTH_IN, _ROW_IN * sum(heights) + 1.0), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    about = results.about
    figure.suptitle(f"{about['device']} · {about['cpu']} · one thread · {about['commit']}", x=0.01, ha="left", fontsize=10, color=_INK)
    if panels:
        axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, (kind, rows) in zip(axes, panels, strict=True):
            _panel(ax, kind, rows)
    replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}))


def _lines(records: Sequence[Record], kind: Kind) -> dict[Line, list[tuple[Goal, Any]]]:
    """Return, for each line of the figure, the goals of its records with median and quartiles of the quantity that they bound."""
    lines: dict[Line, list[tuple[Goal, Any]]] = {}
    for r in records:
        for goal in r.goals:
            name = r.fastest(goal.against) if goal.kind == kind else None
            if name is not None:
                lines.setdefault((r.op, r.name, SHORT[r.dtype], goal.against), []).append((goal, quantity(r, goal, name)))
    return lines


def _panel(ax: Any, kind: Kind, rows: dict[Line, list[tuple[Goal, Any]]]) -> None:
    for y, ((_, _, _, against), found) in enumerate(rows.items()):
        color = _COLORS.get(against, _OTHER)
        for goal, (value, low, high) in found:
            ax.plot([low, high], [y, y], color=color, linewidth=1.4, alpha=0.6)
            face = color if is_met(goal, value) else "white"
            ax.plot(value, y, "o", markeredgecolor=color, markerfacecolor=face, markersize=5, markeredgewidth=1.2)
            ax.plot(goal.bound, y, "|", color=_INK, markersize=11, markeredgewidth=1.6)
    sign = "×" if kind == "speedup" else "/"
    ax.set_yticks(range(len(rows)), [f"{op}: {name}, {dtype}, {sign} {against}" for op, name, dtype, against in rows], fontsize=7.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    if kind == "speedup":
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(_few)
    ax.xaxis.set_major_formatter("{x:g}")
    title = (
        "Times as fast as …: a goal is a mark, full dots meet theirs"
        if kind == "speedup"
        else "Time over that of …: full dots meet their goal, left of the mark"
    )
    ax.set_title(title, loc="left", fontsize=10, color=_INK)
    ax.axvline(1, color="#9aa1ab", linewidth=1)
    ax.grid(axis="x", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="both", which="both", length=0, labelcolor=_INK)
    ax.tick_params(axis="x", which="both", labelsize=8)


def _few(x: float, _: int) -> str:
    """Return the label of a minor tick: only 2 and 5 times powers of ten have one."""
    return f"{x:g}" if f"{x:e}"[0] in "25" else ""
