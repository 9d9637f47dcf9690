"""The event loop: a sampler and an engine model on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdaptiveSampler, Policy
from reinforce_ada.sampling.columns import ColumnSampler
from reinforce_ada.sampling.policies import History, Window
from reinforce_ada.sampling.sampler import Schedule
from reinforce_ada.simulate.engine_model import EngineModel
from reinforce_ada.simulate.population import World
from reinforce_ada.types import Completion, CompletionId, Prompt, Scored

Ints = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max  # the step at which a free slot finishes
_NO_TOKENS, _NO_LOGPROBS = np.empty(0, np.int32), np.empty(0, np.float32)
_CHUNK = 1 << 16  # prompts whose committed tokens are counted together: 2 M completions at a cap of 32


class Sampler(Protocol):
    """What the loop asks of a sampler; prompts are positions, requests are columns (prompt_of [N], index [N])."""

    @property
    def done(self) -> bool: ...

    def next_requests(self, free_slots: int) -> tuple[Ints, Ints]: ...

    def receive(self, prompt_of: Ints, index: Ints, rewards: NDArray[np.float64]) -> tuple[Ints, Ints]: ...

    def pools(self) -> Pools: ...


@dataclass(frozen=True)
class Pools:
    """Counts of the finished pools, each [P] int64."""

    num_correct: Ints
    num_wrong: Ints

    @property
    def committed(self) -> Ints:
        """Completions in the pool; a simulated reward never fails, so all are scored."""
        return self.num_correct + self.num_wrong


class _Known:
    """Histories by the position of the prompt."""

    def __init__(self, histories: Sequence[History]) -> None:
        self._histories = histories

    def history(self, prompt: Prompt, /) -> History:
        return self._histories[int(prompt.prompt_id)]


class EventSampler:
    """`AdaptiveSampler` in columns, one event after another: the faster of the two while polls bring less than ten answers."""

    def __init__(self, policy: Policy, schedule: Schedule, window: int | Window | None, histories: Sequence[History]) -> None:
        prompts, wanted = [Prompt(str(i)) for i in range(len(histories))], _num_wanted(len(histories), policy)
        memory = _Known(histories)
        self._sampler = AdaptiveSampler(prompts, policy, schedule=schedule, window=window, num_prompts=wanted, memory=memory)

    @property
    def done(self) -> bool:
        return self._sampler.done

    def next_requests(self, free_slots: int) -> tuple[Ints, Ints]:
        return _columns([request.id for request in self._sampler.next_requests(free_slots)])

    def receive(self, prompt_of: Ints, index: Ints, rewards: NDArray[np.float64]) -> tuple[Ints, Ints]:
        aborted: list[CompletionId] = []
        for prompt, i, reward in zip(prompt_of.tolist(), index.tolist(), rewards.tolist(), strict=True):
            completion = Completion(CompletionId(0, str(prompt), i), _NO_TOKENS, _NO_LOGPROBS, "", "stop", 0)
            aborted += self._sampler.receive(Scored(completion, reward))
        return _columns(aborted)

    def pools(self) -> Pools:
        pools = self._sampler.result().pools
        return Pools(np.array([pool.num_correct for pool in pools]), np.array([pool.num_wrong for pool in pools]))


class BatchSampler:
    """`ColumnSampler`, for batches of hundreds."""

    def __init__(self, policy: Policy, schedule: Schedule, window: int | Window | None, histories: Sequence[History]) -> None:
        num_prompts = len(histories)
        wanted = _num_wanted(num_prompts, policy)
        self._sampler = ColumnSampler(num_prompts, policy, schedule=schedule, window=window, num_wanted=wanted, histories=histories)

    @property
    def done(self) -> bool:
        return self._sampler.done

    def next_requests(self, free_slots: int) -> tuple[Ints, Ints]:
        prompt_of, index = self._sampler.next_requests(free_slots)
        return prompt_of, index.astype(np.int64)

    def receive(self, prompt_of: Ints, index: Ints, rewards: NDArray[np.float64]) -> tuple[Ints, Ints]:
        aborted_prompt_of, aborted_index = self._sampler.receive(prompt_of, index, rewards)
        return aborted_prompt_of, aborted_index.astype(np.int64)

    def pools(self) -> Pools:
        result = self._sampler.result()
        return Pools(result.num_correct.astype(np.int64), result.num_wrong.astype(np.int64))


@dataclass(frozen=True)
class Outcome:
    """What a simulated sampling phase costs and brings."""

    wall_s: float
    num_steps: int  # decode steps
    tokens: int  # generated, wasted ones included
    tokens_committed: int
    num_prompts: int
    num_committed: int
    num_with_signal: int  # prompts with both classes in their pool
    slots: int
    busy: NDArray[np.float64]  # [n, 2]: seconds, busy slots from then on

    @property
    def waste(self) -> float:
        """Share of the generated tokens that no pool holds."""
        return 1 - self.tokens_committed / self.tokens

    @property
    def utilisation(self) -> float:
        """Share of the slots, over all decode steps, that gave a token."""
        return self.tokens / (self.slots * self.num_steps)

    @property
    def samples_per_prompt(self) -> float:
        return self.num_committed / self.num_prompts

    @property
    def signal_fraction(self) -> float:
        return self.num_with_signal / self.num_prompts


class _Slots:
    """The engine: which completion is in which slot, and the decode step it ends at."""

    def __init__(self, num_slots: int, num_prompts: int, cap: int) -> None:
        self.finish = np.full(num_slots, _NEVER)
        self.prompt_of = np.zeros(num_slots, np.int64)
        self.index = np.zeros(num_slots, np.int64)
        self.correct = np.zeros(num_slots, np.bool_)
        self._cap = cap
        self._slot_of = np.zeros(num_prompts * cap, np.int32)  # 4 bytes a completion; read only for those that run

    def free(self) -> Ints:
        return np.flatnonzero(self.finish == _NEVER)

    def start(self, prompt_of: Ints, index: Ints, correct: NDArray[np.bool_], finish: Ints) -> None:
        slots = self.free()[: len(prompt_of)]
        self.prompt_of[slots], self.index[slots], self.correct[slots], self.finish[slots] = prompt_of, index, correct, finish
        self._slot_of[prompt_of * self._cap + index] = slots

    def abort(self, prompt_of: Ints, index: Ints) -> None:
        """Free the slots of these; one that has finished in the same poll has none any more."""
        slots = self._slot_of[prompt_of * self._cap + index]
        self.finish[slots[(self.prompt_of[slots] == prompt_of) & (self.index[slots] == index)]] = _NEVER


def simulate(
    world: World,
    policy: Policy,
    engine: EngineModel,
    *,
    schedule: Schedule = "stream",
    window: int | Window | None = None,
    num_earlier: int = 0,
    poll_fraction: float = 0.0,
    sampler: Sampler | None = None,
    on_poll: Callable[[int], None] | None = None,
) -> Outcome:
    """Run one sampling phase on the virtual clock.

    Between two polls the batch only shrinks, and the time is exact: sum over steps of (step_ms + busy_ms * busy) is
    step_ms * steps + busy_ms * tokens.

    Args:
        world: outcomes and lengths of all completions.
        policy: see `preset`.
        engine: slots and times.
        schedule, window: as `AdaptiveSampler` takes them.
        num_earlier: completions of earlier steps from which each prompt's history is; 0 leaves all at Beta(1, 1).
        poll_fraction: 0 polls whenever a completion ends. Above it, only when that share of the slots has ended (or all that run have),
            which leaves those slots idle meanwhile; it is for populations of 100 000 prompts, where 0.01 costs under 1 % of the time.
        sampler: to drive instead of the one that fits.
        on_poll: called after every poll with the number of completions that have ended so far.
    Returns: wall-clock, tokens, waste, signal, utilisation and the busy slots over time.
    """
    if not 0 <= poll_fraction < 1:
        raise InputError("simulate", f"poll_fraction {poll_fraction}", "a number from 0 to below 1 is needed")
    driven = sampler or (BatchSampler if poll_fraction else EventSampler)(policy, schedule, window, world.histories(num_earlier))
    slots = _Slots(engine.slots, world.num_prompts, policy.cap)
    batch = max(round(poll_fraction * engine.slots), 1)
    step = tokens = num_ended = 0
    seconds = engine.sync_ms / 1e3
    busy: list[tuple[float, int]] = []
    while not driven.done:
        prompt_of, index = driven.next_requests(len(slots.free()))
        correct, length = world.draw(prompt_of, index)
        slots.start(prompt_of, index, correct, step + length)
        running = slots.finish[slots.finish != _NEVER]
        busy.append((seconds, len(running)))
        wake = int(np.partition(running, min(batch, len(running)) - 1)[min(batch, len(running)) - 1])
        generated = int((np.minimum(running, wake) - step).sum())
        seconds += engine.decode_s(wake - step, generated) + engine.prefill_s(len(prompt_of))
        tokens, step = tokens + generated, wake
        ended = np.flatnonzero(slots.finish <= wake)
        slots.finish[ended] = _NEVER
        slots.abort(*driven.receive(slots.prompt_of[ended], slots.index[ended], slots.correct[ended].astype(np.float64)))
        num_ended += len(ended)
        if on_poll is not None:
            on_poll(num_ended)
    busy.append((seconds, 0))
    pools = driven.pools()
    return Outcome(
        wall_s=seconds,
        num_steps=step,
        tokens=tokens,
        tokens_committed=_committed_tokens(world, pools.committed),
        num_prompts=len(pools.committed),
        num_committed=int(pools.committed.sum()),
        num_with_signal=int(((pools.num_correct > 0) & (pools.num_wrong > 0)).sum()),
        slots=engine.slots,
        busy=np.array(busy),
    )


def _committed_tokens(world: World, committed: Ints) -> int:
    """Tokens of the first so many completions of each prompt."""
    total = 0
    for first in range(0, len(committed), _CHUNK):
        counts = committed[first : first + _CHUNK]
        prompt_of = np.repeat(np.arange(first, first + len(counts)), counts)
        index = np.arange(len(prompt_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        total += int(world.draw(prompt_of, index)[1].sum())
    return total


def _columns(ids: list[CompletionId]) -> tuple[Ints, Ints]:
    prompt_of = np.fromiter((int(i.prompt_id) for i in ids), np.int64, len(ids))
    return prompt_of, np.fromiter((i.index for i in ids), np.int64, len(ids))


def _num_wanted(num_prompts: int, policy: Policy) -> int | None:
    """Groups wanted: one a prompt; where the policy refills, as many as leave each its share of replacements."""
    factor = policy.propose(1_000_000, 10**9) / 1_000_000
    return None if factor <= 1 else max(int(num_prompts / factor), 1)
