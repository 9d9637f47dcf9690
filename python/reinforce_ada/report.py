"""The report of a run: figure.png, rollouts.parquet and the closing table, from log.jsonl and rollouts.sqlite. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError, needs
from reinforce_ada.files import replace_file
from reinforce_ada.outside import literal_names, one_line
from reinforce_ada.rollouts import PoolCounts, RolloutStore
from reinforce_ada.training.evaluate import paired_difference
from reinforce_ada.training.log import read_log

_BLUE, _ORANGE, _GREY, _INK = "#1f6cb0", "#d1661e", "#9aa1ab", "#2b2f36"
_PALE_ORANGE, _PALE_BLUE, _PALE_GREY = "#f4d9c8", "#86b0d6", "#cfd3d8"
_WIDTH_IN, _HEIGHT_IN, _DPI = 10.5, 7.4, 150
_SMALL = 9.5  # points
_NUM_BINS = 9  # of pass rates, centred on 0, 1/8, .., 1: pools often have 8, 16, .. samples, and 0 and 1 get bars of their own


@dataclass(frozen=True, slots=True)
class _Run:
    """The contents of a run folder."""

    name: str
    header: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]

    def series(self, metric: str) -> NDArray[np.float64]:
        """Return one metric, [steps] float64, nan for a step without it."""
        return np.array([_float(record.get(metric)) for record in self.steps])

    def total(self, metric: str) -> int:
        return int(np.nansum(self.series(metric)))

    def mean(self, metric: str, weight: str) -> float:
        """Return the mean of a metric over the steps that have it, weighted by another; nan if none has it."""
        values, weights = self.series(metric), np.nan_to_num(self.series(weight))
        known = ~np.isnan(values)
        total = weights[known].sum()
        return float((values[known] * weights[known]).sum() / total) if total else math.nan

    @property
    def cap(self) -> int | None:
        return self.header.get("cap")


def report(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Redraw the figure and export the rollouts of a folder with log.jsonl and rollouts.sqlite; may be called while the run goes on.

    Returns: the paths of figure.png and rollouts.parquet.
    Raises: InputError when there is no run, or matplotlib or pyarrow is missing.
    """
    figure = draw(run_dir)
    with RolloutStore(Path(run_dir) / "rollouts.sqlite", read_only=True) as store:
        return [figure, store.export_parquet(Path(run_dir) / "rollouts.parquet")]


def draw(run_dir: str | os.PathLike[str]) -> Path:
    """Draw figure.png: reward, share of prompts with signal, samples per prompt, and the pools' pass rates.

    Returns: its path. Raises: InputError when there is no run, or matplotlib is missing.
    """
    needs("report", "matplotlib")
    path = Path(run_dir) / "figure.png"
    run, pools = _read(run_dir), _pools(Path(run_dir) / "rollouts.sqlite")
    with literal_names():
        replace_file(path, _figure(run, pools).savefig, where="report")
    return path


