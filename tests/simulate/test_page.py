"""docs/simulator.md has the measured numbers, and its claims hold for them."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from scripts import loaded


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("write_simulator.py")


def test_the_tables_are_those_of_the_results(script: ModuleType) -> None:
    records = json.loads(script.RESULTS.read_text())
    page = script.PAGE.read_text()
    assert script.filled(page, records) == page
    assert {name for name in script.tables(records) if f"<!-- {name} -->" in page} == set(script.tables(records))


def test_the_goal_is_met_on_the_three_populations(script: ModuleType) -> None:
    """The goal is at most .65 of the rounds' wall-clock and 15 % waste, over 32 seeds."""
    studies = json.loads(script.RESULTS.read_text())["goal"]
    assert [study["population"] for study in studies] == ["Beta(1, 2)", "Beta(0.5, 2.5)", "Beta(2.5, 0.6)"]
    for study in studies:
        assert study["num_seeds"] == 32
        for row in study["rows"][1:]:
            assert row["relative"] <= 0.65
            assert sum(row["waste"]) / 32 <= 0.15


def test_the_published_rows_are_met(script: ModuleType) -> None:
    study = json.loads(script.RESULTS.read_text())["frontier"][0]
    found = {(row["policy"], script._schedule(row)): row for row in study["rows"]}
    for name, (_, relative, waste, *_) in script.PUBLISHED.items():
        assert found[name]["relative"] == pytest.approx(relative, abs=0.05)
        assert sum(found[name]["waste"]) / 8 == pytest.approx(waste, abs=0.03)
