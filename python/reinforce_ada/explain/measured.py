"""What a run measured: what training costs against generating, and the pass rates of its held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.explain.efficiency import PassRates, posteriors
from reinforce_ada.training.costs import cost, number
from reinforce_ada.training.log import read_log


@dataclass(frozen=True)
class Measured:
    """The numbers of a run on which a ranking of policies depends."""

    cost_ratio: float  # seconds of training per trained completion / seconds of sampling per generated completion
    rates: PassRates  # of the held-out prompts, after `step`
    step: int


def measured(run: Path) -> Measured:
    """Return what a run measured: seconds over all its steps, and the pass rates of its latest evaluation.

    Raises: InputError for a folder without a log, or a log without steps or evaluations.
    """
    records = read_log(run / "log.jsonl")
    where = f"explain --of {run}"
    evaluations = [(r["step"], r["k"], _known(r.get("per_prompt") or ())) for r in records if r["kind"] == "eval" and r["k"] > 1]
    step, k, rates = max(evaluations, default=(0, 0, []))
    if not rates:
        raise InputError(where, "no evaluation of at least 2 completions a prompt", "a run folder whose log has one")
    return Measured(_cost_ratio(records, where), posteriors(rates, k), step)


def _known(rates: Sequence[float | None]) -> list[float]:
    return [rate for rate in rates if rate is not None and 0 <= rate <= 1]


def _cost_ratio(records: Sequence[Mapping[str, Any]], where: str) -> float:
    steps = [r for r in records if r["kind"] == "step"]
    sampling, training = (math.fsum(number(r.get(name)) for r in steps) for name in ("sampling_s", "training_s"))
    generated, trained = (cost(records, name) for name in ("generated_completions", "trained_completions"))
    if not (sampling > 0 and training >= 0 and generated > 0 and trained > 0):
        raise InputError(where, "no step that sampled and trained", "a run folder whose log has some")
    return (training / trained) / (sampling / generated)
