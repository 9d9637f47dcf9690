"""Whatever the engine, the network and the clock do, the pools are those of the sequential sampler."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_world import (
    VOID,
    Chaos,
    Remembered,
    drawn,
    histories,
    prompts_of,
    scored,
    sequential,
    tables,
    windows,
)
from sampling_world import policies as any_policy

from reinforce_ada.sampling import AdaptiveSampler, Balance, Centered, Never, Policy, Positive, Refill, Rounds, preset
from reinforce_ada.sampling.policies.decide import DropOneClass
from reinforce_ada.sampling.policies.select import Balanced
from reinforce_ada.types import Aborted, CompletionId, Event, Failed, Lost, SamplingResult, Scored

COMMON = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    group_size = draw(st.integers(1, 4))
    allocate = Rounds(draw(st.integers(group_size, 6)), draw(st.integers(1, 3)))
    decide = draw(st.sampled_from([Never(), Positive(1), Balance(group_size // 2, group_size - group_size // 2)]))
    return Policy(
        name="drawn",
        group_size=group_size,
        allocate=allocate,
        decide=decide,
        select=Balanced(),
        weight=Centered(),
        decide_every=draw(st.integers(1, allocate.cap + 1)),
        min_pool=draw(st.integers(0, allocate.cap)),
    )


def scripts(policy: Policy, num_prompts: int) -> st.SearchStrategy[dict[str, str]]:
    chars = st.text("+-v" if policy.cap else "+", min_size=policy.cap, max_size=policy.cap)
    return st.lists(chars, min_size=num_prompts, max_size=num_prompts).map(lambda rows: {f"p{i}": row for i, row in enumerate(rows)})


@st.composite
def timings(draw: st.DrawFn, policy: Policy) -> tuple[str, int | None, int, float, random.Random]:
    schedule = draw(st.sampled_from(["stream", "rounds"]))
    window = draw(st.none() | st.integers(1, policy.cap + 2)) if schedule == "stream" else None
    return schedule, window, draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 0.2, 0.5])), random.Random(draw(st.integers(0, 2**32)))


def world(policy: Policy, script: dict[str, str], timing, **more) -> Chaos:
    schedule, window, slots, mess, rng = timing
    sampler = AdaptiveSampler(more.pop("prompts", prompts_of(list(script))), policy, step=7, schedule=schedule, window=window, **more)
    return Chaos(sampler, script, rng, slots=slots, mess=mess)


def any_step(data: st.DataObject) -> tuple[Policy, dict[str, str]]:
    """Draw a policy, and the outcomes of one to four prompts."""
    policy = data.draw(policies())
    return policy, data.draw(scripts(policy, data.draw(st.integers(1, 4))))


def kept(result: SamplingResult) -> list[list[tuple]]:
    return [[s.id for s in group.kept] for group in result.groups]


@COMMON
@given(data=st.data())
def test_any_event_order_gives_the_sequential_pools(data: st.DataObject) -> None:
    policy, script = any_step(data)
    chaos = world(policy, script, data.draw(timings(policy)))
    chaos.run()
    result = chaos.sampler.result()
    assert [drawn(pool) for pool in result.pools] == [sequential(chars, policy) for chars in script.values()]
    assert [pool.prompt.prompt_id for pool in result.pools] == list(script)
    assert result.metrics["num_rejected"] == chaos.num_foreign
    assert result.metrics["num_voids"] == sum(drawn(pool)[0].count("v") for pool in result.pools)
    for group in result.groups:
        assert all(isinstance(s, Scored) for s in group.kept)
        assert len(group.kept) == min(policy.group_size, group.pool.count)


@COMMON
@given(data=st.data())
def test_a_step_cut_anywhere_and_restored_gives_the_same_pools(data: st.DataObject) -> None:
    policy, script = any_step(data)
    first = world(policy, script, data.draw(timings(policy)))
    first.run(data.draw(st.integers(0, 60)))
    second = world(policy, script, data.draw(timings(policy)))
    second.sampler.restore(first.journal)
    assert second.sampler.num_committed == first.sampler.num_committed
    assert second.sampler.num_active == first.sampler.num_active
    second.seeds = first.seeds
    second.run()
    assert [drawn(pool) for pool in second.sampler.result().pools] == [sequential(c, policy) for c in script.values()]
    assert all(pool.num_issued >= len(pool.outcomes) for pool in second.sampler.result().pools)


@COMMON
@given(data=st.data())
def test_refill_admits_the_same_prompts_under_any_timing(data: st.DataObject) -> None:
    factor = data.draw(st.sampled_from([1.0, 1.5, 3.0]))
    policy = preset("dapo", group_size=data.draw(st.integers(2, 3)), max_prompts_factor=factor)
    wanted = data.draw(st.integers(1, 3))
    script = data.draw(scripts(policy, data.draw(st.integers(1, 8))))
    chaos = world(policy, script, data.draw(timings(policy)), prompts=iter(prompts_of(list(script))), num_prompts=wanted)
    chaos.run()
    result = chaos.sampler.result()
    admitted, alive = [], 0
    for name, chars in script.items():
        if alive < wanted and len(admitted) < int(wanted * factor):
            admitted.append(name)
            alive += sequential(chars, policy)[1] != "dropped"
    assert [pool.prompt.prompt_id for pool in result.pools] == admitted
    assert len(result.groups) == alive <= wanted
    assert result.metrics["refill_exhausted"] == (alive < wanted)
    assert result.metrics["num_dropped"] == len(admitted) - alive


@COMMON
@given(data=st.data())
def test_the_window_bounds_what_is_in_flight(data: st.DataObject) -> None:
    policy = data.draw(policies())
    script = data.draw(scripts(policy, 3))
    window = data.draw(st.integers(1, policy.cap))
    chaos = world(policy, script, ("stream", window, 40, 0.2, random.Random(data.draw(st.integers(0, 99)))))
    sampler, every = chaos.sampler, policy.decide_every
    while not sampler.done:
        chaos.step()
        for request_id in sampler.outstanding:
            committed = sampler.committed(request_id.prompt_id)
            assert request_id.index < min(committed + window, policy.cap)
            if window <= every:
                assert request_id.index < (committed // every + 1) * every


def test_dropped_prompts_are_replaced_in_rounds_too() -> None:
    policy = preset("dapo", group_size=2, max_prompts_factor=3)
    assert isinstance(policy.propose, Refill)
    assert isinstance(policy.decide, DropOneClass)
    script = {"a": "++", "b": "+-", "c": "--", "d": "-+", "e": "+-"}
    chaos = world(policy, script, ("rounds", None, 8, 0.0, random.Random(0)), num_prompts=2)
    chaos.run()
    assert kept(chaos.sampler.result()) == [[(7, "b", 0), (7, "b", 1)], [(7, "d", 0), (7, "d", 1)]]


# -------------------- nothing but the answers


class Replicas:
    """Engines that each answer their own requests at their own pace, some requests lost on the way, and the journal of all of it."""

    def __init__(self, rows: list[list[float | None]], num: int, slots: int, rng: random.Random) -> None:
        self.rows, self.slots, self.rng = rows, slots, rng
        self.pace = [rng.random() for _ in range(num)]
        self.queues: list[list[CompletionId]] = [[] for _ in range(num)]
        self.journal: list[Event] = []

    def answer(self, request_id: CompletionId) -> Event:
        reward = self.rows[int(request_id.prompt_id)][request_id.index]
        return Failed(request_id, 0, "void") if reward is VOID else scored(request_id, reward)

    def drive(self, sampler: AdaptiveSampler, num_polls: int | None = None) -> AdaptiveSampler:
        """Run to the end, or for a number of polls."""
        while not sampler.done and num_polls != 0:
            for request in sampler.next_requests(self.slots - sum(map(len, self.queues))):
                min(self.queues, key=len).append(request.id)
            for number, pace in enumerate(self.pace):
                queue = self.queues[number]
                if queue and self.rng.random() < 0.1 + pace:
                    request_id = queue.pop(self.rng.randrange(min(len(queue), 8)))
                    lost = self.rng.random() < 0.1
                    self.deliver(sampler, Lost(request_id, 0, "late") if lost else self.answer(request_id))
            num_polls = None if num_polls is None else num_polls - 1
        return sampler

    def deliver(self, sampler: AdaptiveSampler, event: Event) -> None:
        self.journal.append(event)
        dropped = sampler.receive(event)
        self.journal += [Aborted(request_id, 0) for request_id in dropped]
        self.queues = [[request_id for request_id in queue if request_id not in dropped] for queue in self.queues]
        for state in sampler._by_order:
            assert state.outstanding >> state.limit == 0
            assert max(state.committed, len(state.answers)) <= state.limit
        assert sorted(sampler.outstanding) == sorted(request_id for queue in self.queues for request_id in queue)


def record(result: SamplingResult) -> list[tuple]:
    """Return all of the pools and groups that training can see."""
    pools = [
        (
            (p.prompt.prompt_id, p.exit, p.cap, p.num_correct, p.num_wrong, p.num_void, p.mean, p.m2, p.min, p.max),
            [(o.id, o.reward if isinstance(o, Scored) else VOID) for o in p.outcomes],
        )
        for p in result.pools
    ]
    return [*pools, *([s.id for s in group.kept] for group in result.groups)]


@COMMON
@given(data=st.data())
def test_pools_depend_on_nothing_but_the_answers(data: st.DataObject) -> None:
    """With any rewards, caps, windows, slots, replicas, order and one crash, the pools are those of one request at a time."""
    policy = data.draw(any_policy())
    rows = data.draw(tables(policy, 5))
    memory = Remembered(data.draw(histories(len(rows))))
    num_wanted = data.draw(st.integers(1, len(rows)))
    rng = random.Random(data.draw(st.integers(0, 2**32)))

    def new(**options) -> AdaptiveSampler:
        prompts = prompts_of([str(i) for i in range(len(rows))])
        return AdaptiveSampler(prompts, policy, num_prompts=num_wanted, memory=memory, **options)

    def engines() -> Replicas:
        return Replicas(rows, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 50)), rng)

    expected = record(Replicas(rows, 1, 1, random.Random(0)).drive(new(window=1)).result())
    for_streams = windows(policy, own=True).map(lambda window: {"window": window})
    options = for_streams | st.just({"schedule": "rounds"})
    assert record(engines().drive(new(**data.draw(options))).result()) == expected
    cut = engines()
    before = cut.drive(new(**data.draw(options)), data.draw(st.integers(0, 40)))
    after = new(**data.draw(options))
    after.restore(cut.journal)
    assert (after.num_committed, after.num_active) == (before.num_committed, before.num_active)
    assert record(engines().drive(after).result()) == expected
