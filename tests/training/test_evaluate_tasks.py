"""`reinforce-ada eval` with a tiny model: several tasks, greedy decoding, truncation, the comparison, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reinforce_ada import cli
from reinforce_ada.engines.transformers import TransformersEngine
from reinforce_ada.training import launch_eval, models
from reinforce_ada.training.eval_results import Earlier, TaskResult, lines_of, table
from reinforce_ada.training.evaluate import Evaluation

QUESTIONS = [f"{a} + {b} =" for a in range(4) for b in range(4)]
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    models.build_tiny(folder, models.tiny_tokenizer(QUESTIONS), [(q, "3") for q in QUESTIONS], seed=0, num_updates=5)
    return folder


@pytest.fixture
def say(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Evaluates in a folder with two tasks of 16 sums, which have 8 questions in common."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("low", 0), ("high", 8)):
        records = [{"prompt": f"{i // 4} + {i % 4} =", "answer": str(i // 4 + i % 4)} for i in range(first, first + 16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def say(*arguments: str) -> tuple[int, str, str]:
        settings = "--engine transformers --device cpu --dtype float32 --max-tokens 3 --num-examples 0 --max-model-len 100"
        code = cli.main(["eval", str(model), *settings.split(), *arguments])
        return code, *capsys.readouterr()

    return say


def test_several_tasks_in_one_object_with_one_engine(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of each are those of an evaluation of its own."""
    starts: list[str] = []
    make_engine = launch_eval.make_engine

    def spy(name: str, *arguments: Any) -> Any:
        starts.append(name)
        return make_engine(name, *arguments)

    monkeypatch.setattr(launch_eval, "make_engine", spy)
    size = ("--eval-prompts", "6", "--eval-k", "4")
    code, out, err = say("--task", "low.jsonl", "--task", "high.jsonl", "--json", *size)
    assert code == 0, err
    found = json.loads(out)
    assert starts == ["transformers"]
    assert found["settings"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 3, "stop": [], "seed": 0}
    assert [task["task"] for task in found["tasks"]] == ["low.jsonl", "high.jsonl"]
    for task in found["tasks"]:
        assert f"{task['task']}: Avg@4 {task['avg_at_k']:.4f} ± {task['stderr']:.4f} on 6 prompts\n" in err
        alone = json.loads(say("--task", task["task"], "--json", *size)[1])["tasks"]
        assert alone == [task]
        assert len(task["prompt_keys"]) == len(set(task["prompt_keys"])) == len(task["per_prompt"]) == 6
        assert 0 <= task["maj_at_k"] <= 1
        assert task["pass_at_k"].keys() == task["pass_at_k_stderr"].keys() == {"1", "2", "4"}
    code, out, _ = say("--task", "low.jsonl", "--task", "high.jsonl", *size)
    lines = out.splitlines()
    assert lines[0].split() == ["task", "prompts", "k", "Avg@k", "pass@k", "maj@k"]
    for line, task in zip(lines[1:3], found["tasks"], strict=True):
        cells = [task["task"], "6", "4"]
        for mean, error in (("avg_at_k", "stderr"), ("maj_at_k", "maj_at_k_stderr")):
            cells += [f"{task[mean]:.4f}", "±", f"{task[error]:.4f}"]
        assert line.split()[:6] + line.split()[9:] == cells
    assert lines[-1] == "± is one standard error over the prompts"


def test_a_task_with_settings_of_its_own(say: Say) -> None:
    """A flag counts for every task; --config does not reach a task that has a table of its own."""
    Path("own.toml").write_text('[task]\ntask = "low.jsonl"\neval_prompts = 5\neval_k = 2\n[run]\nseed = 9\n')
    Path("base.toml").write_text('[task]\ntask = "high.jsonl"\neval_prompts = 3\neval_k = 3\ntemplate = "plain"\n')
    code, out, err = say("--config", "base.toml", "--task", "own.toml", "--task", "high.jsonl", "--json")
    assert code == 0, err
    assert "own.toml: only its table [task] is read, not [run]" in err
    found = json.loads(out)
    assert [(t["task"], len(t["per_prompt"]), t["k"]) for t in found["tasks"]] == [("own.toml", 5, 2), ("high.jsonl", 3, 3)]
    assert found["settings"]["seed"] == 0
    Path("inner").mkdir()
    Path("inner/own.toml").write_text('[task]\ntask = "../low.jsonl"\neval_prompts = 5\n')  # the path starts from the file
    code, out, _ = say("--task", "inner/own.toml", "--json", "--eval-k", "1")
    assert [(len(t["per_prompt"]), t["k"]) for t in json.loads(out)["tasks"]] == [(5, 1)]


