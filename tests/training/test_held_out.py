"""Held-out questions of another part, file or dataset: never trained on, however many are evaluated; and datasets of the hub."""

from __future__ import annotations

import importlib.util
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from reinforce_ada.config import TaskConfig
from reinforce_ada.errors import InputError
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.training.task_datasets import read_folder, read_hub
from reinforce_ada.training.task_files import question_of
from reinforce_ada.training.tasks import Records, load_records, name_of, render

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


def questions(*numbers: int) -> list[dict[str, Any]]:
    return [{"problem": f"q{i}", "solution": str(i)} for i in numbers]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that `datasets` saved: 20 training questions, and 10 test questions of which 3 are among those."""
    folder = tmp_path_factory.mktemp("saved") / "sums"
    parts = {"train": questions(*range(20)), "test": questions(*range(17, 27))}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(folder)
    return str(folder)


def config(task: str, **values: Any) -> TaskConfig:
    return TaskConfig(task=task, **{"prompt_column": "problem", "answer_column": "solution", "eval_prompts": 4, **values})


def trained(records: Records) -> set[str]:
    return {question_of(records.train.at(i)[1]) for i in range(records.train.size)}


def test_the_test_part_is_held_out_and_none_of_it_is_trained_on(saved: str) -> None:
    records = load_records(config(saved, eval_split="test"), 0, 0)
    assert len(records.held_out) == 4
    assert {question_of(r) for r in records.held_out} < {f"q{i}" for i in range(17, 27)}
    assert trained(records) == {f"q{i}" for i in range(17)}
    assert records.notes == (f"3 of 20 training records are left out: part test of {saved} has their questions too",)
    task = render(records, config(saved, eval_split="test"), tiny_tokenizer(), longest=100)
    assert {p.data["problem"] for p in islice(task.train(0), 40)} == trained(records)
    assert task.name == "sums"


def test_the_split_is_that_of_the_data_seed_and_a_file_may_hold_it(saved: str, tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", questions(*range(17, 27)))
    for other in ({"eval_split": "test"}, {"eval_task": path}, {"eval_task": saved}):
        found = [load_records(config(saved, **other), seed, data_seed) for seed, data_seed in ((0, 0), (1, 0), (0, 1))]
        held_out = [[question_of(r) for r in records.held_out] for records in found]
        assert held_out[0] == held_out[1] != held_out[2]
        assert {frozenset(trained(records)) for records in found} == {frozenset(f"q{i}" for i in range(17))}


def test_worked_examples_come_from_the_training_part(saved: str) -> None:
    records = load_records(config(saved, eval_split="test", num_examples=3, eval_prompts=10), 0, 0)
    shown = {question_of(r) for r in records.examples}
    assert len(shown) == 3
    assert not shown & (trained(records) | {question_of(r) for r in records.held_out})
    assert len(records.held_out) == 10


def test_fewer_held_out_questions_than_wanted_are_said(saved: str) -> None:
    records = load_records(config(saved, eval_split="test", eval_prompts=64), 0, 0)
    assert records.notes[1] == f"10 held-out questions instead of 64: part test of {saved} has no more"


def test_the_digest_knows_both_sources(saved: str, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    found = {load_records(config(saved), 0, 0).digest}
    for numbers in ((30, 31), (30, 32)):
        found.add(load_records(config(saved, eval_task=write(path, questions(*numbers))), 0, 0).digest)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split": "train[:3]"}, "sums has no part 'train[:3]'; one of its parts: train, test; --split and --eval-split"),
        ({"eval_split": "validation"}, "has no part 'validation'; one of its parts: train, test"),
        ({"eval_split": "train"}, "part 'train' is both trained on and held out; two different parts"),
        ({"split": "test", "eval_split": "test"}, "part 'test' is both trained on and held out"),
        ({"eval_task": "chain_sum"}, "eval_task = 'chain_sum'; a file, a folder or a dataset of the hub"),
        ({"eval_split": "test", "num_examples": 17}, "has 17 records; more than num_examples = 17"),
        ({"eval_prompts": 20}, "has 20 records; more than num_examples + eval_prompts = 20; --eval-prompts holds fewer out"),
    ],
)
def test_what_cannot_be_held_out_is_one_line(saved: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"^task: ") as caught:
        load_records(config(saved, **values), 0, 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["split", "eval_task", "eval_split", "prompt_column", "answer_column"])
def test_generated_questions_have_no_parts_and_columns(key: str) -> None:
    with pytest.raises(InputError, match=rf"^task: {key} = 'x' with the generated task chain_sum; questions of your own$"):
        load_records(TaskConfig(**{key: "x"}), 0, 0)


def test_held_out_records_are_checked_for_the_reward_too(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.jsonl", questions(1, 2, 3)), tmp_path / "b.jsonl"
    other.write_text('{"problem": "?", "solution": "none that is known"}\n')
    with pytest.raises(InputError, match=rf"^task: {other}, record 1; reward number"):
        load_records(config(path, eval_task=str(other), eval_split="", reward="number"), 0, 0)


def test_all_questions_held_out_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(1, 2, 3))
    with pytest.raises(InputError, match=r"a\.jsonl has 0 records"):
        load_records(config(path, eval_task=str(path), eval_split=""), 0, 0)


# -------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the hub: the real `load_dataset` finds org/sums in a folder, as it would in a clone; any other name is looked up."""
    folder = tmp_path / "clone"
    for name, numbers in (("train", range(20)), ("test", range(17, 27))):
        (folder / "main").mkdir(parents=True, exist_ok=True)
        write(folder / f"main/{name}.jsonl", questions(*numbers))
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: main/train.jsonl\n  - split: test\n    path: main/test.jsonl\n"
        for name in ("main", "other")
    )
    (folder / "README.md").write_text(card + "---\n")
    load = datasets.load_dataset

    def redirected(name: str, *args: Any, **more: Any) -> Any:
        return load(str(folder) if name == "org/sums" else name, *args, **more, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", redirected)
    datasets.disable_progress_bars()
    return folder


def test_a_dataset_of_the_hub_is_read_by_its_configuration_and_parts(hub: Path) -> None:
    records = load_records(config("org/sums:main", split="train[:18]", eval_split="test"), 0, 0)
    assert trained(records) == {f"q{i}" for i in range(17)}
    assert len(records.held_out) == 4
    again = load_records(config("org/sums:other", split="train[:18]", eval_split="test"), 0, 0)
    assert again.digest == records.digest  # of the records, wherever the cache has them
    assert name_of("org/sums:main") == "sums"


@pytest.mark.parametrize(
    ("task", "values", "said"),
    [
        ("org/sums", {}, "cannot load org/sums, part 'train': Config name is missing. Please pick one among the available configs: "),
        ("org/sums:none", {}, "BuilderConfig 'none' not found. Available: ['main', 'other']"),
        ("org/sums:main", {"split": "dev"}, "Unknown split \"dev\". Should be one of ['train', 'test']"),
        (
            "org/absent",
            {},
            "cannot load org/absent, part 'train': Couldn't reach 'org/absent' on the Hub",
        ),  # HF_HUB_OFFLINE: tests/conftest.py
        ("org/absent", {}, "; no file or folder org/absent is here either"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub: Path, task: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"^task: ") as caught:
        load_records(config(task, **values), 0, 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_library_is_named_with_its_extra(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = r'^task: datasets is not installed; pip install "reinforce-ada\[datasets\]"; it reads '
    with pytest.raises(InputError, match=said + r"org/sums:main$"):
        read_hub("org/sums:main", "")
    with pytest.raises(InputError, match=said):
        read_folder(Path(saved), "", "")


# -------------------- answers with a rationale


def rationales(count: int) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": f"It is {i}.\n#### {i}" if i < count else str(i)} for i in range(10)]


def test_answers_with_a_rationale_need_a_reward_that_reads_them(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm8k.jsonl", rationales(6))
    with pytest.raises(InputError, match=r"6 of 10 answers of .* hold a rationale, such as 'It is 0. #### 0'; .*####; --reward number$"):
        load_records(TaskConfig(task=path, eval_prompts=2), 0, 0)
    with_reward = load_records(TaskConfig(task=path, eval_prompts=2, reward="m:f"), 0, 0)
    assert sum("####" in with_reward.train.at(i)[1]["answer"] for i in range(8)) >= 4
    load_records(TaskConfig(task=write(tmp_path / "few.jsonl", rationales(5)), eval_prompts=2), 0, 0)


@pytest.mark.parametrize(("reward", "is_refused"), [("", True), ("number", True), ("my_rewards:score", False)])
def test_only_a_function_of_ones_own_may_score_without_an_answer(tmp_path: Path, reward: str, is_refused: bool) -> None:
    task = TaskConfig(task=write(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "r"}]), eval_prompts=0, reward=reward)
    if not is_refused:
        assert load_records(task, 0, 0).train.size == 2
        return
    with pytest.raises(InputError, match="has no answer"):
        load_records(task, 0, 0)