def summary_table(run_dir: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return the closing table of a run as (name, value) rows: held-out before and after, samples, waste, voids, tokens, time.

    Raises: InputError when there is no run.
    """
    run = _read(run_dir)
    return [*_evaluation_rows(run.evals), *(_cost_rows(run) if run.steps else [])]


# -------------------- reading


def _read(run_dir: str | os.PathLike[str]) -> _Run:
    folder = Path(run_dir)
    records = read_log(folder / "log.jsonl")
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("run", "step", "eval")}
    if not by_kind["step"] and not by_kind["eval"]:
        given = f"{folder} holds no log.jsonl with a step or an evaluation"
        raise InputError("report", given, "a folder that `reinforce-ada train` wrote is needed")
    header = by_kind["run"][-1] if by_kind["run"] else {}
    return _Run(folder.resolve().name, header, by_kind["step"], by_kind["eval"])


def _pools(path: Path) -> list[PoolCounts]:
    if not path.is_file():
        return []
    with RolloutStore(path, read_only=True) as store:
        return store.pool_counts()


def _float(value: Any) -> float:
    """Return a finite number of the log, or nan for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


# -------------------- the table


def _evaluation_rows(evals: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    if not evals:
        return []
    first, last = evals[0], evals[-1]
    if first is last:
        return [(f"held-out Avg@{first['k']}", f"{_avg(first)} after step {first['step']}")]
    rows = [
        (f"held-out Avg@{first['k']} before", f"{_avg(first)} after step {first['step']}"),
        (f"held-out Avg@{last['k']} after", f"{_avg(last)} after step {last['step']}"),
    ]
    shares = [[_float(share) for share in e.get("per_prompt") or ()] for e in (first, last)]
    if shares[0] and len(shares[0]) == len(shares[1]):
        difference, stderr = paired_difference(*shares)
        rows.append(("difference, paired by prompt", f"{difference:+.3f} ± {stderr:.3f}"))
    before, after = first.get("pass_at_k") or {}, last.get("pass_at_k") or {}
    if (k := max((int(k) for k in before if k in after), default=1)) > 1:  # pass@1 is Avg@k
        rows.append((f"pass@{k}", f"{_float(before[str(k)]):.3f} → {_float(after[str(k)]):.3f}"))
    return rows


def _avg(evaluation: Mapping[str, Any]) -> str:
    return f"{_float(evaluation.get('avg_at_k')):.3f} ± {_float(evaluation.get('stderr')):.3f}"


def _cost_rows(run: _Run) -> list[tuple[str, str]]:
    num_prompts, committed, issued = (run.total(f"num_{what}") for what in ("prompts", "completions_committed", "completions_issued"))
    per_prompt = f"{committed / max(num_prompts, 1):.1f} per prompt"
    budget = f" of {run.cap * num_prompts:,} ({committed / max(run.cap * num_prompts, 1):.0%} of the cap {run.cap})" if run.cap else ""
    lengths, cuts = (run.mean(metric, "num_completions_committed") for metric in ("completion_length_mean", "truncated_fraction"))
    length = [] if math.isnan(lengths) else [("length", f"{lengths:.1f} tokens on average, {cuts:.1%} cut at max_tokens")]
    seconds = f"{np.nansum(run.series('sampling_s')):.0f} s sampling, {np.nansum(run.series('training_s')):.0f} s training"
    return [
        ("steps", f"{len(run.steps)} of {num_prompts:,} prompts in all"),
        ("prompts with signal", f"{np.nanmean(run.series('signal_fraction')):.0%}"),
        ("samples", f"{committed:,}{budget}, {per_prompt}"),
        ("wasted", f"{issued - committed:,} ({(issued - committed) / max(issued, 1):.1%} of those issued)"),
        ("voids", f"{run.total('num_voids'):,}"),
        ("tokens", f"{run.total('tokens_committed'):,} committed, {run.total('tokens_wasted'):,} wasted"),
        *length,
        ("time", seconds),
    ]


# -------------------- the figure


def _figure(run: _Run, pools: Sequence[PoolCounts]) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.14)  # inches
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI, layout=layout, facecolor="white")
    figure.suptitle(_title(run), x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=_INK)
    panels: list[Callable[[Any], None]] = [
        lambda axes: _draw_reward(axes, run),
        lambda axes: _draw_signal(axes, run),
        lambda axes: _draw_samples(axes, run),
        lambda axes: _draw_pass_rates(axes, pools),
    ]
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _plain(axes)
        panel(axes)
    return figure


def _title(run: _Run) -> str:
    config = run.header.get("config", {})
    parts = [config.get(section, {}).get(key) for section, key in (("sampling", "preset"), ("task", "task"), ("model", "model"))]
    known = [Path(str(part)).name for part in parts if part]
    return one_line(" · ".join(one_line(name, 40) for name in known) if known else run.name, 100)


def _plain(axes: Any) -> None:
    """Draw a light horizontal grid and no box."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK)


def _name(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=8)
    axes.set_xlabel(x_label, fontsize=_SMALL, color=_INK)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=_SMALL, labelcolor=_INK, loc="best", handlelength=1.4)


def _step_axis(axes: Any, run: _Run) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    numbers = [r["step"] for r in (*run.steps, *run.evals)]
    axes.set_xlim(min(numbers) - 0.5, max(*numbers, min(numbers) + 1) + 0.5)


def _trend(axes: Any, x: NDArray[np.float64], y: NDArray[np.float64], color: str, label: str) -> None:
    """Draw the steps as dots, and their running mean (over a tenth of the run) as a line once a trend can be seen."""
    window = max(1, len(y) // 10)
    axes.plot(x, y, "o", color=color, markersize=_dot_size(x), alpha=0.35 if window > 1 else 1.0, markeredgewidth=0)
    axes.plot(x, _running_mean(y, window), color=color, linewidth=2.0, label=label)


def _dot_size(x: NDArray[np.float64]) -> float:
    return 5.0 if len(x) < 20 else 3.5


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the centred mean over up to 2 * window - 1 values, fewer at the ends; nan values are left out."""
    spans = [values[max(0, i - window + 1) : i + window] for i in range(len(values))]
    return np.array([span[~np.isnan(span)].mean() if not np.isnan(span).all() else math.nan for span in spans])


