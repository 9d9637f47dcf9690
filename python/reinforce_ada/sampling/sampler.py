"""The adaptive sampler: a state machine that hands out requests and takes events. It does no I/O and reads no clock."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Literal, TypeAlias, get_args

import numpy as np

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.outside import one_line
from reinforce_ada.sampling.metrics import Progress, Tally, sampling_metrics
from reinforce_ada.sampling.policies.contracts import History, Remembers, Verdict, Window, at_least
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.pool import only_reward, rewards_of
from reinforce_ada.sampling.prompt_state import PromptState, indices_of
from reinforce_ada.sampling.rules import exit_reason, has_room, settled_end, shared_window, window_needed
from reinforce_ada.types import (
    Aborted,
    CompletionId,
    Event,
    ExitReason,
    Failed,
    Group,
    Lost,
    Pool,
    Prompt,
    Request,
    SamplingResult,
    Scored,
)

Schedule: TypeAlias = Literal["stream", "rounds"]

_WHERE = "AdaptiveSampler"
_ORDER_BITS = 40  # a heap key has the prompt's order in these bits and num_issued above them; a tuple would cost 100 bytes a prompt
_UNKNOWN = History()


def request_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """Return the seed of a request, in [0, 2**63); it is the same whenever, wherever and however often the request is issued."""
    key = f"{run_seed},{step},{index},{prompt_id}".encode("utf-8", "surrogatepass")  # prompt_id last: it may hold commas
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


class AdaptiveSampler:
    """The sampler of one step, which spends the rollout budget where the signal is.

    Completions are committed in request order: completion k counts once 0..k-1 do. The exit rule sees only the committed prefix, so
    the pools follow the law of the sequential sampler and depend on neither timing nor window. When a prompt exits, its other
    requests are aborted, and answers past the prefix are waste.

    Args:
        prompts: a sequence, or an iterator read lazily, of prompts with distinct ids.
        policy: see `preset` and `Policy`.
        step: part of every completion's identity; events of another step are rejected and counted.
        policy_version: that of the weights that sample; events of another version are rejected and counted.
        schedule: "stream" (no barrier) or "rounds" (no prompt gets its next round before every active prompt has committed its
            current one; a prompt that refills a dropped one joins at the next barrier). Both give the same pools at equal `decide_every`.
        seed: run seed from which request seeds derive.
        window: for "stream" only. A prompt may be issued up to committed + window requests; a window of at most `decide_every` never
            reaches past the next decision. A function (`Window`) bounds each prompt's unanswered requests from all of its answers,
            and requests are aborted as soon as the answers settle that they are past the prompt's end. None adapts:
            ceil((free_slots + outstanding) / active prompts), at least round_size.
        num_prompts: groups wanted; all of a sequence by default. It is required with an iterator and with a policy that refills.
        memory: the histories of prompts in earlier steps; required by a policy that reads them.
        keep_completions: False drops all of a completion but its reward as soon as it arrives, which takes a twentieth of the memory,
            for a simulation. The outcomes of the pools then have neither id nor text, and no tokens are counted.
    Raises: InputError for no prompts, duplicate ids, and arguments that cannot go together.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        policy: Policy,
        *,
        step: int = 0,
        policy_version: int = 0,
        schedule: Schedule = "stream",
        seed: int = 0,
        window: int | Window | None = None,
        num_prompts: int | None = None,
        memory: Remembers | None = None,
        keep_completions: bool = True,
    ) -> None:
        if not isinstance(policy, Policy):
            raise InputError(_WHERE, f"policy {one_line(repr(policy))}", "a Policy", "preset('reinforce-ada-balance') makes one")
        check_schedule(_WHERE, schedule, window)
        if policy.needs_memory and memory is None:
            raise InputError(_WHERE, f"policy {policy.name!r} without memory", "the histories of the prompts are needed", "memory=Memory()")
        self._policy = policy
        self._step = step
        self._memory = memory
        self._policy_version = policy_version
        self._schedule = schedule
        self._seed = seed
        self._keep_completions = keep_completions
        self._fixed_window = None if callable(window) else window
        self._window_of = window if callable(window) else None
        self._is_history_read_again = self._window_of is not None or policy.weight_needs_memory
        self._num_wanted = _num_wanted(prompts, policy, num_prompts)
        self._source: Iterator[Prompt] = iter(prompts)

        self._states: dict[str, PromptState] = {}
        self._by_order: list[PromptState] = []
        self._num_active = 0
        self._num_outstanding = 0
        self._num_behind = 0
        self._num_candidates = 0
        self._tally = Tally()
        self._ready: list[int] = []  # heap of num_issued << _ORDER_BITS | order: breadth first
        self._waiting: dict[int, list[int]] = defaultdict(list)  # window needed -> orders; stale unless the prompt waits for that one
        self._reissue: list[tuple[int, int]] = []  # heap of (order, index); stale unless index is in that prompt's `lost`
        self._admit()
        if not self._by_order:
            raise InputError(_WHERE, "no prompts", "at least one is needed")
        if schedule == "rounds":
            self._start_round()

    # -------------------- read-only

    @property
    def done(self) -> bool:
        """Return whether every prompt that entered has exited."""
        return self._num_active == 0

    @property
    def num_active(self) -> int:
        return self._num_active

    @property
    def num_eliminated(self) -> int:
        """Return the number of prompts that entered and have exited, for whatever reason."""
        return len(self._by_order) - self._num_active

    @property
    def num_admitted(self) -> int:
        return len(self._by_order)

    @property
    def num_committed(self) -> int:
        return self._tally.num_committed

    @property
    def num_outstanding(self) -> int:
        return self._num_outstanding

    @property
    def outstanding(self) -> list[CompletionId]:
        """Return the requests of active prompts that are handed out and not answered, in prompt and request order."""
        return [self._id(state, index) for state in self._by_order for index in indices_of(state.outstanding)]

    def prompt(self, prompt_id: str) -> Prompt:
        """Return the prompt with this id. Raises: KeyError if no such prompt has entered this step."""
        return self._states[prompt_id].prompt

    def committed(self, prompt_id: str) -> int:
        """Return the length of this prompt's committed prefix."""
        return self._states[prompt_id].committed

    def is_open(self, request_id: CompletionId) -> bool:
        """Return whether the answer to this request could still be committed."""
        state = self._states.get(request_id.prompt_id)
        return state is not None and request_id.step == self._step and state.is_open(request_id.index)

    def progress(self) -> Progress:
        return self._tally.progress(self.num_admitted, self._num_active)

    # -------------------- requests

    def next_requests(self, free_slots: int) -> list[Request]:
        """Hand out up to `free_slots` requests: lost ones first, then breadth first (fewest issued first, ties in prompt order)."""
        at_least(0, f"{_WHERE}.next_requests", free_slots=free_slots)
        window = self._window(free_slots)
        self._release(window)
        requests: list[Request] = []
        while len(requests) < free_slots and (state_index := self._next_lost() or self._next_fresh(window)):
            requests.append(self._issue(*state_index))
        return requests

    def _window(self, free_slots: int) -> int:
        """Return the window that all prompts share; if each has its own, the widest possible one."""
        if self._window_of is not None:
            return self._policy.cap
        if self._fixed_window is not None:
            return min(self._fixed_window, self._policy.cap)
        capacity = free_slots + self._num_outstanding
        return shared_window(capacity, self._num_active, self._policy.allocate.round_size, self._policy.cap)

    def _next_lost(self) -> tuple[PromptState, int] | None:
        while self._reissue:
            order, index = heapq.heappop(self._reissue)
            state = self._by_order[order]
            if state.exit is None and state.is_lost(index):
                return state, index
        return None

    def _release(self, window: int) -> None:
        """Queue the prompts that waited for a window of at most this width."""
        for needed in [n for n in self._waiting if n <= window] if self._waiting else ():
            for state in (self._by_order[order] for order in self._waiting.pop(needed)):
                if state.waits_for == needed:
                    state.waits_for = 0
                    self._queue(state)

    def _next_fresh(self, window: int) -> tuple[PromptState, int] | None:
        while self._ready:
            state = self._by_order[heapq.heappop(self._ready) & ((1 << _ORDER_BITS) - 1)]
            state.queued = False
            needed = self._window_needed(state)
            if state.exit is None and needed <= window:
                return state, state.num_issued
            if state.exit is None and window < needed <= self._policy.cap and state.waits_for != needed:
                state.waits_for = needed
                self._waiting[needed].append(state.order)
        return None

    def _window_needed(self, state: PromptState) -> int:
        """Return the smallest window at which this prompt may be issued a fresh request; above the cap if no window allows it."""
        never = self._policy.cap + 1
        if state.num_issued >= (state.round_limit if self._schedule == "rounds" else state.limit):
            return never
        if self._schedule == "rounds":
            return 0
        if self._window_of is not None:  # it changes with the answers only, and every answer queues the prompt again
            answered = state.answered
            window = self._window_of(answered, state.history, state.cap)
            return 0 if has_room(window, state.num_issued, answered.committed) else never
        return window_needed(state.num_issued, state.committed, self._policy.decide_every)

    def _issue(self, state: PromptState, index: int) -> Request:
        state.outstanding |= 1 << index
        self._num_outstanding += 1
        if state.is_lost(index):
            state.lost ^= 1 << index
        else:
            state.num_issued += 1
            self._tally.num_issued += 1
            self._queue(state)
        request_id = self._id(state, index)
        seed = request_seed(self._seed, self._step, state.prompt.prompt_id, index)
        return Request(request_id, state.prompt, seed, self._policy_version)

    def _queue(self, state: PromptState) -> None:
        if not state.queued and state.exit is None:
            state.queued = True
            heapq.heappush(self._ready, state.num_issued << _ORDER_BITS | state.order)

    def _id(self, state: PromptState, index: int) -> CompletionId:
        return CompletionId(self._step, state.prompt.prompt_id, index)

    # -------------------- events

    def receive(self, event: Event) -> list[CompletionId]:
        """Take one event. Events may arrive in any order and more than once.

        Returns: the requests to abort: all outstanding ones of a prompt that exits by this event, or past the end that it settles.
        Raises: InputError for a Scored whose reward is not finite.
        """
        request_id = event.id
        state = self._state_of(event, request_id)
        if state is None or request_id.index >= state.num_issued:
            self._tally.num_rejected += 1
            return []
        return self._take(state, event, request_id.index)

    def restore(self, events: Iterable[Event]) -> None:
        """Replay a journal in its order, before any request is issued. Requests it leaves open are issued again with the same seeds.

        Raises: InputError once requests have been issued.
        """
        if self._tally.num_issued:
            raise InputError(f"{_WHERE}.restore", f"{self._tally.num_issued} issued requests", "a sampler that has issued none is needed")
        for event in events:
            request_id = event.id
            state = self._state_of(event, request_id)
            if state is None:
                self._tally.num_rejected += 1
                continue
            self._mark_issued(state, request_id.index)
            self._take(state, event, request_id.index)
        self._ready = []
        self._waiting.clear()
        for state in self._by_order:
            state.queued, state.waits_for = False, 0
            self._queue(state)

    def _state_of(self, event: Event, request_id: CompletionId) -> PromptState | None:
        """Return the state of the prompt to which this event may be credited, or None."""
        if isinstance(event, Scored) and not math.isfinite(event.reward):
            given = f"reward {event.reward} for {tuple(request_id)}"
            raise InputError(f"{_WHERE}.receive", given, "a finite reward is needed", "send a Failed event for it")
        if request_id.step != self._step or event.policy_version != self._policy_version:
            return None
        state = self._states.get(request_id.prompt_id)
        return state if state is not None and 0 <= request_id.index < state.cap else None

    def _mark_issued(self, state: PromptState, index: int) -> None:
        """Count every index up to this one as issued by the run that wrote the journal, and issue the gaps again."""
        for missing in range(state.num_issued, min(index, state.limit)):
            self._issue_again(state, missing)
        self._tally.num_issued += max(index + 1 - state.num_issued, 0)
        state.num_issued = max(index + 1, state.num_issued)

    def _issue_again(self, state: PromptState, index: int) -> None:
        state.lost |= 1 << index
        heapq.heappush(self._reissue, (state.order, index))

    def _take(self, state: PromptState, event: Event, index: int) -> list[CompletionId]:
        if state.is_answered(index) or (state.is_lost(index) and isinstance(event, Aborted | Lost)):
            self._tally.num_duplicates += 1
            return []
        if state.exit is not None or index >= state.limit:
            self._waste(state, index, event)
            return []
        if state.outstanding >> index & 1:
            state.outstanding ^= 1 << index
            self._num_outstanding -= 1
        if isinstance(event, Aborted | Lost):
            self._tally.lose(event)
            self._issue_again(state, index)
            return []
        state.lost &= ~(1 << index)
        state.put(index, event if self._keep_completions or isinstance(event, Failed) else only_reward(event.reward))
        return self._commit(state)

    def _waste(self, state: PromptState, index: int, event: Event) -> None:
        """Discard an answer that will never be committed."""
        if not isinstance(event, Lost):  # a lost request may still be answered
            state.discarded |= 1 << index
            self._tally.waste(event)

    def _commit(self, state: PromptState) -> list[CompletionId]:
        """Extend the committed prefix as far as answers allow, and ask the exit rule at every decision point."""
        had_signal = state.has_signal
        while (outcome := state.commit_next()) is not None:
            self._tally.num_with_signal += state.has_signal and not had_signal
            had_signal = state.has_signal
            self._tally.commit(outcome, self._policy.positive_threshold)
            if (reason := exit_reason(self._policy, state.counts, state.cap)) is not None:
                return self._exit(state, reason)
        self._queue(state)
        if state.behind and state.committed >= state.round_limit:
            self._catch_up(state)
        return [] if self._window_of is None else self._settle(state)

    def _settle(self, state: PromptState) -> list[CompletionId]:
        """Give up the requests past the point where the prompt exits however its unanswered requests turn out."""
        if self._policy.decide(state.answered) is Verdict.CONTINUE:  # nearly always, and it saves the search
            return []
        state.limit = min(state.limit, settled_end(self._policy, state.counts, state.later, state.cap))
        state.lost &= (1 << state.limit) - 1
        return self._give_up(state, state.limit)

    def _give_up(self, state: PromptState, first: int) -> list[CompletionId]:
        """Discard the answers from index `first` on, which will never be committed, and return the outstanding requests to abort."""
        to_abort = state.abort(first)
        self._num_outstanding -= len(to_abort)
        for index, outcome in state.cut(first):
            self._waste(state, index, outcome)
        return [self._id(state, index) for index in to_abort]

    def _exit(self, state: PromptState, reason: ExitReason) -> list[CompletionId]:
        state.exit = reason
        self._num_active -= 1
        self._tally.num_satisfied += reason == "satisfied"
        self._tally.num_dropped += reason == "dropped"
        to_abort = self._give_up(state, state.committed)
        if reason == "dropped":
            self._admit()
        if state.behind:
            self._catch_up(state)
        return to_abort

    # -------------------- admission and barriers

    def _admit(self) -> None:
        """Admit prompts from the source until as many have entered as the policy proposes."""
        wanted = self._policy.propose(self._num_wanted, self._tally.num_dropped)
        missing = wanted - len(self._by_order)
        while missing > 0 and (prompts := self._draw(1 if self._by_order else missing)):
            missing -= len(prompts)
            self._enter(prompts)

    def _draw(self, num: int) -> list[Prompt]:
        """Return the next `num` prompts, which the policy chooses among candidates; none if the source is exhausted."""
        propose = self._policy.propose
        candidates = list(islice(self._source, num * propose.candidates_per_prompt))
        rng = np.random.default_rng(request_seed(self._seed, self._step, "", self._num_candidates))
        self._num_candidates += len(candidates)
        chosen = propose.choose([self._history(p) for p in candidates], num, rng)
        self._tally.num_skipped += len(candidates) - len(chosen)
        return [candidates[i] for i in chosen]

    def _history(self, prompt: Prompt) -> History:
        return _UNKNOWN if self._memory is None else self._memory.history(prompt)

    def _enter(self, prompts: Sequence[Prompt]) -> None:
        histories = [self._history(p) for p in prompts]
        for prompt, history, cap in zip(prompts, histories, budgets_of(self._policy, histories), strict=True):
            if prompt.prompt_id in self._states:
                raise InputError(_WHERE, f"two prompts with id {prompt.prompt_id!r}", "distinct ids are needed")
            seen = history if self._is_history_read_again else _UNKNOWN
            state = PromptState(len(self._by_order), prompt, seen, cap, self._policy.positive_threshold)
            self._states[prompt.prompt_id] = state
            self._by_order.append(state)
            self._num_active += 1
            self._queue(state)

    def _catch_up(self, state: PromptState) -> None:
        state.behind = False
        self._num_behind -= 1
        if self._num_behind == 0:
            self._start_round()

    def _start_round(self) -> None:
        """Pass the barrier: give every active prompt its next round."""
        for state in self._by_order:
            if state.exit is None:
                state.round_limit = min(self._policy.allocate(state.counts), state.cap)
                state.behind = True
                self._num_behind += 1
                self._queue(state)

    # -------------------- result

    def result(self) -> SamplingResult:
        """Return the pools in the order the prompts entered, the groups kept of them, and the metrics (docs/metrics.md).

        Raises: InputError while prompts are active.
        """
        if not self.done:
            given = f"{self._num_active} of {self.num_admitted} prompts still active"
            raise InputError(f"{_WHERE}.result", given, "every prompt must have exited", "drive the sampler until .done")
        pools = tuple(s.freeze(s.prompt, s.num_issued, s.exit, s.cap, s.history[:2]) for s in self._by_order if s.exit is not None)
        groups = tuple(group for pool in pools if (group := self._group(pool)) is not None)
        return SamplingResult(pools, groups, sampling_metrics(pools, groups, self._policy, self._num_wanted, self._tally))

    def _group(self, pool: Pool) -> Group | None:
        """Return the group kept of a pool; None for a dropped or empty pool, and for one without signal if the policy drops those."""
        if pool.exit == "dropped" or pool.count == 0 or (self._policy.degenerate == "drop" and not pool.has_signal):
            return None
        scored = pool.scored
        rewards = rewards_of(scored)
        kept = self._policy.select(rewards, rewards > self._policy.positive_threshold, self._policy.group_size)
        return Group(pool, tuple(scored[i] for i in kept))


