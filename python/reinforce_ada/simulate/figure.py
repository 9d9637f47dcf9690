"""The figure of the simulator: wall-clock against waste for every study, and busy slots over time. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.files import replace_file
from reinforce_ada.outside import one_line
from reinforce_ada.simulate.study import Row, Study

_INK, _GRID = "#2b2f36", "#e6e8eb"
_COLORS = ("#9aa1ab", "#1f6cb0", "#d1661e", "#2e8b57", "#9a5fb4", "#b8860b", "#c2185b", "#00838f")
_PANEL_IN, _HEIGHT_IN, _DPI = 4.6, 4.6, 130


def draw(studies: Sequence[Study], path: Path) -> None:
    """Write the figure: a panel for each study, and one with the busy slots of the first study's first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = 2 if len(studies) > 2 else 1
    num_columns = -(-(len(studies) + 1) // num_rows)
    size = (_PANEL_IN * num_columns, _HEIGHT_IN * num_rows)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for ax, study in zip(panels, studies, strict=False):
        _frontier(ax, study)
    _busy(panels[len(studies)], studies[0])
    for ax in panels[len(studies) + 1 :]:
        ax.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}))


def _families(study: Study) -> dict[str, list[Row]]:
    """Group the rows that differ only in the width of their window; in rounds, those of one preset."""
    families: dict[str, list[Row]] = {}
    for row in study.rows:
        policy, window = row.setting.policy_text, row.setting.window_text
        kind = next((kind for kind in ("posterior", "adaptive") if window.startswith(kind)), "fixed")
        name = f"{policy}, stream, {kind} window" if window else f"{policy.partition(':')[0]}, rounds"
        families.setdefault(name, []).append(row)
    return families


def _styled(study: Study) -> Iterator[tuple[str, list[Row], str, bool]]:
    """Yield each family with its name, its colour, and whether that colour is repeated, which makes lines dashed and markers hollow."""
    for i, (name, rows) in enumerate(_families(study).items()):
        yield one_line(name, 80), rows, _COLORS[i % len(_COLORS)], i >= len(_COLORS)


def _frontier(ax: Any, study: Study) -> None:
    for name, rows, color, again in _styled(study):
        x, spread = zip(*(row.relative(study.rows[0]) for row in rows), strict=True)
        y = [row.mean("waste") for row in rows]
        marker, size = ("*", 9) if "posterior" in name else ("s", 5) if "adaptive" in name else ("o", 5)
        look = {"linestyle": "none" if "stream" not in name else "--" if again else "-", "markerfacecolor": "white" if again else color}
        ax.errorbar(x, y, xerr=spread, fmt="none", ecolor=color, alpha=0.25, linewidth=1.2)
        ax.plot(x, y, marker=marker, color=color, label=name, linewidth=1, markersize=size, **look)
        for row, at in zip(rows, zip(x, y, strict=True), strict=True):
            ax.annotate(_mark(row), at, xytext=(4, 4), textcoords="offset points", fontsize=6.5, color=color)
    ax.set_xlabel(f"wall-clock, relative to the first row ({study.rows[0].setting.schedule_label})", fontsize=8)
    ax.set_ylabel("wasted tokens", fontsize=8)
    ax.set_ylim(bottom=-0.01)
    ax.yaxis.set_major_formatter("{x:.0%}")
    _finish(ax, f"{study.population}, {study.num_prompts} prompts, {study.engine.slots} slots")


def _mark(row: Row) -> str:
    """Return the text that distinguishes a row from others of its family."""
    window, overrides = row.setting.window_text, row.setting.policy_text.partition(":")[2]
    if window:
        return window if window.isdigit() else window.partition(":")[2]
    return ", ".join(item.rpartition("=")[2] for item in overrides.split(","))


def _busy(ax: Any, study: Study) -> None:
    """Draw the busy slots of the first row and of the middle row of every family of streams.

    A legend that would fill the panel is left out; the figure has one.
    """
    presets = {row.setting.policy_text.partition(":")[0] for row in study.rows}
    for name, rows, color, again in _styled(study):
        if "stream" not in name and rows[0] is not study.rows[0]:
            continue
        row = rows[len(rows) // 2] if "stream" in name else rows[0]
        seconds, busy = row.outcomes[0].busy.T
        policy = row.setting.policy_text if len(presets) > 1 else row.setting.policy_text.partition(":")[2]
        label = one_line(f"{policy} {row.setting.schedule_label}".strip(), 80)
        ax.step(seconds, busy, where="post", label=label, color=color, linestyle="--" if again else "-", linewidth=1.1)
    ax.set_xlabel("seconds", fontsize=8)
    ax.set_ylabel("busy slots", fontsize=8)
    ax.set_ylim(bottom=0)
    if len(ax.get_lines()) <= len(_COLORS):
        ax.legend(fontsize=7, loc="upper right", edgecolor="none", framealpha=0.8)
    _finish(ax, f"Busy slots, {study.population}, first seed")


def _finish(ax: Any, title: str) -> None:
    ax.set_title(one_line(title, 90), loc="left", fontsize=9, color=_INK)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, labelcolor=_INK, length=0)
