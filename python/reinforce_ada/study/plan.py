"""The plan of a study: its runs, and the record that keeps them the same when a study goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.config import POLICY_KEYS, Config
from reinforce_ada.errors import InputError, differences
from reinforce_ada.files import replace_file
from reinforce_ada.outside import GarbageError, parse_json, read_text
from reinforce_ada.study.prediction import Prediction
from reinforce_ada.study.settings import UNTRAINED, WHERE, Arm, Study

PLAN = "plan.json"
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Run:
    """One training run; `name` is its folder inside that of the study, and `keys` are what its configuration sets."""

    name: str
    keys: Mapping[str, Any]

    def config(self, out: Path) -> Config:
        """Return the whole configuration of the run."""
        return configuration.load(None, {**self.keys, "out": str(out / self.name)})


@dataclass(frozen=True)
class Cell:
    """A run of the comparison."""

    arm: str
    learning_rate: float
    seed: int
    run: Run


def untrained_run(study: Study) -> Run:
    """Return the run without a step that evaluates the untrained model."""
    shared = {key: value for key, value in study.shared.items() if key not in POLICY_KEYS or key == "positive_threshold"}
    return Run(UNTRAINED, {**shared, "preset": "grpo", "steps": 0, "seed": min(study.seeds)})


def cells_of(study: Study, predictions: Sequence[Prediction]) -> list[Cell]:
    """Return every run, seed by seed, so that an unfinished study has as many seeds as possible of every arm."""
    prompts = {p.arm: p.prompts_per_step for p in predictions}
    return [
        Cell(arm.name, rate, seed, Run(f"{arm.name}/lr{rate!r}/seed{seed}", _keys(study, arm, rate, seed, prompts[arm.name])))
        for seed in study.seeds
        for arm in study.arms
        for rate in arm.learning_rates
    ]


def _keys(study: Study, arm: Arm, rate: float, seed: int, num_prompts: int) -> dict[str, Any]:
    ends = study.budget.keys()
    return {**ends, **study.shared, **arm.keys, "learning_rate": rate, "seed": seed, "prompts_per_step": num_prompts}


# -------------------- the record


def keep(out: Path, runs: Sequence[Run]) -> None:
    """Add runs to the record of the study's folder. Raises: InputError if one of them has begun there with other settings."""
    path = out / PLAN
    recorded = _read(path) if path.exists() else {}
    known = {name: configuration.beside(Path(), keys) for name, keys in recorded.items()}  # earlier versions kept relative paths
    new = {run.name: json.loads(json.dumps(run.keys)) for run in runs}
    for name, keys in new.items():
        if (out / name / "config.toml").exists() and (changed := differences(known.get(name, keys), keys)):
            given = f"{name} in {out} has begun with {changed}"
            raise InputError(WHERE, given, "the settings as they were", "put them back, or begin another study with --out")
    if any(recorded.get(name) != keys for name, keys in new.items()):
        out.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({**recorded, **new}, indent=1) + "\n", where=WHERE)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = parse_json(read_text(path, _MOST_BYTES))
    except GarbageError as e:
        raise InputError(WHERE, f"cannot read {path}: {e}", "the plan that the study wrote there") from None
    if not isinstance(found, dict) or not all(isinstance(keys, dict) for keys in found.values()):
        raise InputError(WHERE, f"{path} is no plan of a study", "the file that the study wrote there")
    return found
