"""The costs of a run, from the steps of its log: the axes on which runs are compared, and the units of a budget. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# Each cost of a step is the sum of these numbers of its record.
COSTS: Mapping[str, tuple[str, ...]] = {
    "steps": (),
    "generated_completions": ("num_completions_issued",),
    "generated_tokens": ("tokens_committed", "tokens_wasted"),
    "trained_completions": ("num_completions_kept",),
    "trained_tokens": ("tokens_trained",),
    "seconds": ("sampling_s", "training_s"),
}


def cost(records: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return one cost of all steps among `records`; a number that the log lacks counts as 0."""
    steps = [r for r in records if r["kind"] == "step"]
    return math.fsum(number(r.get(key)) for r in steps for key in COSTS[name]) if COSTS[name] else float(len(steps))


def costs_until(records: Iterable[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Return every cost of the steps up to `step`, by name."""
    until = [r for r in records if r["kind"] == "step" and r["step"] <= step]
    return {name: cost(until, name) for name in COSTS}


def number(value: Any) -> float:
    """Return a value of a log as a number, 0 for anything that is none."""
    if type(value) not in (int, float) or not abs(value) < 2**1000:  # an integer of a file may be too large for a float
        return 0.0
    return float(value)
