"""docs/demo.png is drawn from what is kept of two runs, which differ in their preset alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reinforce_ada.run_report import figure
from reinforce_ada.run_report.reading import PassRates
from scripts import BENCHMARKS, loaded


def test_the_runs_that_are_kept_differ_in_their_preset_alone() -> None:
    grpo, ada = loaded("write_demo.py").runs()
    assert (grpo.label, ada.label) == ("grpo", "reinforce-ada-balance")
    configs = [json.loads(json.dumps(run.header["config"])) for run in (grpo, ada)]
    for config in configs:
        del config["sampling"]["preset"], config["run"]["out"]
    assert configs[0] == configs[1]
    assert [len(run.steps) for run in (grpo, ada)] == [30, 30]
    assert all(run.evals[0]["per_prompt"] == grpo.evals[0]["per_prompt"] for run in (grpo, ada))  # one model, one set of questions


def test_a_run_is_kept_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = loaded("write_demo.py")
    (path, _) = paths = sorted((BENCHMARKS / "demo").glob("*.json"))
    assert len(paths) == 2
    run = script.kept(path)
    monkeypatch.setattr(script, "KEPT", tmp_path)
    monkeypatch.setattr(script, "read_run", lambda folder: run)
    script.keep(Path(path.stem))
    assert (tmp_path / path.name).read_text() == path.read_text()


def test_the_shares_of_a_run_without_early_steps() -> None:
    assert figure.class_shares(PassRates(1, 1, ())).tolist() == [0.0] * 6
