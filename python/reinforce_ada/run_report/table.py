"""The numbers of a run in words: what was learned, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reinforce_ada.run_report.reading import Run, as_float
from reinforce_ada.training.evaluate import paired_difference

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Gain:
    """The difference between the last and the first evaluation, paired by prompt, with its standard error."""

    difference: float
    stderr: float
    num_prompts: int


def summary_rows(run: Run) -> Rows:
    """Return (name, value) of the closing table: held-out before and after, samples, waste, voids, tokens, time."""
    return [*evaluation_rows(run.evals), *(cost_rows(run) if run.steps else [])]


def gain_of(evals: Sequence[Mapping[str, Any]]) -> Gain | None:
    """Return what changed on the held-out prompts; None without two evaluations of the same prompts."""
    if len(evals) < 2:
        return None
    before, after = ([as_float(share) for share in e.get("per_prompt") or ()] for e in (evals[0], evals[-1]))
    if not before or len(before) != len(after):
        return None
    known = sum(not (math.isnan(a) or math.isnan(b)) for a, b in zip(before, after, strict=True))
    return Gain(*paired_difference(before, after), known)


def evaluation_rows(evals: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the rows of the held-out evaluations."""
    if not evals:
        return []
    first, last = evals[0], evals[-1]
    if first is last:
        return [(f"held-out Avg@{first['k']}", f"{average(first)} after step {first['step']}")]
    rows = [
        (f"held-out Avg@{first['k']} before", f"{average(first)} after step {first['step']}"),
        (f"held-out Avg@{last['k']} after", f"{average(last)} after step {last['step']}"),
    ]
    if gain := gain_of(evals):
        rows.append(("difference, paired by prompt", f"{gain.difference:+.3f} ± {gain.stderr:.3f}"))
    before, after = first.get("pass_at_k") or {}, last.get("pass_at_k") or {}
    if (k := max((int(k) for k in before if k in after), default=1)) > 1:  # pass@1 is Avg@k
        rows.append((f"pass@{k}", f"{as_float(before[str(k)]):.3f} → {as_float(after[str(k)]):.3f}"))
    return rows


def average(evaluation: Mapping[str, Any]) -> str:
    """Return Avg@k with its standard error."""
    return f"{as_float(evaluation.get('avg_at_k')):.3f} ± {as_float(evaluation.get('stderr')):.3f}"


def cost_rows(run: Run) -> Rows:
    """Return the rows of what the steps cost."""
    num_prompts, committed, issued = (run.total(f"num_{what}") for what in ("prompts", "completions_committed", "completions_issued"))
    per_prompt = f"{committed / max(num_prompts, 1):.1f} per prompt"
    budget = f" of {run.cap * num_prompts:,} ({committed / max(run.cap * num_prompts, 1):.0%} of the cap {run.cap})" if run.cap else ""
    lengths, cuts = (run.mean(metric, "num_completions_committed") for metric in ("completion_length_mean", "truncated_fraction"))
    length = [] if math.isnan(lengths) else [("length", f"{lengths:.1f} tokens on average, {cuts:.1%} cut at max_tokens")]
    seconds = f"{np.nansum(run.series('sampling_s')):.0f} s sampling, {np.nansum(run.series('training_s')):.0f} s training"
    return [
        ("steps", f"{len(run.steps)} of {num_prompts:,} prompts in all"),
        ("prompts with signal", f"{mean_signal(run):.0%}"),
        ("samples", f"{committed:,}{budget}, {per_prompt}"),
        ("wasted", f"{issued - committed:,} ({(issued - committed) / max(issued, 1):.1%} of those issued)"),
        ("voids", f"{run.total('num_voids'):,}"),
        ("tokens", f"{run.total('tokens_committed'):,} committed, {run.total('tokens_wasted'):,} wasted"),
        *length,
        ("time", seconds),
    ]


def mean_signal(run: Run) -> float:
    """Return the mean over the steps of the share of prompts with signal; nan if no step knows it."""
    shares = run.series("signal_fraction")
    known = shares[~np.isnan(shares)]
    return float(known.mean()) if len(known) else math.nan