def check_schedule(where: str, schedule: str, window: int | Window | None) -> None:
    """Raise InputError for an unknown schedule, a window below 1, and a window in rounds."""
    if schedule not in get_args(Schedule):
        raise unknown_name(where, "schedule", schedule, get_args(Schedule))
    if window is not None and not callable(window):
        at_least(1, where, window=window)
    if window is not None and schedule == "rounds":
        given = "a window function" if callable(window) else f"window {window}"
        raise InputError(where, f"{given} with schedule 'rounds'", "rounds have no window", "leave it out")


def _num_wanted(prompts: Iterable[Prompt], policy: Policy, num_prompts: int | None) -> int:
    """Return the number of groups wanted in the step; see AdaptiveSampler."""
    available = len(prompts) if isinstance(prompts, Sequence) else None
    if available == 0:
        raise InputError(_WHERE, "no prompts", "at least one is needed")
    if num_prompts is None:
        if available is None:
            raise InputError(_WHERE, "an iterator of prompts", "num_prompts is needed with it")
        if policy.propose(available, available) > available:
            given = f"policy {policy.name!r}, which refills dropped prompts, without num_prompts"
            raise InputError(_WHERE, given, "num_prompts is needed", "give fewer than the prompts to draw from")
        return available
    at_least(1, _WHERE, num_prompts=num_prompts)
    if available is not None and num_prompts > available:
        raise InputError(_WHERE, f"num_prompts {num_prompts} of {available} prompts", "at most the number of prompts is possible")
    return num_prompts


def budgets_of(policy: Policy, histories: Sequence[History]) -> Sequence[int]:
    """Return the most completions of each prompt, for prompts that enter together. Raises: InputError for one outside [1, policy.cap]."""
    budgets = policy.allocate.budgets(histories)
    if len(budgets) != len(histories):
        raise InputError(f"Policy {policy.name!r}", f"{len(budgets)} budgets of {len(histories)} prompts", "one for each is needed")
    if len(budgets) and not 1 <= min(budgets) <= max(budgets) <= policy.cap:
        given = f"a budget of {min(budgets) if min(budgets) < 1 else max(budgets)} completions"
        raise InputError(f"Policy {policy.name!r}", given, f"at least 1 and at most the cap of {policy.cap} is needed")
    return budgets
