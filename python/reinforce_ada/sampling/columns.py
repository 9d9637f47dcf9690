"""The adaptive sampler in columns: arrays of requests out, arrays of answers in, for simulations and other batches of thousands.

The same state machine as `AdaptiveSampler`, to the same pools, in the same order of requests; prompts are positions. One prompt costs
some 50 bytes beside its row in two tables of completions (9 bytes each completion), and a call costs time by its batch, not by the
number of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.metrics import Tally
from reinforce_ada.sampling.policies import Counts, History, Policy, Verdict, Window, at_least
from reinforce_ada.sampling.pool import reward_statistics
from reinforce_ada.sampling.sampler import CORRECT, VOID, WRONG, Schedule, budgets_of, certain_exit, check_schedule
from reinforce_ada.sampling.statistics import stopping_table
from reinforce_ada.types import ExitReason, PoolStats

Ints: TypeAlias = NDArray[np.int64]
Requests: TypeAlias = tuple[Ints, NDArray[np.int32]]  # prompt_of [K], index [K]

_WHERE = "ColumnSampler"
# The state of one completion. Those from _VOID on are answers.
_FREE, _OUT, _LOST, _ABORTED, _VOID, _WRONG, _CORRECT = range(7)
_UNITS = (None, None, None, None, VOID, WRONG, CORRECT)  # what a completion in that state counts as
_ACTIVE, _SATISFIED, _EXHAUSTED, _DROPPED = range(4)
EXITS: tuple[ExitReason | None, ...] = (None, "satisfied", "exhausted", "dropped")  # by exit code
_VERDICTS = (Verdict.CONTINUE, Verdict.STOP, Verdict.DROP)
_EXIT_OF = np.array([_EXHAUSTED, _SATISFIED, _DROPPED], np.int8)  # by position in _VERDICTS: at the cap, or by the rule
_LEVEL = 40  # bits of a queue key below num_issued: the prompt's position
_CHUNK = 1 << 15  # prompts whose rewards are looked at together: 8 MiB at a cap of 32
_MEMO_SIZE = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class ColumnResult:
    """What one step's sampling produced, a row for each prompt that entered. Statistics are of the raw rewards, as in `Pool`."""

    num_correct: NDArray[np.int32]  # [P]
    num_wrong: NDArray[np.int32]  # [P]
    num_void: NDArray[np.int32]  # [P]
    mean: NDArray[np.float64]  # [P]
    m2: NDArray[np.float64]  # [P]
    min: NDArray[np.float64]  # [P]
    max: NDArray[np.float64]  # [P]
    num_issued: NDArray[np.int32]  # [P]
    committed: NDArray[np.int32]  # [P], length of the pool with its voids
    exit: NDArray[np.int8]  # [P], position in EXITS
    cap: NDArray[np.int32]  # [P]
    rewards: NDArray[np.float64]  # [P, cap], nan for voids and past the pool
    has_group: NDArray[np.bool_]  # [P]
    kept: NDArray[np.int32]  # [P, most kept], indices of the kept completions, increasing, then -1; all -1 without a group
    metrics: Mapping[str, float]  # those of docs/sampling.md that do not speak of tokens or engines

    @property
    def count(self) -> NDArray[np.int32]:
        """Scored completions, [P]."""
        return self.num_correct + self.num_wrong

    def pool_stats(self) -> PoolStats:
        """Statistics of the groups' pools, each [G] float64, ready for `ops.group_advantages(pool=...)`."""
        columns = (self.count, self.mean, self.m2, self.min, self.max)
        return PoolStats(*(column[self.has_group].astype(np.float64) for column in columns))


