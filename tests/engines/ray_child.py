"""Plays on a Ray cluster of two nodes, each with room for one vLLM, and writes what happened as JSON: `python ray_child.py MODEL FILE`.

The second node joins when the first replica has sampled; then a replica is killed, one is stopped, and a node leaves, each in a step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from engine_conformance import play
from engine_scenes import MAX_MODEL_LEN, MAX_TOKENS, make_prompts, weights
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

from reinforce_ada.driver import run
from reinforce_ada.engines.fleet import State
from reinforce_ada.engines.ray import Options, RayEngine
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Prompt

PATIENCE_S = 150.0


def num_ready(engine: RayEngine) -> int:
    return sum(m.state is State.ready for m in engine.members)


def until(engine: RayEngine, count: int) -> float:
    """Polls until so many replicas are ready; seconds."""
    began = time.monotonic()
    while num_ready(engine) != count:
        assert time.monotonic() - began < PATIENCE_S, [(m.state.value, m.reason) for m in engine.members]
        assert engine.poll() == []
    return time.monotonic() - began


def pid_of(engine: RayEngine, i: int) -> int:
    return int(ray.get(engine.members[i].replica._talk._actor.ready.remote()))  # type: ignore[attr-defined]


def reward(prompt: Prompt, text: str) -> float:
    return float(len(text) % 3 == 0)


def step(engine: RayEngine, version: int, disturb: Callable[[], None] | None = None) -> dict[str, Any]:
    """The pools of one step; `disturb` happens after 10 completions."""
    left = [disturb] if disturb else []

    def on_progress(progress: Any) -> None:
        if left and progress.num_committed >= 10:
            left.pop()()

    prompts = [Prompt(f"{p.prompt_id}-{i}", p.token_ids) for i in range(6) for p in make_prompts()]
    sampler = AdaptiveSampler(prompts, preset("reinforce-ada-balance"), step=1, policy_version=version)
    moved = engine.counts.moved
    result = run(sampler, engine, reward, on_progress=on_progress)
    assert not left
    pools = {
        pool.prompt.prompt_id: [(s.completion.id.index, s.completion.token_ids.tolist(), s.reward) for s in pool.scored]
        for pool in result.pools
    }
    return {"pools": pools, "moved": engine.counts.moved - moved}


def main(model: str, file: Path) -> None:
    torch.set_num_threads(1)
    said: list[str] = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    options = Options(
        model=model, dtype="float32", device="cpu", max_tokens=MAX_TOKENS, max_model_len=MAX_MODEL_LEN, max_num_seqs=32,
        temperature=1.0, kv_cache_bytes=64 << 20,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    engine = RayEngine(options, num_replicas=2, address=cluster.address, hung_after_s=5.0, say=said.append)
    engine.sync_weights(weights(module), 0)
    facts: dict[str, Any] = {"ready_on_one_node": num_ready(engine)}
    step(engine, 0)  # with what there is
    second = cluster.add_node(num_cpus=1)
    facts["joined_after_s"] = until(engine, 2)
    facts.update(play(engine, module))

    version = 3  # of the last sync
    facts["undisturbed"] = step(engine, version)
    facts["killed"] = step(engine, version, lambda: os.kill(pid_of(engine, 0), signal.SIGKILL))
    facts["back_after_s"] = until(engine, 2)
    stopped = pid_of(engine, 1)
    facts["stopped"] = step(engine, version, lambda: os.kill(stopped, signal.SIGSTOP))
    until(engine, 2)
    facts["node_gone"] = step(engine, version, lambda: cluster.remove_node(second))
    facts["after_all"] = step(engine, version)
    facts["metrics"], facts["said"] = engine.metrics(), said
    engine.close()
    ray.shutdown()
    cluster.shutdown()
    file.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
