"""The look of every picture: one palette for light and dark pages, the same colour for the same way to sample, and labels that keep apart.

Figures are made of these parts in `report`, `study`, `simulate`, `explain` and `bench`; all of them need matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada.files import replace_file

# The ways to sample, in the order of the colours of a theme. The names are those of presets without `reinforce-ada-`; `predicted` is
# `reinforce-ada-memory` with a predicted baseline.
FAMILIES = ("grpo", "memory", "balance", "exact", "pos", "dapo", "est", "predicted")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TITLE_PT, LABEL_PT = 11.0, 9.5


@dataclass(frozen=True)
class Theme:
    """The colours of pictures on one background, as `#rrggbb`.

    Any two of `series` are at least .085 apart in OKLab (Ottosson 2020), with normal vision and with the dichromacies of Machado et al.
    2009, and each has a contrast of at least 3 to the background (WCAG 2.2, 1.4.11); that of texts is at least 4.5 (1.4.3).
    """

    name: str
    background: str
    ink: str  # texts
    muted: str  # texts and lines of second rank
    grid: str
    pale: str  # areas behind a series
    series: tuple[str, ...]  # one for each of FAMILIES


LIGHT = Theme(
    "light", "#ffffff", "#20252c", "#68707c", "#e4e7ea", "#d5d9de",
    ("#3f4650", "#3364d1", "#f8500b", "#665d35", "#ba5892", "#009d46", "#35519e", "#0097ff"),
)  # fmt: skip
DARK = Theme(
    "dark", "#14171c", "#e6e9ed", "#98a1ad", "#2b3038", "#3a414b",
    ("#c3c9d1", "#999ffe", "#ff6826", "#ffcb00", "#ca88bb", "#00d087", "#9771ea", "#527d8d"),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one series is drawn: the place of its colour in `Theme.series`, and what tells it from others of that colour."""

    place: int
    dash: Any
    marker: str

    def color(self, theme: Theme = LIGHT) -> str:
        return theme.series[self.place]


def family_of(name: str) -> str:
    """Return the way to sample that a name begins with: "grpo" for `grpo-8` and `grpo:group_size=8`, "pos" for `reinforce-ada-pos`."""
    return re.sub(r"-\d+$", "", re.split(r"[:\s]", name.strip(), maxsplit=1)[0]).removeprefix("reinforce-ada-")


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Return a look for each name: the colour of its family, or a free one for a name of none; no two names have the same look.

    Names of the same colour differ in dash and marker, in the order in which they are given.
    """
    families = {name: family_of(name) for name in names}
    taken = {FAMILIES.index(family) for family in families.values() if family in FAMILIES}
    free = [place for place in range(len(FAMILIES)) if place not in taken] or list(range(len(FAMILIES)))
    others = dict.fromkeys(family for family in families.values() if family not in FAMILIES)
    places = {**{family: i for i, family in enumerate(FAMILIES)}, **{family: free[i % len(free)] for i, family in enumerate(others)}}
    used = [0] * len(FAMILIES)
    found: dict[str, Look] = {}
    for name, family in families.items():
        place = places[family]
        found[name] = Look(place, DASHES[used[place] % len(DASHES)], MARKERS[used[place] // len(DASHES) % len(MARKERS)])
        used[place] += 1
    return found


# -------------------- parts of a figure


def new_figure(width_in: float, height_in: float, *, dpi: int, theme: Theme = LIGHT) -> Any:
    """Return an empty figure. It is none of pyplot's, which keeps a global state and looks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=dpi, layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, *, where: str) -> None:
    """Write the figure as a PNG file. It depends on nothing but what is drawn and matplotlib's version, which the file names."""
    import matplotlib as mpl

    metadata = {"Software": f"matplotlib {mpl.__version__}"}
    replace_file(path, lambda aside: figure.savefig(aside, format="png", metadata=metadata), where=where)


def plain(axes: Any, theme: Theme = LIGHT, *, grid: str = "y") -> None:
    """Draw a light grid along one axis, or along "both", behind everything, and no box."""
    axes.set_facecolor(theme.background)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", length=0, labelsize=LABEL_PT, labelcolor=theme.ink)


def name_axes(axes: Any, title: str, x_label: str, y_label: str = "", theme: Theme = LIGHT) -> None:
    """Write the title at the left, and the labels."""
    axes.set_title(title, loc="left", fontsize=TITLE_PT, color=theme.ink, pad=8)
    axes.set_xlabel(x_label, fontsize=LABEL_PT, color=theme.ink)
    axes.set_ylabel(y_label, fontsize=LABEL_PT, color=theme.ink)


def legend(axes: Any, theme: Theme = LIGHT, **options: Any) -> None:
    """Add a legend without a frame where the axes have most room."""
    axes.legend(**{"frameon": False, "fontsize": LABEL_PT, "labelcolor": theme.ink, "loc": "best", "handlelength": 1.8, **options})


def percent(axis: Any) -> None:
    """Show the shares on an axis as whole per cents."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def few(x: float, _: int) -> str:
    """Return the label of a minor tick of a logarithmic axis: only 2 and 5 times powers of ten have one."""
    return f"{x:g}" if f"{x:e}"[0] in "25" else ""


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return values at least `gap` apart in the same order, each as near to its own as its neighbours allow (least squares)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    blocks: list[tuple[float, int]] = []  # sum and number of what each value is beyond the steps below it: pooled while they fall
    for step, i in enumerate(order):
        total, count = values[i] - step * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    placed = [total / count for total, count in blocks for _ in range(count)]
    found = [0.0] * len(values)
    for step, i in enumerate(order):
        found[i] = placed[step] + step * gap
    return found


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]], *, size_pt: float = LABEL_PT) -> None:
    """Write (y, text, colour) at the right edge of the axes, moved apart where the texts would overlap. The limits must be final."""
    low, high = axes.get_ylim()
    height_pt = axes.get_window_extent().height / axes.figure.dpi * 72
    gap = 1.25 * size_pt / height_pt * (high - low)
    for (_, text, color), y in zip(ends, spread([y for y, *_ in ends], gap), strict=True):
        axes.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points", va="center", fontsize=size_pt,
            color=color, annotation_clip=False,
        )  # fmt: skip


def place_labels(axes: Any, labels: Sequence[tuple[float, float, str, str]], *, size_pt: float = 8.0) -> None:
    """Write (x, y, text, colour) beside its point, at the first of eight places where it covers no other label or point.

    A text without such a place is left out. The limits must be final, and the figure drawn once.
    """
    taken = [(x - 4, y - 4, x + 4, y + 4) for line in axes.get_lines() for x, y in axes.transData.transform(line.get_xydata())]
    pad = 5 * axes.figure.dpi / 72
    for x, y, text, color in labels:
        at = axes.transData.transform((x, y))
        note = axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size_pt, color=color)
        size = note.get_window_extent()
        for right, up in ((0.5, 1), (1, 0.5), (0.5, 0), (0, 0.5), (1, 1), (0, 1), (1, 0), (0, 0)):
            left = at[0] + (right - 1) * size.width + (2 * right - 1) * pad
            low = at[1] + (up - 1) * size.height + (2 * up - 1) * pad
            box = (left, low, left + size.width, low + size.height)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                note.xyann = ((left - at[0]) * 72 / axes.figure.dpi, (low - at[1]) * 72 / axes.figure.dpi)
                taken.append(box)
                break
        else:
            note.remove()
