"""Three steps of TRL with a real vLLM in its process, on a CPU: `python trl_stream.py MODEL OUT` writes what happened as JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl_runs import recorded_adaptive, tenth, trainer_of

from reinforce_ada.engines.vllm import VllmEngine


def colocated(trainer: Any, model: Path) -> Any:
    """What TRL makes for vllm_mode="colocate", with an LLM for a CPU and with weights loaded in the way that vLLM has there."""
    engine = VllmEngine(str(model), dtype="float32", max_tokens=6, max_model_len=64, max_num_seqs=16, kv_cache_bytes=64 << 20)
    loaded: list[int] = []

    def sync_weights() -> None:
        loaded.append(trainer.state.global_step)
        engine.sync_weights([(name, p.detach()) for name, p in trainer.model.named_parameters()], len(loaded))

    return SimpleNamespace(
        llm=engine._llm, max_num_seqs=16, sync_weights=sync_weights, loaded=loaded, close=engine.close, enable_sleep_mode=False,
        generation_kwargs={}, structured_outputs_regex=None,
    )  # fmt: skip


def main(model: Path, out: Path) -> None:
    import_module("trl.trainer.grpo_trainer")  # before trl_runs does: TRL is to see that there is a vLLM
    trainer = trainer_of(model, out, cls=recorded_adaptive(), reward_funcs=tenth, max_steps=3, learning_rate=1e-1, beta=0.04)
    vllm = colocated(trainer, model)
    trainer.vllm_generation, trainer.vllm_mode, trainer.use_vllm, trainer._last_loaded_step = vllm, "colocate", True, -1
    trainer.train()
    steps = [
        {
            "pools": [[(o.id.index, o.reward, o.completion.token_ids.tolist()) for o in pool.outcomes] for pool in result.pools],
            "kept": [s.completion.token_ids.tolist() for group in result.groups for s in group.kept],
            "issued": [pool.num_issued for pool in result.pools],
            "trained": [ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)],
            "advantages": batch["advantages"].tolist(),
            "expected": [s.reward - group.pool.mean for group in result.groups for s in group.kept],
            # Logprobs of the trained model against those of vLLM: with the weights of an earlier step they would differ
            "diff": ((batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs() * batch["completion_mask"]).max().item(),
        }
        for result, batch in zip(trainer.results, trainer.batches, strict=True)
    ]
    vllm.close()
    (out / "facts.json").write_text(json.dumps({"steps": steps, "loaded": vllm.loaded, "log": trainer.state.log_history}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
