"""arun and adaptive_group: the pools of the one driver, whatever the order, the concurrency and the cancellations."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reinforce_ada import AdaptiveSampler, FunctionEngine, Policy, Prompt, adaptive_group, arun, preset, run
from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.sampling import Memory, PosteriorWindow
from reinforce_ada.types import Aborted, Completion, Event, Failed, Pool, Request, SamplingResult, Scored

BALANCE = "reinforce-ada-balance"


def rewarded(request: Request) -> float | None:
    """What becomes of a request, by its seed alone: 1, 0, or None for a call that fails."""
    law = random.Random(request.seed)
    rate = request.prompt.data.get("rate", 0.4)
    return None if law.random() < request.prompt.data.get("void", 0.0) else float(law.random() < rate)


def prompts(count: int, void: float = 0.0) -> list[Prompt]:
    return [Prompt(f"p{i}", data={"rate": (i % 10) / 9, "void": void}) for i in range(count)]


class Agent:
    """A sample function whose calls take a random number of turns; it counts, and some of its calls do not end when they are cancelled."""

    def __init__(self, *, turns: int = 5, stubborn: float = 0.0, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.turns, self.stubborn = turns, stubborn
        self.num_running = self.max_running = self.num_cancelled = 0

    async def __call__(self, request: Request) -> tuple[str, float]:
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            for _ in range(self.rng.randint(0, self.turns)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            if self.rng.random() >= self.stubborn:
                raise
            await asyncio.sleep(0)
        finally:
            self.num_running -= 1
        reward = rewarded(request)
        if reward is None:
            raise RuntimeError("the environment is down")
        return f"output {request.id.index}", reward


def outcomes(pool: Pool) -> tuple[Any, ...]:
    rewards = [o.reward if isinstance(o, Scored) else None for o in pool.outcomes]
    return [o.id for o in pool.outcomes], rewards, pool.mean, pool.m2, pool.exit, pool.cap


def kept(result: SamplingResult) -> list[Any]:
    return [s.id for group in result.groups for s in group.kept]


POLICIES = (
    preset(BALANCE), preset(BALANCE, decide_every=1), preset("reinforce-ada-pos"), preset("grpo", group_size=3),
    preset("reinforce-ada-exact"), preset("reinforce-ada-memory", group_size=2),
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@example(policy=POLICIES[0], count=200, concurrency=256, window=None, void=0.1, stubborn=0.3, seed=0)
@given(
    count=st.just(30),
    policy=st.sampled_from(POLICIES),
    concurrency=st.sampled_from([1, 3, 17, 10_000]),
    window=st.sampled_from([None, 1, 7, PosteriorWindow]),
    void=st.sampled_from([0.0, 0.2]),
    stubborn=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_groups_of_one_prompt_have_the_pools_of_one_sampler_over_all(policy, count, concurrency, window, void, stubborn, seed) -> None:
    given_prompts, memory = prompts(count, void), Memory()
    window = window(policy) if window is PosteriorWindow else window
    own = {"seed": seed, "step": 3, "memory": memory}

    async def both() -> tuple[SamplingResult, list[SamplingResult]]:
        agent = Agent(stubborn=stubborn, seed=seed)
        together = await arun(AdaptiveSampler(given_prompts, policy, window=window, **own), agent, concurrency=concurrency)
        assert agent.num_running == 0
        assert agent.max_running <= concurrency
        gate, agent = asyncio.Semaphore(concurrency), Agent(stubborn=stubborn, seed=seed + 1)

        async def gated(request: Request) -> tuple[str, float]:
            async with gate:
                return await agent(request)

        order = random.Random(seed).sample(given_prompts, len(given_prompts))
        alone = await asyncio.gather(*[adaptive_group(policy, gated, prompt=p, window=window, **own) for p in order])
        assert agent.num_running == 0
        of = dict(zip([p.prompt_id for p in order], alone, strict=True))
        return together, [of[p.prompt_id] for p in given_prompts]

    together, alone = asyncio.run(both())
    assert [outcomes(p) for p in together.pools] == [outcomes(r.pools[0]) for r in alone]
    assert kept(together) == [i for result in alone for i in kept(result)]
    assert all(s.completion.output == f"output {s.id.index}" for g in together.groups for s in g.kept)


def test_the_pools_are_those_of_the_driver_for_engines() -> None:
    given_prompts = prompts(12)
    engine = ScriptedEngine(lambda request: str(rewarded(request)), slots=7, num_per_poll=2, shuffle_seed=1)
    with_engine = run(AdaptiveSampler(given_prompts, preset(BALANCE), window=5), engine, lambda prompt, text: float(text))
    alone = asyncio.run(arun(AdaptiveSampler(given_prompts, preset(BALANCE), window=5), Agent(), concurrency=7))
    assert [outcomes(p) for p in alone.pools] == [outcomes(p) for p in with_engine.pools]
    without_tokens = {k: v for k, v in with_engine.metrics.items() if not k.startswith("tokens_") and k != "completion_length_mean"}
    # How many requests run ahead and are wasted depends on the order of the answers; nothing else does.
    ahead = {"issued_per_prompt", "waste_fraction", "num_completions_issued", "num_completions_wasted", "num_aborted"}
    assert {k: alone.metrics[k] for k in without_tokens if k not in ahead} == {k: v for k, v in without_tokens.items() if k not in ahead}


def test_calls_that_are_not_needed_are_cancelled_and_hold_their_slots_until_they_end() -> None:
    class Slow(Agent):
        async def __call__(self, request: Request) -> tuple[str, float]:
            self.num_running += 1
            self.max_running = max(self.max_running, self.num_running)
            try:
                await asyncio.sleep(0 if request.id.index < 2 else 30)
            except asyncio.CancelledError:
                for _ in range(50):  # it puts its tools away
                    await asyncio.sleep(0)
                self.num_cancelled += 1
                raise
            finally:
                self.num_running -= 1
            return "", float(request.id.index % 2)

    agent = Slow()
    policy = preset(BALANCE, group_size=2, min_pool=2, decide_every=1)
    result = asyncio.run(arun(AdaptiveSampler(prompts(5), policy, window=4), agent, concurrency=6))
    assert [len(pool.outcomes) for pool in result.pools] == [2] * 5
    assert agent.num_cancelled == result.metrics["num_completions_issued"] - 10 > 0
    assert (agent.num_running, agent.max_running) == (0, 6)


def test_other_coroutines_run_meanwhile() -> None:
    async def main() -> tuple[int, float]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticker = asyncio.create_task(tick())
        result = await arun(AdaptiveSampler(prompts(100), preset(BALANCE)), Agent(turns=0), concurrency=16)
        ticker.cancel()
        return ticks, result.metrics["num_completions_committed"]

    ticks, num_completions = asyncio.run(main())
    assert ticks > num_completions / 16


# -------------------- what goes wrong


def sampled(sample: Callable[[Request], Awaitable[Any]], **options: Any) -> SamplingResult:
    return asyncio.run(arun(AdaptiveSampler([Prompt("a")], preset("grpo", group_size=3)), sample, **options))


def returning(value: Any, *, only: int = 1) -> Callable[[Request], Awaitable[Any]]:
    """A function whose call `only` returns this, or raises it, and whose other calls give 1."""

    async def sample(request: Request) -> Any:
        if request.id.index != only:
            return None, 1.0
        if isinstance(value, BaseException):
            raise value
        return value

    return sample


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (RuntimeError("the server\nis down"), "RuntimeError: the server is down"),
        (BaseException("a panic of Rust"), "BaseException: a panic of Rust"),
        (asyncio.TimeoutError(), "TimeoutError"),
        (asyncio.CancelledError(), "CancelledError"),  # it cancelled itself, nobody here did
        (None, "returned NoneType None, not (output, reward)"),
        (("a", 1.0, 2.0), "returned tuple ('a', 1.0, 2.0), not (output, reward)"),
        ((None, None), "the reward returned NoneType"),
        ((None, float("nan")), "the reward returned nan"),
        ((None, 10**400), "OverflowError"),
    ],
)
def test_a_call_that_fails_is_a_void(value: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "reinforce_ada"):
        result = sampled(returning(value))
    (pool,) = result.pools
    assert [type(o) for o in pool.outcomes] == [Scored, Failed, Scored]
    assert reason in pool.outcomes[1].reason
    assert result.metrics["num_voids"] == 1
    assert len([r for r in caplog.records if "a call of the sample function failed (shown once)" in r.message]) == 1


def test_an_error_outside_the_calls_ends_them_all() -> None:
    agent = Agent(turns=10**9)

    async def main() -> None:
        driving = asyncio.create_task(arun(AdaptiveSampler(prompts(3), preset("grpo")), agent, concurrency=5))
        await asyncio.sleep(0.01)
        assert agent.num_running == 5
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving
        assert (agent.num_running, agent.num_cancelled) == (0, 5)

    asyncio.run(main())


def test_nothing_in_flight_is_a_stall() -> None:
    sampler = AdaptiveSampler([Prompt("a")], preset("grpo"))
    assert len(sampler.next_requests(8)) == 8  # nobody answers these
    with pytest.raises(RuntimeError, match="1 of 1 prompts are open, 8 requests unanswered, but no call of the sample function is running"):
        asyncio.run(arun(sampler, Agent()))


def another(request: Request) -> Completion:
    return Completion(request.id._replace(index=7), [1], [0.0], "", "stop", 0)


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (Agent(), {"concurrency": 0}, "arun: concurrency 0; an integer of at least 1 is needed"),
        (lambda request: ("", 1.0), {}, "a sample function that returns a tuple; an async function is needed"),
    ],
)
def test_what_cannot_be_driven_is_one_line(sample: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        sampled(sample, **options)
    assert message in str(caught.value)


def test_a_completion_must_be_the_requests_own() -> None:
    async def sample(request: Request) -> tuple[Completion, float]:
        return another(request), 1.0

    with pytest.raises(InputError, match=r"a completion of \(0, 'a', 7\), version 0; one of \(0, 'a', 0\), version 0"):
        sampled(sample)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (preset("dapo"), "with Refill, which draws further prompts; exactly one prompt is given"),
        (preset("knapsack"), "with Knapsack, which divides a budget between the prompts of a step"),
    ],
)
def test_a_policy_over_many_prompts_is_refused_for_one(policy: Policy, message: str) -> None:
    with pytest.raises(InputError) as caught:
        asyncio.run(adaptive_group(policy, Agent()))
    assert message in str(caught.value)


class AsyncCall:
    async def __call__(self, prompt: Any, text: Any) -> Any: ...


@pytest.mark.parametrize("function", [AsyncCall().__call__, AsyncCall()])
def test_what_blocks_refuses_async_functions_and_names_arun(function: Any) -> None:
    with pytest.raises(InputError, match="inside the sample function of"):
        run(AdaptiveSampler([Prompt("a")], preset("grpo")), ScriptedEngine({"a": "+"}), function)
    with pytest.raises(InputError, match="inside the sample function of"):
        FunctionEngine(function)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_group_of_one_prompt_asks_for_what_is_needed_for_certain_and_at_once(policy: Policy) -> None:
    for i in range(10):
        agent = Agent()
        agent.rng.randint = lambda least, most: most  # type: ignore[method-assign]  # all calls take as long
        prompt = Prompt(f"p{i}", data={"rate": i / 9})
        result = asyncio.run(adaptive_group(policy, agent, prompt=prompt, memory=Memory()))
        assert result.metrics["waste_fraction"] == 0
        assert agent.max_running >= max(policy.min_pool, min(policy.decide_every, policy.cap))


class Careful:
    """Calls that take a while to put their tools away when they are cancelled."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, request: Request) -> tuple[None, float]:
        if request.prompt.prompt_id == "p0" and request.id.index < 2:
            return None, float(request.id.index)
        try:
            await asyncio.sleep(0.02 if request.prompt.prompt_id == "p1" else 60)
        except asyncio.CancelledError:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                self.seen.append("interrupted")
                raise
            self.seen.append("put away")
            raise
        return None, float(request.id.index % 2)


