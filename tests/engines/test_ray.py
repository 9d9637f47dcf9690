"""The Ray engine with real vLLM on a cluster of two nodes: joins, the conformance suite, a replica killed, one stopped, a node gone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conformance
import pytest
from engine_scenes import refusal

from reinforce_ada.engines.ray import Options, RayEngine
from reinforce_ada.training import models

HERE = Path(__file__)
OPTIONS = Options(
    model="m", dtype="float32", device="cpu", max_tokens=4, max_model_len=32, max_num_seqs=4, temperature=1.0
)  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    models.build_tiny(folder / "base", models.tiny_tokenizer(["1 + 2 ="]), [("1 + 2 =", "3")], seed=0, num_updates=2)
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    """What the child saw."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, str(HERE.with_name("ray_child.py")), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def in_process(folder: Path) -> dict[str, Any]:
    """The same scenes with vLLM in a process of its own, without Ray."""
    script = """
import json, sys, torch
from pathlib import Path
from conformance import play
from engine_scenes import MAX_MODEL_LEN, MAX_TOKENS
from transformers import AutoModelForCausalLM
from reinforce_ada.engines.vllm import VllmEngine
folder = Path(sys.argv[1])
torch.set_num_threads(1)
module = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
engine = VllmEngine(str(folder / "base"), dtype="float32", max_tokens=MAX_TOKENS, max_model_len=MAX_MODEL_LEN, max_num_seqs=64,
                    kv_cache_bytes=64 << 20)
(folder / "in_process.json").write_text(json.dumps(play(engine, module)))
engine.close()
"""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env={**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return json.loads((folder / "in_process.json").read_text())


def test_vllm_in_process_conforms(in_process: dict[str, Any]) -> None:
    conformance.check(in_process, in_process)


def test_two_nodes_conform(facts: dict[str, Any], in_process: dict[str, Any]) -> None:
    conformance.check(facts, in_process)


def test_a_replica_joins_with_its_node(facts: dict[str, Any]) -> None:
    assert facts["ready_on_one_node"] == 1
    assert facts["joined_after_s"] > 0


@pytest.mark.parametrize("what", ["killed", "stopped", "node_gone"])
def test_nothing_is_lost(what: str, facts: dict[str, Any]) -> None:
    assert facts[what]["pools"] == facts["undisturbed"]["pools"]
    assert facts[what]["moved"] > 0
    assert facts["undisturbed"]["moved"] == 0


def test_what_was_said(facts: dict[str, Any]) -> None:
    assert facts["after_all"]["pools"] == facts["undisturbed"]["pools"]
    said = "\n".join(facts["said"])
    assert "replica 0 is down: died; again in 1 s" in said
    assert "replica 1 is down: has not answered for 5 s" in said
    assert facts["metrics"]["engine_restarts"] >= 2


def test_refusals_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at least 1" in refusal(lambda: RayEngine(OPTIONS, num_replicas=0))
    assert "ray start --head starts one" in refusal(lambda: RayEngine(OPTIONS, num_replicas=1, address="127.0.0.1:9"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    assert 'pip install "reinforce-ada[ray]"' in refusal(lambda: RayEngine(OPTIONS, num_replicas=1))
