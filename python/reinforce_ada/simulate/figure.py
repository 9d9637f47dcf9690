"""The figure of the simulator: signal and waste against wall-clock, for every study. It needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada import plots
from reinforce_ada.outside import literal_names, one_line
from reinforce_ada.plots import LIGHT

_PANEL_IN, _HEIGHT_IN, _DPI = 4.4, 3.9, 130
_MARKERS = {"rounds": "D", "fixed": "o", "adaptive": "s", "posterior": "*"}
_VARIANTS = (("-", True), ("--", False), (":", True), ("-.", False))  # of a preset: line style, and whether its marks are full
_WHERE = "simulate"

Record = Mapping[str, Any]  # see `Study.record`


@dataclass(frozen=True)
class Family:
    """Rows that differ only in the width of their window; in rounds, those of one preset."""

    name: str
    kind: str  # a key of `_MARKERS`
    rows: tuple[Record, ...]
    color: str
    dash: str
    is_full: bool


def draw(studies: Sequence[Record], path: Path) -> None:
    """Write the figure of these studies (each a `Study.record`): a column for each, signal above and waste below."""
    with literal_names():
        figure = plots.new_figure(max(_PANEL_IN * len(studies), 8), 2 * _HEIGHT_IN + 1.2, dpi=_DPI)
        panels = figure.subplots(2, len(studies), squeeze=False, sharex="col")
        for (above, below), study in zip(panels.T, studies, strict=True):
            draw_signal(above, study)
            draw_waste(below, study)
        handles, labels = panels[1][0].get_legend_handles_labels()
        columns = min(2, len(studies))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False, labelcolor=LIGHT.ink)
        figure.canvas.draw()
        for axes, study in zip(panels.ravel(), [*studies, *studies], strict=True):
            plots.place_labels(axes, list(_labels(study, "signal_fraction" if axes in panels[0] else "waste")))
        plots.save(figure, path, where=_WHERE)


def draw_signal(axes: Any, study: Record) -> None:
    """Draw the share of prompts with signal against wall-clock."""
    _points(axes, study, "signal_fraction")
    title = one_line(f"{study['population']}, {study['num_prompts']} prompts, {study['engine']['slots']} slots", 60)
    plots.name_axes(axes, title, "", "prompts with signal (more is better)")
    axes.set_ylim(0, 1.05)


def draw_waste(axes: Any, study: Record) -> None:
    """Draw the share of wasted tokens against wall-clock."""
    _points(axes, study, "waste")
    first = study["rows"][0]
    x_label = f"wall-clock, relative to {first['policy']}\nin {_schedule(first)} (less is better)"
    plots.name_axes(axes, "", x_label, "wasted tokens (less is better)")
    axes.set_ylim(bottom=-0.12 * axes.get_ylim()[1])


def _points(axes: Any, study: Record, name: str) -> None:
    plots.plain(axes, grid="both")
    for family in families(study):
        x, spread = zip(*(_relative(row, study["rows"][0]) for row in family.rows), strict=True)
        y = [statistics.fmean(row[name]) for row in family.rows]
        face = family.color if family.is_full else LIGHT.background
        style = {"marker": _MARKERS[family.kind], "markersize": 10 if family.kind == "posterior" else 6, "markerfacecolor": face}
        line = "none" if family.kind == "rounds" else family.dash
        axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=family.color, alpha=0.25, linewidth=1.2)
        axes.plot(x, y, color=family.color, label=family.name, linewidth=1, linestyle=line, **style)
    plots.percent(axes.yaxis)


def families(study: Record) -> list[Family]:
    """Group the rows of a study: no two groups look alike as long as a preset has at most four variants."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in study["rows"]:
        kind = next((kind for kind in ("posterior", "adaptive") if row["window"].startswith(kind)), "fixed") if row["window"] else "rounds"
        policy = row["policy"] if row["window"] else _preset(row)
        groups.setdefault((policy, kind), []).append(row)
    looks = plots.looks(list(dict.fromkeys(map(_preset, study["rows"]))))
    variants: dict[str, list[str]] = {}
    for policy, _ in groups:
        known = variants.setdefault(policy.partition(":")[0], [])
        known += [] if policy in known else [policy]
    found = []
    for (policy, kind), rows in groups.items():
        preset = policy.partition(":")[0]
        name = one_line(f"{policy}, rounds" if kind == "rounds" else f"{policy}, stream, {kind} window", 80)
        found.append(Family(name, kind, tuple(rows), looks[preset].color(), *_VARIANTS[variants[preset].index(policy) % len(_VARIANTS)]))
    return found


def _preset(row: Record) -> str:
    return str(row["policy"]).partition(":")[0]


def _schedule(row: Record) -> str:
    return f"{row['schedule']}, window {row['window']}" if row["window"] else str(row["schedule"])


def _relative(row: Record, base: Record) -> tuple[float, float]:
    """Return the mean wall-clock divided by that of `base`, and the standard deviation of the ratio over their seeds."""
    ratios = [a / b for a, b in zip(row["wall_s"], base["wall_s"], strict=True)]
    return statistics.fmean(row["wall_s"]) / statistics.fmean(base["wall_s"]), statistics.stdev(ratios) if len(ratios) > 1 else 0.0


def _labels(study: Record, name: str) -> Iterator[tuple[float, float, str, str]]:
    """Yield (x, y, text, colour): the sizes of rounds above, and below the windows as well, of which the first and the last have one."""
    for family in families(study):
        rows = family.rows if family.kind == "rounds" else [] if name == "signal_fraction" else [family.rows[0], *family.rows[1:][-1:]]
        for row in rows:
            if text := _mark(row):
                yield _relative(row, study["rows"][0])[0], statistics.fmean(row[name]), text, family.color


def _mark(row: Record) -> str:
    """Return the text that distinguishes a row from others of its family."""
    window, overrides = row["window"], row["policy"].partition(":")[2]
    if window:
        return str(window) if window.isdigit() else window.partition(":")[2]
    return ", ".join(item.rpartition("=")[2] for item in overrides.split(",")) if overrides else ""
