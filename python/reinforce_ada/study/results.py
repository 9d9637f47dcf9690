"""results.json: the raw results of a study, from which its page and its figure are made; nothing in it is derived."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.explain.efficiency import Efficiency
from reinforce_ada.files import replace_file
from reinforce_ada.outside import GarbageError, finite, one_line, parse_json, read_text
from reinforce_ada.study.plan import Cell
from reinforce_ada.study.prediction import Prediction
from reinforce_ada.study.runs import is_finished
from reinforce_ada.study.settings import WHERE, Study
from reinforce_ada.training.costs import COSTS, costs_until
from reinforce_ada.training.log import read_log

RESULTS = "results.json"
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """A held-out evaluation: Avg@k, and what the run had cost by then, by the names of `COSTS`."""

    step: int
    reward: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    arm: str
    learning_rate: float
    seed: int
    evaluations: tuple[Evaluation, ...]
    per_prompt: tuple[float, ...]  # final reward of each held-out prompt; nan where no completion could be scored

    @property
    def final(self) -> Evaluation:
        return self.evaluations[-1]


@dataclass(frozen=True)
class Results:
    """All finished runs of a study, and what was planned."""

    name: str
    budget: str
    budget_unit: str
    budget_amount: int
    baseline: str
    target: float | None
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    learning_rates: Mapping[str, tuple[float, ...]]  # of each arm
    predictions: tuple[Prediction, ...]
    runs: tuple[RunResult, ...]

    @property
    def num_planned(self) -> int:
        return len(self.seeds) * sum(len(rates) for rates in self.learning_rates.values())


def collect(study: Study, predictions: Sequence[Prediction], cells: Sequence[Cell], out: Path) -> Results:
    """Return the results of every finished run, from its log."""
    runs = [RunResult(c.arm, c.learning_rate, c.seed, *_evaluations(out / c.run.name)) for c in cells if is_finished(out, c.run)]
    return Results(
        study.name, str(study.budget), study.budget.unit, study.budget.amount, study.baseline, study.target, study.seeds,
        tuple(arm.name for arm in study.arms), {arm.name: arm.learning_rates for arm in study.arms}, tuple(predictions),
        tuple(run for run in runs if run.evaluations),
    )  # fmt: skip


def damaged(results: Results, cells: Sequence[Cell], out: Path) -> list[str]:
    """Return the finished runs that are not among the results."""
    there = {(run.arm, run.learning_rate, run.seed) for run in results.runs}
    return [c.run.name for c in cells if is_finished(out, c.run) and (c.arm, c.learning_rate, c.seed) not in there]


def _evaluations(folder: Path) -> tuple[tuple[Evaluation, ...], tuple[float, ...]]:
    """Return the evaluations of a run and the final reward of each prompt.

    There are none if its log lacks a step or the last evaluation, since its costs or its end are then unknown.
    """
    records = read_log(folder / "log.jsonl")
    evaluations = sorted((r for r in records if r["kind"] == "eval" and r.get("avg_at_k") is not None), key=lambda r: r["step"])
    steps = sorted(r["step"] for r in records if r["kind"] == "step")
    if not evaluations or steps != list(range(1, evaluations[-1]["step"] + 1)):
        return (), ()
    found = tuple(Evaluation(r["step"], float(r["avg_at_k"]), costs_until(records, r["step"])) for r in evaluations)
    return found, _per_prompt(evaluations[-1].get("per_prompt") or ())


def _per_prompt(given: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if reward is None else float(reward) for reward in given)


def write(results: Results, out: Path) -> Path:
    """Write results.json, and return its path."""
    path = out / RESULTS
    planned = finite(asdict(results))
    runs = ",\n  ".join(map(json.dumps, planned.pop("runs")))
    text = json.dumps(planned, indent=1).removesuffix("\n}")
    replace_file(path, f'{text},\n "runs": [\n  {runs}\n ]\n}}\n', where=WHERE)  # a run is a line
    return path


def read(out: Path) -> Results:
    """Return the results in a study's folder. Raises: InputError if there are none, or if they cannot be read."""
    path = out / RESULTS
    try:
        found = parse_json(read_text(path, _MOST_BYTES))
    except GarbageError as e:
        raise InputError(
            WHERE, f"cannot read {path}: {e}", "the results that the study wrote there", "run the study without --report"
        ) from None
    try:
        return _results(found)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        given = f"{path} is not what a study wrote: {one_line(repr(e), 100)}"
        raise InputError(WHERE, given, "its own results", "run the study without --report") from None


def _results(found: Mapping[str, Any]) -> Results:
    runs = tuple(
        RunResult(
            str(r["arm"]),
            float(r["learning_rate"]),
            int(r["seed"]),
            tuple(_evaluation(e) for e in r["evaluations"]),
            _per_prompt(r["per_prompt"]),
        )
        for r in found["runs"]
    )
    arms, rates = tuple(map(str, found["arms"])), found["learning_rates"]
    if not all(run.evaluations and run.arm in arms for run in runs) or found["baseline"] not in arms:
        raise ValueError("a run without evaluations, or of no arm")
    if len({len(run.per_prompt) for run in runs}) > 1:
        raise ValueError("runs with different numbers of held-out prompts")
    return Results(
        str(found["name"]), str(found["budget"]), str(found["budget_unit"]), int(found["budget_amount"]), str(found["baseline"]),
        None if found["target"] is None else float(found["target"]), tuple(map(int, found["seeds"])), arms,
        {arm: tuple(map(float, rates[arm])) for arm in arms}, tuple(_prediction(p) for p in found["predictions"]), runs,
    )  # fmt: skip


def _evaluation(found: Mapping[str, Any]) -> Evaluation:
    return Evaluation(int(found["step"]), float(found["reward"]), {name: float(found["costs"][name]) for name in COSTS})


def _prediction(found: Mapping[str, Any]) -> Prediction:
    known = found["efficiency"]
    efficiency = None if known is None else Efficiency(*(float(known[f.name]) for f in fields(Efficiency)))
    numbers = float(found["completions_per_prompt"]), float(found["signal"])
    return Prediction(str(found["arm"]), int(found["prompts_per_step"]), *numbers, efficiency)
