"""The recipes of examples/recipes: each says what it needs and costs, is read from any folder, and trains the tiny model."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from word_problems import problems

from reinforce_ada import config as configuration
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.names import load_reward
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import configured
from reinforce_ada.training import launch, lineage, models
from reinforce_ada.training.log import read_log
from reinforce_ada.training.task_files import question_of, read_records

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parents[1] / "examples/recipes").glob("*.toml"))
WORD_PROBLEMS = HERE / "word_problems.jsonl"
TINY = {
    "model": "tiny", "dtype": "float32", "device": "cpu", "engine": "transformers", "prompts_per_step": 2, "max_rounds": 1, "max_tokens": 8,
    "max_model_len": 1900, "eval_prompts": 2, "eval_k": 1, "eval_every": 0, "steps": 1, "tokens_per_pass": 2048, "learning_rate": 1e-3,
    "reward_workers": 1,
}  # fmt: skip


def as_math(number: int) -> dict[str, Any]:
    return {"problem": f"What is $\\frac{{{number}}}{{2}}$?", "solution": f"It is $\\boxed{{{number / 2}}}$.", "answer": f"{number / 2}"}


def rows_of(source: str, split: str) -> list[dict[str, Any]]:
    """What the hub has under the names in the recipes, in the form that it has there."""
    if source == "openai/gsm8k:main":
        rows = [json.loads(line) for line in WORD_PROBLEMS.read_text().splitlines()]
        return {"train": rows[:160], "test": rows[160:]}[split]
    assert (source, split) in {("nlile/hendrycks-MATH-benchmark", "train"), ("HuggingFaceH4/MATH-500", "test")}
    return [as_math(n) for n in (range(12) if split == "train" else range(10, 16))]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub in this process, a warm-up of few updates, no figure, and rewards in this process: other tests have those."""

    @contextmanager
    def inline(config: Any, records: Any) -> Iterator[InlineRewards]:
        yield InlineRewards(load_reward(records.reward) if isinstance(records.reward, str) else records.reward)

    monkeypatch.setattr("reinforce_ada.training.task_files.read_hub", lambda task, split: rows_of(task, split or "train"))
    monkeypatch.setattr(models, "build_tiny", functools.partial(models.build_tiny, num_updates=3))
    monkeypatch.setattr(lineage, "WARM_UP_EXAMPLES", 16)  # reasoning-gym takes a tenth of a second for a question of countdown
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    monkeypatch.setattr(launch, "make_rewards", inline)


def test_there_are_four() -> None:
    assert [path.stem for path in RECIPES] == ["countdown", "gsm8k", "math", "own_data"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_takes(path: Path) -> None:
    head = path.read_text().partition("\n[")[0]
    assert [
        name for name in ("model", "questions", "cost", "run here", "needs") if not re.search(rf"^# {name}: ", head, re.MULTILINE)
    ] == []
    assert f"reinforce-ada train --config examples/recipes/{path.name}" in head
    config = configuration.load(path)
    most = config.training.steps * config.sampling.prompts_per_step * configured(config.sampling).cap * config.sampling.max_tokens
    number, unit = re.findall(r"(\d+) (million|thousand) tokens in all", " ".join(head.replace("#", " ").split()))[0]
    assert round(most / {"million": 1e6, "thousand": 1e3}[unit]) == int(number)
    assert f"{config.training.steps} steps of {config.sampling.prompts_per_step} prompts" in head


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_the_tiny_model(
    path: Path, light: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = configuration.load(path)
    launch.train(configuration.load(path, {**TINY, "out": str(tmp_path / "run")}))
    records = read_log(tmp_path / "run/log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [1]
    assert len([r for r in records if r["kind"] == "eval"]) == 2
    saved = configuration.load_saved(tmp_path / "run/config.toml")
    assert saved.task.system_prompt == recipe.task.system_prompt
    with RolloutStore(tmp_path / "run/rollouts.sqlite", read_only=True) as store:
        trained = {question_of(record) for record in store.records()}
    assert trained
    if path.stem == "math":
        said = "2 of 12 training records are left out: part test of HuggingFaceH4/MATH-500 has their questions too"
        assert said in capsys.readouterr().out
        assert not trained & {as_math(n)["problem"] for n in range(10, 16)}


# -------------------- the form of GSM8K


def test_the_word_problems_are_those_of_their_generator() -> None:
    made = subprocess.run([sys.executable, str(HERE / "word_problems.py")], capture_output=True, text=True, check=True).stdout
    assert WORD_PROBLEMS.read_text() == made
    assert len({record["question"] for record in problems(200)}) == 200
    for record in islice(problems(200), 200):
        *rationale, last = record["answer"].split("\n")
        assert len(rationale) == 2
        for left, right in re.findall(r"<<(.+?)=(\d+)>>", record["answer"]):
            assert eval(left) == int(right)
        assert last == f"#### {int(right):,}"


def number_after_the_marks(prompt: Any, completion: str) -> float:
    """Partial credit, so that a tiny model has a signal: the share of the gold number's digits that the completion has."""
    gold = prompt.data["answer"].rpartition("####")[2].strip()
    return sum(digit in completion for digit in gold) / len(gold)


@pytest.fixture
def steps(light: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    monkeypatch.chdir(tmp_path)

    def train(**values: Any) -> list[dict[str, Any]]:
        recipe = next(path for path in RECIPES if path.stem == "gsm8k")
        given = {**TINY, "reward": "test_recipes:number_after_the_marks", "out": str(tmp_path / "run"), **values}
        launch.train(configuration.load(recipe, given))
        return [r for r in read_log(tmp_path / "run/log.jsonl") if r["kind"] == "step"]

    return train


def test_the_recipe_of_gsm8k_trains_on_questions_of_its_form(steps: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    records = steps(steps=3, prompts_per_step=3, preset="grpo", group_size=3, max_rounds=None, max_tokens=6, positive_threshold=0.4)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(r["num_completions_kept"] == 9 and 0 < r["completion_length_mean"] <= 6 for r in records)
    test = {r["question"] for r in rows_of("openai/gsm8k:main", "test")}
    with RolloutStore(tmp_path / "run/rollouts.sqlite", read_only=True) as store:
        trained = list(store.records())
    assert not {question_of(r) for r in trained} & test
    assert all("####" in r["answer"] for r in trained)


def test_the_file_is_read_as_it_is() -> None:
    records = read_records(WORD_PROBLEMS, needs_answer=True)
    assert [dict(r) for r in records] == list(problems(200))
