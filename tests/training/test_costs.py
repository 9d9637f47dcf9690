"""The costs of a run by its log, and runs that end when their budget is spent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from toy_runs import Runner, evaluations, trained

from reinforce_ada import config
from reinforce_ada.config import BUDGET_UNITS, Budget
from reinforce_ada.errors import InputError
from reinforce_ada.training.costs import COSTS, cost, costs_until, number
from reinforce_ada.training.log import read_log


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, **values}


LOG = [
    {"kind": "run"},
    {"kind": "eval", "step": 0, "num_tokens": 1000},
    step(1, num_completions_issued=20.0, num_completions_kept=8.0, tokens_committed=90.0, tokens_wasted=10.0, tokens_trained=40.0,
         sampling_s=2.0, training_s=0.5),
    step(2, num_completions_issued=12.0, num_completions_kept=4.0, tokens_committed=60.0, tokens_wasted=0.0, tokens_trained=20.0,
         sampling_s=1.0, training_s=None),
    step(3, num_completions_issued="many", num_completions_kept=True, tokens_wasted=float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("until", "expected"),
    [(0, (0, 0, 0, 0, 0, 0)), (1, (1, 20, 100, 8, 40, 2.5)), (2, (2, 32, 160, 12, 60, 3.5)), (9, (3, 32, 160, 12, 60, 3.5))],
)
def test_costs(until: int, expected: tuple[float, ...]) -> None:
    assert costs_until(LOG, until) == dict(zip(COSTS, expected, strict=True))


def test_every_unit_of_a_budget_is_a_cost() -> None:
    assert set(BUDGET_UNITS) == set(COSTS) - {"steps", "seconds"}
    for unit in BUDGET_UNITS:
        assert config.budget_of(config.load(None, {"budget": f"20000 {unit.replace('_', ' ')}"}).training) == Budget(20000, unit)
    assert config.budget_of(config.load().training) is None


NO_BUDGETS = [
    "20000", "0 generated tokens", "-1 generated tokens", "1.5 trained tokens", "20k trained tokens", "2 tokens", "2  trained tokens",
    "9999999999999999 trained tokens", "2 trained tokens\n", "٣ trained tokens", " ",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_BUDGETS)
def test_texts_that_are_no_budget(text: str) -> None:
    with pytest.raises(InputError, match=r'config: budget = .*; a number of generated or trained .* such as "20000 generated completions"'):
        config.load(None, {"budget": text})


SETTINGS = {"steps": 9, "eval_every": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def whole(toy_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps without a budget."""
    out = tmp_path_factory.mktemp("costs") / "whole"
    assert toy_run(out, **{**SETTINGS, "steps": 4}) == 0
    return out


@pytest.mark.parametrize("unit", BUDGET_UNITS)
def test_a_run_ends_after_the_step_that_reaches_the_budget(toy_run: Runner, whole: Path, tmp_path: Path, unit: str) -> None:
    """The budget is what three steps cost, or one less: in both cases the third is the last."""
    spent = [int(costs_until(steps(whole), n)[unit]) for n in (1, 2, 3, 4)]
    assert 0 < spent[0] < spent[1] < spent[2] < spent[3]
    for amount in (spent[2], spent[1] + 1):
        out = tmp_path / str(amount)
        assert toy_run(out, budget=f"{amount} {unit.replace('_', ' ')}", **SETTINGS) == 0
        assert trained(out) == trained(whole)[:3]
        assert list(evaluations(out)) == [0, 2, 3]
        assert (out / "model").is_dir()


def steps(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_log(out / "log.jsonl") if r["kind"] == "step"]


def test_a_killed_run_ends_where_the_undisturbed_one_does(toy_run: Runner, whole: Path, tmp_path: Path) -> None:
    out, budget = tmp_path / "run", f"{int(cost(steps(whole), 'generated_completions'))} generated completions"
    for n, kill in enumerate([("before the log", 4), ("inside a checkpoint", 1)]):
        assert toy_run(out, kill=kill, resume=n > 0, budget=budget, **SETTINGS) == -9
    assert toy_run(out, resume=True, budget=budget, **SETTINGS) == 0
    assert trained(out) == trained(whole)
    assert toy_run(out, resume=True, budget=budget, **SETTINGS) == 0  # it is over
    assert len(steps(out)) == 4


def test_a_finished_run_goes_on_with_a_larger_budget(toy_run: Runner, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy_run(out, budget="1 trained tokens", **SETTINGS) == 0
    assert len(steps(out)) == 1
    assert toy_run(out, resume=True, **{**SETTINGS, "steps": 4}) == 0
    assert trained(out) == trained(whole)


@pytest.mark.parametrize("value", [None, "1", True, [], {}, math.nan, math.inf, -math.inf, 10**400, -(10**400)])
def test_what_is_no_number_counts_as_nothing(value: Any) -> None:
    assert number(value) == 0.0
    assert (
        cost([{"kind": "step", "step": 1, "tokens_trained": value}, {"kind": "step", "step": 2, "tokens_trained": 3}], "trained_tokens")
        == 3
    )
