"""Plays the conformance suite with vLLM in this process, and writes what happened as JSON: `python in_process_child.py MODEL FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_conformance import play
from engine_scenes import MAX_MODEL_LEN, MAX_TOKENS
from transformers import AutoModelForCausalLM

from reinforce_ada.engines.vllm import VllmEngine


def main(model: str, file: Path) -> None:
    torch.set_num_threads(1)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    engine = VllmEngine(
        model, dtype="float32", max_tokens=MAX_TOKENS, max_model_len=MAX_MODEL_LEN, max_num_seqs=64, kv_cache_bytes=64 << 20
    )
    file.write_text(json.dumps(play(engine, module)))
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
