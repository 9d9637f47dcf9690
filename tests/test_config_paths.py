"""What the name of a task means, and where the paths of a configuration file start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reinforce_ada import config
from reinforce_ada.config import beside, kind_of, suffix_of
from reinforce_ada.study.plan import Run, keep
from reinforce_ada.study.settings import read_study

KINDS = [
    ("chain_sum", "name"),
    ("mydata", "name"),
    ("problems.jsonl", "file"),
    ("problems.txt", "file"),  # of no kind that is read, which is said
    ("data/problems.jsonl", "file"),
    ("data/problems.JSON.gz", "file"),
    ("./data", "file"),
    ("../data/x", "file"),
    ("/data/x", "file"),
    ("a/b/c", "file"),
    ("~/x", "file"),
    ("openai/gsm8k", "hub"),
    ("openai/gsm8k:main", "hub"),
    ("HuggingFaceH4/MATH-500", "hub"),
    ("allenai/tulu-v3.1", "hub"),
    ("here/is_one", "file"),
    ("here/is_one:main", "hub"),
    ("here/gone", "hub"),
]


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_the_kind_of_a_task_shows_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, kind: str) -> None:
    (tmp_path / "here/is_one").mkdir(parents=True)
    assert kind_of(task, tmp_path) == kind
    monkeypatch.chdir(tmp_path)
    assert kind_of(task) == kind


@pytest.mark.parametrize(("name", "suffix"), [("A.JSONL.gz", ".jsonl"), ("a.parquet", ".parquet"), ("folder", ""), ("a.b/c", "")])
def test_a_suffix_ignores_case_and_gz(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix_of(Path(name)) == suffix


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a configuration, and what it names beside it."""
    folder = tmp_path / "project"
    (folder / "saved").mkdir(parents=True)
    (folder / "saved/dataset_info.json").write_text("{}")
    (folder / "score_of_project.py").write_text("def score(prompt, completion):\n    return 1.0\n")
    (folder / "task.jsonl").write_text('{"prompt": "q", "answer": 1}\n')
    return folder


def test_paths_of_questions_and_code_start_from_the_folder_of_the_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, expected in [
        ({"task": "task.jsonl"}, {"task": f"{project}/task.jsonl"}),
        ({"task": "saved", "eval_task": "../other.csv"}, {"task": f"{project}/saved", "eval_task": f"{project}/../other.csv"}),
        ({"task": "/data/x.csv", "eval_task": ""}, {"task": "/data/x.csv", "eval_task": ""}),
        ({"task": "chain_sum"}, {"task": "chain_sum"}),
        ({"task": "openai/gsm8k:main"}, {"task": "openai/gsm8k:main"}),
        ({"reward": "score_of_project:score"}, {"reward": f"{project}/score_of_project.py:score"}),
        ({"reward": "./score_of_project.py:score"}, {"reward": f"{project}/score_of_project.py:score"}),
        ({"reward": "json:dumps", "loss": "ppo"}, {"reward": "json:dumps", "loss": "ppo"}),
        ({"reward": "number"}, {"reward": "number"}),
        ({"loss": "losses.py:smooth"}, {"loss": f"{project}/losses.py:smooth"}),
        ({"out": "runs/a", "memory_from": "runs/b", "model": "runs/b/model"},) * 2,  # run folders start from the working folder
        ({"task": 3, "reward": ["x"]},) * 2,  # of the wrong type, which is said elsewhere
    ]:
        assert beside(project, values) == expected
    monkeypatch.chdir(project)
    assert beside(Path(), {"task": "task.jsonl"}) == {"task": str(project / "task.jsonl")}


def test_a_file_is_read_alike_from_every_folder_and_a_flag_starts_from_the_working_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "run.toml").write_text('[task]\ntask = "task.jsonl"\nreward = "./score_of_project.py:score"\n[run]\nout = "runs/a"\n')
    found = []
    for folder in (project, project.parent, Path("/")):
        monkeypatch.chdir(folder)
        found.append(config.load(Path(os.path.relpath(project / "run.toml"))))
    assert found[0] == found[1] == found[2]
    assert (found[0].task.task, found[0].run.out) == (str(project / "task.jsonl"), "runs/a")
    assert config.load(project / "run.toml", {"task": "task.jsonl"}).task.task == "task.jsonl"


def test_the_folder_of_a_run_is_read_as_it_was_written(project: Path) -> None:
    """What an earlier version left relative in it started from the working folder, not from the run's."""
    (project / "config.toml").write_text('[task]\ntask = "task.jsonl"\nreward = "score_of_project:score"\n')
    saved = config.load_saved(project / "config.toml").task
    assert (saved.task, saved.reward) == ("task.jsonl", "score_of_project:score")


STUDY = """
name = "s"
baseline = "a"
seeds = [0]
learning_rates = [1e-3]
budget = {steps = 1}
shared = {model = "tiny", task = "task.jsonl"}
arm = [{name = "a", preset = "grpo", loss = "losses.py:f"}]
"""


def test_a_study_names_its_questions_beside_its_file_and_goes_on_as_it_began(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "study.toml").write_text(STUDY)
    study = read_study(project / "study.toml")
    assert study.shared["task"] == str(project / "task.jsonl")
    assert study.arms[0].keys["loss"] == f"{project}/losses.py:f"
    monkeypatch.chdir(project)
    out = tmp_path / "out"
    earlier, now = Run("a", {"model": "tiny", "task": "task.jsonl"}), Run("a", dict(study.shared))
    keep(out, [earlier])  # the plan of an earlier version, whose paths started from the working folder
    (out / "a").mkdir()
    (out / "a/config.toml").write_text("")
    keep(out, [now])
    monkeypatch.chdir(tmp_path)
    keep(out, [now])
