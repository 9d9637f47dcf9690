"""The tables of results: goals with the values reached, all measurements, and a summary. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from reinforce_ada.bench.case import label_of
from reinforce_ada.bench.record import Record, Timing, number, slower, verdicts

Row = Sequence[str]
GOALS = ("operator", "case", "dtype", "shape", "goal", "reached", "quartiles", "verdict")
MEASURED = ("case", "dtype", "shape", "form", "time", "rate", "of the ceiling", "extra MB", "as fast as … (quartiles)")
SLOWER = ("operator", "case", "dtype", "shape", "slower than", "ours / theirs, times as fast")
SUMMARY = ("operator", "case", "× naive eager", "× torch.compile", "× fastest other", "of the ceiling", "extra MB")


def goal_rows(records: Iterable[Record]) -> list[Row]:
    """Return one row for each goal."""
    return [(*label_of(r), v.goal, v.reached, v.spread, v.word) for r in records for v in verdicts(r)]


def tally(records: Iterable[Record]) -> str:
    """Return a text such as "31 of 40 goals hit"."""
    words = [v.word for r in records for v in verdicts(r)]
    unmeasured = words.count("not measured")
    text = f"{words.count('hit')} of {len(words)} goals hit"
    return text + (f", {unmeasured} not measured" if unmeasured else "")


def measured_rows(records: Iterable[Record]) -> list[Row]:
    """Return one row for each record, with every baseline."""
    return [_measured(r) for r in records]


def _measured(r: Record) -> Row:
    baselines = ", ".join(f"{name} {_ratio(t)}" for name, t in r.baselines().items())
    extra = "" if r.ours.extra_mb is None else number(r.ours.extra_mb, up=True)
    rate = f"{r.gflop_per_s:.0f} GFLOP/s" if r.flops else f"{r.gb_per_s:.1f} GB/s"
    return (*label_of(r)[1:], r.backend, duration(r.ours.ms), rate, _share(r), extra, baselines)


def _ratio(t: Timing) -> str:
    return f"{number(t.ratio)} ({number(t.ratio_low)}–{number(t.ratio_high)})"


def _share(r: Record) -> str:
    """Return the time of the floor, which is the machine's best, divided by ours."""
    return ", ".join(f"{number(t.ratio)} of {name}" for name, t in r.others.items() if t.floor)


def slower_rows(records: Iterable[Record]) -> list[Row]:
    """Return one row for each baseline that is faster than ours."""
    return [(*label_of(r), name, _ratio(t)) for r, name, t in slower(records)]


def absent_reasons(records: Iterable[Record]) -> list[str]:
    """Return the baselines that were not measured, each with its reasons."""
    found = {f"{name}: {reason}": None for r in records for name, reason in r.absent.items()}
    return sorted(found)


def summary_rows(records: Iterable[Record]) -> list[Row]:
    """Return one row for each operator and case, over its shapes and dtypes."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r.op, r.name), []).append(r)
    return [(f"`{op}`", name, *_summary(found)) for (op, name), found in groups.items()]


def _summary(records: Sequence[Record]) -> Row:
    def against(name_of: Callable[[Record], str | None]) -> str:
        timings = [r.others.get(name_of(r) or "") for r in records]
        return span([t.ratio for t in timings if t is not None])

    floors = [t.ratio for r in records for t in r.others.values() if t.floor]
    extra = [r.ours.extra_mb for r in records if r.ours.extra_mb is not None]
    return (
        against(lambda r: r.naive),
        against(lambda r: r.fastest("inductor")),
        against(lambda r: r.fastest("best")),
        span(floors),
        number(max(extra), up=True) if extra else "",
    )


def span(values: Sequence[float]) -> str:
    """Return the least and the largest value, or "–" without values."""
    if not values:
        return "–"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low}–{high}"


# -------------------- as text


def duration(ms: float) -> str:
    """Return a time in ms, or in µs below one ms."""
    return f"{number(ms, up=True)} ms" if ms >= 1 else f"{number(1e3 * ms, up=True)} µs"


def as_markdown(header: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def as_text(header: Row, rows: Sequence[Row]) -> str:
    """Return a table with aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
