"""The column sampler is the event sampler: same requests in the same order, same pools, whatever happens to the answers."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_world import VOID, DropHopeless, Remembered, histories, policies, prompts_of, scored, tables, windows

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdaptiveSampler, Centered, History, Never, Policy, Refill, Rounds, preset
from reinforce_ada.sampling.columns import EXITS, ColumnResult, ColumnSampler, _Smallest
from reinforce_ada.types import CompletionId, Failed, Lost, SamplingResult

COMMON = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


class Pair:
    """Both samplers under the same events; their answers are compared at every step."""

    def __init__(self, policy, rows, histories, options, num_wanted) -> None:
        self.policy, self.rows = policy, rows
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


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Both samplers, for any policy, rewards, histories and set-up."""
    policy = draw(policies())
    rows = draw(tables(policy, 6))
    schedule = draw(st.sampled_from(["stream", "stream", "rounds"]))
    # A rule that may go on again after it would have ended: what it settles within a batch depends on the order.
    window = draw(windows(policy, own=not isinstance(policy.decide, DropHopeless))) if schedule == "stream" else None
    num_wanted = draw(st.integers(1, len(rows)))
    return Pair(policy, rows, draw(histories(len(rows))), {"schedule": schedule, "window": window}, num_wanted)


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
@given(pair=pairs(), slots=st.integers(1, 60), mess=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**32))
def test_columns_do_what_events_do(pair: Pair, slots: int, mess: float, seed: int) -> None:
    pair.run(random.Random(seed), slots, mess)
    same(pair.columns.result(), pair.events.result(), pair.policy)


@pytest.mark.parametrize(
    ("name", "options"),
    [("reinforce-ada-balance", {}), ("reinforce-ada-balance", {"window": 3}), ("dapo", {}), ("reinforce-ada-pos", {"schedule": "rounds"})],
)
def test_columns_do_what_events_do_among_many_prompts(name: str, options: dict) -> None:
    """Enough prompts that the queue has many runs at many levels."""
    policy, rng = preset(name), np.random.default_rng(0)
    rows = (rng.random((800, policy.cap)) < rng.beta(1, 2, (800, 1))).astype(float).tolist()
    pair = Pair(policy, rows, [History()] * 800, options, 400 if name == "dapo" else 800)
    pair.run(random.Random(0), 120, 0.1)
    same(pair.columns.result(), pair.events.result(), policy)


# -------------------- parts


@given(st.lists(st.tuples(st.lists(st.integers(0, 2**50), max_size=30), st.integers(1, 40)), max_size=30))
def test_the_queue_gives_the_smallest_keys_first(turns) -> None:
    queue, truth = _Smallest(), []
    for keys, num in turns:
        new = list(dict.fromkeys(key for key in keys if key not in truth))
        queue.put(np.array(new, np.int64))
        truth = sorted([*truth, *new])
        assert queue.take(num).tolist() == truth[:num]
        truth = truth[num:]


def test_selection_is_asked_once_for_each_row_of_rewards() -> None:
    asked = []

    def select(rewards, correct, group_size):
        asked.append(rewards.tolist())
        return [len(rewards) - 1]

    policy = Policy("own", 2, Rounds(2, 1), Never(), select, Centered(), decide_every=2, min_pool=0)
    sampler = ColumnSampler(4, policy)
    prompt_of, index = sampler.next_requests(8)
    sampler.receive(prompt_of, index, [1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 9.0, 9.0], void=[False] * 6 + [True] * 2)
    assert asked == []
    result = sampler.result()
    assert sorted(asked) == [[0.5], [1.0, 0.0]]
    assert result.kept.tolist() == [[1], [1], [0], [0]]
    assert result.num_void.tolist() == [0, 0, 1, 1]


def test_a_result_is_a_snapshot() -> None:
    """Answers that come after the last exit change nothing of a result that was taken, and nothing of one that is taken then."""
    sampler = ColumnSampler(3, preset("reinforce-ada-balance"), window=16)
    prompt_of, index = sampler.next_requests(48)
    answered = np.zeros(len(index), bool)
    while not sampler.done:
        now = index == index[~answered].min()
        sampler.receive(prompt_of[now], index[now], index[now] % 2.0)
        answered |= now
    assert np.count_nonzero(~answered) > 0
    result = sampler.result()

    def contents(result) -> dict[str, list]:
        columns = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "metrics"}
        return {name: np.nan_to_num(column.astype(float), nan=-7.0).tolist() for name, column in columns.items()}

    before, metrics = contents(result), dict(result.metrics)
    sampler.receive(prompt_of[~answered], index[~answered], np.full(np.count_nonzero(~answered), 5.0))
    assert contents(result) == before
    assert dict(result.metrics) == metrics
    assert contents(sampler.result()) == before


# -------------------- errors


@pytest.mark.parametrize(
    ("num_prompts", "policy", "options", "message"),
    [
        (0, "grpo", {}, "ColumnSampler: num_prompts 0; an integer of at least 1"),
        (2, "dapo", {}, "policy 'dapo', which refills dropped prompts, without num_wanted; num_wanted is needed"),
        (2, "grpo", {"num_wanted": 3}, "num_wanted 3 of 2 prompts; at most as many as there are"),
        (2, "grpo", {"num_wanted": 0}, "num_wanted 0; an integer of at least 1"),
        (2, "grpo", {"window": 0}, "window 0; an integer of at least 1"),
        (2, "grpo", {"window": 4, "schedule": "rounds"}, "window 4 with schedule 'rounds'; rounds have no window"),
        (2, "grpo", {"schedule": "streem"}, "unknown schedule 'streem'; known: rounds, stream"),
        (2, "grpo", {"histories": [History()]}, "1 histories of 2 prompts; one of each prompt is needed"),
        (2, "reinforce-ada-est", {}, "policy 'reinforce-ada-est' without histories; what earlier steps say"),
    ],
)
def test_constructor_errors(num_prompts: int, policy: str, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ColumnSampler(num_prompts, preset(policy), **options)
    assert message in str(caught.value)


def test_a_policy_that_chooses_among_candidates_is_refused() -> None:
    class Two(Refill):
        candidates_per_prompt = 2

    policy = dataclasses.replace(preset("grpo"), propose=Two(1.0))
    with pytest.raises(InputError, match="policy 'grpo', which chooses among candidates; a policy that takes prompts in order is needed"):
        ColumnSampler(2, policy)


def test_misuse() -> None:
    sampler = ColumnSampler(2, preset("grpo", group_size=2))
    prompt_of, index = sampler.next_requests(3)
    with pytest.raises(InputError, match="reward nan for prompt 0, index 0; a finite reward is needed; mark it as void"):
        sampler.receive(prompt_of, index, [math.nan, 0, 0])
    with pytest.raises(InputError, match=r"columns of lengths \[3, 3, 1, 1\]; one row for each answer is needed"):
        sampler.receive(prompt_of, index, [1.0])
    with pytest.raises(InputError, match="2 of 2 prompts still active"):
        sampler.result()
    with pytest.raises(InputError, match="free_slots -1"):
        sampler.next_requests(-1)
    assert sampler.num_committed == 0