class ColumnSampler:
    """Spends one step's rollout budget where the signal is, a batch of prompts at a time; see `AdaptiveSampler` for the rules.

    Args:
        num_prompts: prompts to draw from, 0..num_prompts-1 in this order.
        policy: any whose `propose` takes prompts in order; see `preset` and `Policy`.
        schedule: "stream" or "rounds".
        window: stream only: requests a prompt may be issued beyond its committed prefix; a function bounds each prompt's unanswered
            ones, and what the answers settle is aborted at the end of a batch; None adapts to the slots.
        num_wanted: groups wanted; all by default. Required with a policy that refills.
        histories: what earlier steps say of each prompt, [num_prompts]; required by a policy that looks at it.
    Raises: InputError for arguments that cannot go together, and for a policy that chooses among candidates.
    """

    def __init__(
        self,
        num_prompts: int,
        policy: Policy,
        *,
        schedule: Schedule = "stream",
        window: int | Window | None = None,
        num_wanted: int | None = None,
        histories: Sequence[History] | None = None,
    ) -> None:
        _check(num_prompts, policy, schedule, window, num_wanted, histories)
        self._policy = policy
        self._num_prompts = num_prompts
        self._num_wanted = num_prompts if num_wanted is None else num_wanted
        self._histories = histories
        self._in_rounds = schedule == "rounds"
        self._adapts = window is None and not self._in_rounds
        self._window_of = window if callable(window) else None
        self._window = policy.allocate.round_size if window is None else policy.cap if callable(window) else min(window, policy.cap)

        width = policy.cap
        self._state = np.zeros((num_prompts, width), np.int8)
        self._rewards = np.zeros((num_prompts, width), np.float64)
        self._state_at = self._state.reshape(-1)  # the same by prompt * width + index
        self._reward_at = self._rewards.reshape(-1)
        self._num_issued = np.zeros(num_prompts, np.int32)
        self._committed = np.zeros(num_prompts, np.int32)
        self._correct = np.zeros(num_prompts, np.int32)
        self._wrong = np.zeros(num_prompts, np.int32)
        self._cap = np.zeros(num_prompts, np.int32)
        self._exit = np.zeros(num_prompts, np.int8)
        self._queued = np.zeros(num_prompts, np.bool_)
        self._waits_for = np.zeros(num_prompts if self._adapts else 0, np.int32)  # the window needed
        self._round_limit = np.zeros(num_prompts if self._in_rounds else 0, np.int32)
        self._behind = np.zeros(num_prompts if self._in_rounds else 0, np.bool_)  # holds the barrier back
        self._own_limit = np.zeros(num_prompts if callable(window) else 0, np.int32)  # by its window: no index at or past this now
        self._end = np.zeros(num_prompts if callable(window) else 0, np.int32)  # no index at or past this will ever be committed
        self._kind = np.zeros(num_prompts if callable(window) else 0, np.int32)  # position in _kinds
        self._kinds: list[tuple[History, int]] = []  # distinct (history, cap)
        self._kind_numbers: dict[tuple[History, int], int] = {}

        self._num_entered = 0
        self._num_active = 0
        self._num_outstanding = 0
        self._num_behind = 0
        self._tally = Tally()
        self._ready = _Smallest()  # num_issued << _LEVEL | prompt: breadth first
        self._reissue = _Smallest()  # prompt * width + index; stale unless that completion is lost and its prompt active
        self._waiting: dict[int, list[int]] = {}  # window needed -> prompts; stale unless the prompt waits for that one
        self._verdicts = _Memo(self._verdict)
        self._limits = _Memo(self._limit)
        self._windows = _Memo(self._window_at)
        self._goes_on = _Memo(lambda code: policy.decide(self._decode(code, 1)[0]) is Verdict.CONTINUE)
        self._admit()
        if self._in_rounds:
            self._start_round()

    # -------------------- read-only

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def done(self) -> bool:
        """Whether every prompt that entered has exited."""
        return self._num_active == 0

    @property
    def num_active(self) -> int:
        return self._num_active

    @property
    def num_admitted(self) -> int:
        return self._num_entered

    @property
    def num_issued(self) -> int:
        return self._tally.num_issued

    @property
    def num_committed(self) -> int:
        return self._tally.num_committed

    @property
    def num_outstanding(self) -> int:
        """Requests handed out and not answered, of active prompts."""
        return self._num_outstanding

    # -------------------- requests

    def next_requests(self, free_slots: int) -> Requests:
        """Up to `free_slots` requests: lost ones first, then breadth first (fewest issued first, ties in prompt order).

        Returns: prompt_of [K] int64, index [K] int32.
        """
        at_least(f"{_WHERE}.next_requests", "free_slots", free_slots, 0)
        if self._adapts:
            self._adapt(free_slots)
        flat = self._next_lost(free_slots)
        if len(flat) < free_slots:
            flat = np.concatenate((flat, self._next_fresh(free_slots - len(flat))))
        self._state_at[flat] = _OUT
        self._num_outstanding += len(flat)
        prompt_of, index = np.divmod(flat, self._policy.cap)
        return prompt_of, index.astype(np.int32)

    def _adapt(self, free_slots: int) -> None:
        """The window of the slots there are; prompts that waited for one this wide are queued."""
        capacity = free_slots + self._num_outstanding
        window = math.ceil(capacity / max(self._num_active, 1))
        self._window = min(max(window, self._policy.allocate.round_size), self._policy.cap)
        for needed in [n for n in self._waiting if n <= self._window]:
            prompts = np.array(self._waiting.pop(needed), np.int64)
            prompts = np.unique(prompts[self._waits_for[prompts] == needed])
            self._waits_for[prompts] = 0
            self._queue(prompts)

    def _next_lost(self, num: int) -> Ints:
        """Up to `num` lost completions in order of prompt and index, as positions in the table."""
        found: list[Ints] = [np.empty(0, np.int64)]
        missing = num
        while missing > 0 and len(flat := self._reissue.take(missing)):
            still = (self._state_at[flat] == _LOST) & (self._exit[flat // self._policy.cap] == _ACTIVE)
            found.append(flat[still])
            missing -= len(found[-1])
        return np.concatenate(found)

    def _next_fresh(self, num: int) -> Ints:
        """Up to `num` completions never issued before, breadth first, as positions in the table."""
        prompts, room = self._heads(num)
        if not len(prompts):
            return prompts
        issued = self._num_issued[prompts].astype(np.int64)
        given = _breadth_first(prompts, issued, room, num)
        self._num_issued[prompts] = issued + given
        self._place(prompts, room - given)
        index, prompt_of = _ranges(issued, given), prompts.repeat(given)
        self._tally.num_issued += len(index)
        in_order: Ints = (index << _LEVEL | prompt_of).argsort()
        flat: Ints = (prompt_of * self._policy.cap + index)[in_order]
        return flat

    def _heads(self, num: int) -> tuple[Ints, Ints]:
        """The first prompts in the queue that may be issued a request, at least `num` where there are as many, and the room of each."""
        found: list[tuple[Ints, Ints]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        missing = num
        while missing > 0 and len(keys := self._ready.take(max(missing, 32))):
            prompts = keys & ((1 << _LEVEL) - 1)
            prompts = prompts[self._exit[prompts] == _ACTIVE]
            room = self._room(prompts)
            if not room.all():  # the window has become narrower since
                self._place(prompts[room == 0], room[room == 0])
                prompts, room = prompts[room > 0], room[room > 0]
            found.append((prompts, room))
            missing -= len(prompts)
        prompts, room = found[1] if len(found) == 2 else map(np.concatenate, zip(*found, strict=True))
        return prompts, room

    def _room(self, prompts: Ints) -> Ints:
        """How many more requests each prompt may be issued now, [n]."""
        room: Ints = np.maximum(self._issue_limit(prompts) - self._num_issued[prompts], 0)
        return room

    def _issue_limit(self, prompts: Ints) -> Ints:
        """No index at or past this may be issued now, [n]."""
        if self._in_rounds:
            return self._round_limit[prompts].astype(np.int64)
        if self._window_of is not None:
            return np.minimum(self._own_limit[prompts], self._end[prompts]).astype(np.int64)
        committed = self._committed[prompts].astype(np.int64)
        limit, every = np.minimum(self._cap[prompts], committed + self._window), self._policy.decide_every
        return np.minimum(limit, (committed // every + 1) * every) if self._window <= every else limit

    def _queue(self, prompts: Ints) -> None:
        """Queue those of these prompts that are active and not in the queue."""
        prompts = prompts[(self._exit[prompts] == _ACTIVE) & ~self._queued[prompts]]
        if len(prompts):
            self._place(prompts, self._room(prompts))

    def _place(self, prompts: Ints, room: Ints) -> None:
        """Into the queue with those that have room; the others wait for their next commit, or for a wider window."""
        has_room = room > 0
        self._queued[prompts] = has_room
        if not has_room.all():
            if self._adapts:
                self._wait(prompts[~has_room])
            prompts = prompts[has_room]
        self._ready.put(self._num_issued[prompts].astype(np.int64) << _LEVEL | prompts)

    def _wait(self, prompts: Ints) -> None:
        """Remember the smallest window at which each of these could be issued a request."""
        prompts = prompts[self._num_issued[prompts] < self._cap[prompts]]
        issued, committed, every = self._num_issued[prompts], self._committed[prompts], self._policy.decide_every
        needed = issued - committed + 1
        needed = np.where(issued >= (committed // every + 1) * every, np.maximum(needed, every + 1), needed)
        is_new = (needed <= self._policy.cap) & (needed != self._waits_for[prompts])
        self._waits_for[prompts[is_new]] = needed[is_new]
        for prompt, window in zip(prompts[is_new].tolist(), needed[is_new].tolist(), strict=True):
            self._waiting.setdefault(window, []).append(prompt)

    # -------------------- answers

    def receive(self, prompt_of: ArrayLike, index: ArrayLike, rewards: ArrayLike, void: ArrayLike | None = None) -> Requests:
        """Take a batch of answers, in any order, any of them any number of times.

        Args:
            prompt_of, index: which completions, [B] integers.
            rewards: [B] float64, finite; what a void has there is not read.
            void: [B] bool, where the reward failed for good.
        Returns: prompt_of [A] int64 and index [A] int32 of the requests to abort, in order of prompt and index: all that are still
            outstanding of the prompts that exited.
        Raises: InputError for columns of different lengths and a reward that is not finite.
        """
        prompts, indices, values, is_void = _answers(prompt_of, index, rewards, void)
        issued, flat = self._issued(prompts, indices)
        first = _first_of_each(flat, self._state_at[flat] < _VOID)
        self._tally.num_duplicates += len(issued) - len(first)
        flat, taken = flat[first], issued[first]
        prompts, indices, values, is_void = prompts[taken], indices[taken], values[taken], is_void[taken]
        self._num_outstanding -= int(np.count_nonzero(self._state_at[flat] == _OUT))
        self._state_at[flat] = np.where(is_void, _VOID, np.where(values > self._policy.positive_threshold, _CORRECT, _WRONG))
        values[is_void] = np.nan
        self._reward_at[flat] = values
        to_abort = self._commit(prompts[(indices == self._committed[prompts]) & (self._exit[prompts] == _ACTIVE)])
        if self._window_of is None:
            return to_abort
        answered = np.unique(prompts[self._exit[prompts] == _ACTIVE])
        return _in_order([to_abort, self._look_ahead(answered)]) if len(answered) else to_abort

    def lose(self, prompt_of: ArrayLike, index: ArrayLike) -> None:
        """Give up waiting for these requests: those of active prompts are issued again, before anything else."""
        _, flat = self._issued(np.asarray(prompt_of, np.int64), np.asarray(index, np.int64))
        state = self._state_at[flat]
        lost = flat[_first_of_each(flat, state == _OUT)]
        self._tally.num_duplicates += int(np.count_nonzero(state != _ABORTED)) - len(lost)
        self._state_at[lost] = _LOST
        self._reissue.put(lost)
        self._num_outstanding -= len(lost)
        self._tally.num_lost += len(lost)

    def _issued(self, prompts: Ints, indices: Ints) -> tuple[Ints, Ints]:
        """Which of these events belong to a request that was issued: their positions, and those of the completions in the table."""
        width = self._policy.cap
        known = ((prompts >= 0) & (prompts < self._num_entered) & (indices >= 0) & (indices < width)).nonzero()[0]
        flat = prompts[known] * width + indices[known]
        issued = self._state_at[flat] != _FREE
        known, flat = known[issued], flat[issued]
        self._tally.num_rejected += len(prompts) - len(known)
        return known, flat

    def _commit(self, prompts: Ints) -> Requests:
        """Extend the committed prefixes of these prompts as far as they go, asking the exit rule after each completion."""
        if not len(prompts):
            return prompts, np.empty(0, np.int32)
        old, old_correct, old_wrong = self._committed[prompts], self._correct[prompts], self._wrong[prompts]
        states, cap = self._state[prompts], self._cap[prompts]
        is_open = states < _VOID
        length = np.where(is_open.any(axis=1), is_open.argmax(axis=1), self._policy.cap) - old
        stop = length.cumsum()
        start = stop - length
        owner = np.arange(len(prompts)).repeat(length)  # of each new completion: its prompt's position here
        index = _ranges(old, length)
        outcome = states[owner, index]
        correct = _running(outcome == _CORRECT, start, old_correct, owner)
        wrong = _running(outcome == _WRONG, start, old_wrong, owner)
        cap = cap[owner]
        verdict = self._verdicts.of(self._code(correct, wrong, index + 1, cap, self._policy.cap + 1))
        ends = ((verdict != 0) | (index + 1 == cap)).nonzero()[0]
        ended = owner[ends]
        if len(ends) > 1:  # the first of each prompt
            is_first = np.concatenate(([True], ended[1:] != ended[:-1]))
            ends, ended = ends[is_first], ended[is_first]
        last = stop - 1
        last[ended] = ends
        self._committed[prompts] = index[last] + 1
        self._correct[prompts], self._wrong[prompts] = correct[last], wrong[last]
        self._tally.num_correct += int((correct[last] - old_correct).sum())
        self._tally.num_committed += int((last - start).sum()) + len(prompts)
        return self._settle(prompts, ended, _EXIT_OF[verdict[ends]])

    def _settle(self, prompts: Ints, ended: Ints, reasons: NDArray[np.int8]) -> Requests:
        """Let those exit that ended, and queue the others."""
        to_abort = self._leave(prompts[ended], reasons)
        if self._in_rounds:
            is_through = (self._exit[prompts] != _ACTIVE) | (self._committed[prompts] >= self._round_limit[prompts])
            caught_up = prompts[self._behind[prompts] & is_through]
            self._behind[caught_up] = False
            self._num_behind -= len(caught_up)
            if len(caught_up) and self._num_behind == 0:
                self._start_round()
        elif self._window_of is None:
            self._queue(prompts)
        return to_abort

    def _look_ahead(self, prompts: Ints) -> Requests:
        """Of active prompts with new answers: give up what lies past a settled end, ask for their windows, and queue them."""
        correct, wrong, answered = self._answered(prompts)
        goes_on = self._goes_on.of(self._code(correct, wrong, answered, 0, 1))  # spares the search: nearly always
        settled = prompts[goes_on == 0]
        to_abort = self._settle_ends(settled)
        if len(settled):
            correct, wrong, answered = self._answered(prompts)
        window = self._windows.of(self._code(correct, wrong, answered, self._kind[prompts], self._num_prompts))
        self._own_limit[prompts] = answered + window
        self._queue(prompts)
        return to_abort

    def _answered(self, prompts: Ints) -> tuple[Ints, Ints, Ints]:
        """Correct, wrong and all answers that are committed or may still be, [n] each."""
        states = self._state[prompts]
        states[np.arange(self._policy.cap) >= self._end[prompts, None]] = _FREE
        return (states == _CORRECT).sum(axis=1), (states == _WRONG).sum(axis=1), (states >= _VOID).sum(axis=1)

    def _settle_ends(self, prompts: Ints) -> Requests:
        for prompt in prompts.tolist():
            self._end[prompt] = self._settled_end(prompt)
        is_past = np.arange(self._policy.cap) >= self._end[prompts, None]
        states = self._state[prompts]
        row, index = ((states == _OUT) & is_past).nonzero()
        self._num_outstanding -= len(index)
        states[((states == _OUT) | (states == _LOST)) & is_past] = _ABORTED
        self._state[prompts] = states
        return prompts[row], index.astype(np.int32)

    def _settled_end(self, prompt: int) -> int:
        correct, wrong, committed = int(self._correct[prompt]), int(self._wrong[prompt]), int(self._committed[prompt])
        later = self._state[prompt, committed : self._end[prompt]]
        known = later[: int((later >= _VOID).nonzero()[0].max(initial=-1)) + 1]
        counts = Counts(correct, wrong, committed - correct - wrong)
        end = certain_exit(self._policy, counts, [_UNITS[state] for state in known.tolist()], int(self._cap[prompt]))
        return min(end, int(self._end[prompt]))

    def _leave(self, gone: Ints, reasons: NDArray[np.int8]) -> Requests:
        if not len(gone):
            return gone, np.empty(0, np.int32)
        self._exit[gone] = reasons
        self._num_active -= len(gone)
        self._tally.num_satisfied += int(np.count_nonzero(reasons == _SATISFIED))
        num_dropped = int(np.count_nonzero(reasons == _DROPPED))
        self._tally.num_dropped += num_dropped
        gone = np.sort(gone)
        row, index = (self._state[gone] == _OUT).nonzero()
        prompt_of = gone[row]
        self._state[prompt_of, index] = _ABORTED
        self._num_outstanding -= len(index)
        if num_dropped:
            self._admit()
        return prompt_of, index.astype(np.int32)

    # -------------------- rules, asked once for each distinct argument

    def _code(self, correct: Ints, wrong: Ints, committed: Ints, last: Any, num_last: int) -> Ints:
        """One integer for (correct, wrong, committed, last), last < num_last."""
        width = self._policy.cap + 1
        code: Ints = ((correct * width + wrong) * width + committed) * num_last + last
        return code

    def _decode(self, code: int, num_last: int) -> tuple[Counts, int]:
        width = self._policy.cap + 1
        code, last = divmod(code, num_last)
        code, committed = divmod(code, width)
        correct, wrong = divmod(code, width)
        return Counts(correct, wrong, committed - correct - wrong), last

    def _codes_of(self, prompts: Ints, last: Any, num_last: int) -> Ints:
        correct, wrong, committed = (column[prompts].astype(np.int64) for column in (self._correct, self._wrong, self._committed))
        return self._code(correct, wrong, committed, last, num_last)

    def _verdict(self, code: int) -> int:
        counts, cap = self._decode(code, self._policy.cap + 1)
        return _VERDICTS.index(self._policy.verdict(counts, cap))

    def _limit(self, code: int) -> int:
        return self._policy.allocate(self._decode(code, 1)[0])

    def _window_at(self, code: int) -> int:
        """The user's window at these counts of answers."""
        counts, kind = self._decode(code, self._num_prompts)
        history, cap = self._kinds[kind]
        assert self._window_of is not None
        return min(max(self._window_of(counts, history, cap), 1), cap)  # limits are int32

    # -------------------- admission and barriers

    def _admit(self) -> None:
        """Let prompts in until as many have entered as the policy proposes: the first ones together, then one by one."""
        wanted = min(self._policy.propose(self._num_wanted, self._tally.num_dropped), self._num_prompts)
        while self._num_entered < wanted:
            self._enter(1 if self._num_entered else wanted)

    def _enter(self, num: int) -> None:
        first = self._num_entered
        histories = [History()] * num if self._histories is None else self._histories[first : first + num]
        caps = budgets_of(self._policy, histories)
        self._num_entered += num
        self._num_active += num
        self._cap[first : first + num] = caps
        prompts = np.arange(first, first + num)
        if self._window_of is not None:
            self._kind[first : first + num] = [self._kind_number(*kind) for kind in zip(histories, caps, strict=True)]
            self._end[first : first + num] = caps
            self._look_ahead(prompts)
        elif not self._in_rounds:
            self._queue(prompts)

    def _kind_number(self, history: History, cap: int) -> int:
        if (history, cap) not in self._kind_numbers:
            self._kind_numbers[history, cap] = len(self._kinds)
            self._kinds.append((history, cap))
        return self._kind_numbers[history, cap]

    def _start_round(self) -> None:
        """The barrier: every active prompt gets its next round."""
        prompts = np.flatnonzero(self._exit[: self._num_entered] == _ACTIVE)
        self._round_limit[prompts] = np.minimum(self._limits.of(self._codes_of(prompts, 0, 1)), self._cap[prompts])
        self._behind[prompts] = True
        self._num_behind += len(prompts)
        self._queue(prompts)

    # -------------------- result

    def result(self) -> ColumnResult:
        """Pools in the order of the prompts, what is kept of them, and the metrics.

        `policy.select` is asked once for each distinct row of rewards.

        Raises: InputError while prompts are active.
        """
        if not self.done:
            given = f"{self._num_active} of {self._num_entered} prompts still active"
            raise InputError(f"{_WHERE}.result", given, "every prompt must have exited", "drive the sampler until .done")
        rows, num = _Rows(self._policy), self._num_entered
        rewards, committed = self._rewards[:num].copy(), self._committed[:num].copy()  # a snapshot: answers may still come
        pattern_of = np.concatenate([_patterns(rewards[i : i + _CHUNK], committed[i : i + _CHUNK], rows) for i in range(0, num, _CHUNK)])
        mean, m2, low, high, first_reward = np.array(rows.statistics)[pattern_of].T
        exit_, void = self._exit[:num].copy(), committed - self._correct[:num] - self._wrong[:num]
        has_group = (exit_ != _DROPPED) & ((low < high) if self._policy.degenerate == "drop" else (low <= high))
        kept = rows.kept()[pattern_of]
        kept[~has_group] = -1
        result = ColumnResult(
            num_correct=self._correct[:num].copy(),
            num_wrong=self._wrong[:num].copy(),
            num_void=void,
            mean=mean,
            m2=m2,
            min=low,
            max=high,
            num_issued=self._num_issued[:num].copy(),
            committed=committed,
            exit=exit_,
            cap=self._cap[:num].copy(),
            rewards=rewards,
            has_group=has_group,
            kept=kept,
            metrics={},
        )
        return replace(result, metrics=_metrics(result, self._policy, self._num_wanted, self._tally, first_reward))


# -------------------- parts


class _Smallest:
    """Distinct int64 keys, the smallest first out: sorted runs, each at least four times as long as the next when that one came."""

    def __init__(self) -> None:
        self._runs: list[Ints] = []

    def put(self, keys: Ints) -> None:
        """Add keys, in any order. O(log n) a key."""
        if not len(keys):
            return
        run = np.sort(keys)
        while self._runs and len(self._runs[-1]) < 4 * len(run):
            run = np.concatenate((self._runs.pop(), run))
            run.sort(kind="stable")  # merges two sorted runs
        self._runs.append(run)

    def take(self, num: int) -> Ints:
        """Remove up to `num` >= 1 of the smallest keys; increasing."""
        enough = [run[num - 1] for run in self._runs if len(run) >= num]
        first = [run[: run.searchsorted(min(enough), "right")] for run in self._runs] if enough else self._runs
        parts = [part for part in first if len(part)]
        if not parts:
            return np.empty(0, np.int64)
        taken = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
        taken = taken[:num]
        rest = [run[run.searchsorted(taken[-1], "right") :] for run in self._runs]
        self._runs = [run for run in rest if len(run)]
        return taken


class _Memo(dict[int, int]):
    """A function of one integer, remembered, for arrays."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        super().__init__()
        self._answer = answer

    def __missing__(self, code: int) -> int:
        if len(self) >= _MEMO_SIZE:
            self.clear()
        value = self[code] = self._answer(code)
        return value

    def of(self, codes: Ints) -> Ints:
        return np.fromiter(map(self.__getitem__, codes.tolist()), np.int64, len(codes))


class _Rows:
    """Distinct rows of committed rewards, each with its statistics and what is kept of it. A void is nan."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._pattern_of: dict[bytes, int] = {}
        self.statistics: list[tuple[float, ...]] = []  # mean, m2, min, max, mean of those always drawn
        self._kept: list[Sequence[int]] = []

    def of(self, rewards: NDArray[np.float64], committed: NDArray[np.int32]) -> NDArray[np.int64]:
        """The pattern of each row of rewards [P, cap] up to its committed length, [P]."""
        data, width = rewards.tobytes(), 8 * rewards.shape[1]
        known, found = self._pattern_of, []
        for start, length in zip(range(0, len(data), width), (8 * committed).tolist(), strict=True):
            key = data[start : start + length]
            pattern = known.get(key)
            found.append(self._add(key) if pattern is None else pattern)
        return np.array(found, np.int64)

    def _add(self, key: bytes) -> int:
        rewards = np.frombuffer(key)
        scored = np.flatnonzero(~np.isnan(rewards))
        values = rewards[scored]
        always = values[scored < self._policy.num_always_drawn].tolist()
        first = math.fsum(always) / len(always) if always else math.nan
        self.statistics.append((*reward_statistics(values.tolist()), first))
        kept = self._policy.select(values, values > self._policy.positive_threshold, self._policy.group_size) if len(values) else []
        self._kept.append(scored[kept].tolist())
        self._pattern_of[key] = len(self._pattern_of)
        return self._pattern_of[key]

    def kept(self) -> NDArray[np.int32]:
        """Indices kept of each pattern, padded with -1."""
        table = np.full((len(self._kept), max(map(len, self._kept), default=0)), -1, np.int32)
        for row, kept in zip(table, self._kept, strict=True):
            row[: len(kept)] = kept
        return table


def _patterns(rewards: NDArray[np.float64], committed: NDArray[np.int32], rows: _Rows) -> NDArray[np.int64]:
    """The pattern of each of a chunk of prompts; rewards past the pool become nan."""
    rewards[np.arange(rewards.shape[1]) >= committed[:, None]] = np.nan
    return rows.of(rewards, committed)


def _breadth_first(prompts: Ints, issued: Ints, room: Ints, num: int) -> Ints:
    """How many of `num` requests each prompt gets, [n]: the smallest pairs (index, prompt) with index in [issued, issued + room)."""
    if len(issued) >= num and issued[num - 1] == issued[0]:  # one for each of the first
        return (np.arange(len(issued)) < num).astype(np.int64)
    if room.sum() <= num:
        return room
    lowest, limit = issued[0], issued + room
    length = int(limit.max() - lowest) + 1
    live = (np.bincount(issued - lowest, minlength=length) - np.bincount(limit - lowest, minlength=length)).cumsum()
    up_to = live.cumsum()  # pairs up to this level
    level = int(up_to.searchsorted(num))
    given: Ints = np.minimum(np.maximum(level + lowest - issued, 0), room)
    at_level = ((issued <= level + lowest) & (level + lowest < limit)).nonzero()[0]
    rest = num - int(up_to[level] - live[level])
    if rest < len(at_level):
        at_level = at_level[prompts[at_level].argpartition(rest)[:rest]]
    given[at_level] += 1
    return given


def _in_order(requests: Sequence[Requests]) -> Requests:
    """All of them, by prompt and index."""
    prompt_of, index = (np.concatenate(columns) for columns in zip(*requests, strict=True))
    order = np.lexsort((index, prompt_of))
    return prompt_of[order], index[order]


def _ranges(first: NDArray[Any], length: NDArray[Any]) -> Ints:
    """first[0], first[0] + 1, ... of each length, one after another."""
    stop = length.cumsum()
    ranges: Ints = np.arange(stop[-1]) + (first - stop + length).repeat(length)
    return ranges


def _running(flags: NDArray[np.bool_], start: NDArray[Any], before: NDArray[Any], owner: Ints) -> Ints:
    """How many flags are set up to each place: counted from the start of its owner's part, and from what there was before."""
    total: Ints = flags.cumsum()
    offset: Ints = before - total[start] + flags[start]
    return total + offset[owner]


def _first_of_each(keys: Ints, counts: NDArray[np.bool_]) -> Ints:
    """Positions of the first of each key, among those that count."""
    positions = counts.nonzero()[0]
    ordered = np.sort(keys[positions])
    if (ordered[1:] != ordered[:-1]).all():
        return positions
    return positions[np.unique(keys[positions], return_index=True)[1]]


def _answers(prompt_of: ArrayLike, index: ArrayLike, rewards: ArrayLike, void: ArrayLike | None) -> tuple[Any, Any, Any, Any]:
    prompts, indices, values = np.asarray(prompt_of, np.int64), np.asarray(index, np.int64), np.asarray(rewards, np.float64)
    is_void = np.zeros(len(values), np.bool_) if void is None else np.asarray(void, np.bool_)
    lengths = [len(column) for column in (prompts, indices, values, is_void)]
    if len(set(lengths)) > 1:
        raise InputError(f"{_WHERE}.receive", f"columns of lengths {lengths}", "one row for each answer is needed")
    bad = np.flatnonzero(~np.isfinite(values) & ~is_void)
    if len(bad):
        given = f"reward {values[bad[0]]} for prompt {prompts[bad[0]]}, index {indices[bad[0]]}"
        raise InputError(f"{_WHERE}.receive", given, "a finite reward is needed", "mark it as void")
    return prompts, indices, values, is_void


def _metrics(result: ColumnResult, policy: Policy, num_wanted: int, tally: Tally, first_reward: NDArray[np.float64]) -> dict[str, float]:
    """`sampling_metrics`, as far as columns know: nothing of tokens, aborted requests and candidates."""
    num_prompts, is_kept = len(result.exit), result.kept >= 0
    first = first_reward[:num_wanted]
    exhausted = result.exit == _EXHAUSTED
    no_correct, no_wrong = result.num_correct < policy.needs[0], result.num_wrong < policy.needs[1]
    row, column = np.nonzero(is_kept)
    metrics = {
        "first_round_reward": _mean(first[~np.isnan(first)]),
        "pool_reward": _mean(result.mean[result.count > 0]),
        "pass_rate": _mean(np.array(list(_pass_rates(result, policy, num_wanted)))),
        "kept_reward": _mean(result.rewards[row, result.kept[row, column]]),
        "signal_fraction": np.count_nonzero(result.min < result.max) / num_prompts,
        "samples_per_prompt": tally.num_committed / num_prompts,
        "issued_per_prompt": tally.num_issued / num_prompts,
        "waste_fraction": (tally.num_issued - tally.num_committed) / tally.num_issued,
        "num_prompts": num_prompts,
        "num_groups": np.count_nonzero(result.has_group),
        "num_satisfied": tally.num_satisfied,
        "num_dropped": tally.num_dropped,
        "num_exhausted": np.count_nonzero(exhausted),
        "open_missing_correct": np.count_nonzero(exhausted & no_correct & ~no_wrong),
        "open_missing_wrong": np.count_nonzero(exhausted & no_wrong & ~no_correct),
        "open_missing_both": np.count_nonzero(exhausted & no_correct & no_wrong),
        "refill_exhausted": num_prompts - tally.num_dropped < num_wanted,
        "num_completions_issued": tally.num_issued,
        "num_completions_committed": tally.num_committed,
        "num_completions_kept": len(row),
        "num_voids": result.num_void.sum(),
        "num_lost": tally.num_lost,
        "num_duplicates": tally.num_duplicates,
        "num_rejected": tally.num_rejected,
    }
    return {name: float(value) for name, value in metrics.items()}


def _pass_rates(result: ColumnResult, policy: Policy, num_prompts: int) -> Iterator[float]:
    """The unbiased estimate of each of the first prompts' pass rates, as `terminals_of` has it; none without a score."""
    known: dict[tuple[int, int, int], float] = {}  # without voids
    columns = (result.num_correct, result.num_wrong, result.num_void, result.cap)
    for row, (correct, wrong, void, cap) in enumerate(zip(*(c[:num_prompts].tolist() for c in columns), strict=True)):
        counts = Counts(correct, wrong, void)
        if void and counts.scored:
            voids = np.isnan(result.rewards[row, : counts.committed]).nonzero()[0]
            yield stopping_table(policy, cap, tuple(voids.tolist())).at(counts).pass_rate
        elif counts.scored:
            if (correct, wrong, cap) not in known:
                known[correct, wrong, cap] = stopping_table(policy, cap).at(counts).pass_rate
            yield known[correct, wrong, cap]


def _mean(values: NDArray[np.float64]) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


def _check(
    num_prompts: int,
    policy: Policy,
    schedule: str,
    window: int | Window | None,
    num_wanted: int | None,
    histories: Sequence[History] | None,
) -> None:
    """Raise InputError for arguments that cannot go together."""
    at_least(_WHERE, "num_prompts", num_prompts, 1)
    check_schedule(_WHERE, schedule, window)
    if policy.needs_memory and histories is None:
        raise InputError(_WHERE, f"policy {policy.name!r} without histories", "what earlier steps say of a prompt is needed")
    if histories is not None and len(histories) != num_prompts:
        raise InputError(_WHERE, f"{len(histories)} histories of {num_prompts} prompts", "one of each prompt is needed")
    if policy.propose.candidates_per_prompt > 1:
        given = f"policy {policy.name!r}, which chooses among candidates"
        raise InputError(_WHERE, given, "a policy that takes prompts in order is needed", "choose before, or use AdaptiveSampler")
    if num_wanted is None:
        if policy.propose(num_prompts, num_prompts) > num_prompts:
            given = f"policy {policy.name!r}, which refills dropped prompts, without num_wanted"
            raise InputError(_WHERE, given, "num_wanted is needed", "give fewer than there are prompts to draw from")
        return
    at_least(_WHERE, "num_wanted", num_wanted, 1)
    if num_wanted > num_prompts:
        raise InputError(_WHERE, f"num_wanted {num_wanted} of {num_prompts} prompts", "at most as many as there are is possible")
