"""Whether adapters arrive in two Ray actors, as JSON: `python ray_adapters_child.py MODEL FILE`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import adapter_scenes
import engine_scenes as scenes
import torch

from reinforce_ada.engines.fleet import State
from reinforce_ada.engines.ray import Options, RayEngine

PATIENCE_S = 300.0


def wait_until_ready(engine: RayEngine) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(member.state is not State.ready for member in engine.members):
        assert time.monotonic() < deadline, [(m.state.value, m.reason) for m in engine.members]
        assert engine.poll() == []


def main(model: str, file: Path) -> None:
    torch.set_num_threads(1)
    options = Options(
        model=model, dtype="float32", device="cpu", max_tokens=scenes.MAX_TOKENS, max_model_len=scenes.MAX_MODEL_LEN, max_num_seqs=32,
        temperature=0.0, kv_cache_bytes=64 << 20,
    )  # fmt: skip
    engine = RayEngine(options, num_replicas=2, vocab_size=384)
    facts = adapter_scenes.play(engine, adapter_scenes.adapted(model), settle=lambda: wait_until_ready(engine))
    facts["replicas"] = len({placement.replica for placement in engine.placements or ()})
    engine.close()
    file.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