def test_all_records_of_a_file_may_be_evaluated(say: Say) -> None:
    """None need be left for training, as a run needs them."""
    found = json.loads(say("--task", "low.jsonl", "--eval-prompts", "1000", "--eval-k", "1", "--json")[1])
    assert len(found["tasks"][0]["per_prompt"]) == 16


@pytest.fixture
def engine_settings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, float]]]:
    """The temperature and the truncation of every sampled token."""
    found: list[tuple[float, dict[str, float]]] = []
    sample = TransformersEngine._sample

    def spy(engine: Any, logits: Any) -> None:
        found.append((engine._temperature, engine._truncation))
        sample(engine, logits)

    monkeypatch.setattr(TransformersEngine, "_sample", spy)
    return found


def test_greedy(say: Say, engine_settings: list[Any]) -> None:
    """Temperature 0 reaches the engine, and the seed makes no difference."""
    Path("run.toml").write_text("[sampling]\ntop_p = 0.5\ntemperature = 0.7\n[task]\neval_k = 16\n")
    line = ("--config", "run.toml", "--task", "low.jsonl", "--greedy")
    outputs = [say(*line, "--json", "--seed", seed)[1] for seed in "12"]
    first, second = (json.loads(out) for out in outputs)
    assert {temperature for temperature, _ in engine_settings} == {0.0}
    assert first["tasks"] == second["tasks"]
    assert (first["settings"]["temperature"], first["settings"]["top_p"], first["tasks"][0]["k"]) == (0.0, 1.0, 1)
    assert set(first["tasks"][0]["per_prompt"]) <= {0.0, 1.0}
    assert "maj_at_k" not in first["tasks"][0]
    said = say(*line)[1].splitlines()
    assert said[-1] == (
        "± is one standard error over the prompts, one greedy completion each: it is about other prompts, not about other completions"
    )


def test_truncation_reaches_the_engine(say: Say, engine_settings: list[Any]) -> None:
    found = json.loads(say("--task", "low.jsonl", "--eval-k", "1", "--json", "--top-k", "7", "--min-p", "0.1", "--top-p", "0.9")[1])
    assert engine_settings[0] == (1.0, {"top_p": 0.9, "top_k": 7, "min_p": 0.1})
    assert {key: found["settings"][key] for key in ("top_p", "top_k", "min_p")} == engine_settings[0][1]


