"""Studies as text, and results as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reinforce_ada.study.prediction import Prediction
from reinforce_ada.study.results import Evaluation, Results, RunResult
from reinforce_ada.training.costs import COSTS

STUDY = """\
name = "sums"
seeds = [0, 1]
learning_rates = [1e-3, 1e-2]
baseline = "grpo-8"
[budget]
steps = 3
[target]
reward = 0.5
[shared]
model = "tiny"
[[arm]]
name = "grpo-8"
preset = "grpo"
[[arm]]
name = "balance"
preset = "reinforce-ada-balance"
learning_rates = [1e-2]
"""


def changed(*changes: tuple[str, str]) -> str:
    """The study with texts replaced, each of which it has."""
    text = STUDY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def result(arm: str, rate: float, seed: int, rewards: Sequence[float], per_step: Mapping[str, float] | None = None) -> RunResult:
    """A run that is evaluated after 0, 10, 20, .. steps, on two prompts; a step costs 1 of everything, or what `per_step` says."""
    each = {**dict.fromkeys(COSTS, 1.0), **(per_step or {})}
    evaluations = [Evaluation(10 * i, reward, {name: 10 * i * each[name] for name in COSTS}) for i, reward in enumerate(rewards)]
    return RunResult(arm, rate, seed, tuple(evaluations), (rewards[-1], rewards[-1]))


def results(runs: Sequence[RunResult], rates: Mapping[str, tuple[float, ...]], seeds: Sequence[int] = (0, 1, 2), **changes: Any) -> Results:
    """The results of a study whose first arm is the baseline."""
    arms = tuple(rates)
    whole: dict[str, Any] = {
        "name": "sums", "budget": "20 steps", "budget_unit": "steps", "budget_amount": 20, "baseline": arms[0], "target": 0.5,
        "seeds": tuple(seeds), "arms": arms, "learning_rates": dict(rates),
        "predictions": tuple(Prediction(arm, 12, 8.0, 0.25) for arm in arms), "runs": tuple(runs), **changes,
    }  # fmt: skip
    return Results(**whole)
