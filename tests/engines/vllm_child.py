"""Plays every scene with a real vLLM, in a process of its own, and writes what happened as JSON: `python vllm_child.py MODEL TASK OUT`.

A process of its own because vLLM makes torch.set_num_threads a no-op and changes global state; one, because it takes seconds to start.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapter_scenes
import engine_scenes as scenes
import torch
from engine_conformance import play
from transformers import AutoModelForCausalLM

from reinforce_ada import config as configuration
from reinforce_ada.engines.vllm import VllmEngine
from reinforce_ada.training import launch


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def at(engine: VllmEngine, temperature: float, max_num_seqs: int = 32, **settings: Any) -> Any:
    """The same vLLM with other settings: a second engine would cost another start."""
    return VllmEngine.around(engine._llm, max_tokens=scenes.MAX_TOKENS, max_num_seqs=max_num_seqs, temperature=temperature, **settings)


def played(engine: VllmEngine, module: Any) -> dict[str, Any]:
    """What the conformance suite leaves out."""
    scenes.spread(module)
    engine.sync_weights(scenes.weights(module), 0)
    requests = scenes.make_requests(scenes.make_prompts())
    first = scenes.sample(engine, requests)
    stop = ["never said", *scenes.common_texts(first)]
    return {
        "tokens": scenes.tokens(first),
        "few_slots": scenes.tokens(scenes.sample(at(engine, 1.0, 5), requests)),
        "finish_reasons": {k: c.finish_reason for k, c in zip(scenes.tokens(first), (first[i] for i in sorted(first)), strict=True)},
        "diff_07": scenes.largest_logprob_difference(module, requests, scenes.sample(at(engine, 0.7), requests), 0.7),
        "truncated": {
            name: scenes.largest_truncated_difference(
                module, requests, scenes.sample(at(engine, 0.7, **truncation), requests), 0.7, truncation
            )
            for name, truncation in scenes.TRUNCATIONS.items()
        },
        "greedy_whatever_is_left": scenes.not_greedy(
            module, requests[::4], scenes.sample(at(engine, 0.0, **scenes.TRUNCATIONS["all"]), requests[::4])
        ),
        "num_stopped": scenes.cut_at(stop, first, scenes.sample(at(engine, 1.0, stop=stop), requests)),
        "free_slots": engine.free_slots,
        "syncs": list(greedy_syncs(at(engine, 0.0), module, requests)),
    }


def greedy_syncs(engine: Any, module: Any, requests: list[Any]) -> Any:
    for version in range(1, 5):
        engine.submit(requests[:2])  # aborted in flight just before the sync: what they cached must go too
        engine.poll()
        engine.abort([r.id for r in requests[:2]])
        scenes.perturb(module, seed=version)
        engine.sync_weights(scenes.weights(module), version)
        done = scenes.sample(engine, requests[::4])
        yield {
            "wrong": scenes.not_greedy(module, requests[::4], done),
            "diff": scenes.largest_logprob_difference(module, requests[::4], done, 1.0),
            "tokens": scenes.tokens(done),
        }


def main(model: Path, task: Path, out: Path) -> None:
    torch.set_num_threads(1)
    settings = {
        "model": str(model), "dtype": "float32", "engine": "vllm", "task": str(task), "steps": 2, "prompts_per_step": 4,
        "eval_prompts": 4, "eval_k": 2, "max_tokens": 4, "max_num_seqs": 16, "max_model_len": 128, "learning_rate": 1e-3,
        "out": str(out / "run"),
    }  # fmt: skip
    launch.train(configuration.load(None, settings))
    too_long = scenes.refusal(lambda: VllmEngine(str(model), dtype="float32", max_tokens=4, max_model_len=1 << 20))
    engine = VllmEngine(
        str(model),
        dtype="float32",
        max_tokens=scenes.MAX_TOKENS,
        max_model_len=scenes.MAX_MODEL_LEN,
        max_num_seqs=32,
        kv_cache_bytes=64 << 20,
    )
    facts = {"conformance": play(engine, load(model)), **played(engine, load(model)), "too_long_for_the_model": too_long}
    facts["adapters"] = adapter_scenes.play(at(engine, 0.0), adapter_scenes.adapted(str(model)))
    engine.close()
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
