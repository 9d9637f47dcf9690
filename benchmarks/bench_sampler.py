"""The sampling core, microseconds a completion and bytes a prompt: pytest benchmarks/bench_sampler.py [--quick] [--benchmark-json=FILE]

A poll takes a batch of answers, in any order, and hands out as many requests; twice the batch is in flight. Only that is timed, not
the engine. The goals: events <= 15 us without a journal and <= 40 us with one, each the same
from 1 000 to 1 000 000 prompts, and <= 400 bytes a prompt beside the completions. `arun` with calls that return at once: <= 40 us.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce_ada import arun
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Prompt, Request, Scored

POLICY = preset("reinforce-ada-balance")
SIZES = (1_000, 100_000, 1_000_000)
NUM_POLLS = 200
IN_FLIGHT = 2  # batches


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines of the table that is printed at the end."""
    lines: list[str] = []
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", f"{'path':<28}{'prompts':>10}{'batch':>7}{'us a completion':>17}", *lines, sep="\n")


@pytest.fixture(autouse=True)
def _size(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if request.config.getoption("--quick") and callspec is not None and callspec.params["num_prompts"] > SIZES[0]:
        pytest.skip("--quick: only 1 000 prompts")


def rewards_of(num_prompts: int) -> np.ndarray:
    """0 or 1 for each completion of each prompt, [P, cap], pass rates Beta(1, 2)."""
    rng = np.random.default_rng(0)
    rates = rng.beta(1, 2, num_prompts).astype(np.float32)
    return (rng.random((num_prompts, POLICY.cap), np.float32) < rates[:, None]).astype(np.int8)


class Events:
    """Objects in, objects out, as the driver does it."""

    def __init__(self, num_prompts: int, batch: int, store: RolloutStore | None, num_tokens: int) -> None:
        self.prompts = [Prompt(f"p{i}") for i in range(num_prompts)]
        self.rewards = rewards_of(num_prompts)
        self.batch, self.store, self.rng = batch, store, random.Random(0)
        self.tokens, self.logprobs = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.float32)
        self.step = -1
        self.start()

    def start(self) -> None:
        self.step += 1
        self.sampler = AdaptiveSampler(self.prompts, POLICY, step=self.step)
        self.running: list[CompletionId] = []
        self.gone: set[CompletionId] = set()
        self.take([], IN_FLIGHT * self.batch)

    def setup(self) -> tuple[tuple[list[Event], int], dict[str, Any]]:
        """The next poll: a batch of what is in flight, chosen at random."""
        if self.sampler.num_active < len(self.prompts) // 4:
            self.start()
        self.running = [i for i in self.running if i not in self.gone]
        self.gone.clear()
        self.rng.shuffle(self.running)
        answered, self.running = self.running[: self.batch], self.running[self.batch :]
        return (([self.event(i) for i in answered], IN_FLIGHT * self.batch - len(self.running)), {})

    def event(self, request_id: CompletionId) -> Event:
        reward = float(self.rewards[int(request_id.prompt_id[1:]), request_id.index])
        return Scored(Completion(request_id, self.tokens, self.logprobs, "", "stop", 0), reward)

    def take(self, events: list[Event], free_slots: int) -> None:
        """What is timed."""
        for event in self.store.append(events) if self.store is not None and events else events:
            dropped = self.sampler.receive(event)
            if dropped:
                self.gone.update(dropped)
                if self.store is not None:
                    self.store.append([Aborted(i, 0) for i in dropped])
        self.running += [r.id for r in self.sampler.next_requests(free_slots)]


def time_of(benchmark: Any, world: Events, batch: int) -> float:
    """Median microseconds a completion of a poll."""
    gc.collect()
    benchmark.pedantic(world.take, setup=world.setup, rounds=NUM_POLLS, warmup_rounds=5)
    us: float = 1e6 * benchmark.stats.stats.median / batch
    benchmark.extra_info["us_per_completion"] = us
    return us


@pytest.mark.parametrize("num_prompts", SIZES)
@pytest.mark.parametrize(("journal", "num_tokens"), [(False, 1), (True, 1), (True, 500)])
def test_events(benchmark, rows, tmp_path: Path, num_prompts: int, journal: bool, num_tokens: int) -> None:
    batch = 64
    store = RolloutStore(tmp_path / "rollouts.db") if journal else None
    us = time_of(benchmark, Events(num_prompts, batch, store, num_tokens), batch)
    if store is not None:
        store.close()
    path = f"events, journal, {num_tokens} token{'s'[: num_tokens - 1]}" if journal else "events"
    rows.append(f"{path:<28}{num_prompts:>10}{batch:>7}{us:>17.2f}")


@pytest.mark.parametrize("num_prompts", SIZES)
def test_bytes_of_events(rows, num_prompts: int) -> None:
    """At the start, and with one completion committed and two requests out; without the completions and the lists that hold them."""
    world = Events(num_prompts, 1, None, 1)
    answers = [world.event(CompletionId(0, prompt.prompt_id, 0)) for prompt in world.prompts]
    tracemalloc.start()
    sampler = AdaptiveSampler(world.prompts, POLICY)
    start = tracemalloc.get_traced_memory()[0]
    for free_slots in [num_prompts] * 3:
        sampler.next_requests(free_slots)
    for answer in answers:
        sampler.receive(answer)
    assert sampler.num_outstanding == 2 * num_prompts
    middle = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    lists = sum(sys.getsizeof(state.answers) for state in sampler._by_order)
    empty = sys.getsizeof([])
    row = f"{start / num_prompts - empty:.0f} at the start, {(middle - lists) / num_prompts:.0f} in the middle"
    rows.append(f"{'events':<28}{num_prompts:>10}  bytes a prompt: {row}")


def test_arun(benchmark, rows) -> None:
    """A whole step, and beside it the tasks of asyncio alone."""
    num_prompts, concurrency = 2000, 256
    rewards = rewards_of(num_prompts)
    prompts = [Prompt(f"p{i}") for i in range(num_prompts)]

    async def sample(request: Request) -> tuple[None, float]:
        return None, float(rewards[int(request.id.prompt_id[1:]), request.id.index])

    async def step() -> int:
        result = await arun(AdaptiveSampler(prompts, POLICY), sample, concurrency=concurrency)
        return int(result.metrics["num_completions_issued"])

    async def tasks(count: int) -> None:
        request = next(iter(AdaptiveSampler(prompts[:1], POLICY).next_requests(1)))
        for _ in range(count // concurrency):
            await asyncio.wait([asyncio.ensure_future(sample(request)) for _ in range(concurrency)])

    count = asyncio.run(step())
    benchmark.pedantic(lambda: asyncio.run(step()), rounds=7, warmup_rounds=1)
    us = 1e6 * benchmark.stats.stats.median / count
    started = time.perf_counter()
    asyncio.run(tasks(count))
    alone = 1e6 * (time.perf_counter() - started) / count
    rows.append(f"{'arun':<28}{num_prompts:>10}{concurrency:>7}{us:>17.2f}   asyncio's tasks alone {alone:.2f}")