def test_the_paired_difference(say: Say) -> None:
    """Prompts are matched by what they ask, not by their place."""
    size = ("--eval-prompts", "16", "--eval-k", "2")
    Path("low.json").write_text(say("--task", "low.jsonl", "--json", *size)[1])
    code, out, err = say("--task", "high.jsonl", "--compare", "low.json", "--temperature", "0.5", "--json", *size)
    assert code == 0, err
    (now,), (before,) = json.loads(out)["tasks"], json.loads(Path("low.json").read_text())["tasks"]
    shares = dict(zip(before["prompt_keys"], before["per_prompt"], strict=True))
    rows = [(shares[key], share) for key, share in zip(now["prompt_keys"], now["per_prompt"], strict=True) if key in shares]
    assert len(rows) == now["compared"]["num_prompts"] == 8
    assert now["compared"]["difference"] == pytest.approx(sum(b - a for a, b in rows) / 8)
    said = say("--task", "high.jsonl", "--compare", "low.json", "--temperature", "0.5", *size)[1]
    difference, stderr = (now["compared"][name] for name in ("difference", "stderr"))
    assert f"high.jsonl: Avg@k {difference:+.4f} ± {stderr:.4f} against low.json, paired over 8 prompts" in said.splitlines()
    (same,) = json.loads(say("--task", "low.jsonl", "--compare", "low.json", "--json", *size)[1])["tasks"]
    assert same["compared"] == {"difference": 0.0, "stderr": 0.0, "num_prompts": 16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--greedy --temperature 0.7", "eval: --greedy and --temperature; one of them: greedy is temperature 0 and k 1"),
        ("--greedy --eval-k 4", "eval: --greedy and --eval-k; one of them: greedy is temperature 0 and k 1"),
        ("--task low.jsonl --task low.jsonl", "eval: --task low.jsonl twice; each task once"),
        ("--task none.toml", "config: cannot read none.toml: No such file or directory; a readable TOML file"),
        ("--task empty.toml", 'eval: empty.toml has no table [task]; one with at least task = "NAME"'),
        ("--task wrong.toml", "wrong.toml [task]: unknown key 'evalk'; known: "),
        ("--task low.jsonl --compare none.json", "eval: cannot read none.json: No such file or directory; what `reinforce-ada eval"),
        ("--task low.jsonl --compare low.jsonl", "eval: cannot read low.jsonl: not JSON"),
        ("--task low.jsonl --compare list.json", "eval: list.json is no evaluation (TypeError: "),
        ("--task low.jsonl --task high.jsonl --compare other.json", "eval: other.json has no task high.jsonl; it has low.jsonl, gcd; the"),
        ("--top-p 0", "argument --top-p: '0'; a number above 0 and up to 1; see reinforce-ada eval --help"),
    ],
)
def test_refusals(say: Say, arguments: str, said: str) -> None:
    Path("empty.toml").write_text("[run]\nseed = 1\n")
    Path("wrong.toml").write_text("[task]\nevalk = 3\n")
    Path("list.json").write_text("[1]")
    one = {"prompt_keys": [], "per_prompt": []}
    Path("other.json").write_text(json.dumps({"tasks": [{"task": "low.jsonl", **one}, {"task": "gcd", **one}]}))
    code, out, err = say(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith((f"reinforce-ada: {said}", f"reinforce-ada eval: {said}"))
    assert err.count("\n") == 1


# -------------------- the table


def result(task: str, k: int, per_prompt: tuple[float, ...], **other: Any) -> TaskResult:
    values = {"avg_at_k": 0.5, "stderr": 0.1, "maj_at_k": None, "maj_at_k_stderr": None, "num_tokens": 9, "num_voids": 0, **other}
    powers = {"1": 0.5, str(k): 0.75}
    e = Evaluation(k=k, pass_at_k=powers, pass_at_k_stderr=dict.fromkeys(powers, 0.05), per_prompt=per_prompt, **values)
    return TaskResult(task, e, tuple(f"{task}{i}" for i in range(len(per_prompt))))


def test_the_table_has_a_row_for_each_task_whatever_its_k() -> None:
    one, two = result("sums", 4, (0.5, 0.5), maj_at_k=0.625, maj_at_k_stderr=0.2, num_voids=3), result("a.jsonl", 1, (0.0, 1.0, 1.0))
    assert table([one, two]) == [
        "task     prompts  k  Avg@k            pass@k           maj@k",
        "sums     2        4  0.5000 ± 0.1000  0.7500 ± 0.0500  0.6250 ± 0.2000",
        "a.jsonl  3        1  0.5000 ± 0.1000  0.7500 ± 0.0500  -",
        "sums: pass@1 0.5000   pass@4 0.7500",
        "sums: 3 completions could not be scored and are left out",
    ]


def test_evaluations_that_share_no_prompt_lose_nothing(tmp_path: Path) -> None:
    """The comparison is empty; what has been measured is printed all the same."""
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"tasks": [result("other", 2, (0.5, 1.0)).record()]}))
    (difference,) = Earlier(path).differences([result("sums", 2, (0.5, 1.0))])
    assert difference.num_prompts == 0
    assert "paired over 0 prompts" in lines_of([difference], path)[0]
