"""Adaptive groups of multi-turn episodes with a tool, and a loss that trains only what the policy wrote.

    python examples/multi_turn.py                            # a scripted policy: no model and no network
    python examples/multi_turn.py --policy my_agent.py:turn  # a model of your own

Tokens are the bytes of the text, so that the lines at the end can show each of them.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
from collections.abc import Awaitable, Callable
from itertools import accumulate
from typing import TypeAlias

import torch

from reinforce_ada import adaptive_group, advantages_of, ops, preset
from reinforce_ada.loading import load
from reinforce_ada.types import Completion, Prompt, Request

# (text so far, seed) -> the policy's next turn: either a call of the tool, such as "3+4=", or an answer, which ends with a full stop.
# It returns the turn's tokens, and the logprob of each.
Turn: TypeAlias = Callable[[str, int], Awaitable[tuple[list[int], list[float]]]]
MAX_TURNS = 4
POLICY = preset("reinforce-ada-balance", decide_every=2)
PROMPTS = [Prompt(text, text=f"{text}? ", data={"answer": sum(map(int, text.split("+")))}) for text in ("17+25", "8+5+30", "2+3+4+5")]


async def scripted(text: str, seed: int) -> tuple[list[int], list[float]]:
    """Add the numbers of the question one call at a time, or, once in three turns, guess their sum."""
    await asyncio.sleep(0)  # a model would work here
    law = random.Random(f"{seed} {text}")
    question, _, written = text.partition("? ")
    numbers, num_calls = [int(n) for n in question.split("+")], written.count("=")
    so_far = int(written.split("=")[-1]) if num_calls else numbers[0]
    if num_calls == len(numbers) - 1:
        turn, probability = f"{so_far}.", 1.0
    elif law.random() < 1 / 3:
        turn, probability = f"{sum(numbers) + law.choice((-1, 0, 1))}.", 1 / 9
    else:
        turn, probability = f"{so_far}+{numbers[num_calls + 1]}=", 2 / 3
    return list(turn.encode()), [math.log(probability)] + [0.0] * (len(turn) - 1)  # the first token decides on the others


async def episode(turn: Turn, request: Request) -> tuple[Completion, float]:
    """Play one episode, in which the policy's tokens and the tool's alternate; the mask is False for those of the tool."""
    ids, logprobs, mask, text = list[int](), list[float](), list[bool](), ""
    for _ in range(MAX_TURNS):
        written, theirs = await turn(request.prompt.text + text, request.seed)
        call = re.search(r"(\d+)\+(\d+)=$", bytes(written).decode())
        told = list(f"{int(call[1]) + int(call[2])} ".encode()) if call else []
        ids += written + told
        logprobs += theirs + [0.0] * len(told)  # nobody sampled the tool's tokens: whatever stands here is never read
        mask += [True] * len(written) + [False] * len(told)
        text = bytes(ids).decode()
        if call is None:
            break
    reward = float(text.split()[-1:] == [f"{request.prompt.data['answer']}."])
    return request.completed(ids, logprobs, text=text, token_mask=mask), reward


async def sampled(turn: Turn, concurrency: int) -> list[tuple[Completion, float]]:
    """Return the kept episodes of all prompts with their advantages. One semaphore bounds the episodes of all prompts together."""
    gate = asyncio.Semaphore(concurrency)

    async def sample(request: Request) -> tuple[Completion, float]:
        async with gate:
            return await episode(turn, request)

    async def group_of(prompt: Prompt) -> list[tuple[Completion, float]]:
        result = await adaptive_group(POLICY, sample, prompt=prompt)
        (pool,) = result.pools
        print(f"{prompt.prompt_id}: {len(pool.outcomes)} episodes, {pool.num_correct} correct, {pool.num_wrong} wrong")
        kept = [scored.completion for group in result.groups for scored in group.kept]
        return list(zip(kept, [a for of in advantages_of(result, POLICY) for a in of], strict=True))

    return [pair for group in await asyncio.gather(*map(group_of, PROMPTS)) for pair in group]


def main(given: argparse.Namespace) -> None:
    turn = load("multi_turn", "policy", given.policy) if given.policy else scripted
    kept = asyncio.run(sampled(turn, given.concurrency))
    if not kept:
        raise SystemExit("multi_turn: no episode ended; the log above says why")
    print("\nThe kept episodes with their advantages; what the policy wrote is underlined.")
    for completion, advantage in kept:
        marks = "".join(" ^"[own] for own in torch.as_tensor(completion.token_mask).tolist())
        print(f"{advantage:+.3f}  {completion.text}\n        {marks}")
    # All episodes in one packed tensor. In a trainer the logprobs are those that the model gives these tokens now.
    logprobs = torch.cat([torch.from_numpy(c.rollout_logprobs) for c, _ in kept]).requires_grad_()
    mask = torch.cat([torch.as_tensor(c.token_mask) for c, _ in kept])
    cu_seqlens = torch.tensor([0, *accumulate(len(c.token_ids) for c, _ in kept)])
    loss, _ = ops.policy_loss(
        logprobs, torch.tensor([a for _, a in kept]), mask, old_logprobs=logprobs.detach(), cu_seqlens=cu_seqlens, advantages_per="sequence"
    )
    size = torch.autograd.grad(loss, logprobs)[0].abs()
    print(f"\nloss {loss.item():.4f} over {mask.sum()} of {mask.numel()} tokens")
    print(f"sizes of the gradient: {size[mask].sum():.2g} over the policy's tokens, {size[~mask].sum():.2g} over the tool's")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help='"module:function" or "file.py:function"; see Turn')
    parser.add_argument("--concurrency", type=int, default=8, help="the most episodes at the same time (8)")
    main(parser.parse_args())
