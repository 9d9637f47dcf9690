"""The column sampler is the event sampler: same requests in the same order, same pools, whatever happens to the answers."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_world import prompts_of, scored

from reinforce_ada.sampling import (
    AdaptiveSampler,
    Balance,
    Centered,
    Counts,
    History,
    Never,
    Policy,
    Positive,
    Refill,
    Rounds,
    Verdict,
)
from reinforce_ada.sampling.columns import EXITS, ColumnResult, ColumnSampler
from reinforce_ada.sampling.policies import All, Balanced, DropOneClass, First
from reinforce_ada.types import CompletionId, Failed, Lost, Prompt, SamplingResult

COMMON = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
VOID = None


# -------------------- policies of every kind


@dataclasses.dataclass(frozen=True)
class OwnBudgets:
    """Every prompt its own cap, multiples of nothing."""

    round_size: int
    cap: int

    def __call__(self, counts: Counts) -> int:
        return min((counts.committed // self.round_size + 1) * self.round_size, self.cap)

    def budgets(self, histories: Sequence[History]) -> list[int]:
        return [1 + round(7 * history.a + 3 * history.b) % self.cap for history in histories]


@dataclasses.dataclass(frozen=True)
class DropHopeless:
    """A rule that stops, continues or drops, and looks at voids."""

    def __call__(self, counts: Counts) -> Verdict:
        if counts.wrong >= 5 and not counts.correct:
            return Verdict.DROP
        return Verdict.STOP if counts.correct >= 2 or counts.void >= 3 else Verdict.CONTINUE


@dataclasses.dataclass(frozen=True)
class Extremes:
    """The highest and the lowest reward; a user's own selection."""

    def __call__(self, rewards, correct, group_size):
        return sorted({int(rewards.argmax()), int(rewards.argmin())})


