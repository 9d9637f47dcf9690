"""The Ray engine with real vLLM, two replicas on one node and on two: the suite, a replica killed, one stopped, a node joins and goes."""

from __future__ import annotations

import importlib.util
import json
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_conformance
import pytest
from engine_scenes import refusal

from reinforce_ada.engines.fleet import Down, News
from reinforce_ada.engines.ray import Options, RayEngine, _check_room, _Talk

OPTIONS = Options(
    model="m", dtype="float32", device="cpu", max_tokens=4, max_model_len=32, max_num_seqs=4, temperature=1.0
)  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(420),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

cluster = pytest.mark.slow  # 2 minutes on two quiet cores


@pytest.fixture(scope="module")
def facts(tiny_model: Path, play_apart: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child saw."""
    file = tmp_path_factory.mktemp("ray") / "facts.json"
    play_apart("ray_child.py", tiny_model, file, timeout_s=400)
    return dict(json.loads(file.read_text()))


@cluster
@pytest.mark.parametrize("where", ["one_node", "two_nodes"])
def test_two_replicas_conform(where: str, facts: dict[str, Any], in_process: dict[str, Any]) -> None:
    engine_conformance.check(facts[where], in_process, num_replicas=2)


@cluster
def test_greedy_output_is_the_trained_models_after_every_sync(facts: dict[str, Any]) -> None:
    syncs = facts["one_node"]["syncs_greedy"]
    assert [sync["wrong"] for sync in syncs] == [0, 0, 0]
    assert len({json.dumps(sync["tokens"]) for sync in syncs}) == 3  # or there was nothing to tell apart


@cluster
def test_a_replica_joins_with_its_node(facts: dict[str, Any]) -> None:
    assert facts["two_nodes"]["joined_after_s"] > 0


@cluster
@pytest.mark.parametrize(("where", "what"), [("one_node", "killed"), ("one_node", "stopped"), ("two_nodes", "node_gone")])
def test_nothing_is_lost(where: str, what: str, facts: dict[str, Any]) -> None:
    assert facts[where][what]["pools"] == facts["one_node"]["undisturbed"]["pools"]
    assert facts[where][what]["moved"] > 0
    assert facts[where]["undisturbed"]["moved"] == 0


@cluster
def test_what_was_said(facts: dict[str, Any]) -> None:
    undisturbed = facts["one_node"]["undisturbed"]["pools"]
    assert facts["two_nodes"]["undisturbed"]["pools"] == facts["two_nodes"]["after_all"]["pools"] == undisturbed
    said = "\n".join(facts["said"])
    assert "3 replicas with 1 CPU each; 1 nodes, the largest with 2 CPU, have room for 2; the others wait until a node joins" in said
    killed, stopped = facts["one_node"]["names"]
    assert f"{killed} is down: died; again in 1 s" in said
    assert f"{stopped} is down: has not answered for 5 s" in said
    assert facts["metrics"]["engine_restarts"] >= 2


@cluster
def test_a_cache_that_is_too_small_is_one_line(facts: dict[str, Any]) -> None:
    assert facts["small_cache"].startswith("engine: replica 0: vllm: it cannot serve ")
    assert "No available memory for the cache blocks" in facts["small_cache"]
    assert "\n" not in facts["small_cache"]


def test_too_little_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    nodes = [{"Alive": True, "Resources": {"CPU": 5.0, "GPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    said: list[str] = []
    _check_room({"CPU": 2.0}, 6, may_grow=False, say=said.append)  # 2 and 4
    _check_room({"CPU": 2.0, "GPU": 2.0}, 1, may_grow=False, say=said.append)
    assert not said
    _check_room({"CPU": 2.0}, 7, may_grow=True, say=said.append)
    assert said == [
        "engine: 7 replicas with 2 CPU each; 2 nodes, the largest with 8 CPU, have room for 6; the others wait until a node joins"
    ]
    alone = refusal(lambda: _check_room({"CPU": 1.0, "GPU": 4.0}, 1, may_grow=False, say=said.append))
    assert alone.startswith(
        "engine: 1 replicas with 1 CPU and 4 GPU each; this machine has 8 CPU and 0 GPU; room for all; lower --replicas"
    )


def test_whatever_ends_the_conversation_is_told() -> None:
    def no_room() -> Any:
        raise OSError("the head is gone")

    told: queue.SimpleQueue[News] = queue.SimpleQueue()
    talk = _Talk(no_room, no_room, told.put, 5.0)
    assert told.get(timeout=30) == Down("OSError: the head is gone")
    talk.end()


def test_refusals_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at least 1" in refusal(lambda: RayEngine(OPTIONS, vocab_size=384, num_replicas=0))
    assert "at least 1" in refusal(lambda: RayEngine(OPTIONS, vocab_size=384, num_replicas=1, cpus=0))
    assert "ray start --head starts one" in refusal(lambda: RayEngine(OPTIONS, vocab_size=384, num_replicas=1, address="127.0.0.1:9"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    assert 'pip install "reinforce-ada[ray]"' in refusal(lambda: RayEngine(OPTIONS, vocab_size=384, num_replicas=1))
