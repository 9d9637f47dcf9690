"""What scoring costs beside the reward itself: `pytest benchmarks/bench_rewards.py -s`, medians in µs a completion."""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
import pytest

from reinforce_ada.rewards import InlineRewards, RewardPool, exact_match
from reinforce_ada.rewards.protocol import RewardRunner
from reinforce_ada.types import Completion, CompletionId, Prompt

_PROMPTS, _PER_PROMPT, _REPETITIONS = 64, 32, 7


def _completions() -> tuple[list[Prompt], list[Completion]]:
    """A step's worth: prompts of 120 tokens, answers of 12, in the order a driver meets them."""
    data = {"question": "What is 3 + 4?", "answer": "7", "metadata": {"terms": [3, 4]}}
    prompts = [Prompt(f"q{i}", tuple(range(120)), "What is 3 + 4? " * 10, data, f"{i}") for i in range(_PROMPTS)]
    pairs = [(p, k) for k in range(_PER_PROMPT) for p in prompts]
    tokens, logprobs = np.arange(12), np.zeros(12)
    return [p for p, _ in pairs], [Completion(CompletionId(1, p.prompt_id, k), tokens, logprobs, "7", "stop", 0) for p, k in pairs]


def _score(runner: RewardRunner, prompts: list[Prompt], completions: list[Completion], batch: int) -> None:
    """Submit completions in batches and poll after each of them, as the driver does."""
    done = 0
    for start in range(0, len(completions), batch):
        runner.submit(prompts[start : start + batch], completions[start : start + batch])
        done += len(runner.poll())
    while done < len(completions):
        done += len(runner.poll(10.0))


def _children_s() -> float:
    """Processor time of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _start_s(prompts: list[Prompt], completions: list[Completion]) -> float:
    """Processor time of a worker that starts, scores one completion and ends."""
    before = _children_s()
    with RewardPool(exact_match, num_workers=1) as rewards:
        _score(rewards, prompts[:1], completions[:1], 1)
    return _children_s() - before


@pytest.mark.parametrize("batch", [1, 8, 128])
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_microseconds_a_completion(runner: str, batch: int) -> None:
    prompts, completions = _completions()
    started = _start_s(prompts, completions) if runner == "pool" else 0.0
    before = _children_s()
    rewards: RewardRunner = InlineRewards(exact_match) if runner == "inline" else RewardPool(exact_match, num_workers=1)
    walls, cpus = [], []
    _score(rewards, prompts, completions, 128)  # the worker has loaded
    for _ in range(_REPETITIONS):
        wall, cpu = time.perf_counter(), time.process_time()
        _score(rewards, prompts, completions, batch)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    rewards.close()
    wall_us, cpu_us = (1e6 * statistics.median(seconds) / len(completions) for seconds in (walls, cpus))
    scored_by = 1e6 * (_children_s() - before - started) / (_REPETITIONS + 1) / len(completions)
    worker_us = scored_by if runner == "pool" else 0.0
    print(f"\n{runner:<8}batches of {batch:<5}{wall_us:7.1f} wall{cpu_us:7.1f} CPU of the driver{worker_us:7.1f} CPU of the worker")
    assert len(completions) == _PROMPTS * _PER_PROMPT