@dataclasses.dataclass(frozen=True)
class Widening:
    """A window that follows counts, history and cap."""

    slope: int

    def __call__(self, counts: Counts, history: History, cap: int) -> int:
        return 1 + (self.slope * counts.wrong + round(history.a) + counts.void) % cap


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    group_size = draw(st.integers(1, 5) | st.sampled_from([7, 64]))
    round_size = draw(st.integers(1, 6))
    allocate = draw(
        st.builds(Rounds, st.just(round_size), st.integers(-(-group_size // round_size), 3 - (-group_size // round_size)))
        | st.builds(OwnBudgets, st.just(round_size), st.integers(group_size, group_size + 12))
    )
    rules = [Never(), Positive(1), Balance(group_size // 2, group_size - group_size // 2), DropOneClass(), DropHopeless()]
    return Policy(
        name="drawn",
        group_size=group_size,
        allocate=allocate,
        decide=draw(st.sampled_from([rule for rule in rules if sum(getattr(rule, "needs", (0, 0))) <= allocate.cap])),
        select=draw(st.sampled_from([Balanced(), First(), All(), Extremes()])),
        weight=Centered(),
        decide_every=draw(st.integers(1, allocate.cap + 1)),
        min_pool=draw(st.integers(0, min(allocate.cap, 8))),
        propose=draw(st.sampled_from([Refill(1.0), Refill(1.5), Refill(3.0)])),
        degenerate=draw(st.sampled_from(["keep", "drop"])),
    )


REWARDS = st.sampled_from([1.0, 0.0, 1.0, 0.0, 0.1, 0.7, -2.5, 0.8, VOID]) | st.floats(-1e9, 1e9)


@st.composite
def worlds(draw: st.DrawFn):
    """A policy, the rewards of every prompt, its history, and how the sampler is set up."""
    policy = draw(policies())
    num_prompts = draw(st.integers(1, 6))
    common = draw(st.sampled_from([REWARDS, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0, VOID]), st.just(0.0)]))
    rows = draw(st.lists(st.lists(common, min_size=policy.cap, max_size=policy.cap), min_size=num_prompts, max_size=num_prompts))
    histories = [History(*draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))) for _ in rows]
    schedule = draw(st.sampled_from(["stream", "stream", "rounds"]))
    windows = st.none() | st.integers(1, policy.cap + 2)
    if not isinstance(policy.decide, DropHopeless):  # it may go on again, so what a batch settles depends on its order
        windows |= st.builds(Widening, st.integers(0, 3))
    options = {"schedule": schedule, "window": draw(windows) if schedule == "stream" else None}
    return policy, rows, histories, options, draw(st.integers(1, num_prompts))


class Remembered:
    def __init__(self, histories: Sequence[History]) -> None:
        self.histories = histories

    def history(self, prompt: Prompt) -> History:
        return self.histories[int(prompt.prompt_id)]


class Pair:
    """Both samplers under the same events; their answers are compared at every step."""

    def __init__(self, policy, rows, histories, options, num_wanted) -> None:
        self.rows = rows
        prompts = prompts_of([str(i) for i in range(len(rows))])
        memory = Remembered(histories)
        self.events = AdaptiveSampler(prompts, policy, num_prompts=num_wanted, memory=memory, **options)
        self.columns = ColumnSampler(len(rows), policy, num_wanted=num_wanted, histories=histories, **options)
        self.running: list[tuple[int, int]] = []
        self.past: list[tuple[int, int]] = []  # anything ever issued

    def issue(self, free_slots: int) -> None:
        expected = [(int(r.id.prompt_id), r.id.index) for r in self.events.next_requests(free_slots)]
        prompt_of, index = self.columns.next_requests(free_slots)
        assert (prompt_of.dtype, index.dtype) == (np.int64, np.int32)
        assert list(zip(prompt_of.tolist(), index.tolist(), strict=True)) == expected
        self.running += expected
        self.past += expected
        self.compare()

    def answer(self, batch: list[tuple[int, int]]) -> None:
        expected: set[tuple[int, int]] = set()
        for prompt, index in batch:
            known = 0 <= prompt < len(self.rows) and 0 <= index < len(self.rows[prompt])
            reward = self.rows[prompt][index] if known else 0.0
            request_id = CompletionId(0, str(prompt), index)
            event = Failed(request_id, 0, "void") if reward is VOID else scored(request_id, reward)
            expected |= {(int(i.prompt_id), i.index) for i in self.events.receive(event)}
        rewards = [self.rows[p][i] if 0 <= p < len(self.rows) and 0 <= i < len(self.rows[p]) else 0.0 for p, i in batch]
        void = [reward is VOID for reward in rewards]
        columns = [p for p, _ in batch], [i for _, i in batch], [math.nan if r is VOID else r for r in rewards]
        prompt_of, index = self.columns.receive(*columns, void) if any(void) else self.columns.receive(*columns)
        to_abort = list(zip(prompt_of.tolist(), index.tolist(), strict=True))
        assert to_abort == sorted(expected - set(batch))
        gone = {*batch, *to_abort}
        self.running = [i for i in self.running if i not in gone]
        self.compare()

    def lose(self, batch: list[tuple[int, int]]) -> None:
        for prompt, index in batch:
            self.events.receive(Lost(CompletionId(0, str(prompt), index), 0, "late"))
        self.columns.lose([p for p, _ in batch], [i for _, i in batch])
        self.running = [i for i in self.running if i not in batch]
        self.compare()

    def compare(self) -> None:
        assert self.columns.done == self.events.done
        assert self.columns.num_active == self.events.num_active
        assert self.columns.num_admitted == self.events.num_admitted
        assert self.columns.num_outstanding == self.events.num_outstanding == len(self.running)
        progress = self.events.progress()
        assert (self.columns.num_issued, self.columns.num_committed) == (progress.num_issued, progress.num_committed)

    def run(self, rng: random.Random, slots: int, mess: float) -> None:
        while not self.events.done:
            self.issue(rng.randint(0, max(slots - len(self.running), 0)))
            batch = rng.sample(self.running, rng.randint(0, len(self.running)))
            if rng.random() < mess:  # twice in a batch, again later, late after an abort, and nobody's
                batch += rng.choices(self.past, k=2) if self.past else []
                batch += [(99, 0), (-1, 0), (0, -1), (0, 10_000), (rng.randrange(len(self.rows)), 3)]
            if rng.random() < mess and self.past:
                self.lose([*rng.choices(self.past, k=3), (0, 10_000)])
            self.answer(batch)


def same(result: ColumnResult, expected: SamplingResult, policy: Policy) -> None:
    """Equal to the bit."""
    pools = expected.pools
    for name in ("num_correct", "num_wrong", "num_void", "mean", "m2", "min", "max", "num_issued", "cap", "count"):
        assert getattr(result, name).tolist() == [getattr(pool, name) for pool in pools], name
    assert [EXITS[code] for code in result.exit] == [pool.exit for pool in pools]
    assert result.committed.tolist() == [len(pool.outcomes) for pool in pools]
    kept = [[i for i in row if i >= 0] for row in result.kept.tolist()]
    group_of = {int(group.pool.prompt.prompt_id): [s.id.index for s in group.kept] for group in expected.groups}
    assert result.has_group.tolist() == [i in group_of for i in range(len(pools))]
    assert kept == [group_of.get(i, []) for i in range(len(pools))]
    for row, pool in zip(result.rewards, pools, strict=True):
        given = [o.reward if not isinstance(o, Failed) else math.nan for o in pool.outcomes]
        np.testing.assert_array_equal(row, np.pad(given, (0, policy.cap - len(given)), constant_values=math.nan))
    for ours, theirs in zip(result.pool_stats(), expected.pool_stats(), strict=True):
        assert ours.tolist() == theirs.tolist()
        assert ours.dtype == np.float64
    unknown = {"tokens_committed", "tokens_wasted", "num_aborted", "num_skipped"}
    assert result.metrics == pytest.approx({k: v for k, v in expected.metrics.items() if k not in unknown}, rel=0, abs=0, nan_ok=True)


@COMMON
@given(world=worlds(), slots=st.integers(1, 60), mess=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**32))
def test_columns_do_what_events_do(world, slots: int, mess: float, seed: int) -> None:
    pair = Pair(*world)
    pair.run(random.Random(seed), slots, mess)
    same(pair.columns.result(), pair.events.result(), world[0])
