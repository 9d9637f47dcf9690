"""docs/evidence.md has the numbers of the results, and the studies are what the page says."""

from __future__ import annotations

from types import ModuleType

import pytest

from reinforce_ada.study import results as result_files
from reinforce_ada.study.statistics import best_rate, is_at_edge
from reinforce_ada.study.summary import finals_by_rate
from scripts import BENCHMARKS, loaded

FOLDER = BENCHMARKS / "evidence"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("evidence/write.py")


def test_the_tables_are_those_of_the_results(script: ModuleType) -> None:
    page, parts = script.PAGE.read_text(), script.tables(script.studies())
    assert script.filled(page, parts) == page
    assert [name for name in parts if f"<!-- {name} -->" not in page] == []


def test_the_rates_were_chosen_on_other_seeds(script: ModuleType) -> None:
    """Every arm of a study has the best rate of the study before it, which has a neighbour on both sides."""
    for name, found in script.studies().items():
        before = result_files.read(FOLDER / f"{name}-rates")
        assert set(found.seeds).isdisjoint(before.seeds)
        assert found.arms == before.arms
        for arm in found.arms:
            rate = best_rate(finals_by_rate(before, arm))
            assert found.learning_rates[arm] == (rate,)
            assert not is_at_edge(rate, before.learning_rates[arm])


def test_every_run_that_was_planned_is_there(script: ModuleType) -> None:
    for found in script.studies().values():
        assert len(found.runs) == found.num_planned
        assert len(found.seeds) >= 8