def test_a_call_is_cancelled_once() -> None:
    agent, policy = Careful(), preset(BALANCE, group_size=2, min_pool=2, decide_every=1, round_size=2)
    asyncio.run(arun(AdaptiveSampler(prompts(2), policy, window=4), agent, concurrency=8))
    assert set(agent.seen) == {"put away"}


def test_every_call_has_ended_even_if_the_end_is_cancelled_too() -> None:
    agent = Careful()

    async def main() -> None:
        driving = asyncio.create_task(arun(AdaptiveSampler([Prompt("p2")], preset("grpo", group_size=3)), agent))
        await asyncio.sleep(0.01)
        driving.cancel()
        await asyncio.sleep(0.01)
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving
        assert agent.seen == ["put away"] * 3

    asyncio.run(main())


def test_what_was_scored_before_the_engine_was_lost_is_in_the_journal() -> None:
    async def sample(request: Request) -> tuple[Completion, float]:
        if request.id.index == 2:
            raise EngineLost("gone")
        return request.completed([1], [0.0]), 1.0

    journal = Polls()
    with pytest.raises(EngineLost, match="gone"):
        sampled(sample, journal=journal)
    assert [e.id.index for poll in journal.polls for e in poll] == [0, 1]


def test_one_future_for_two_requests_is_refused() -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        with pytest.raises(InputError, match="returns one future twice"):
            await arun(AdaptiveSampler([Prompt("a")], preset("grpo")), lambda request: future)

    asyncio.run(main())


