"""The Ray engine with real vLLM on a cluster of two nodes: joins, the conformance suite, a replica killed, one stopped, a node gone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_conformance
import pytest
from engine_scenes import refusal

from reinforce_ada.engines.ray import Options, RayEngine

OPTIONS = Options(
    model="m", dtype="float32", device="cpu", max_tokens=4, max_model_len=32, max_num_seqs=4, temperature=1.0
)  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

cluster = pytest.mark.slow  # 80 s on two quiet cores


@pytest.fixture(scope="module")
def facts(tiny_model: Path, play_apart: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child saw."""
    file = tmp_path_factory.mktemp("ray") / "facts.json"
    play_apart("ray_child.py", tiny_model, file, timeout_s=400)
    return dict(json.loads(file.read_text()))


def test_vllm_in_process_conforms(in_process: dict[str, Any]) -> None:
    engine_conformance.check(in_process, in_process)


@cluster
def test_two_nodes_conform(facts: dict[str, Any], in_process: dict[str, Any]) -> None:
    engine_conformance.check(facts, in_process, num_replicas=2)


@cluster
def test_a_replica_joins_with_its_node(facts: dict[str, Any]) -> None:
    assert facts["ready_on_one_node"] == 1
    assert facts["joined_after_s"] > 0


@cluster
@pytest.mark.parametrize("what", ["killed", "stopped", "node_gone"])
def test_nothing_is_lost(what: str, facts: dict[str, Any]) -> None:
    assert facts[what]["pools"] == facts["undisturbed"]["pools"]
    assert facts[what]["moved"] > 0
    assert facts["undisturbed"]["moved"] == 0


@cluster
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
