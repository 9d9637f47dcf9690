"""The driver loop: requests to the engine, completions to the rewards, events to the sampler."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from reinforce_ada.engines.base import Engine
from reinforce_ada.errors import InputError
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.protocol import Reward, RewardRunner
from reinforce_ada.sampling import AdaptiveSampler, Progress
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Failed, Lost, Request, SamplingResult

# With no request at the engine only a reward can make progress, so the wait may be long; it bounds how late on_progress is called.
_REWARD_WAIT_S = 1.0


class Journal(Protocol):
    """Makes a step resumable: events are written down before the sampler sees them."""

    def append(self, events: Sequence[Event], /) -> Sequence[Event]:
        """Write these events in one transaction and return them."""


def run(
    sampler: AdaptiveSampler,
    engine: Engine,
    rewards: RewardRunner | Reward,
    journal: Journal | None = None,
    *,
    request_timeout_s: float | None = None,
    max_losses: int = 3,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SamplingResult:
    """Drive one step to its end.

    Args:
        sampler: fresh, or restored from a journal.
        engine: never given more than its `free_slots`.
        rewards: a runner, or a plain callable (prompt, text) -> float, which is called in this process.
        journal: gets the non-empty list of events of each poll, before the sampler; then the requests dropped at an exit, as Aborted.
        request_timeout_s: a request that the engine has not answered after this time is aborted there and issued again.
        max_losses: a request that is lost (timed out, or dropped by the engine) this many times becomes a void.
        on_progress: called with the sampler's counts after each poll that brought events.
        clock: seconds, monotonic.
    Returns: the sampler's result. However the loop ends, its requests are aborted at the engine.
    Raises: RuntimeError when nothing is in flight anywhere and the sampler cannot continue.
    """
    if max_losses < 1:
        raise InputError("run", f"max_losses {max_losses}", "at least 1 is needed")
    runner = rewards if isinstance(rewards, RewardRunner) else InlineRewards(rewards)
    flights = _Flights(engine, request_timeout_s, max_losses, clock)
    ledger = Ledger(sampler, journal, flights.stop, on_progress)
    scoring: set[CompletionId] = set()
    was_stalled = False
    try:
        while not sampler.done:
            flights.start(sampler.next_requests(engine.free_slots))
            engine_idle = not flights.running
            finished, events = _sort(sampler, flights, flights.land())
            if finished:
                runner.submit([sampler.prompt(c.id.prompt_id) for c in finished], finished)
                scoring.update([c.id for c in finished])
            events += runner.poll(_REWARD_WAIT_S if engine_idle and scoring else 0.0)
            events += flights.overdue()
            stalled = engine_idle and not scoring and not events
            if stalled and was_stalled:  # twice: a poll may be what frees the slots of aborted requests
                raise stall(sampler, f"neither the engine ({engine.free_slots} free slots) nor the rewards have anything in flight")
            was_stalled = stalled
            scoring.difference_update([event.id for event in events])
            ledger.enter(events)
    finally:
        flights.stop(list(flights.running))
    return sampler.result()


class Ledger:
    """What every driver does with events: the journal gets them first, then the sampler; requests that it no longer needs are stopped.

    Args:
        stop: is called with the requests that are not needed any more.
        sampler, journal, on_progress: see `run`.
    """

    def __init__(
        self,
        sampler: AdaptiveSampler,
        journal: Journal | None,
        stop: Callable[[list[CompletionId]], None],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._sampler = sampler
        self._journal = journal
        self._stop = stop
        self._on_progress = on_progress

    def enter(self, events: Sequence[Event]) -> None:
        """Enter the events of one poll, if there are any."""
        if not events:
            return
        for event in self._journal.append(events) if self._journal is not None else events:
            if dropped := self._sampler.receive(event):
                self._stop(dropped)
                if self._journal is not None:  # so that a replay counts them as issued, and as waste
                    self._journal.append([Aborted(i, event.policy_version) for i in dropped])
        if self._on_progress is not None:
            self._on_progress(self._sampler.progress())


def stall(sampler: AdaptiveSampler, idle: str) -> RuntimeError:
    """Return the error for a step that cannot go on; `idle` says what has nothing to do."""
    progress = sampler.progress()
    return RuntimeError(
        f"run: {progress.num_active} of {progress.num_prompts} prompts are open, {sampler.num_outstanding} requests unanswered, "
        f"but {idle}; every request must be answered under the sampler's step and policy_version"
    )


def _sort(sampler: AdaptiveSampler, flights: _Flights, completions: list[Completion]) -> tuple[list[Completion], list[Event]]:
    """Return the completions to be scored, and events for the others: aborted ones, and answers that nothing waits for any more."""
    finished: list[Completion] = []
    events: list[Event] = []
    for completion in completions:
        if completion.finish_reason != "abort" and sampler.is_open(completion.id):
            finished.append(completion)
            continue
        aborted = Aborted(completion.id, completion.policy_version, len(completion.token_ids))
        events.append(flights.lose(aborted) if sampler.is_open(completion.id) else aborted)
    return finished, events


class _Flights:
    """Requests at the engine, with their start times and how often each was lost."""

    def __init__(self, engine: Engine, timeout_s: float | None, max_losses: int, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._max_losses = max_losses
        self._clock = clock
        self._num_losses: Counter[CompletionId] = Counter()
        self._echoes: set[CompletionId] = set()  # timed out and aborted by us: the engine may still return the aborted remains
        self.running: dict[CompletionId, tuple[float, Request]] = {}

    def start(self, requests: list[Request]) -> None:
        if requests:
            now = self._clock()
            self._engine.submit(requests)
            self.running.update([(r.id, (now, r)) for r in requests])

    def stop(self, ids: list[CompletionId]) -> None:
        running = [i for i in ids if self.running.pop(i, None) is not None]
        if running:
            self._engine.abort(running)

    def land(self) -> list[Completion]:
        """Return the completions that the engine has finished, without the remains of requests that timed out."""
        landed: list[Completion] = []
        for completion in self._engine.poll():
            request_id = completion.id
            if completion.finish_reason == "abort" and request_id in self._echoes:
                self._echoes.discard(request_id)
                continue
            if request_id in self._num_losses:  # answered late: the second attempt is not needed
                self.stop([request_id])
            self.running.pop(request_id, None)
            landed.append(completion)
        return landed

    def overdue(self) -> list[Event]:
        """Abort the requests that have been at the engine too long, and return an event for each."""
        if self._timeout_s is None:
            return []
        latest = self._clock() - self._timeout_s
        late = [request for started, request in self.running.values() if started < latest]
        self.stop([request.id for request in late])
        self._echoes.update(request.id for request in late)
        return [self.lose(Lost(r.id, r.policy_version, f"no answer after {self._timeout_s} s")) for r in late]

    def lose(self, event: Lost | Aborted) -> Event:
        """Return the event itself, or a void if this id has been lost too often."""
        self._num_losses[event.id] += 1
        if self._num_losses[event.id] < self._max_losses:
            return event
        reason = event.reason if isinstance(event, Lost) else "dropped by the engine"
        return Failed(event.id, event.policy_version, f"{reason} ({self._num_losses[event.id]} times)")
