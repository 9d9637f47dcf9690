"""What the tests with real vLLM share: a model, and what vLLM in a process of its own makes of every scene."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_scenes import mislead

from reinforce_ada.training import models

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 100 000 weights that nobody has trained, with sampling settings in its folder that no engine may take."""
    folder = tmp_path_factory.mktemp("tiny_model")
    texts = [f"{a} + {b} =" for a in range(5) for b in range(5)]
    models.build_tiny(folder, models.tiny_tokenizer(texts), [(t, "3") for t in texts], seed=0, num_updates=2)
    mislead(folder)
    return folder


@pytest.fixture(scope="session")
def play_apart() -> Callable[..., None]:
    """Runs a script of this folder: vLLM and Ray change the process that they are in."""

    def play_apart(script: str, *arguments: Path, timeout_s: float) -> None:
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        child = subprocess.run(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]

    return play_apart


@pytest.fixture(scope="session")
def vllm_folder(tiny_model: Path, play_apart: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vLLM in one process left a trained run and facts.json."""
    folder = tmp_path_factory.mktemp("vllm")
    lines = [json.dumps({"prompt": f"{a} + {b} =", "answer": str(a + b)}) for a in range(5) for b in range(5)]
    (folder / "task.jsonl").write_text("\n".join(lines))
    play_apart("vllm_child.py", tiny_model, folder / "task.jsonl", folder, timeout_s=240)
    return folder


@pytest.fixture(scope="session")
def vllm_facts(vllm_folder: Path) -> dict[str, Any]:
    return dict(json.loads((vllm_folder / "facts.json").read_text()))


@pytest.fixture(scope="session")
def in_process(vllm_facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that every other engine is compared with."""
    return dict(vllm_facts["conformance"])
