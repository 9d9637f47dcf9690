"""Plays every scene with a real vLLM, in a process of its own, and writes what happened as JSON: `python vllm_child.py FOLDER`.

A process of its own because vLLM makes torch.set_num_threads a no-op and changes global state; one, because it takes seconds to start.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from engine_scenes import (
    MAX_MODEL_LEN,
    MAX_TOKENS,
    abort_and_reissue,
    bad_requests,
    common_texts,
    cut_at,
    largest_logprob_difference,
    make_prompts,
    make_requests,
    not_greedy,
    perturb,
    refusal,
    sample,
    spread,
    tokens,
    weights,
)

from reinforce_ada import config as configuration
from reinforce_ada.engines.vllm import VllmEngine
from reinforce_ada.training import launch


def at(engine: VllmEngine, temperature: float, max_num_seqs: int | None = None, stop: list[str] | None = None) -> Any:
    """The same vLLM with other settings: a second engine would cost another start."""
    other = copy.copy(engine)
    other._temperature, other._stop = temperature, stop or []
    other._max_num_seqs = max_num_seqs or other._max_num_seqs
    return other


def scenes(engine: VllmEngine, module: Any) -> dict[str, Any]:
    spread(module)
    engine.sync_weights(weights(module), 0)
    prompts = make_prompts()
    requests = make_requests(prompts)
    facts: dict[str, Any] = {"refusals": {name: refusal(lambda r=r: engine.submit([r])) for name, r in bad_requests().items()}}

    # sampling
    first = sample(engine, requests)
    facts["tokens"] = tokens(first)
    facts["reversed"] = tokens(sample(engine, requests[::-1]))
    facts["few_slots"] = tokens(sample(at(engine, 1.0, 5), requests))
    facts["finish_reasons"] = {k: c.finish_reason for k, c in zip(tokens(first), (first[i] for i in sorted(first)), strict=True)}
    facts["diff_1"] = largest_logprob_difference(module, requests, first, 1.0)
    facts["diff_07"] = largest_logprob_difference(module, requests, sample(at(engine, 0.7), requests), 0.7)

    # stop strings
    stop = ["never said", *common_texts(first)]
    facts["num_stopped"] = cut_at(stop, first, sample(at(engine, 1.0, stop=stop), requests))

    # slots, aborts
    slots = [engine.free_slots]
    engine.submit(requests[:3])
    slots.append(engine.free_slots)
    facts["sync_in_flight"] = refusal(lambda: engine.sync_weights(weights(module), 9))
    engine.abort([r.id for r in requests])  # most of them not running
    facts["free_slots"] = [*slots, engine.free_slots]
    kept, again = abort_and_reissue(engine, requests)
    facts["kept"], facts["again"] = tokens(kept), tokens(again)

    # weights
    greedy = at(engine, 0.0)
    facts["syncs"] = []
    for version in range(1, 5):
        engine.submit(requests[:2])  # aborted in flight just before the sync: what they cached must go too
        engine.poll()
        engine.abort([r.id for r in requests[:2]])
        perturb(module, seed=version)
        greedy.sync_weights(weights(module), version)
        done = sample(greedy, requests[::4])
        frozen = copy.deepcopy(module)
        perturb(module, seed=100 + version)  # the trainer goes on; the engine must not see it before the next sync
        later = sample(greedy, requests[::4])
        facts["syncs"].append(
            {
                "wrong": not_greedy(frozen, requests[::4], done),
                "diff": largest_logprob_difference(frozen, requests[::4], done, 1.0),
                "changed_without_sync": tokens(later) != tokens(done),
                "versions": sorted({c.policy_version for c in done.values()}),
                "tokens": tokens(done),
            }
        )
    return facts


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    out = folder / "run"
    settings = {
        "model": str(folder / "base"), "dtype": "float32", "engine": "vllm", "task": str(folder / "task.jsonl"), "steps": 2,
        "prompts_per_step": 4, "eval_prompts": 4, "eval_k": 2, "max_tokens": 4, "max_num_seqs": 16, "max_model_len": 128,
        "learning_rate": 1e-3, "out": str(out),
    }  # fmt: skip
    launch.train(configuration.load(None, settings))
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    too_long = refusal(lambda: VllmEngine(str(out / "model"), dtype="float32", max_tokens=4, max_model_len=1 << 20))
    engine = VllmEngine(
        str(out / "model"), dtype="float32", max_tokens=MAX_TOKENS, max_model_len=MAX_MODEL_LEN, max_num_seqs=32, kv_cache_bytes=64 << 20
    )
    facts = {**scenes(engine, module), "too_long_for_the_model": too_long}
    engine.close()
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
