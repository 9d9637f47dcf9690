"""Runs and evaluations as the command line starts them: whose questions are scored, what stops a run, and what a resume takes."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training import launch, launch_eval, lineage, models
from reinforce_ada.training.log import read_log
from reinforce_ada.training.task_files import question_of
from reinforce_ada.training.tasks import content_key, load_records
from reinforce_ada.training.trainer import compared, fingerprint
from reinforce_ada.types import Prompt

QUESTIONS = [f"{a} + {b} =" for a in range(6) for b in range(4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    models.build_tiny(folder, models.tiny_tokenizer(QUESTIONS), [(QUESTIONS[0], "3")], seed=0, num_updates=1)
    return folder


@pytest.fixture(autouse=True)
def _without_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "finish", lambda out, display: None)


def write_task(path: Path, records: Sequence[dict[str, Any]] | None = None) -> Path:
    records = records or [{"prompt": q, "answer": str(i)} for i, q in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def flags(**values: Any) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def train(llama: Path, out: Path, **values: Any) -> int:
    base = {
        "model": llama, "dtype": "float32", "device": "cpu", "engine": "transformers", "num_examples": 0, "eval_prompts": 4, "eval_k": 1,
        "preset": "grpo", "group_size": 2, "prompts_per_step": 6, "steps": 2, "max_tokens": 3, "max_model_len": 100, "out": out,
        "reward": "toy_rewards:even_length",
    }  # fmt: skip
    return cli.main(["train", *flags(**{**base, **values})])


def trained_questions(out: Path) -> set[str]:
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        return {question_of(record) for record in store.records()}


# -------------------- no evaluation of what was trained on


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    task = write_task(folder / "task.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "finish", lambda out, display: None)
        assert train(llama, folder / "run", task=task) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"eval_prompts": 20},
        {"seed": 7},
        {"data_seed": 1},
        {"data_seed": 2, "eval_prompts": 12},
        {"eval_prompts": 9, "num_examples": 2, "seed": 3},
    ],
)
def test_no_trained_question_is_scored(
    run: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored: list[str] = []
    evaluate = launch_eval.evaluate

    def spy(engine: Any, rewards: Any, prompts: Sequence[Prompt], **more: Any) -> Any:
        scored.extend(question_of(p.data) for p in prompts)
        return evaluate(engine, rewards, prompts, **more)

    monkeypatch.setattr(launch_eval, "evaluate", spy)
    trained = trained_questions(run)
    assert len(trained) == 12
    place = "model" if "eval_prompts" in other else "checkpoints/step-000002/model"
    code = cli.main(["eval", str(run / place), "--json", "--config", str(run / "config.toml"), *flags(**other)])
    out, err = capsys.readouterr()
    assert code == 0
    assert scored
    assert not trained & set(scored)
    assert len(json.loads(out)["tasks"][0]["per_prompt"]) == len(scored)
    wanted = configuration.load_saved(run / "config.toml", other)
    asked = {question_of(r) for r in load_records(wanted.task, wanted.run.seed, wanted.run.data_seed).held_out}
    assert set(scored) == asked - trained
    assert ("are left out" in err) == bool(asked & trained)


def test_the_split_of_every_task_is_the_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All records of the task of the run, and of another file that repeats some of them; greedily, and one by a table of its own."""
    trained = trained_questions(run)
    task = configuration.load_saved(run / "config.toml").task.task
    other = write_task(tmp_path / "other.jsonl", [{"prompt": q, "answer": "1"} for q in (*sorted(trained)[:3], "new 1", "new 2")])
    (tmp_path / "own.toml").write_text(f'[task]\ntask = "{other}"\nnum_examples = 0\n')
    tasks = ["--task", task, "--task", str(tmp_path / "own.toml"), "--greedy", "--json", "--eval-prompts", "20"]
    code = cli.main(["eval", str(run / "model"), *tasks])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = {entry["task"]: set(entry["prompt_keys"]) for entry in json.loads(out)["tasks"]}
    with RolloutStore(run / "rollouts.sqlite", read_only=True) as store:
        keys = {content_key(record) for record in store.records()}
    assert len(keys) == 12
    assert not keys & found[task]
    assert len(found[str(tmp_path / "own.toml")]) == 2
    assert f"own.toml: 3 of 5 held-out questions are left out: {run} trained on them" in err


