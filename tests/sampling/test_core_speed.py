"""A completion costs the same however many prompts there are, and a prompt costs little; benchmarks/bench_sampler.py has the figures.

Times are the shortest of many polls and the bounds four times the goals: this guards against a cost that grows, not against noise.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable

import pytest
from sampling_world import prompts_of, scored

from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import CompletionId

POLICY = preset("reinforce-ada-balance")
BYTES_PER_PROMPT = 400
BATCH = 256


def shortest_us(poll: Callable[[], float]) -> float:
    """Return the microseconds per completion in the shortest of 20 polls, each of which returns its seconds; 1 000 prompts last for 31."""
    return 1e6 * min(poll() for _ in range(20)) / BATCH


def polls_of(num_prompts: int) -> Callable[[], float]:
    sampler = AdaptiveSampler(prompts_of([f"p{i}" for i in range(num_prompts)]), POLICY)
    running = sampler.next_requests(BATCH)

    def poll() -> float:
        nonlocal running
        answers = [scored(request.id, float(request.id.index % 7 == 0)) for request in running]
        started = time.perf_counter()
        for answer in answers:
            sampler.receive(answer)
        running = sampler.next_requests(BATCH)
        return time.perf_counter() - started

    return poll


def test_a_completion_costs_the_same_among_few_and_many_prompts() -> None:
    polls = [polls_of(num_prompts) for num_prompts in (1_000, 40_000, 1_000, 40_000)]
    gc.collect()
    few, many, few_again, many_again = map(shortest_us, polls)
    assert max(few, many, few_again, many_again) < 60
    assert min(many, many_again) < 2.5 * max(few, few_again)


@pytest.mark.parametrize("num_prompts", [1_000, 6_000])
def test_bytes_of_a_prompt(num_prompts: int) -> None:
    """Measure before anything is issued and with windows out, without the completions and the lists that hold them."""
    prompts = prompts_of([f"p{i}" for i in range(num_prompts)])
    answers = [scored(CompletionId(0, prompt.prompt_id, index), 0.0) for index in (0, 2) for prompt in prompts]
    AdaptiveSampler(prompts[:1], POLICY)  # numpy.random is imported on its first use
    gc.collect()
    tracemalloc.start()
    try:
        sampler = AdaptiveSampler(prompts, POLICY)
        at_start = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            sampler.next_requests(num_prompts)
        for answer in answers:
            sampler.receive(answer)
        gc.collect()
        in_the_middle = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (sampler.num_committed, sampler.num_outstanding) == (num_prompts, 3 * num_prompts)
    in_the_middle -= sum(sys.getsizeof(state.answers) for state in sampler._by_order)
    assert 100 < at_start / num_prompts < BYTES_PER_PROMPT
    assert 100 < in_the_middle / num_prompts < BYTES_PER_PROMPT