def _draw_reward(axes: Any, run: _Run) -> None:
    _name(axes, "Reward", "step")
    if run.steps:
        _trend(axes, run.series("step"), run.series("first_round_reward"), _BLUE, "training prompts, first round")
    if run.evals:
        x, y, errors = (np.array([_float(e.get(key)) for e in run.evals]) for key in ("step", "avg_at_k", "stderr"))
        label = f"held-out Avg@{run.evals[-1]['k']} ± standard error"
        axes.errorbar(x, y, np.nan_to_num(errors), fmt="o", color=_ORANGE, markersize=6, capsize=3, linewidth=1.6, label=label, zorder=4)
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(0.0, bottom), top + 0.2 * (top - min(0.0, bottom)))  # from zero, with room for the legend
    _legend(axes)
    _step_axis(axes, run)


def _draw_signal(axes: Any, run: _Run) -> None:
    _name(axes, "Prompts with a learning signal", "step")
    _trend(axes, run.series("step"), run.series("signal_fraction"), _BLUE, "")
    _percent(axes.yaxis)
    axes.set_ylim(0, 1.03)
    _step_axis(axes, run)


def _draw_samples(axes: Any, run: _Run) -> None:
    _name(axes, "Samples per prompt", "step")
    x, used, issued = (run.series(metric) for metric in ("step", "samples_per_prompt", "issued_per_prompt"))
    axes.fill_between(x, used, issued, color=_PALE_ORANGE, linewidth=0, label="issued, then wasted")
    axes.vlines(x, used, issued, color=_PALE_ORANGE, linewidth=2)  # a single step has no area
    axes.plot(x, used, "-o", color=_BLUE, linewidth=2.0, markersize=_dot_size(x), markeredgewidth=0, label="used")
    axes.set_ylim(0, 1.12 * max(np.nanmax(issued, initial=1.0), run.cap or 0))
    if run.cap:
        axes.axhline(run.cap, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        where = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 4), "textcoords": "offset points"}
        axes.annotate(f"cap {run.cap}", (1, run.cap), ha="right", fontsize=_SMALL, color=_INK, **where)
    _legend(axes)
    _step_axis(axes, run)


def _draw_pass_rates(axes: Any, pools: Sequence[PoolCounts]) -> None:
    _name(axes, "Pass rates of the prompts", "correct completions of those scored")
    early, late = _quarters(pools)
    edges = (np.arange(_NUM_BINS + 1) - 0.5) / (_NUM_BINS - 1)
    if early is late:
        axes.stairs(_shares(early, edges), edges, fill=True, color=_PALE_BLUE, label=_span(early))
    else:
        axes.stairs(_shares(early, edges), edges, fill=True, color=_PALE_GREY, label=_span(early))
        axes.stairs(_shares(late, edges), edges, color=_BLUE, linewidth=2.2, label=_span(late))
    _percent(axes.yaxis)
    _percent(axes.xaxis)
    axes.set_xticks(np.linspace(0, 1, 5))
    axes.set_xlim(edges[0] - 0.01, edges[-1] + 0.01)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of prompts", fontsize=_SMALL, color=_INK)
    _legend(axes)


def _quarters(pools: Sequence[PoolCounts]) -> tuple[list[PoolCounts], list[PoolCounts]]:
    """Return the pools of the first and of the last quarter of the steps; the same list twice if there is a single step."""
    steps = sorted({pool.step for pool in pools})
    size = -(-len(steps) // 4)
    early = [pool for pool in pools if pool.step in steps[:size]]
    return (early, early) if len(steps) < 2 else (early, [pool for pool in pools if pool.step in steps[-size:]])


def _shares(pools: Sequence[PoolCounts], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the pools in each bin of pass rate, [bins]; voids count in no pass rate."""
    scored = [(pool.num_correct, pool.num_correct + pool.num_wrong) for pool in pools]
    counts = np.histogram([correct / count for correct, count in scored if count], edges)[0].astype(np.float64)
    return counts / max(float(counts.sum()), 1.0)


def _span(pools: Sequence[PoolCounts]) -> str:
    if not pools:
        return "no finished step yet"
    first, last = pools[0].step, pools[-1].step
    return f"step {first}" if first == last else f"steps {first}–{last}"


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
