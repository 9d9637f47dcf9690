"""The page and the figure of a study, from results alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_world import STUDY, result, results

from reinforce_ada import cli
from reinforce_ada.study import results as result_files
from reinforce_ada.study.page import page
from reinforce_ada.study.results import Results
from reinforce_ada.study.summary import arms_of, curve, warnings_of

RATES = {"grpo-8": (1e-5, 3e-5, 1e-4), "balance": (3e-5,)}
DOUBLE = {"generated_completions": 2.0, "generated_tokens": 20.0, "trained_completions": 0.5, "trained_tokens": 5.0, "seconds": 0.1}
RUNS = [
    *(result("grpo-8", 3e-5, seed, [0.1, 0.3, final]) for seed, final in enumerate((0.4, 0.5, 0.6))),
    *(result("grpo-8", 1e-5, seed, [0.1, 0.1, 0.2]) for seed in range(3)),
    *(result("grpo-8", 1e-4, seed, [0.1, 0.0, 0.0]) for seed in range(3)),
    *(result("balance", 3e-5, seed, [0.1, 0.4, final], DOUBLE) for seed, final in enumerate((0.6, 0.6, 0.9))),
]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = text.partition(f"## {heading}\n")[2].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ") and "---" not in line]


def test_the_tables() -> None:
    text = page(results(RUNS, RATES), has_figure=True)
    assert rows(text, "Held-out reward at the end")[1:] == [
        ["grpo-8", "3e-05", "3", "0.500", "0.252 to 0.748", "–", "–"],  # 4.3027 * 0.1 / sqrt(3) = 0.2484
        ["balance", "3e-05", "3", "0.700", "0.270 to 1.130", "+0.200", "+0.100 to +0.300"],
    ]
    assert rows(text, "Costs of a run")[1:] == [
        ["grpo-8", "20", "20", "20", "20", "20", "20"],
        ["balance", "20", "40", "400", "10", "100", "2"],
    ]
    assert rows(text, "Costs until a held-out reward of 0.5") == [
        ["arm", "steps", "generated completions", "generated tokens", "trained completions", "trained tokens", "seconds"],
        ["grpo-8", *["not reached by 1 of 3"] * 6],
        ["balance", "14", "28", "280", "7", "70", "1.4"],  # after 15, 15 and 12 steps
    ]
    assert rows(text, "Learning rates")[1:] == [
        ["grpo-8", "1e-05", "3", "0.200", ""], ["grpo-8", "3e-05", "3", "0.500", "best"], ["grpo-8", "0.0001", "3", "0.000", ""],
        ["balance", "3e-05", "3", "0.700", "best"],
    ]  # fmt: skip
    assert rows(text, "Predicted before the runs")[1:] == [[arm, "12", "8.0", "96", "0.250", "–", "–"] for arm in RATES]
    assert "12 of 12 runs are finished" in text
    assert "![held-out reward against steps and against generated tokens](figure.png)" in text
    assert "figure.png" not in page(results(RUNS, RATES), has_figure=False)
    assert "Costs until" not in page(results(RUNS, RATES, target=None), has_figure=False)


def test_the_same_cost() -> None:
    """A step of grpo-8 costs 1 of everything; one of balance 2 completions, 20 tokens and so on, and its first ten reach .4."""
    found = {row[0]: row[1:] for row in rows(page(results(RUNS, RATES), has_figure=False), "Held-out reward at the same cost")}
    assert found == {
        "cost": ["amount", "grpo-8", "balance"],
        "steps": ["20", "0.500", "0.700 (+0.200, +0.100 to +0.300)"],
        "generated completions": ["20", "0.500", "0.400 (-0.100, -0.200 to +0.000)"],
        "generated tokens": ["20", "0.500", "0.130 (-0.370, -0.470 to -0.270)"],
        "trained completions": ["10", "0.300", "0.700 (+0.400, +0.300 to +0.600)"],
        "trained tokens": ["20", "0.500", "0.220 (-0.280, -0.380 to -0.180)"],
        "seconds": ["2", "0.140", "0.700 (+0.560, +0.460 to +0.760)"],
    }


def warned(found: Results) -> str:
    return "\n".join(warnings_of(found, arms_of(found)))


@pytest.mark.parametrize(
    ("found", "warning"),
    [
        (results(RUNS[:3], {"grpo-8": (3e-5, 1e-4)}), "grpo-8: the best learning rate, 3e-05, is the smallest that was tried"),
        (results(RUNS[:3], {"grpo-8": (1e-5, 3e-5)}), "grpo-8: the best learning rate, 3e-05, is the largest that was tried"),
        (results(RUNS[:8], RATES), "4 of 12 runs are not finished"),
        (results(RUNS[:8], RATES), "balance: no run is finished."),
        (results(RUNS[:2], {"grpo-8": (3e-5,)}), "grpo-8: 2 of 3 seeds are finished at its best learning rate."),
        (results(RUNS[:3], {"grpo-8": (3e-5,)}), "covers the true one with a probability of 75% at most"),
        (results(RUNS[:1], {"grpo-8": (3e-5,)}, [0]), "With one seed there are no intervals"),
        (results(RUNS, RATES), "was chosen on the same seeds"),
        (
            results(RUNS, RATES),
            "In the same number of steps balance generated 2.0 times as many completions as grpo-8: the rewards at the end",
        ),
        (
            results(RUNS[:3], {"grpo-8": (3e-5,)}, budget="21 trained tokens", budget_unit="trained_tokens", budget_amount=21),
            "grpo-8: 3 runs ended at the limit of steps, before the budget of 21 trained tokens was spent.",
        ),
    ],
)
def test_warnings(found: Results, warning: str) -> None:
    assert warning in warned(found)
    assert warning in page(found, has_figure=False)


def test_no_warning_without_a_cause() -> None:
    runs = [result("grpo-8", 1e-5, seed, [0.1, 0.3, 0.4]) for seed in range(6)]
    assert warned(results(runs, {"grpo-8": (1e-5,)}, range(6))) == ""
    assert "same number of steps" not in warned(results(RUNS, RATES, budget_unit="generated_completions"))
    assert "that was tried" not in warned(results(RUNS, RATES))


def test_a_study_without_any_run() -> None:
    text = page(results([], RATES), has_figure=False)
    assert rows(text, "Held-out reward at the end")[1:] == [
        ["grpo-8", "–", "0", "–", "–", "–", "–"], ["balance", "–", "0", "–", "–", "–", "–"],
    ]  # fmt: skip
    assert rows(text, "Costs until a held-out reward of 0.5")[1] == ["grpo-8", *["not reached"] * 6]


def test_the_curves() -> None:
    """Every point is a mean over the same seeds: the curve ends where the first of them does."""
    runs = [result("a", 1e-5, 0, [0.0, 0.2, 0.4], {"seconds": 1.0}), result("a", 1e-5, 1, [0.2, 0.6], {"seconds": 2.0})]
    x, mean, error = curve(runs, "steps")
    assert (x, mean) == ([0.0, 10.0], pytest.approx([0.1, 0.4]))
    assert error == pytest.approx([0.1, 0.2])  # |a - b| / 2
    x, mean, _ = curve(runs, "seconds", num_points=3)
    assert (x, mean) == ([0.0, 10.0, 20.0], pytest.approx([0.1, 0.3, 0.5]))
    assert curve(runs[:1], "steps") == ([0.0, 10.0, 20.0], [0.0, 0.2, 0.4], [0.0, 0.0, 0.0])


def test_the_results_survive_the_file(tmp_path: Path) -> None:
    found = results(RUNS, RATES)
    assert result_files.read(result_files.write(found, tmp_path).parent) == found
    text = (tmp_path / "results.json").read_text()
    assert sum(line.startswith('  {"arm": ') for line in text.splitlines()) == len(RUNS)  # a run is a line
    raw = json.loads(text)
    assert set(raw["runs"][0]) == {"arm", "learning_rate", "seed", "evaluations", "per_prompt"}
    assert set(raw["runs"][0]["evaluations"][0]) == {"step", "reward", "costs"}


def test_a_report_needs_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(STUDY)
    out = tmp_path / "studies" / "sums"
    out.mkdir(parents=True)
    result_files.write(results(RUNS, RATES), out)
    assert cli.main(["study", "s.toml", "--report"]) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "page.md", "figure.png", "progress.png"}
    assert (out / "page.md").read_text() == page(results(RUNS, RATES), has_figure=True)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out == "studies/sums/figure.png\nstudies/sums/progress.png\nstudies/sums/page.md\n"