def test_engine_lost_ends_the_step() -> None:
    agent = Agent(turns=100)

    async def sample(request: Request) -> tuple[str, float]:
        if request.id.index == 1:
            raise EngineLost("http://host: 401")
        return await agent(request)

    with pytest.raises(EngineLost, match="http://host: 401"):
        sampled(sample)
    assert agent.num_running == 0


# -------------------- journal


class Polls:
    """A journal in memory."""

    def __init__(self) -> None:
        self.polls: list[list[Event]] = []

    def append(self, events: Sequence[Event]) -> Sequence[Event]:
        self.polls.append(list(events))
        return events


class WithTokens(Agent):
    async def __call__(self, request: Request) -> tuple[Completion, float]:
        output, reward = await super().__call__(request)
        ids = np.arange(request.id.index + 1)
        return request.completed(ids, -ids / 7, text=output, token_mask=ids % 2 == 0), reward


def test_the_journal_sees_events_first_and_resumes_them_anywhere() -> None:
    def fresh() -> AdaptiveSampler:
        return AdaptiveSampler(prompts(4, void=0.1), preset(BALANCE, decide_every=1), seed=5, window=4)

    journal, sampler = Polls(), fresh()
    whole = asyncio.run(arun(sampler, WithTokens(stubborn=0.3), concurrency=9, journal=journal))
    assert len(journal.polls) > 5
    for cut in range(len(journal.polls) + 1):
        resumed = fresh()
        resumed.restore(itertools.chain.from_iterable(journal.polls[:cut]))
        agent = WithTokens(seed=cut)
        again = asyncio.run(arun(resumed, agent, concurrency=5))
        assert [outcomes(p) for p in again.pools] == [outcomes(p) for p in whole.pools]
        assert kept(again) == kept(whole)
    assert agent.max_running == 0  # the whole journal leaves nothing to do
    assert any(isinstance(e, Aborted) for poll in journal.polls for e in poll)


def test_a_journal_needs_completions() -> None:
    with pytest.raises(InputError, match="an output of type str with a journal; a journal keeps only a Completion"):
        sampled(Agent(), journal=Polls())


def test_progress_is_reported() -> None:
    seen: list[int] = []
    sampled(Agent(), on_progress=lambda p: seen.append(p.num_committed))
    assert seen == sorted(seen)
    assert seen[-1] == 3


def test_memory_reaches_a_group_of_one_prompt() -> None:
    policy = preset("reinforce-ada-memory")
    with pytest.raises(InputError, match="without memory"):
        asyncio.run(adaptive_group(policy, Agent()))
    result = asyncio.run(adaptive_group(policy, Agent(), memory=Memory()))
    assert result.pools[0].prior == (1.0, 1.0)
