"""The figure of the benchmarks: how many times as fast each operator is as its alternatives. It needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from reinforce_ada import plots
from reinforce_ada.bench.record import Record, Results
from reinforce_ada.plots import LIGHT

_ROW_IN, _WIDTH_IN, _DPI = 0.42, 10.5, 130
# Cases that differ in one of these are different rows. Other parts of a name (reductions, terms of a loss, where a gradient goes), shapes
# and dtypes share a row, or there would be 40.
_CASES = (
    *("forward", "forward with entropy", "forward and backward", "forward and backward with entropy"),
    *("sorted", "shuffled", "packed", "padded"),
)  # fmt: skip
# What ours is compared with: its label, the place of its colour in `Theme.series`, its marker, and its distance from the row's middle.
_AGAINST = (
    ("naive eager PyTorch", 0, "s", -0.15),
    ("the fastest alternative, torch.compile and other libraries included", 2, "o", 0.15),
)

Row = tuple[str, str]  # operator and case


def draw(results: Results, path: Path) -> None:
    """Write the figure: a row for each operator and case, a small mark for each shape and dtype, and a large one for their median."""
    rows = rows_of(results.records)
    figure = plots.new_figure(_WIDTH_IN, _ROW_IN * len(rows) + 1.8, dpi=_DPI)
    about = results.about
    axes = figure.subplots()
    axes.set_xscale("log")
    plots.plain(axes, grid="x")
    where = f"{about['device']}, {about['cpu']}, one thread, commit {about['commit']}"
    x_label = f"times as fast; small: each shape and dtype, large: their median\n{where}"
    plots.name_axes(axes, "Operators beside their alternatives: right of the line ours is faster", x_label)
    axes.axvline(1, color=LIGHT.muted, linewidth=1.4)
    for name, place, marker, offset in _AGAINST:
        labels = [name]  # for the first row that has a value
        for y, found in enumerate(rows.values()):
            if values := found[name]:
                style = {"color": LIGHT.series[place], "marker": marker, "linestyle": "none", "markeredgewidth": 0}
                axes.plot(values, [y + offset] * len(values), markersize=4, alpha=0.45, **style)
                axes.plot(statistics.median(values), y + offset, markersize=9, label=labels.pop() if labels else None, **style)
    axes.set_yticks(range(len(rows)), [f"{op}\n{case}" for op, case in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color=LIGHT.grid, linewidth=0.8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(plots.few)
    if rows:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=plots.LABEL_PT)
    plots.save(figure, path, where="bench")


def rows_of(records: Sequence[Record]) -> dict[Row, dict[str, list[float]]]:
    """Return, for each row, how many times as fast ours is as each kind of alternative, once for each record that has one."""
    rows: dict[Row, dict[str, list[float]]] = {}
    for record in records:
        case = next((part for part in record.name.split(", ") if part in _CASES), record.name)
        found = rows.setdefault((record.op, case), {name: [] for name, *_ in _AGAINST})
        for name, rival in _rivals(record).items():
            if rival is not None:
                found[name].append(record.others[rival].ratio)
    return rows


def _rivals(record: Record) -> Mapping[str, str | None]:
    naive = record.naive if record.naive in record.others else None
    return dict(zip((name for name, *_ in _AGAINST), (naive, record.fastest("best")), strict=True))
