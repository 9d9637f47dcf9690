"""What a run folder holds for a report: the log, and the counts of the first and the last pools. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training.costs import cost
from reinforce_ada.training.log import read_log

STORE, LOG = "rollouts.sqlite", "log.jsonl"
WHERE = "report"


@dataclass(frozen=True, slots=True)
class PassRates:
    """The pools of some finished steps, as counts: of (correct, wrong) the number of pools that have as many."""

    first_step: int
    last_step: int
    counts: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        return f"step {self.first_step}" if self.first_step == self.last_step else f"steps {self.first_step}–{self.last_step}"


@dataclass(frozen=True, slots=True)
class Run:
    """The contents of a run folder."""

    name: str
    header: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    early: PassRates | None  # of the first quarter of the finished steps; None if none is finished
    late: PassRates | None  # of the last quarter; the same as `early` if one step is finished

    def series(self, metric: str) -> NDArray[np.float64]:
        """Return one metric, [steps] float64, nan for a step without it."""
        return np.array([as_float(record.get(metric)) for record in self.steps], dtype=np.float64)

    def total(self, metric: str) -> int:
        return int(np.nansum(self.series(metric)))

    def mean(self, metric: str, weight: str) -> float:
        """Return the mean of a metric over the steps that have it, weighted by another; nan if none has it."""
        values, weights = self.series(metric), np.nan_to_num(self.series(weight))
        known = ~np.isnan(values)
        total = weights[known].sum()
        return float((values[known] * weights[known]).sum() / total) if total else math.nan

    def generated_until(self, steps: Sequence[int]) -> NDArray[np.float64]:
        """Return how many completions had been generated after each of these steps, [len(steps)] float64."""
        of_step = sorted((r["step"], cost([r], "generated_completions")) for r in self.steps)
        until = np.cumsum([0.0, *(number for _, number in of_step)])
        return np.asarray(until[np.searchsorted([step for step, _ in of_step], steps, side="right")])

    @property
    def cap(self) -> int | None:
        return self.header.get("cap")

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the run's configuration; None if its log does not have it."""
        return ((self.header.get("config") or {}).get(section) or {}).get(key)

    @property
    def label(self) -> str:
        """Return the run's preset, or the name of its folder if the log does not have it."""
        return one_line(str(self.setting("sampling", "preset") or self.name), 40)

    @property
    def title(self) -> str:
        parts = [self.setting(section, key) for section, key in (("sampling", "preset"), ("task", "task"), ("model", "model"))]
        known = [Path(str(part)).name for part in parts if part]
        return one_line(" · ".join(one_line(name, 40) for name in known) if known else self.name, 100)


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run, which may still go on. Raises: InputError when there is none, or its log or its store cannot be read."""
    folder = Path(run_dir)
    records = read_log(folder / LOG)
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("run", "step", "eval")}
    if not by_kind["step"] and not by_kind["eval"]:
        given = f"{folder} holds no {LOG} with a step or an evaluation"
        raise InputError(WHERE, given, "a folder that `reinforce-ada train` wrote is needed")
    header = by_kind["run"][-1] if by_kind["run"] else {}
    return Run(folder.resolve().name, header, by_kind["step"], by_kind["eval"], *_pass_rates(folder / STORE))


def _pass_rates(path: Path) -> tuple[PassRates | None, PassRates | None]:
    if not path.is_file():
        return None, None
    with RolloutStore(path, read_only=True) as store:
        steps = store.finished_steps()
        if not steps:
            return None, None
        size = -(-len(steps) // 4)
        early, late = (PassRates(part[0], part[-1], tuple(store.pass_counts(part[0], part[-1]))) for part in (steps[:size], steps[-size:]))
        return (early, early) if len(steps) == 1 else (early, late)


def as_float(value: Any) -> float:
    """Return a finite number of the log, or nan for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
