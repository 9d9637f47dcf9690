"""The driver for asyncio: one coroutine for each completion, which generates and scores however it likes."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any, TypeAlias

from reinforce_ada.driver import Journal, Ledger, stall
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.loading import described
from reinforce_ada.rewards.loading import as_reward
from reinforce_ada.sampling import AdaptiveSampler, CertainWindow, Policy, Progress
from reinforce_ada.sampling.policies.contracts import Remembers, Window, at_least
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Failed, Prompt, Request, SamplingResult, Scored

SampleFunction: TypeAlias = Callable[[Request], Awaitable[tuple[Any, float]]]

_log = logging.getLogger(__name__)


async def arun(
    sampler: AdaptiveSampler,
    sample: SampleFunction,
    *,
    concurrency: int = 64,
    journal: Journal | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SamplingResult:
    """Drive one step to its end inside a running event loop; `run` is the same for an engine and a reward.

    Args:
        sampler: fresh, or restored from a journal.
        sample: an async function (request) -> (output, reward), called once for each request. The output is a `Completion` of that
            request, see `Request.completed`; anything else becomes the `output` of a completion without tokens. The reward is a finite
            number. A call that raises, is cancelled or returns anything else becomes a void, and the first traceback is logged as a
            warning. A call that raises `EngineLost` ends the step: no further call would fare better.
        concurrency: the most calls that run at the same time.
        journal: gets the events before the sampler, as in `run`. It keeps only what a `Completion` holds, and so needs one as the output.
        on_progress: called with the sampler's counts whenever completions have arrived.
    Returns: the sampler's result. However the loop ends, every call has ended before: those that are not needed any more are cancelled.
    Raises: InputError for a concurrency below 1, a function that is not async, and an output that is another request's completion;
        EngineLost as a call raised it; RuntimeError when no call is running and the sampler cannot continue.
    """
    at_least(1, "arun", concurrency=concurrency)
    calls = _Calls(sample, concurrency, needs_completion=journal is not None)
    ledger = Ledger(sampler, journal, calls.cancel, on_progress)
    try:
        while not sampler.done:
            calls.start(sampler.next_requests(calls.free_slots))
            if not calls.num_running:
                raise stall(sampler, "no call of the sample function is running")
            events, error = await calls.ended()
            ledger.enter(events)
            if error is not None:
                raise error
    finally:
        await calls.close()
    return sampler.result()


async def adaptive_group(
    policy: Policy,
    sample: SampleFunction,
    *,
    prompt: Prompt = Prompt("0"),  # noqa: B008 - it is frozen
    step: int = 0,
    policy_version: int = 0,
    seed: int = 0,
    window: int | Window | None = None,
    memory: Remembers | None = None,
    concurrency: int | None = None,
    journal: Journal | None = None,
) -> SamplingResult:
    """Sample one prompt adaptively, for loops that have one coroutine for each prompt.

    Groups of many prompts, in any order and at the same time, have the pools that one sampler over all of them would have.

    Args:
        policy: one that decides on each prompt alone.
        sample: see `arun`.
        window: see `AdaptiveSampler`. By default those requests are out that are needed for certain, so that nothing is wasted;
            `PosteriorWindow(policy)` also issues those that will probably be needed.
        concurrency: the most calls at the same time for this prompt; by default as many as the window allows. A semaphore inside `sample`
            bounds the calls of all prompts together.
        step, policy_version, seed, memory, journal: see `AdaptiveSampler` and `arun`.
    Returns: the result of a step with this one prompt: `result.pools[0]`, and its kept completions in `result.groups`, which is empty if
        nothing was kept. `advantages_of(result, policy)` gives their advantages, unless the policy scales over a batch.
    Raises: InputError for a policy that chooses among prompts or divides a budget between them.
    """
    check_alone("adaptive_group", policy)
    sampler = AdaptiveSampler(
        [prompt], policy, step=step, policy_version=policy_version, seed=seed, memory=memory,
        window=CertainWindow(policy) if window is None else window,
    )  # fmt: skip
    return await arun(sampler, sample, concurrency=policy.cap if concurrency is None else concurrency, journal=journal)


def check_alone(where: str, policy: Policy) -> None:
    """Raise InputError for a policy that cannot decide on a prompt without the others of its step."""
    if policy.draws_prompts:
        given = f"policy {policy.name!r} with {type(policy.propose).__name__}, which draws further prompts"
        raise InputError(where, given, "exactly one prompt is given", "propose=AllPrompts()")
    if policy.allocate.is_batch_wide:
        given = f"policy {policy.name!r} with {type(policy.allocate).__name__}, which divides a budget between the prompts of a step"
        raise InputError(where, given, "a budget for each prompt alone is needed")


class _Calls:
    """The calls of the sample function. One that is cancelled holds its slot until it has ended."""

    def __init__(self, sample: SampleFunction, concurrency: int, *, needs_completion: bool) -> None:
        self._sample = sample
        self._concurrency = concurrency
        self._needs_completion = needs_completion
        self._running: dict[asyncio.Future[Any], Request] = {}
        self._needed: dict[CompletionId, asyncio.Future[Any]] = {}
        self._ended: list[tuple[asyncio.Future[Any], Request]] = []
        self._loop = asyncio.get_running_loop()
        self._has_ended = asyncio.Event()
        self._has_warned = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def free_slots(self) -> int:
        return self._concurrency - len(self._running)

    def start(self, requests: list[Request]) -> None:
        for request in requests:
            call = self._call(request)
            self._running[call] = request
            self._needed[request.id] = call
            call.add_done_callback(self._end)

    def _call(self, request: Request) -> asyncio.Future[Any]:
        awaitable = self._sample(request)
        if isinstance(awaitable, CoroutineType):
            return self._loop.create_task(awaitable)
        if not inspect.isawaitable(awaitable):
            raise InputError("arun", f"a sample function that returns a {type(awaitable).__name__}", "an async function is needed")
        call = asyncio.ensure_future(awaitable)
        if call in self._running:
            raise InputError("arun", "a sample function that returns one future twice", "one for each request is needed")
        return call

    def _end(self, call: asyncio.Future[Any]) -> None:
        self._ended.append((call, self._running.pop(call)))
        self._has_ended.set()

    def cancel(self, ids: list[CompletionId]) -> None:
        for request_id in ids:
            if (call := self._needed.pop(request_id, None)) is not None:
                call.cancel()

    async def ended(self) -> tuple[list[Event], BaseException | None]:
        """Wait until a call has ended, and return the events of all that have, with the first error that ends the step."""
        await self._has_ended.wait()
        self._has_ended.clear()
        ended, self._ended = self._ended, []
        events: list[Event] = []
        first: BaseException | None = None
        for call, request in ended:
            try:
                event = self._event(call, request)
            except (EngineLost, InputError) as error:
                first = first or error
            else:
                events += [] if event is None else [event]
        return events, first

    def _event(self, call: asyncio.Future[Any], request: Request) -> Event | None:
        """Return what became of a call; None for one that was cancelled because nothing waited for it."""
        is_needed = self._needed.pop(request.id, None) is not None
        error = asyncio.CancelledError() if call.cancelled() else call.exception()  # result() would tie the call to its traceback
        if error is None:
            try:
                output, reward = _pair(call.result())
            except (TypeError, ValueError, OverflowError) as wrong:
                error = wrong
        if error is not None:
            if is_needed and isinstance(error, EngineLost):
                raise error
            return self._void(request, error) if is_needed else None
        completion = self._completion(output, request)
        if not is_needed:  # it had ended before it could be cancelled
            return Aborted(request.id, request.policy_version, len(completion.token_ids))
        return Scored(completion, reward)

    def _completion(self, output: Any, request: Request) -> Completion:
        if not isinstance(output, Completion):
            if self._needs_completion:
                given = f"an output of type {type(output).__name__} with a journal"
                raise InputError("arun", given, "a journal keeps only a Completion", "return request.completed(...)")
            return request.completed(output=output)
        if (output.id, output.policy_version) != (request.id, request.policy_version):
            given = f"a completion of {tuple(output.id)}, version {output.policy_version}"
            raise InputError("arun", given, f"one of {tuple(request.id)}, version {request.policy_version}", "request.completed(...)")
        return output

    def _void(self, request: Request, error: BaseException) -> Failed:
        reason = described(error)
        if not self._has_warned:
            self._has_warned = True
            _log.warning("a call of the sample function failed (shown once): %s", reason, exc_info=error)
        return Failed(request.id, request.policy_version, reason)

    async def close(self) -> None:
        """Cancel every call that is still needed, and wait until all have ended, even if this is cancelled meanwhile."""
        for call in self._needed.values():  # the others were cancelled before, and may be cleaning up
            call.cancel()
        interrupted: asyncio.CancelledError | None = None
        while self._running:
            try:
                await asyncio.wait(self._running)
            except asyncio.CancelledError as error:
                interrupted = error
        for call, _ in self._ended:
            if not call.cancelled():
                call.exception()  # so that asyncio does not warn of one that nobody looked at
        if interrupted is not None:
            raise interrupted


def _pair(returned: Any) -> tuple[Any, float]:
    """Return output and reward. Raises: TypeError, ValueError or OverflowError for what is no output with a finite number."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"the sample function returned {type(returned).__name__} {returned!r:.80}, not (output, reward)")
    return returned[0], as_reward(returned[1])
