"""The file of a study: what it means, and each thing that is refused in one line before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_world import STUDY, changed

from reinforce_ada import cli
from reinforce_ada.study.settings import read_study


def test_the_study_is_read(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(STUDY)
    study = read_study(tmp_path / "s.toml")
    assert (study.name, study.seeds, study.baseline, study.target, study.shared) == ("sums", (0, 1), "grpo-8", 0.5, {"model": "tiny"})
    assert [(arm.name, arm.keys, arm.learning_rates) for arm in study.arms] == [
        ("grpo-8", {"preset": "grpo"}, (1e-3, 1e-2)), ("balance", {"preset": "reinforce-ada-balance"}, (1e-2,)),
    ]  # fmt: skip
    assert (str(study.budget), study.budget.keys(), study.budget.completions_per_step) == ("3 steps", {"steps": 3}, None)


@pytest.mark.parametrize("unit", ["generated_completions", "generated_tokens", "trained_completions", "trained_tokens"])
def test_other_budgets(tmp_path: Path, unit: str) -> None:
    (tmp_path / "s.toml").write_text(changed(("steps = 3", f"{unit} = 20000\ncompletions_per_step = 96")))
    budget = read_study(tmp_path / "s.toml").budget
    words = unit.replace("_", " ")
    assert budget.keys() == {"steps": 10_000, "budget": f"20000 {words}"}
    assert (str(budget), budget.completions_per_step) == (f"20,000 {words}", 96)


ARM = 'name = "balance"\n'
REFUSALS = [
    ([("seeds = [0, 1]", "seed = [0, 1]")], "study, the file: unknown key 'seed'", "did you mean 'seeds'?"),
    ([('name = "sums"\n', "")], "s.toml lacks name", "name, seeds, budget, baseline and arms"),
    ([('baseline = "grpo-8"\n', "")], "s.toml lacks baseline", "baseline and arms"),
    ([('name = "sums"', 'name = "../sums"')], "study: name = '../sums'", "since it names a folder"),
    ([('name = "sums"', "name = 3")], "study: name = 3", "a name of letters"),
    ([("seeds = [0, 1]", "seeds = 0")], "study: seeds = 0", "a list of integers"),
    ([("seeds = [0, 1]", "seeds = []")], "study: seeds = []", "a list of integers"),
    ([("seeds = [0, 1]", "seeds = [0, true]")], "study: seeds = True", "an integer from 0"),
    ([("seeds = [0, 1]", "seeds = [-1]")], "study: seeds = -1", "an integer from 0"),
    ([("seeds = [0, 1]", "seeds = [1, 1]")], "study: seed 1 is there twice", "each once"),
    ([("[1e-3, 1e-2]", '["a"]')], "study: learning_rates with 'a'", "numbers above 0 and up to 1"),
    ([("[1e-3, 1e-2]", "[0.0]")], "study: learning_rates with 0.0", "numbers above 0"),
    ([("[1e-3, 1e-2]", "[nan]")], "study: learning_rates with nan", "numbers above 0"),
    ([("[1e-3, 1e-2]", "[1e-3, 0.001]")], "study: learning rate 0.001 is there twice", "each once"),
    ([("learning_rates = [1e-3, 1e-2]\n", "")], "study: arm 'grpo-8' without learning rates", "in the arm or for all"),
    ([("steps = 3", "")], "study: [budget] with nothing that ends a run", "exactly one of steps, generated_completions"),
    ([("steps = 3", "steps = 3\ntrained_tokens = 9")], "study: [budget] with steps and trained_tokens", "exactly one of"),
    ([("steps = 3", "step = 3")], "study, [budget]: unknown key 'step'", "did you mean 'steps'?"),
    ([("steps = 3", "steps = 0")], "study: budget steps = 0", "an integer from 1"),
    ([("steps = 3", "steps = 3.0")], "study: budget steps = 3.0", "an integer from 1"),
    ([("steps = 3", "steps = 3\ncompletions_per_step = 0")], "study: budget completions_per_step = 0", "an integer from 1"),
    ([("[budget]\nsteps = 3\n", ""), ("baseline", "budget = 3\nbaseline")], "study: budget = 3", "a table [budget]"),
    ([("reward = 0.5", "reward = 1.5")], "study: target reward = 1.5", "the share of correct completions"),
    ([("reward = 0.5", "")], "study: [target] without reward", "such as reward = 0.5"),
    ([("reward = 0.5", "rewards = 0.5")], "study, [target]: unknown key 'rewards'", "did you mean 'reward'?"),
    ([('baseline = "grpo-8"', 'baseline = "grpo"')], "study: unknown baseline 'grpo'", "did you mean 'grpo-8'?"),
    ([('baseline = "grpo-8"', "baseline = [1]")], "study: unknown baseline '[1]'", "known: balance, grpo-8"),
    ([('model = "tiny"', "modl = 1")], "study, [shared]: unknown key 'modl'", "did you mean 'model'?"),
    ([('model = "tiny"', "seed = 1")], "study: [shared] sets seed", "what the study sets is not among them"),
    ([('model = "tiny"', "steps = 1")], "study: [shared] sets steps", "what the study sets"),
    ([('model = "tiny"', 'push_to_hub = "me/x"')], "study: [shared] sets push_to_hub", "what the study sets"),
    ([('model = "tiny"', 'out = "x"')], "study: [shared] sets out", "what the study sets"),
    ([('model = "tiny"', "learning_rate = 1e-3")], "study: [shared] sets learning_rate", "what the study sets"),
    ([('model = "tiny"', 'preset = "grpo"')], "study: [shared] sets preset", "what the study sets"),
    ([('model = "tiny"', 'budget = "9 trained tokens"')], "study: [shared] sets budget", "what the study sets"),
    ([('model = "tiny"', "eval_prompts = 0")], "study: [shared] eval_prompts = 0", "held-out prompts"),
    ([("steps = 3", "trained_tokens = 9"), (ARM, ARM + 'lr_schedule = "linear"\n')], "lr_schedule linear with a budget", "step is known"),
    ([('model = "tiny"', "eval_k = 1")], "study: [shared] eval_k = 1", "at least 2, without which the spread"),
    ([('name = "sums"', 'name = "sums"\nremembered = 65')], "study: remembered = 65", "an integer from 0 to 64"),
    ([('name = "sums"', 'name = "sums"\nremembered = 8.0')], "study: remembered = 8.0", "an integer from 0 to 64"),
    ([('model = "tiny"', "eval_k = 0")], "config [task]: eval_k = 0", "an integer from 1 to 2048"),
    ([('model = "tiny"', 'temperature = "hot"')], "config [sampling]: temperature = 'hot'", "a number"),
    ([("steps = 3", "steps = 3\ncompletions_per_step = 9"), ('model = "tiny"', "prompts_per_step = 4")],
     "[shared] sets prompts_per_step", "what the study sets"),
    ([(ARM, "")], "study: an [[arm]] without name", 'name = "..."'),
    ([(ARM, 'name = "grpo-8"\n')], "study: arm 'grpo-8' is there twice", "each once"),
    ([(ARM, 'name = "a/b"\n')], "study: arm name = 'a/b'", "since it names a folder"),
    ([(ARM, 'name = "untrained"\n')], "study: arm 'untrained'", "another name"),
    ([('preset = "grpo"\n', "")], "study: arm 'grpo-8' without preset", "docs/policies.md"),
    ([('preset = "grpo"', 'preset = "gpro"')], "config [sampling]: preset = 'gpro'", "did you mean 'grpo'?"),
    ([('preset = "grpo"', 'preset = "grpo"\nround_size = 4')], "preset 'grpo': unknown override 'round_size'", "known:"),
    ([(ARM, ARM + "group_sise = 4\n")], "study, arm 'balance': unknown key 'group_sise'", "did you mean 'group_size'?"),
    ([(ARM, ARM + "seed = 4\n")], "study: arm 'balance' sets seed", "what the study sets"),
    ([(ARM, ARM + 'task = "gcd"\n')], "study: arm 'balance' sets task", "[shared]: an arm differs from the others in"),
    ([(ARM, ARM + "temperature = 0.5\n")], "study: arm 'balance' sets temperature", "[shared]"),
    ([(ARM, ARM + "top_p = 0.9\n")], "study: arm 'balance' sets top_p", "[shared]"),
    ([(ARM, ARM + "positive_threshold = 0.5\n")], "study: arm 'balance' sets positive_threshold", "[shared]"),
    ([(ARM, ARM + "group_size = 0\n")], "config [sampling]: group_size = 0", "an integer from 1 to 1000000"),
    ([("learning_rates = [1e-2]", "learning_rates = []")], "study: arm 'balance': learning_rates = []", "a list of numbers"),
    ([("[[arm]]", "[arm]"), ("[[arm]]", "[arm.x]")], "study: arm = {", "one table [[arm]] for each arm"),
    ([("[[arm]]", "[[arm")], "is not TOML", "a valid TOML file"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "given", "needed"), REFUSALS, ids=[given for _, given, _ in REFUSALS])
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: list[tuple[str, str]], given: str,
    needed: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(changed(*changes))
    assert cli.main(["study", "s.toml"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert given in error
    assert needed in error
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


@pytest.mark.parametrize("shard", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", "1.0/2", "١/٢", "1/" + "9" * 5000])
def test_shards_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shard: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(STUDY)
    assert cli.main(["study", "s.toml", f"--shard={shard}"]) == 2
    assert capsys.readouterr().err.startswith("reinforce-ada: study: --shard ")
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


@pytest.mark.parametrize("jobs", ["0", "-1", "1025"])
def test_jobs_that_are_no_number_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(STUDY)
    assert cli.main(["study", "s.toml", f"--jobs={jobs}"]) == 2
    said = capsys.readouterr().err
    assert "--jobs" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"runs": []}', '{"runs": [{}]}', "\x00", '{"name": NaN}'])
def test_a_report_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    (tmp_path / "s.toml").write_text(STUDY)
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert cli.main(["study", str(tmp_path / "s.toml"), "--report", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "results.json" in error
    assert "run the study without --report" in error


def test_the_help_has_a_study_that_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["study", "--help"])
    example = capsys.readouterr().out.partition("a study file:\n")[2].partition("\nEverything")[0]
    (tmp_path / "s.toml").write_text(example)
    study = read_study(tmp_path / "s.toml")
    assert [arm.name for arm in study.arms] == ["grpo-8", "balance"]
    assert study.budget.completions_per_step == 96
