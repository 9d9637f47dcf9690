"""Adaptive groups over an environment of `verifiers` 0.4, whose episodes run on an OpenAI-compatible endpoint.

    python examples/verifiers_env.py --base-url http://host:8000/v1 --model NAME

verifiers needs Python 3.11 and a virtual environment of its own: it asks for openai below 3 and for one version of mcp.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import reinforce_ada
from reinforce_ada.errors import InputError, needs
from reinforce_ada.types import Completion, Prompt, Request

try:
    needs("verifiers_env", "verifiers")
except InputError as error:
    sys.exit(str(error))

import verifiers.v1 as vf
from openai import AsyncOpenAI

__all__ = ["Chat", "Sums"]  # where verifiers looks for the taskset and the harness of a module

# -------------------- the environment: a taskset, and a harness that asks twice, at the endpoint of verifiers that records the trace


class SumData(vf.TaskData):
    answer: int


class Sum(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def is_right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.rstrip(".").split()[-1:] == [str(self.data.answer)])


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self) -> list[Sum]:
        return [Sum(SumData(prompt=f"{a}+{b}", answer=a + b), self.config.task) for a, b in ((17, 25), (8, 5), (2, 3))]


class Chat(vf.Harness[vf.HarnessConfig]):
    NEEDS_CONTAINER = EXECUTES_CODE = False

    async def launch(
        self, ctx: vf.ModelContext, trace: vf.Trace, runtime: vf.Runtime, endpoint: str, secret: str, tools: dict[str, str], data: SumData
    ) -> vf.ProgramResult:
        messages = [{"role": "user", "content": data.prompt_text}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            for follow_up in ("Check that, and end with the number.", ""):
                reply = await client.chat.completions.create(model=ctx.model, messages=messages)
                messages += [{"role": "assistant", "content": reply.choices[0].message.content}, {"role": "user", "content": follow_up}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


# -------------------- adaptive groups over it


def completed(request: Request, trace: vf.Trace) -> Completion:
    # Only a TrainClientConfig gives tokens: verifiers then renders the chat itself for vLLM. Those before the first sampled one are prompt.
    branch = trace.branches[-1]
    start = [*branch.sampled_mask, True].index(True)
    ids, logprobs, mask = (values[start:] for values in (branch.token_ids, branch.logprobs, branch.sampled_mask))
    return request.completed(ids, logprobs, text=trace.transcript, token_mask=mask)


async def main(given: argparse.Namespace) -> None:
    here = {"id": __name__}  # of a published environment: its name
    env = vf.SingleAgentEnv(vf.SingleAgentEnvConfig(taskset=here, agent={"harness": here, "runtime": {"type": "subprocess"}}))
    tasks = {task.key: task for task in env.taskset}
    client = vf.EvalClientConfig(base_url=given.base_url, api_key_var="OPENAI_API_KEY")
    policy, gate = reinforce_ada.preset("reinforce-ada-balance"), asyncio.Semaphore(given.concurrency)

    async def sample(request: Request) -> tuple[Completion, float]:
        model = vf.ModelContext(given.model, client, vf.SamplingConfig(temperature=1.0, seed=request.seed % 2**31))
        async with gate:
            episode = await env.run_episode(tasks[request.prompt.prompt_id], model)
        if not episode.ok:  # this episode becomes a void
            raise RuntimeError(f"the episode failed: {[e.message for part in (episode, *episode.traces) for e in part.errors]}")
        return completed(request, episode.traces[0]), episode.traces[0].reward

    async with env.serving():
        results = await asyncio.gather(*[reinforce_ada.adaptive_group(policy, sample, prompt=Prompt(key)) for key in tasks])
    for task, result in zip(tasks.values(), results, strict=True):
        (pool,) = result.pools
        print(f"{task.data.prompt}: {pool.num_correct} correct, {pool.num_wrong} wrong, {pool.num_void} void")
        for group, advantages in zip(result.groups, reinforce_ada.advantages_of(result, policy), strict=True):
            print(f"  kept {[scored.reward for scored in group.kept]}, advantages {[round(a, 3) for a in advantages]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=16)
    asyncio.run(main(parser.parse_args()))
