"""The script of docs/trl.md and the example run as they stand."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from trl_runs import data, grpo_trainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # TRL's default, where there is no GPU


def test_the_script_of_the_documentation_runs(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = grpo_trainer().GRPOConfig
    monkeypatch.setattr("trl.GRPOConfig", partial(config, use_cpu=True, bf16=False, max_completion_length=8))  # the defaults want a GPU
    (script,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/trl.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {"model": str(model_folder), "train": data(8)}
    exec(compile(script, "trl.md", "exec", dont_inherit=True), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 3
    assert trainer.sampling_result.metrics["num_prompts"] == 8


def test_the_settings_of_the_documentation_are_those_of_trl():
    table = (ROOT / "docs/trl.md").read_text().partition("\n## Your settings\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")][1:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 10
    assert named <= {field.name for field in fields(grpo_trainer().GRPOConfig)}


@pytest.mark.parametrize("arguments", [["--steps", "2"], ["--steps", "1", "--plain"]])
def test_the_example_trains(monkeypatch, arguments):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    grpo_trainer()  # TRL as the other tests import it
    import trl_adaptive

    found = trl_adaptive.main(arguments)
    assert 0 < found["before"] < 1
    assert 0 < found["after"] < 1
    assert found["signal"] > (0.2 if "--plain" in arguments else 0.6)
