"""The event loop of the simulator: a sampler and an engine model on a virtual clock."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.sampling import AdaptiveSampler, Policy
from reinforce_ada.sampling.policies.contracts import History, Window
from reinforce_ada.sampling.sampler import Schedule
from reinforce_ada.simulate.engine_model import EngineModel
from reinforce_ada.simulate.population import World
from reinforce_ada.types import Completion, CompletionId, Event, Prompt, Request, Scored

Ints = NDArray[np.int64]
_NO_TOKENS, _NO_LOGPROBS = np.empty(0, np.int32), np.empty(0, np.float32)
_NO_DATA: Mapping[str, object] = MappingProxyType({})
_CHUNK = 1 << 18  # completions whose tokens are counted together, which take some 20 MB
_PROMPT_BITS, _INDEX_BITS = 8, 3  # a block of completions drawn together has 2^8 prompts and 2^3 indices


class Sampler(Protocol):
    """The methods of `AdaptiveSampler` that the loop uses; the id of a prompt is its position."""

    @property
    def done(self) -> bool: ...

    def next_requests(self, free_slots: int) -> Sequence[Request]: ...

    def receive(self, event: Event) -> Sequence[CompletionId]: ...

    def committed(self, prompt_id: str) -> int: ...


class _Known:
    """A memory with given histories, by the position of the prompt."""

    def __init__(self, histories: Sequence[History]) -> None:
        self._histories = histories

    def history(self, prompt: Prompt, /) -> History:
        return self._histories[int(prompt.prompt_id)]


@dataclass(frozen=True)
class SimulationResult:
    """The costs and results of a simulated sampling phase."""

    wall_s: float
    num_steps: int  # decode steps
    tokens: int  # generated, wasted ones included
    tokens_committed: int
    num_prompts: int
    num_committed: int
    num_with_signal: int  # prompts with both classes in their pool
    slots: int

    @property
    def waste(self) -> float:
        """Return the share of the generated tokens that are in no pool."""
        return 1 - self.tokens_committed / self.tokens

    @property
    def utilisation(self) -> float:
        """Return the share of the slots, over all decode steps, that generated a token."""
        return self.tokens / (self.slots * self.num_steps)

    @property
    def samples_per_prompt(self) -> float:
        return self.num_committed / self.num_prompts

    @property
    def signal_fraction(self) -> float:
        return self.num_with_signal / self.num_prompts


class _Drawn:
    """The completions of a world, one at a time. They are drawn in blocks, since numpy takes as long for one as for hundreds."""

    def __init__(self, world: World, cap: int) -> None:
        self._world = world
        self._last_prompt, self._last_index = world.num_prompts - 1, cap - 1
        self._blocks: dict[tuple[int, int], memoryview] = {}

    def __call__(self, prompt: int, index: int) -> int:
        """Return the tokens of the completion, negative if it is wrong."""
        at = prompt >> _PROMPT_BITS, index >> _INDEX_BITS
        block = self._blocks.get(at)
        if block is None:
            block = self._blocks[at] = self._draw(*at)
        return block[(index & (1 << _INDEX_BITS) - 1) << _PROMPT_BITS | prompt & (1 << _PROMPT_BITS) - 1]

    def _draw(self, prompts: int, indices: int) -> memoryview:
        index, prompt_of = np.divmod(np.arange(1 << _PROMPT_BITS + _INDEX_BITS), 1 << _PROMPT_BITS)
        prompt_of = np.minimum(prompt_of + (prompts << _PROMPT_BITS), self._last_prompt)
        correct, tokens = self._world.draw(prompt_of, np.minimum(index + (indices << _INDEX_BITS), self._last_index))
        return np.where(correct, tokens, -tokens).astype(np.int32).data


class _Engine:
    """The engine on its virtual clock, with the requests in its slots by the decode step at which they end."""

    def __init__(self, model: EngineModel, drawn: _Drawn) -> None:
        self._model = model
        self._drawn = drawn
        self._reward_of: dict[CompletionId, float] = {}
        self._ending: dict[int, list[CompletionId]] = {}
        self._steps: list[int] = []  # heap of the keys of _ending
        self.step = self.tokens = self.num_ended = 0
        self.seconds = model.sync_ms / 1e3
        self._prefill_s = 0.0  # that of the requests that join the next step

    @property
    def free_slots(self) -> int:
        return self._model.slots - len(self._reward_of)

    def submit(self, requests: Sequence[Request]) -> None:
        """Give each request a slot, and add the prefill of their prompts to the next step."""
        for request in requests:
            length = self._drawn(int(request.id.prompt_id), request.id.index)
            last_step = self.step + abs(length)
            self._reward_of[request.id] = float(length > 0)
            if (ending := self._ending.get(last_step)) is None:
                self._ending[last_step] = [request.id]
                heapq.heappush(self._steps, last_step)
            else:
                ending.append(request.id)
        self._prefill_s = self._model.prefill_s(len(requests))

    def abort(self, request_id: CompletionId) -> None:
        """Free the slot of a request, unless the request has ended in the same step."""
        self._reward_of.pop(request_id, None)

    def poll(self) -> list[Scored]:
        """Decode up to the next step at which a request ends, and return the requests that end there."""
        num_running = len(self._reward_of)
        ended: list[CompletionId] = []
        while not ended:
            step = heapq.heappop(self._steps)
            ended = [request_id for request_id in self._ending.pop(step) if request_id in self._reward_of]
        generated = num_running * (step - self.step)
        self.seconds += self._model.decode_s(step - self.step, generated) + self._prefill_s
        self.tokens, self.step, self.num_ended = self.tokens + generated, step, self.num_ended + len(ended)
        return [_scored(request_id, self._reward_of.pop(request_id)) for request_id in ended]


def _scored(request_id: CompletionId, reward: float) -> Scored:
    return Scored(Completion(request_id, _NO_TOKENS, _NO_LOGPROBS, "", "stop", 0), reward)


def simulate(
    world: World,
    policy: Policy,
    engine: EngineModel,
    *,
    schedule: Schedule = "stream",
    window: int | Window | None = None,
    num_earlier: int = 0,
    sampler: Sampler | None = None,
    on_poll: Callable[[int], None] | None = None,
) -> SimulationResult:
    """Run one sampling phase on the virtual clock.

    Between two polls the batch is the same, and the time is exact: sum over steps of (step_ms + busy_ms * busy) is
    step_ms * steps + busy_ms * tokens.

    Args:
        world: outcomes and lengths of all completions.
        policy: see `preset`.
        engine: slots and times.
        schedule, window: see `AdaptiveSampler`.
        num_earlier: completions of earlier steps in the history of each prompt; with 0 all are at Beta(1, 1).
        sampler: a sampler to drive instead of an `AdaptiveSampler`.
        on_poll: called after every poll with the number of completions that have ended so far.
    Returns: wall-clock, tokens, waste, signal and utilisation.
    """
    driven = sampler or _sampler(policy, schedule, window, world.histories(num_earlier))
    virtual = _Engine(engine, _Drawn(world, policy.cap))
    entered = array("q")
    while not driven.done:
        requests = driven.next_requests(virtual.free_slots)
        entered.extend(int(request.id.prompt_id) for request in requests if request.id.index == 0)
        virtual.submit(requests)
        for event in virtual.poll():
            for request_id in driven.receive(event):
                virtual.abort(request_id)
        if on_poll is not None:
            on_poll(virtual.num_ended)
    committed = np.fromiter((driven.committed(str(prompt)) for prompt in entered), np.int64, len(entered))
    tokens_committed, num_with_signal = _pools(world, np.array(entered), committed)
    return SimulationResult(
        wall_s=virtual.seconds,
        num_steps=virtual.step,
        tokens=virtual.tokens,
        tokens_committed=tokens_committed,
        num_prompts=len(entered),
        num_committed=int(committed.sum()),
        num_with_signal=num_with_signal,
        slots=engine.slots,
    )


def _sampler(policy: Policy, schedule: Schedule, window: int | Window | None, histories: Sequence[History]) -> AdaptiveSampler:
    prompts, wanted = [Prompt(str(i), data=_NO_DATA) for i in range(len(histories))], _num_wanted(len(histories), policy)
    memory = _Known(histories)
    return AdaptiveSampler(prompts, policy, schedule=schedule, window=window, num_prompts=wanted, memory=memory, keep_completions=False)


def _pools(world: World, prompts: Ints, committed: Ints) -> tuple[int, int]:
    """Return (tokens, prompts with both classes) of the first `committed` completions of each of these prompts."""
    tokens = with_signal = 0
    num_prompts = max(_CHUNK // int(committed.max()), 1)
    for first in range(0, len(committed), num_prompts):
        counts = committed[first : first + num_prompts]
        row = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        correct, length = world.draw(prompts[first + row], index)
        num_correct = np.bincount(row, correct, len(counts))
        tokens += int(length.sum())
        with_signal += int(((num_correct > 0) & (num_correct < counts)).sum())
    return tokens, with_signal


def _num_wanted(num_prompts: int, policy: Policy) -> int | None:
    """Return the number of groups wanted: one per prompt, or fewer if the policy refills, so that enough prompts are left to replace."""
    factor = policy.propose(1_000_000, 10**9) / 1_000_000
    return None if factor <= 1 else max(int(num_prompts / factor), 1)
