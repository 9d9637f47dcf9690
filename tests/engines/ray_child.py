"""Plays on a Ray cluster and writes what happened as JSON: `python ray_child.py MODEL FILE`.

First on one node with room for two vLLMs: a replica is killed, one is stopped. Then a second node joins, and goes. Each in a step.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from engine_conformance import play
from engine_scenes import MAX_MODEL_LEN, MAX_TOKENS, make_prompts, make_requests, not_greedy, perturb, refusal, sample, tokens, weights
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

from reinforce_ada.driver import run
from reinforce_ada.engines.fleet import Member, State
from reinforce_ada.engines.ray import Options, RayEngine
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Prompt

PATIENCE_S = 150.0
VERSION = 3  # of the last sync of the suite


def ready_ones(engine: RayEngine) -> list[Member]:
    return [m for m in engine.members if m.state is State.ready]


def until(engine: RayEngine, count: int) -> float:
    """Polls until so many replicas are ready; seconds."""
    began = time.monotonic()
    while len(ready_ones(engine)) != count:
        assert time.monotonic() - began < PATIENCE_S, [(m.state.value, m.reason) for m in engine.members]
        assert engine.poll() == []
    return time.monotonic() - began


def actor_of(member: Member) -> Any:
    return member.replica._talk._actor  # type: ignore[attr-defined]


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


def greedy(engine: RayEngine, module: Any) -> list[dict[str, Any]]:
    """After every sync, at temperature 0: how far from the model's own choice."""

    def set_temperature(value: float) -> None:  # in the actors that are there: others would have to start
        for member in ready_ones(engine):
            ray.get(actor_of(member).__ray_call__.remote(lambda sampler: sampler._engine._fields.update(temperature=value)))

    requests = make_requests(make_prompts())[::4]
    set_temperature(0.0)
    syncs = []
    for version in range(11, 14):
        perturb(module, seed=version)
        engine.sync_weights(weights(module), version)
        done = sample(engine, requests)
        syncs.append({"wrong": not_greedy(module, requests, done), "tokens": tokens(done)})
    set_temperature(1.0)
    return syncs


def on_one_node(engine: RayEngine, module: Any) -> dict[str, Any]:
    """Two replicas: the suite, one killed, one stopped, greedy."""
    engine.sync_weights(weights(module), 0)
    until(engine, 2)
    facts = play(engine, module)
    facts["undisturbed"] = step(engine, VERSION)
    first, second = ready_ones(engine)
    facts["names"] = [first.replica.name, second.replica.name]
    for what, member, number in (("killed", first, signal.SIGKILL), ("stopped", second, signal.SIGSTOP)):
        pid = int(ray.get(actor_of(member).ready.remote()))
        facts[what] = step(engine, VERSION, partial(os.kill, pid, number))
        until(engine, 2)
    facts["syncs_greedy"] = greedy(engine, module)
    return facts


def on_two_nodes(engine: RayEngine, module: Any, cluster: Cluster) -> dict[str, Any]:
    """The third replica joins with its node, one of the others leaves: one on each node; the suite, then the node goes."""
    leaver = ready_ones(engine)[0].replica.name
    second = cluster.add_node(num_cpus=1)
    joined_after_s = until(engine, 3)
    engine.remove(leaver)
    facts = {"joined_after_s": joined_after_s, **play(engine, module)}
    facts["undisturbed"] = step(engine, VERSION)
    facts["node_gone"] = step(engine, VERSION, lambda: cluster.remove_node(second))
    facts["after_all"] = step(engine, VERSION)
    return facts


def main(model: str, file: Path) -> None:
    torch.set_num_threads(1)
    said: list[str] = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    options = Options(
        model=model, dtype="float32", device="cpu", max_tokens=MAX_TOKENS, max_model_len=MAX_MODEL_LEN, max_num_seqs=32,
        temperature=1.0, kv_cache_bytes=64 << 20,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    facts: dict[str, Any] = {}
    small = RayEngine(replace(options, kv_cache_bytes=4096), num_replicas=1, vocab_size=384, address=cluster.address)
    facts["small_cache"] = refusal(lambda: small.sync_weights(weights(module), 0))
    small.close()
    engine = RayEngine(options, num_replicas=3, vocab_size=384, address=cluster.address, hung_after_s=5.0, say=said.append)
    facts["one_node"] = on_one_node(engine, copy.deepcopy(module))
    facts["two_nodes"] = on_two_nodes(engine, copy.deepcopy(module), cluster)
    facts["metrics"], facts["said"] = engine.metrics(), said
    engine.close()
    ray.shutdown()
    cluster.shutdown()
    file.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
