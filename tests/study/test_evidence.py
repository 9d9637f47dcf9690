"""docs/evidence.md has the numbers of the results, and the studies are what the page says."""

from __future__ import annotations

from pathlib import Path
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


def test_the_first_picture_compares_grpo_at_its_best_with_the_leader(script: ModuleType) -> None:
    """`grpo-4` ends at .699 and above the other groups of GRPO, `memory-1` at .737 and above all."""
    assert script.compared(script.studies()["sort"]) == {
        "grpo-8": "GRPO, groups of 8",
        "grpo-4": "GRPO, groups of 4",
        "memory-1": "reinforce-ada-memory,\ngroups of 1",
    }


def test_the_first_picture_says_what_the_results_say(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The quotients of tokens; those of completions are in the table, and as large, since answers have the same length."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from reinforce_ada import plots
    from reinforce_ada.study import figure

    results, drawn = script.studies()["sort"], []
    monkeypatch.setattr(plots, "save", lambda figure, path, *, where: drawn.append(figure))
    figure.draw_against(results, script.compared(results), tmp_path / "first.png", title="title", about="about")
    (axes,) = drawn[0].axes
    said = next(text.get_text() for text in axes.texts if "reaches" in text.get_text())
    assert "GRPO, groups of 8, with 2.2 times fewer tokens (1.8 to 2.6)" in said
    assert "GRPO, groups of 4, with 1.7 times fewer tokens (1.6 to 1.8)" in said
    seeds, means = ([line for line in axes.lines if (line.get_linewidth() > 1) == wide] for wide in (False, True))
    assert (len(seeds), len(means)) == (3 * 8, 3)
    assert [round(line.get_ydata()[-1], 3) for line in means] == [0.681, 0.698, 0.737]  # where the first seed of each ends
