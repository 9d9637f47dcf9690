"""Stand-ins for verl's language model server and reward workers: what a request gets is a function of its prompt and its session."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tiny import tokenizer
from verl.workers.rollout.replica import TokenOutput

TOKENIZER = tokenizer()


def rate_of(text: str) -> float:
    """The pass rate of the sum a+b=: never right for a = 0, always for a = 1, else spread over (0, 1)."""
    a, b = int(text[0]), int(text[2])
    return {0: 0.0, 1: 1.0}.get(a, (1 + b) / 11)


def answer(text: str, session: int) -> str:
    """The answer to a sum in a session, right with the prompt's rate."""
    return right_answer(text) if random.Random(f"{text}{session}").random() < rate_of(text) else "+"


def right_answer(text: str) -> str:
    return str(int(text[0]) + int(text[2]))


class Client:
    """Answers like verl's LLMServerClient, after up to 20 ms; `broken` sessions raise, `cancelled` ones cancel themselves."""

    def __init__(self, *, broken: int = 0, cancelled: int = 0) -> None:
        self.broken, self.cancelled = broken, cancelled
        self.num_calls = self.num_running = 0

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        text = TOKENIZER.decode(prompt_ids, skip_special_tokens=True)
        session = int(sampling_params["request"].rsplit(" ", 1)[1])
        self.num_calls += 1
        self.num_running += 1
        try:
            await asyncio.sleep(random.Random(f"{request_id}").random() * 0.02)
        finally:
            self.num_running -= 1
        if self.broken and session % 3 == self.broken:
            raise RuntimeError("the server is down")
        if self.cancelled and session % 3 == self.cancelled:
            raise asyncio.CancelledError
        ids = [*TOKENIZER(answer(text, session), add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
        versions = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), 0)
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), num_preempted=0, stop_reason="completed", extra_fields=versions)


class Reward:
    """The handle of a reward worker, in this process: `await handle.compute_score.remote(data)`."""

    num_calls = 0

    @property
    def compute_score(self) -> Any:
        return self

    async def remote(self, data: Any) -> dict[str, Any]:
        self.num_calls += 1
        item = data[-1]  # of several outputs the last one is scored
        ids = item.batch["responses"][: int(item.non_tensor_batch["response_len"])]
        said = TOKENIZER.decode(ids, skip_special_tokens=True).strip()
        return {"reward_score": float(said == item.non_tensor_batch["reward_model"]["ground_truth"]), "reward_extra_info": {"said": said}}
