"""Plays Gemma 3 with a real vLLM in float32, in a process of its own, and writes what happened: `python gemma3_child.py MODEL OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_scenes as scenes
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from reinforce_ada.engines.vllm import VllmEngine
from reinforce_ada.types import Prompt, Request

MAX_TOKENS = 8


def make_requests(window: int, vocab_size: int) -> list[Request]:
    """Prompts of a few tokens, of nearly a window, which the completion passes, and of more; the last two begin alike."""
    head = np.random.default_rng(0).integers(300, vocab_size, window + 40).tolist()
    prompts = [[2, *head[:5]], [2, *head[: window - 4]], [2, *head]]
    return scenes.make_requests([Prompt(f"p{i}", tuple(ids)) for i, ids in enumerate(prompts)], per_prompt=1)


@torch.no_grad()
def logprobs_of(module: Any, request: Request, ids: Sequence[int]) -> torch.Tensor:
    """Of each token of `ids`, over the vocabulary, from one unpadded row without a cache, [L, V]."""
    row = torch.tensor([[*request.prompt.token_ids, *ids]])
    return module(input_ids=row, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1].log_softmax(-1)


def judged(engine: VllmEngine, module: Any, requests: Sequence[Request]) -> dict[str, Any]:
    """How many greedy tokens are not the model's best, and how far logprobs of sampled ones are from the model's."""
    greedy = VllmEngine.around(engine._llm, max_tokens=MAX_TOKENS, max_num_seqs=8, temperature=0.0)
    best, sampled = scenes.sample(greedy, requests), scenes.sample(engine, requests)
    wrong, worst = 0, 0.0
    for r in requests:
        ids = torch.from_numpy(best[r.id].token_ids).long()
        wrong += int((logprobs_of(module, r, ids.tolist()).argmax(-1) != ids).sum())
        c = sampled[r.id]
        ids = torch.from_numpy(c.token_ids).long()
        truth = logprobs_of(module, r, ids.tolist()).gather(1, ids[:, None])[:, 0]
        worst = max(worst, float((truth - torch.from_numpy(c.rollout_logprobs)).abs().max()))
    return {"wrong": wrong, "diff": worst, "tokens": scenes.tokens(best)}


def main(model: str, out: str) -> None:
    torch.set_num_threads(1)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    window = module.config.sliding_window
    engine = VllmEngine(model, dtype="float32", max_tokens=MAX_TOKENS, max_model_len=window + 64, max_num_seqs=8)
    requests = make_requests(window, module.config.vocab_size)
    facts = {"window": window, "lengths": sorted({len(r.prompt.token_ids) for r in requests}), "before": judged(engine, module, requests)}
    scenes.perturb(module, seed=1, scale=0.1)
    engine.sync_weights(scenes.weights(module), 1)
    facts |= {"after": judged(engine, module, requests)}
    engine.close()
    Path(out).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
