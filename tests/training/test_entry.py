"""`reinforce_ada.train` (entry, in_memory): the same run as from the command line, from records and functions of a program."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_rewards
from toy_runs import trained

import reinforce_ada
from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.training import launch, models
from reinforce_ada.training.entry import TrainedRun
from reinforce_ada.training.log import read_log
from reinforce_ada.types import Prompt

EXAMPLE = Path(__file__).parents[2] / "examples/train_in_python.py"
RECORDS = [{"prompt": f"{a} + {b} =", "answer": a + b} for a in range(4) for b in range(4)]
SETTINGS = {
    "dtype": "float32", "device": "cpu", "engine": "transformers", "num_examples": 0, "eval_prompts": 2, "eval_k": 2, "preset": "grpo",
    "group_size": 2, "prompts_per_step": 3, "steps": 2, "max_tokens": 3, "max_model_len": 100, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry") / "llama"
    models.build_tiny(folder, models.tiny_tokenizer([r["prompt"] for r in RECORDS]), [("1 + 1 =", "2")], seed=0, num_updates=1)
    return folder


@pytest.fixture(autouse=True)
def _without_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "finish", lambda out, display: None)


def train(llama: Path, out: Path, data: Any = RECORDS, reward: Any = toy_rewards.even_length, **more: Any) -> TrainedRun:
    return reinforce_ada.train(llama, data, reward, out=out, **{**SETTINGS, **more})


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "finish", lambda out, display: None)
        return train(llama, tmp_path_factory.mktemp("entry") / "run")


# -------------------- the same run


def test_it_is_the_run_of_the_command_line(llama: Path, run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    values = {**SETTINGS, "model": llama, "task": tmp_path / "task.jsonl", "reward": "toy_rewards:even_length", "out": tmp_path / "run"}
    assert cli.main(["train", *(text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value)))]) == 0
    assert trained(tmp_path / "run") == trained(run.path)
    assert len(trained(run.path)) == 2


def test_the_result_shows_what_the_folder_has(run: TrainedRun) -> None:
    log = read_log(run.path / "log.jsonl")
    assert run.history == [r for r in log if r["kind"] == "step"]
    assert run.before == next(r for r in log if r["kind"] == "eval" and r["step"] == 0)
    assert run.after == next(r for r in log if r["kind"] == "eval" and r["step"] == 2)
    first, last = (f"{e['avg_at_k']:.3f} ± {e['stderr']:.3f}" for e in (run.before, run.after))
    assert repr(run) == f"<TrainedRun {run.path}: 2 steps, held-out Avg@2 {first} → {last}>"
    module, tokenizer = run.load()
    assert module.config.vocab_size == len(tokenizer)
    assert run.model == run.path / "model"


def test_a_run_without_evaluations_has_a_result(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "run"}\n{"kind": "step", "step": 1}\n')
    assert repr(TrainedRun(tmp_path)) == f"<TrainedRun {tmp_path}: 1 steps>"


# -------------------- resuming


def test_it_resumes_by_one_rule_and_from_the_command_line(llama: Path, run: TrainedRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(llama, out, steps=1, resume=True)  # there is nothing yet: it begins
    assert [r["step"] for r in first.history] == [1]
    with pytest.raises(InputError, match=rf"^train: {out} holds a run already; an empty folder; --resume {out} goes on with it"):
        train(llama, out)
    changed = [*RECORDS[:-1], {"prompt": "new", "answer": 0}]
    with pytest.raises(InputError, match=r"^train: the records are not those with which the run began, which are in .*run/data.jsonl"):
        train(llama, out, changed, resume=True)
    with pytest.raises(InputError, match=r"^RolloutStore: .* was made with task.reward=toy_rewards:even_length \(now test_entry:"):
        train(llama, out, reward=lambda prompt, completion: 0.0, resume=True)
    with pytest.raises(InputError, match=r"was made with sampling.group_size=2 \(now 3\)"):
        train(llama, out, group_size=3, resume=True)
    assert cli.main(["train", "--resume", str(out), "--steps", "2"]) == 0
    assert trained(out) == trained(run.path)
    later = reinforce_ada.train(llama, RECORDS, toy_rewards.even_length, out=out, resume=True)  # as it is: settings are the run's
    assert trained(later.path) == trained(run.path)


def test_a_reward_of_the_program_and_a_callback(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = "3"

    def score(prompt: Prompt, completion: str) -> float:
        return float(completion.strip() == right) + 0.5 * (len(completion) % 2)

    def stop(record: Mapping[str, Any], view: Any) -> None:
        if record["kind"] == "step":
            raise reinforce_ada.StopTraining

    questions = [{"prompt": r["prompt"]} for r in RECORDS]
    found = train(llama, tmp_path / "run", questions, score, callbacks=[stop], eval_prompts=0)
    assert len(found.history) == 1
    assert found.before is found.after is None
    named = "test_entry:test_a_reward_of_the_program_and_a_callback.<locals>.score"
    assert configuration.load(found.path / "config.toml").task.reward == named
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(found.path)]) == 2  # that program alone has the reward
    assert f"reward {named!r}" in capsys.readouterr().err
    assert len(train(llama, found.path, questions, score, resume=True, eval_prompts=0).history) == 2


# -------------------- data


def test_a_dataset_is_its_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "1 + 1 =", "answer": 2, "hint": None}, {"prompt": "é?", "answer": 3, "hint": "x"}]
    kept = []
    monkeypatch.setattr(launch, "train", lambda config, resume, given: kept.append((given.records, config.task.task)))
    for data in (rows, datasets.Dataset.from_list(rows), iter(rows)):
        train(Path("tiny"), tmp_path / "run", data)
    lines = '{"prompt": "1 + 1 =", "answer": 2}\n{"prompt": "é?", "answer": 3, "hint": "x"}\n'
    assert kept == [(lines, str(tmp_path / "run/data.jsonl"))] * 3
    with pytest.raises(InputError, match=r"^train: the data are a DatasetDict with the parts train, test; an iterable of"):
        train(Path("tiny"), tmp_path / "run", datasets.DatasetDict(dict.fromkeys(("train", "test"), datasets.Dataset.from_list(rows))))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "train: the data hold no records; at least one"),
        (["text"], "task: data, record 1 is no object"),
        ([{"prompt": "q", "answer": 1}, {"question": " "}], "task: data, record 2 has no prompt: it is empty"),
        ([{"prompt": "q"}], "task: data, record 1 has no answer"),
        ([{"prompt": "q", "answer": 1, "more": {2}}], r"train: data, record 1 cannot be written as JSON \(Object of type set"),
        ([{"prompt": "q", "answer": 1, "more": math.nan}], "train: data, record 1 cannot be written as JSON"),
        ([{"prompt": "\ud800", "answer": 1}], "train: data, record 1 cannot be written as JSON"),
        (7, "train: the data are a int"),
        ("gone.jsonl", "task: cannot read gone.jsonl"),
    ],
)
def test_data_that_cannot_be_used_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{said}"):
        train(Path("tiny"), tmp_path / "run", data, "")
    assert list(tmp_path.iterdir()) == []


def test_too_few_records_leave_no_folder(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.jsonl has 2 records; more than num_examples \+ eval_prompts = 2; --eval-prompts"):
        train(llama, tmp_path / "run", RECORDS[:2])
    assert list(tmp_path.iterdir()) == []


def test_records_may_have_other_columns_and_a_moved_run_still_finds_them(llama: Path, tmp_path: Path) -> None:
    renamed = [{"problem": r["prompt"], "solution": r["answer"]} for r in RECORDS]
    train(llama, tmp_path / "run", renamed, prompt_column="problem", answer_column="solution", steps=0)
    (tmp_path / "run").rename(tmp_path / "moved")
    saved = configuration.load_saved(tmp_path / "moved/config.toml")
    assert saved.task.task == str(tmp_path / "moved/data.jsonl")
    assert [json.loads(line) for line in Path(saved.task.task).read_text().splitlines()] == renamed


def test_adapters_are_loaded_around_their_base_model(llama: Path, tmp_path: Path) -> None:
    run = train(llama, tmp_path / "run", lora_rank=2, steps=1)
    module, _ = run.load()
    assert any("lora_A" in name for name, _ in module.named_parameters())
    assert "library_name: peft" in (run.model / "README.md").read_text()


# -------------------- other arguments


async def later(prompt: Prompt, completion: str) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stepz": 3}, r"config: unknown key 'stepz'; .*; did you mean 'steps'\?"),
        ({"steps": "many"}, "config .training.: steps = 'many'"),
        ({"task": "gcd"}, "train: task= among the settings; the argument data"),
        ({"model": SimpleNamespace()}, r"train: the model is a SimpleNamespace; a name or a folder; save_pretrained\(folder\)"),
        ({"model": "./gone"}, "model: './gone' is no folder"),
        ({"reward": later}, "reward: test_entry:later is an async function"),
        ({"reward": len}, "reward: builtins:len"),
        ({"reward": "gone:score"}, "--reward: reward 'gone:score': No module named 'gone'"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_line(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    values = {"model": "tiny", "data": RECORDS, "reward": "", "out": tmp_path / "run", **SETTINGS, **arguments}
    with pytest.raises(InputError, match=f"^{said}") as error:
        reinforce_ada.train(**values)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# -------------------- the example


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a base model that is barely warmed up, and one step."""
    build, settings = models.build_tiny, []

    def short(config: Any, resume: Any, given: Any) -> None:
        settings.append(config)
        values = {key: value for section in ("model", "task", "engine") for key, value in vars_of(config, section).items()}
        values |= {**SETTINGS, "steps": 1, "out": config.run.out, "lr_schedule": config.training.lr_schedule}
        run_it(configuration.load(None, values), resume, given)

    run_it = launch.train
    monkeypatch.setattr(models, "build_tiny", lambda *arguments, seed: build(*arguments, seed=seed, num_updates=1))
    monkeypatch.setattr(launch, "train", short)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "after step 1 of 1: reward" in out
    assert "the model is in runs/train_in_python/model" in out
    assert (settings[0].training.steps, settings[0].training.lr_schedule, settings[0].task.reward) == (4, "cosine", "__main__:score")


def vars_of(config: Any, section: str) -> dict[str, Any]:
    return {key: getattr(getattr(config, section), key) for key, home in configuration.section_of().items() if home == section}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a script", "cells"])
def test_the_example_as_a_program(tmp_path: Path, form: str) -> None:
    """Cells have no file, and nothing answers on the network."""
    code = EXAMPLE.read_text()
    guard = "import socket\nsocket.getaddrinfo = socket.create_connection = None\n"
    command: Sequence[str] = [sys.executable, str(EXAMPLE)] if form == "a script" else [sys.executable, "-c", guard + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "after 4 steps; the model is in runs/train_in_python/model" in done.stdout
