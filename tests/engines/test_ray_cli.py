"""`--engine ray` as a user types it, with real vLLM: `train`, `train` under torchrun, `eval`, and what ends in one line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reinforce_ada.training.log import read_log

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


REWARD = """
def odd_length(prompt, completion):
    return float(len(completion) % 2)
"""


def cli(folder: Path, *arguments: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *under, "-m", "reinforce_ada", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def train(model: Path, out: Path, *flags: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Two steps on sums, of which an untrained model knows none: the reward is one that it meets."""
    (out.parent / "my_reward.py").write_text(REWARD)
    task = out.with_suffix(".jsonl")
    task.write_text("\n".join(json.dumps({"prompt": f"{a} + {b} =", "answer": str(a + b)}) for a in range(5) for b in range(5)))
    settings = {
        "model": model, "dtype": "float32", "engine": "ray", "task": task, "steps": 2, "prompts-per-step": 4, "eval-prompts": 4,
        "eval-k": 2, "max-tokens": 4, "max-num-seqs": 16, "max-model-len": 128, "learning-rate": 1e-3, "out": out,
        "reward": "my_reward:odd_length",
    }  # fmt: skip
    return cli(out.parent, "train", *(text for key, value in settings.items() for text in (f"--{key}", str(value))), *flags, under=under)


def trained(model: Path, out: Path, *flags: str, under: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The log of such a run."""
    done = train(model, out, *flags, under=under)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_log(out / "log.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray_cli")


@pytest.fixture(scope="module")
def log(tiny_model: Path, folder: Path) -> list[dict[str, Any]]:
    """Of a run with two replicas on this machine."""
    return trained(tiny_model, folder / "plain", "--replicas", "2")


def test_two_replicas_train(log: list[dict[str, Any]]) -> None:
    assert [(r["kind"], r.get("step")) for r in log] == [("run", None), ("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]
    assert log[0]["engine"] == "RayEngine"
    assert log[3]["engine_replicas"] == 2
    assert all(step["grad_norm"] > 0 for step in log[2:4])
    assert all(abs(step["rollout_kl_k1"]) < 1e-4 for step in log[2:4])  # the actors have the weights of the trainer


def test_eval_finds_what_the_run_found(log: list[dict[str, Any]], folder: Path) -> None:
    done = cli(folder, "eval", str(folder / "plain" / "model"), "--replicas", "1", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "engine: 1 vLLM replicas on Ray" in done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["avg_at_k"] < 1
    assert found["per_prompt"] == log[-1]["per_prompt"]


def test_two_processes_train_the_same(log: list[dict[str, Any]], tiny_model: Path, folder: Path) -> None:
    joint = trained(tiny_model, folder / "joint", under=TORCHRUN)
    assert (log[0]["ranks"], joint[0]["ranks"]) == (1, 2)
    for key in ("num_completions_committed", "tokens_committed", "pool_reward", "kept_reward"):
        assert joint[2][key] == log[2][key]
    assert joint[2]["grad_norm"] == pytest.approx(log[2]["grad_norm"], rel=1e-4)


def test_a_context_longer_than_the_models_is_one_line(tiny_model: Path, folder: Path) -> None:
    done = train(tiny_model, folder / "long", "--max-model-len", "100000")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("reinforce-ada: engine: replica 0: vllm: it cannot serve ")
    assert "max_model_len (100000) is greater" in line


def test_too_few_cores_are_one_line(tiny_model: Path, folder: Path) -> None:
    done = train(tiny_model, folder / "cores", "--cpus-per-replica", "5000")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "engine: 1 replicas with 5000 CPU each; this machine has " in line
