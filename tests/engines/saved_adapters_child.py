"""Serves saved adapters with vLLM as a LoRA of their base, in a process of its own: `python saved_adapters_child.py BASE ADAPTERS OUT`.

Writes the greedy tokens and their logprobs for the prompts of `adapter_scenes`, with the LoRA and without.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapter_scenes
import engine_scenes as scenes


def greedy(llm: Any, lora: Any) -> list[list[tuple[int, float]]]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=scenes.MAX_TOKENS, logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(r.prompt.token_ids)} for r in adapter_scenes.REQUESTS]
    done = [output.outputs[0] for output in llm.generate(prompts, settings, lora_request=lora, use_tqdm=False)]
    return [[(t, at[t].logprob) for t, at in zip(o.token_ids, o.logprobs, strict=True)] for o in done]


def main(base: str, adapters: str, out: str) -> None:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        base, dtype="float32", max_model_len=scenes.MAX_MODEL_LEN, enforce_eager=True, enable_lora=True, max_lora_rank=8,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=64 << 20, generation_config="vllm",
    )  # fmt: skip
    played = {"with": greedy(llm, LoRARequest("run", 1, adapters)), "without": greedy(llm, None)}
    Path(out).write_text(json.dumps(played))


if __name__ == "__main__":  # vLLM's engine starts as a process that imports this file again
    main(*sys.argv[1:])
