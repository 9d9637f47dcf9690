"""A run whose completions depend on the prompt and on how often it was asked for, not on the process: started by torchrun, or called."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from trl_runs import recorded_adaptive, recorded_plain, tenth, trained, weights

from reinforce_ada.sampling import request_seed


class Rollouts:
    """A rollout_func that answers the k-th request for a prompt, counted over all processes, with tokens of its own."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        from accelerate.utils import gather_object

        completions = [self._answer(prompt) for prompt in gather_object(prompts)]
        first = trainer.accelerator.process_index * len(prompts)
        mine = completions[first : first + len(prompts)]
        prompt_ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": mine,
            "logprobs": [[0.0] * len(ids) for ids in mine],
            "num_tokens_of": [len(ids) for ids in mine],
        }

    def _answer(self, prompt: str) -> list[int]:
        self._asked[prompt] += 1
        seed = request_seed(0, 0, prompt, self._asked[prompt])
        return [3 + (seed >> (8 * i)) % 300 for i in range(1 + seed % 5)]


def rewarded(completion_ids: list[list[int]], num_tokens_of: list[int], **columns: Any) -> list[float | None]:
    """What a rollout_func adds to a row comes to the reward function."""
    assert [len(ids) for ids in completion_ids] == num_tokens_of
    return tenth(completion_ids)


def balance(round_size: int) -> tuple[str, dict[str, int]]:
    return "reinforce-ada-balance", {"round_size": round_size}


def run(folder: Path, out: Path, *, rows: int, cls: Any = None, **options: Any) -> dict[str, Any]:
    """The pools and the weights of three steps of 12 rows, `rows` of them in each process: of 6, the middle group is in both."""
    trainer = trained(
        folder, out, cls=cls or recorded_adaptive(), reward_funcs=rewarded, per_device_train_batch_size=rows, max_steps=3, optim="sgd",
        scale_rewards="none", options={"rollout_func": Rollouts(), **options},
    )  # fmt: skip
    pools = [
        [(*o.id, o.reward, *o.completion.token_ids.tolist()) for p in result.pools for o in p.outcomes]
        for result in trainer.results
        if result
    ]
    return {"pools": pools, "weights": weights(trainer)}


if __name__ == "__main__":
    model, target = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    policies = {"of 8": balance(8), "of 5": balance(5), "grpo": ("grpo", {"scale": "none"})}
    found = {name: run(model, target / "out", rows=6, adaptive=policy) for name, policy in policies.items()}
    found["TRL"] = run(model, target / "out", rows=6, cls=recorded_plain())
    torch.save(found, target / f"{torch.distributed.get_rank()}.pt")
