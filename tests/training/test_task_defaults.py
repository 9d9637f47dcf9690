"""What a task starts with: the demo's settings for generated questions, none for a person's own, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from loaded_tasks import load_task
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.training.loss import RunLoss
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.training.task_defaults import completed, is_generated
from reinforce_ada.training.trainer import compared, fingerprint

DEMO = ("Reply with one number and nothing else.", 1, 12)
# The task as given, what else is given, and system prompt, worked examples and max_tokens of the run.
CASES: list[tuple[str, dict[str, Any], tuple[str, int, int]]] = [
    ("chain_sum", {}, DEMO),
    ("gcd", {}, DEMO),
    ("chain_sum", {"max_model_len": 4096}, DEMO),
    ("chain_sum", {"system_prompt": "", "num_examples": 0, "max_tokens": 64}, ("", 0, 64)),
    ("own.jsonl", {}, ("", 0, 256)),
    ("own.jsonl", {"max_model_len": 4096}, ("", 0, 2048)),
    ("own.jsonl", {"max_model_len": 3}, ("", 0, 1)),
    ("own.jsonl", {"system_prompt": "Think.", "num_examples": 2, "max_tokens": 12}, ("Think.", 2, 12)),
    ("data/own.parquet", {}, ("", 0, 256)),
    ("openai/gsm8k:main", {}, ("", 0, 256)),
    ("saved", {}, ("", 0, 256)),
]


@pytest.mark.parametrize(("task", "given", "expected"), CASES)
def test_the_defaults_are_those_of_the_kind_of_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, given: dict[str, Any], expected: tuple[str, int, int]
) -> None:
    (tmp_path / "saved").mkdir()
    monkeypatch.chdir(tmp_path)
    config, said = completed(configuration.load(None, {"task": task, **given}))
    assert (config.task.system_prompt, config.task.num_examples, config.sampling.max_tokens) == expected
    assert completed(config) == (config, "")  # the folder of a run keeps them, and nothing is left to say
    assert RunLoss.from_config(configuration.load(None, {"task": task, **given})).norm_length == expected[2]
    assert bool(said) == (expected[0] == "" and "max_tokens" not in given)


def test_what_is_chosen_for_ones_own_questions_is_said() -> None:
    _, said = completed(configuration.load(None, {"task": "own.jsonl", "max_model_len": 1000}))
    chosen = "no system prompt (--system-prompt), no worked examples (--num-examples), max_tokens 500, half of max_model_len 1000"
    assert said == f"defaults for your own questions: {chosen} (--max-tokens)"
    _, said = completed(configuration.load(None, {"task": "own.jsonl", "max_tokens": 9, "system_prompt": ""}))
    assert said == "defaults for your own questions: no worked examples (--num-examples)"


def test_a_folder_is_a_task_of_ones_own_unless_a_generator_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_generated("mine")
    for name in ("mine", "gcd"):
        (tmp_path / name).mkdir()
    assert [is_generated(name) for name in ("mine", "./mine", "gcd", "./gcd", "org/name", "a.csv")] == [False, False, True] + [False] * 3


def test_the_demo_needs_room_for_its_completions() -> None:
    with pytest.raises(InputError, match="max_tokens = 12 with max_model_len = 12; room for the prompt"):
        completed(configuration.load(None, {"max_model_len": 12}))


def test_the_prompts_of_the_demo_are_what_they_were() -> None:
    task = load_task(configuration.load().task, tiny_tokenizer(), 0, 0)
    system, user, answer, question, rest = task.held_out[0].text.split("<end>")
    assert system == "s|Reply with one number and nothing else."
    assert (user[:2], answer[:2], question[:2], rest) == ("u|", "a|", "u|", "a|")


# -------------------- runs of earlier versions


OLD_KEYS = {"system_prompt": "Reply with one number and nothing else.", "num_examples": 1}  # as every run folder has them


def test_a_run_of_an_earlier_version_keeps_what_it_began_with(tmp_path: Path) -> None:
    """Its folder has all keys of then, and its store the fingerprint of then: no key that came later may change either."""
    new = {"split", "eval_task", "eval_split", "prompt_column", "answer_column", "template_options"}
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "q", "answer": 1}))
    then = configuration.load(None, {"task": str(tmp_path / "own.jsonl"), **OLD_KEYS, "max_tokens": 12})
    store = fingerprint(then)
    store["task"] = {key: value for key, value in store["task"].items() if key not in new}
    old = dataclasses.asdict(then)
    folder = tmp_path / "config.toml"
    folder.write_text(configuration.dump(then))
    now, said = completed(configuration.load_saved(folder))
    assert said == ""
    assert dataclasses.asdict(now) == old
    assert compared(store) == compared(fingerprint(now))


def test_the_demo_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    then = configuration.load(None, {**OLD_KEYS, "max_tokens": 12})
    assert completed(configuration.load())[0] == then
    assert compared(fingerprint(completed(configuration.load())[0])) == compared(fingerprint(then))
