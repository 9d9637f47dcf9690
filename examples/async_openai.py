"""Adaptive sampling from asyncio over any OpenAI-compatible endpoint, with a journal from which a killed run goes on.

    python examples/async_openai.py --base-url http://host:8000/v1 --model NAME --prompts examples/problems.jsonl --out run.sqlite

Started again with the same arguments, it asks for nothing that the journal has. OPENAI_API_KEY is the endpoint's key, if it wants one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import openai

import reinforce_ada
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.rewards import exact_match
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import CertainWindow, Progress
from reinforce_ada.training.task_files import digest_of, read_records, turns_of
from reinforce_ada.types import Completion, Prompt, Request, SamplingResult

# vLLM's own: the ids of the sampled tokens, and none of the generation_config.json that would sample from another distribution.
VLLM = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def score(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the last number in the text is the answer, otherwise 0.0."""
    numbers = re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return exact_match(prompt, numbers[-1]) if numbers else 0.0


def completed(request: Request, choice: Any) -> Completion:
    # Most endpoints give no token ids. The completion then carries text only, which serves pools and advantages; a trainer tokenizes it.
    ids = getattr(choice, "token_ids", None) or []
    logprobs = [token.logprob for token in choice.logprobs.content] if ids else []
    finish = "length" if choice.finish_reason == "length" else "stop"
    return request.completed(ids, logprobs, text=choice.message.content or "", finish_reason=finish)


class Lines:  # one whenever a prompt is done
    done = 0

    def __call__(self, now: Progress) -> None:
        if now.num_prompts - now.num_active > self.done:
            self.done = now.num_prompts - now.num_active
            print(f"{self.done} of {now.num_prompts} prompts done, {now.num_committed} samples", flush=True)


def show_all(result: SamplingResult, advantages: list[list[float]]) -> None:
    """Print one line for each prompt, then the totals."""
    kept = {g.pool.prompt.prompt_id: (g.kept, a) for g, a in zip(result.groups, advantages, strict=True)}
    for pool in result.pools:
        scored, weights = kept.get(pool.prompt.prompt_id, ((), []))
        counts = f"{len(pool.outcomes)} samples, {pool.num_correct} correct, {pool.num_wrong} wrong, {pool.num_void} void"
        print(f"prompt {pool.prompt.prompt_id}: {counts}; kept {[s.reward for s in scored]}, advantages {[round(a, 3) for a in weights]}")
    samples, correct, wrong = (sum(x) for x in zip(*[(len(p.outcomes), p.num_correct, p.num_wrong) for p in result.pools], strict=True))
    print(f"total: {samples} samples, {correct} correct, {wrong} wrong; a signal in {result.metrics['signal_fraction']:.0%} of the prompts")


async def main(given: argparse.Namespace) -> None:
    policy = reinforce_ada.preset(given.preset)
    prompts = [Prompt(str(i), data={**r, "messages": turns_of(r)}) for i, r in enumerate(read_records(given.prompts, needs_answer=True))]
    # This window asks only for what is needed for certain. None would fill every slot, which is faster where completions cost nothing.
    sampler = reinforce_ada.AdaptiveSampler(prompts, policy, window=CertainWindow(policy))
    settings: dict[str, Any] = {"model": given.model, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "extra_body": given.extra_body}
    # The client repeats what may pass (no connection, a timeout, 408, 409, 429, 5xx). What every request would meet ends the run.
    fatal = (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
    client = openai.AsyncOpenAI(base_url=given.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=5)

    async def sample(request: Request) -> tuple[Completion, float]:
        try:
            answer = await client.chat.completions.create(messages=request.prompt.data["messages"], seed=request.seed % 2**31, **settings)
        except fatal as error:
            raise EngineLost(f"{given.base_url}: {error}") from error
        completion = completed(request, answer.choices[0])
        return completion, score(request.prompt, completion.text)

    with RolloutStore(given.out, run={**settings, "preset": given.preset, "prompts": digest_of(given.prompts)}) as store:
        sampler.restore(store.events(0))
        async with client:
            result = await reinforce_ada.arun(sampler, sample, concurrency=given.concurrency, journal=store, on_progress=Lines())
        store.finish_step(0, result)
    show_all(result, reinforce_ada.advantages_of(result, policy))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--preset", default="reinforce-ada-balance")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl", help="a prompt and its answer in each line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.sqlite", help="the journal; an unfinished one is continued")
    parser.add_argument("--token-ids", action="store_const", dest="extra_body", const=VLLM, help="for vLLM, which gives them")
    try:
        asyncio.run(main(parser.parse_args()))
    except (InputError, EngineLost) as error:
        sys.exit(str(error))