def test_an_evaluation_of_trained_questions_alone_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = sorted(trained_questions(run))
    task = write_task(tmp_path / "again.jsonl", [{"prompt": q, "answer": "other"} for q in trained])
    assert cli.main(["eval", str(run / "model"), *flags(task=task, eval_prompts=5)]) == 2
    err = capsys.readouterr().err
    assert f"5 of 5 held-out questions are left out: {run} trained on them" in err
    assert "--data-seed 0 --eval-prompts 4 --num-examples 0" in err


def test_a_model_whose_run_has_lost_its_store_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("*.sqlite*"))
    assert cli.main(["eval", str(tmp_path / "copy/model")]) == 2
    assert "has a configuration and a log but no rollouts.sqlite" in capsys.readouterr().err


def test_a_run_from_the_model_of_another_holds_out_nothing_that_one_trained_on(
    run: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = configuration.load_saved(run / "config.toml").task.task
    assert train(run / "model", tmp_path / "refused", task=task, data_seed=1) == 2
    err = capsys.readouterr().err
    assert "held-out questions were trained on by" in err
    assert "--data-seed 0 --eval-prompts 4 --num-examples 0" in err
    assert not (tmp_path / "refused").exists()
    assert train(run / "model", tmp_path / "second", task=task, seed=3) == 0
    both = trained_questions(run) | trained_questions(tmp_path / "second")
    records, said = lineage.without_trained(
        load_records(configuration.load_saved(run / "config.toml", {"eval_prompts": 20}).task, 0, 0), str(tmp_path / "second/model")
    )
    assert not both & {question_of(r) for r in records.held_out}
    assert said.count("are left out") == 2


def test_the_tiny_models_warm_up_counts_as_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build_tiny", functools.partial(models.build_tiny, num_updates=1))
    monkeypatch.setattr(lineage, "WARM_UP_EXAMPLES", 9)
    task = write_task(tmp_path / "task.jsonl")
    out = tmp_path / "run"
    for seed in (0, 1):
        assert train(Path("tiny"), tmp_path / f"run{seed}", task=task, steps=0, seed=seed) == 0
    first, second = ((tmp_path / f"run{seed}/base_model/model.safetensors").read_bytes() for seed in (0, 1))
    assert first == second  # the base model is of the data's seed
    out = tmp_path / "run0"
    config = configuration.load_saved(out / "config.toml", {"eval_prompts": 20})
    before = load_records(config.task, 0, 0)
    records, said = lineage.without_trained(before, str(out / "model"))
    assert len(records.held_out) < len(before.held_out)
    assert f": {out} trained on them" in said


# -------------------- seeds


def test_an_older_runs_data_is_of_its_seed(run: Path, tmp_path: Path) -> None:
    text = (run / "config.toml").read_text()
    older = tmp_path / "config.toml"
    older.write_text(text.replace("data_seed = 0\n", "").replace("\nseed = 0\n", "\nseed = 5\n"))
    assert configuration.load_saved(older).run.data_seed == 5
    assert configuration.load_saved(older, {"data_seed": 2}).run.data_seed == 2
    assert configuration.load(older).run.data_seed == 0
    assert configuration.load_saved(run / "config.toml").run.data_seed == 0
    kept = fingerprint(configuration.load_saved(older))
    without = {**kept, "run": {key: value for key, value in kept["run"].items() if key != "data_seed"}}
    assert compared(without) == compared(kept)  # what the store of such a run has
    assert compared(fingerprint(configuration.load(older))) != compared(without)


# -------------------- rewards that never score

FAILING = {
    "returns_a_dict": ("return {'score': 1.0}", "TypeError: the reward returned dict {'score': 1.0}, not a float"),
    "raises": ("raise KeyError('gold')", "KeyError: 'gold'"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "kills": ("import os; os._exit(5)", "the worker died of exit code 5"),
    "hangs": ("import time; time.sleep(99)", "timed out after 0.2 s"),
    "is_far": ("return 1e39", "ValueError: the reward returned 1e+39, more than 1e+15 in magnitude"),
}


@pytest.mark.parametrize(("name", "eval_prompts"), [*((name, 1) for name in FAILING), ("raises", 0), ("kills", 0)])
def test_a_run_whose_completions_are_all_voids_stops_and_goes_on_once_mended(
    llama: Path, tmp_path: Path, name: str, eval_prompts: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body, reason = FAILING[name]
    (tmp_path / "rwd.py").write_text(f"def score(prompt, completion):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    task, out = write_task(tmp_path / "task.jsonl"), tmp_path / "run"
    small = {"task": task, "prompts_per_step": 1, "steps": 1, "eval_prompts": eval_prompts, "reward_timeout_s": 0.2}
    assert train(llama, out, reward="./rwd.py:score", **small) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reinforce-ada: ")]
    assert f"none of the {1 if eval_prompts else 2} completions of {'the evaluation' if eval_prompts else 'step 1'} could be scored" in line
    assert reason.removeprefix("TypeError: ").removeprefix("ValueError: ") in line
    assert ("/rwd.py" in line) == (name in ("raises", "exits", "hangs"))  # where in its code
    assert not (out / "model").exists()
    (tmp_path / "rwd.py").write_text("def score(prompt, completion):\n    return len(completion) % 2\n")
    monkeypatch.chdir("/")
    assert cli.main(["train", "--resume", str(out)]) == 0
    (step,) = [r for r in read_log(out / "log.jsonl") if r["kind"] == "step"]
    assert (step["num_voids"], step["num_completions_committed"]) == (0, 2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("async def score(prompt, completion):\n    return 1.0\n", "rwd.py:score' is an async function"),
        ("raise ValueError('two\\nlines')\n", "rwd.py does not import (ValueError: two lines, at "),
        ("import none_of_that_name\n", "No module named 'none_of_that_name'; an importable module is needed"),
    ],
)
def test_a_reward_that_cannot_work_is_one_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, said: str
) -> None:
    (tmp_path / "rwd.py").write_text(code)
    task = write_task(tmp_path / "task.jsonl")
    assert train(llama, tmp_path / "run", task=task, reward=f"{tmp_path}/rwd.py:score") == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


# -------------------- files that move or change


def test_a_run_goes_on_from_another_folder_and_says_which_file_has_changed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    write_task(here / "task.jsonl")
    (here / "near_rewards.py").write_text("def score(prompt, completion):\n    return len(completion) % 2\n")
    assert train(llama, there / "run", task="task.jsonl", reward="near_rewards:score", steps=1) == 0
    saved = configuration.load_saved(there / "run/config.toml").task
    assert (saved.task, saved.reward) == (str(here / "task.jsonl"), f"{here / 'near_rewards.py'}:score")
    monkeypatch.chdir(there)
    assert cli.main(["train", "--resume", "run", "--steps", "2"]) == 0
    (here / "task.jsonl").rename(there / "moved.jsonl")
    assert cli.main(["train", "--resume", "run", "--steps", "3", "--task", "moved.jsonl"]) == 0
    assert configuration.load_saved(there / "run/config.toml").task.task == str(there / "moved.jsonl")
    assert [r["step"] for r in read_log(there / "run/log.jsonl") if r["kind"] == "step"] == [1, 2, 3]
    with (there / "moved.jsonl").open("a") as f:
        f.write('{"prompt": "new", "answer": 0}\n')
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run", "--steps", "4", "--task", "moved.jsonl"]) == 2
    err = capsys.readouterr().err
    said = f"{there}/moved.jsonl has changed since the run began; the file as it was; put it back, or begin a new run with another --out"
    assert err == f"reinforce-ada: train: {said}\n"


def test_a_prompt_that_is_too_long_ends_no_run(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": q + " x" * (100 if i == 5 else 0), "answer": "1"} for i, q in enumerate(QUESTIONS[:8])]
    task = write_task(tmp_path / "task.jsonl", records)
    assert train(llama, tmp_path / "run", task=task, eval_prompts=0, prompts_per_step=8) == 0
    assert "1 of 8 training prompts are longer than max_model_len - max_tokens = 97 tokens and are never drawn" in capsys.readouterr().out
    assert len(trained_questions(tmp_path / "run")) == 7


def test_a_configuration_beside_its_questions_runs_resumes_and_evaluates_from_every_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    write_task(project / "task.jsonl")
    write_task(project / "test.jsonl", [{"prompt": q, "answer": "1"} for q in ("0 + 1 =", "9 + 9 =", "8 + 8 =", "7 + 7 =")])
    (project / "rwd_beside.py").write_text("def score(prompt, completion):\n    return len(completion) % 2\n")
    (project / "run.toml").write_text(
        '[task]\ntask = "task.jsonl"\neval_task = "test.jsonl"\nreward = "rwd_beside:score"\neval_prompts = 3\neval_k = 1\n'
        '[sampling]\npreset = "grpo"\ngroup_size = 2\nprompts_per_step = 3\n[training]\nsteps = 1\n'
        f'[model]\nmodel = "{llama}"\ndtype = "float32"\ndevice = "cpu"\n[engine]\nengine = "transformers"\nmax_model_len = 24\n'
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "project/run.toml", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    chosen = "no system prompt (--system-prompt), no worked examples (--num-examples), max_tokens 12, half of max_model_len 24"
    assert f"defaults for your own questions: {chosen} (--max-tokens)\n" in printed
    assert f"1 of 24 training records are left out: {project}/test.jsonl has their questions too\n" in printed
    saved = configuration.load_saved(tmp_path / "run/config.toml")
    assert (saved.task.task, saved.task.eval_task) == (f"{project}/task.jsonl", f"{project}/test.jsonl")
    assert (saved.task.system_prompt, saved.task.num_examples, saved.sampling.max_tokens) == ("", 0, 12)
    monkeypatch.chdir("/")
    resume = ["train", "--resume", str(tmp_path / "run"), "--steps", "2"]
    assert cli.main([*resume, "--max-model-len", "30"]) == 0  # which is free, and moves no max_tokens
    printed = capsys.readouterr().out
    assert "defaults for your own questions" not in printed
    assert configuration.load_saved(tmp_path / "run/config.toml").sampling.max_tokens == 12
    assert cli.main(["eval", str(tmp_path / "run/model"), "--json", "--eval-prompts", "4"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tasks"][0]["per_prompt"]) == 4
    write_task(project / "other.jsonl", [{"prompt": q, "answer": "1"} for q in ("6 + 6 =", "5 + 5 =", "4 + 9 =")])
    assert cli.main(["eval", str(tmp_path / "run/model"), "--json", "--task", str(project / "other.jsonl"), "--eval-prompts", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tasks"][0]["per_prompt"]) == 2  # of that file, whatever the run had held out
    assert not trained_questions(tmp_path / "run") & {"0 + 1 =", "9 + 9 =", "8 + 8 =", "7 + 7 ="}
    with (project / "test.jsonl").open("a") as f:
        f.write('{"prompt": "new", "answer": 0}\n')
    assert cli.main([*resume[:-1], "3"]) == 2
    assert "has changed since the run began" in capsys.readouterr().err
