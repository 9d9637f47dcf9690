from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from sampling_world import answer, cid, drawn, finish, kept, prompts_of, sample, scored

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdaptiveSampler, preset, request_seed
from reinforce_ada.types import Aborted, Failed, Lost, Scored

POS, BALANCE = "reinforce-ada-pos", "reinforce-ada-balance"
PACKAGE_ROOT = Path(sys.modules["reinforce_ada.sampling"].__file__).parents[2]


def indices(sampler: AdaptiveSampler, free_slots: int) -> list[tuple[str, int]]:
    return [(r.id.prompt_id, r.id.index) for r in sampler.next_requests(free_slots)]


# -------------------- literal cases


@pytest.mark.parametrize(
    ("outcomes", "cap", "pos_stops", "balance_stops", "balance_keeps"),
    [
        ("+-+-", 32, 1, 4, [0, 1, 2, 3]),
        ("++++++++----", 32, 1, 10, [0, 1, 8, 9]),
        ("--------", 8, None, None, [0, 1, 2, 3]),
        ("-----+-+", 32, 6, 8, [0, 1, 5, 7]),
    ],
)
def test_per_completion_stops(outcomes: str, cap: int, pos_stops: int, balance_stops: int, balance_keeps: list[int]) -> None:
    options = {"decide_every": 1, "min_pool": 0, "max_rounds": cap // 8}
    (pos,) = sample(preset(POS, **options), a=outcomes).pools
    assert (len(pos.outcomes), pos.exit) == ((pos_stops, "satisfied") if pos_stops else (cap, "exhausted"))
    balance = sample(preset(BALANCE, **options), a=outcomes)
    (pool,) = balance.pools
    assert (len(pool.outcomes), pool.exit) == ((balance_stops, "satisfied") if balance_stops else (cap, "exhausted"))
    assert kept(balance.groups[0]) == balance_keeps
    assert pool.has_signal == (balance_stops is not None)


def test_stops_at_the_first_multiple_of_decide_every() -> None:
    outcomes = "++++++++----++++"
    pos = sample(preset(POS), a=outcomes).pools[0]
    assert (drawn(pos)[0], pos.exit, pos.has_signal) == ("++++++++", "satisfied", False)
    result = sample(preset(BALANCE), a=outcomes)
    (group,) = result.groups
    assert (drawn(group.pool)[0], kept(group), group.pool.mean) == (outcomes, [0, 1, 8, 9], 0.75)
    assert [s.reward - group.pool.mean for s in group.kept] == [0.25, 0.25, -0.75, -0.75]
    assert (group.pool.m2, group.pool.min, group.pool.max) == (3.0, 0.0, 1.0)


def test_pool_statistics_are_of_raw_rewards() -> None:
    """With graded rewards the threshold (0.7, strict) decides classes, and the mean is that of the raw rewards."""
    rewards = [0.8, 0.7, 0.2, 0.9, 0.0, 0.0, 0.0, 0.0]
    sampler = AdaptiveSampler(prompts_of(["a"]), preset(BALANCE))
    for request in sampler.next_requests(8):
        sampler.receive(scored(request.id, rewards[request.id.index]))
    (group,) = sampler.result().groups
    assert (group.pool.num_correct, group.pool.num_wrong, kept(group)) == (2, 6, [0, 1, 2, 3])
    assert group.pool.mean == math.fsum(rewards) / 8
    assert group.pool.exit == "satisfied"


def test_a_prompt_with_fewer_completions_than_its_group_keeps_what_there_is() -> None:
    (group,) = sample(preset(BALANCE, round_size=4, max_rounds=1, min_pool=0), a="+vv-").groups
    assert (kept(group), group.pool.count, group.pool.num_void) == ([0, 3], 2, 2)
    result = sample(preset("grpo", group_size=2), a="vv", b="+-")
    assert [g.pool.prompt.prompt_id for g in result.groups] == ["b"]  # nothing scored: no group
    assert result.metrics["num_voids"] == 2


@pytest.mark.parametrize(("degenerate", "groups"), [("keep", ["a", "b", "c"]), ("drop", ["b"])])
def test_pools_without_signal_are_a_setting(degenerate: str, groups: list[str]) -> None:
    result = sample(preset("grpo", group_size=4, degenerate=degenerate), a="++++", b="+---", c="----")
    assert [g.pool.prompt.prompt_id for g in result.groups] == groups
    assert [p.prompt.prompt_id for p in result.pools] == ["a", "b", "c"]
    assert result.metrics["signal_fraction"] == pytest.approx(1 / 3)


def test_degenerate_means_equal_rewards_not_equal_classes() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset("grpo", group_size=2, degenerate="drop"))
    for request, reward in zip(sampler.next_requests(2), (0.1, 0.2), strict=True):
        sampler.receive(scored(request.id, reward))
    assert len(sampler.result().groups) == 1


# -------------------- what is issued


def test_breadth_first_ties_in_prompt_order() -> None:
    sampler = AdaptiveSampler(prompts_of(["b", "a"]), preset(BALANCE), window=3)
    assert indices(sampler, 5) == [("b", 0), ("a", 0), ("b", 1), ("a", 1), ("b", 2)]
    assert indices(sampler, 5) == [("a", 2)]  # both windows are full
    assert indices(sampler, 5) == []
    sampler.receive(scored(cid("a", 1), 0.0))
    assert indices(sampler, 5) == []  # not the next in request order: nothing is committed
    sampler.receive(scored(cid("a", 0), 0.0))
    assert sampler.committed("a") == 2
    assert indices(sampler, 5) == [("a", 3), ("a", 4)]


def test_a_window_within_decide_every_stops_at_the_next_decision() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset(BALANCE, round_size=4, decide_every=4, min_pool=0), window=3)
    assert indices(sampler, 9) == [("a", 0), ("a", 1), ("a", 2)]
    for index in (0, 1):
        sampler.receive(scored(cid("a", index), 1.0))
    assert indices(sampler, 9) == [("a", 3)]  # committed 2, window 3: index 4 is past the decision at 4
    for index in (2, 3):
        sampler.receive(scored(cid("a", index), 1.0))
    assert indices(sampler, 9) == [("a", 4), ("a", 5), ("a", 6)]


def test_a_wider_window_speculates_past_the_decision_and_stops_at_the_cap() -> None:
    policy = preset(BALANCE, round_size=4, max_rounds=2, decide_every=4, min_pool=0)
    assert indices(AdaptiveSampler(prompts_of(["a"]), policy, window=5), 9) == [("a", i) for i in range(5)]
    assert indices(AdaptiveSampler(prompts_of(["a"]), policy, window=99), 99) == [("a", i) for i in range(8)]


@pytest.mark.parametrize(("free_slots", "window"), [(1, 8), (16, 8), (17, 9), (40, 20), (64, 32), (1000, 32)])
def test_the_window_adapts_to_the_slots_per_active_prompt(free_slots: int, window: int) -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(BALANCE, decide_every=1, min_pool=0))
    requests = indices(sampler, free_slots)
    assert len(requests) == min(free_slots, 2 * window)
    assert max(index for _, index in requests) < window


def test_the_window_grows_as_prompts_exit() -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(BALANCE, decide_every=1, min_pool=0))
    assert len(sampler.next_requests(20)) == 20  # 20 slots for 2: window 10
    for index in (0, 1):
        sampler.receive(scored(cid("a", index), 1.0))
    assert indices(sampler, 2) == [("a", 10), ("a", 11)]  # b was issued fewer, but its window is full
    for index in (2, 3):
        aborted = sampler.receive(scored(cid("a", index), 0.0))
    assert aborted == [cid("a", index) for index in range(4, 12)]
    assert indices(sampler, 10) == [("b", index) for index in range(10, 20)]  # 20 slots for 1


def test_a_prompt_waits_again_for_a_window_it_waited_for_before() -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(BALANCE, round_size=2, max_rounds=8, decide_every=1, min_pool=0))

    def take(*answers: tuple[str, int]) -> None:
        for prompt_id, index in answers:
            sampler.receive(scored(cid(prompt_id, index), 1.0))

    assert len(indices(sampler, 4)) == 4
    take(("a", 1))  # it waits for a0, in a's window
    assert indices(sampler, 1) == []  # 4 slots for 2: window 2, and both need 3
    assert indices(sampler, 2) == [("a", 2), ("b", 2)]  # 5 slots: window 3
    take(("a", 0), ("b", 0))
    assert indices(sampler, 1) == [("a", 3)]
    take(("a", 2))
    assert indices(sampler, 1) == [("a", 4)]  # window 2 again, and b needs 3 again
    assert indices(sampler, 1) == [("b", 3)]  # window 3


def everything(counts, history, cap) -> int:
    return cap


def test_what_the_answers_settle_is_given_up() -> None:
    """With a custom window: once index 1 is correct the rule ends the prompt at 2, whatever index 0 brings."""
    policy = preset(POS, group_size=2, round_size=8, max_rounds=1, decide_every=2, min_pool=0)
    sampler = AdaptiveSampler(prompts_of(["a"]), policy, window=everything)
    assert len(sampler.next_requests(9)) == 8
    sampler.receive(Lost(cid("a", 5), 0, "late"))
    assert sampler.receive(scored(cid("a", 1), 1.0)) == [cid("a", index) for index in (2, 3, 4, 6, 7)]
    assert sampler.next_requests(9) == []  # nor is the lost one issued again
    assert [index for index in range(8) if sampler.is_open(cid("a", index))] == [0]
    for event in (scored(cid("a", 3), 1.0), Lost(cid("a", 4), 0, "late"), Lost(cid("a", 5), 0, "late")):  # late, and of no use
        assert sampler.receive(event) == []
    assert sampler.next_requests(9) == []
    resumed = AdaptiveSampler(prompts_of(["a"]), policy, window=everything)
    resumed.restore([scored(cid("a", 1), 1.0), scored(cid("a", 5), 1.0)])
    assert indices(resumed, 9) == [("a", 0)]
    assert sampler.num_outstanding == 1
    assert sampler.receive(scored(cid("a", 0), 0.0)) == []
    (pool,) = sampler.result().pools
    assert (drawn(pool), pool.num_issued) == (("-+", "satisfied"), 8)


def test_rounds_hold_everybody_at_the_barrier() -> None:
    policy = preset(BALANCE, round_size=2, max_rounds=3, group_size=2)
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), policy, schedule="rounds")
    assert indices(sampler, 9) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    for index in (0, 1):
        sampler.receive(scored(cid("a", index), 1.0))
    sampler.receive(scored(cid("b", 1), 1.0))
    assert indices(sampler, 9) == []  # b has not committed its round
    sampler.receive(scored(cid("b", 0), 1.0))
    assert indices(sampler, 9) == [("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    sampler.receive(scored(cid("b", 2), 0.0))
    sampler.receive(scored(cid("b", 3), 0.0))  # b exits; a alone holds the barrier
    assert (sampler.num_active, sampler.num_eliminated) == (1, 1)
    for index in (2, 3):
        sampler.receive(scored(cid("a", index), 1.0))
    assert indices(sampler, 9) == [("a", 4), ("a", 5)]


def test_seeds() -> None:
    seeds = {request_seed(s, t, p, i) for s in range(3) for t in range(3) for p in ("a", "1", "1,2") for i in range(3)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 0, "a", 0) == 6438759198449605333
    assert request_seed(0, 0, "\ud800", 0) != request_seed(0, 0, "\ud801", 0)  # no UTF-8, as ids from broken files are
    (request,) = AdaptiveSampler(prompts_of(["a"]), preset(BALANCE), step=5, seed=2, policy_version=9).next_requests(1)
    assert (request.id, request.policy_version, request.seed) == (cid("a", 0, 5), 9, request_seed(2, 5, "a", 0))


# -------------------- events


def test_an_exit_aborts_what_is_out_and_wastes_what_waits() -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(POS, decide_every=1, min_pool=0), window=6)
    sampler.next_requests(12)
    assert sampler.receive(scored(cid("a", 3), 1.0, num_tokens=7)) == []
    assert sampler.receive(Lost(cid("a", 4), 0, "late")) == []
    assert sampler.receive(scored(cid("a", 0), 1.0, num_tokens=5)) == [cid("a", 1), cid("a", 2), cid("a", 5)]
    assert [i.prompt_id for i in sampler.outstanding] == ["b"] * 6
    sampler.receive(Aborted(cid("a", 1), 0, num_tokens=2))
    sampler.receive(Lost(cid("a", 5), 0, "late"))
    sampler.receive(scored(cid("a", 5), 0.0, num_tokens=4))  # given up, and answered all the same
    sampler.receive(scored(cid("a", 2), 0.0, num_tokens=3))  # finished before the abort reached it
    sampler.receive(scored(cid("a", 2), 0.0, num_tokens=3))
    assert all(prompt_id == "b" for prompt_id, _ in indices(sampler, 20))  # the lost one is not issued again
    sampler.receive(scored(cid("b", 0), 1.0))
    metrics = sampler.result().metrics
    assert (metrics["tokens_committed"], metrics["tokens_wasted"]) == (6, 7 + 2 + 4 + 3)
    assert (metrics["num_duplicates"], metrics["num_lost"], metrics["num_aborted"]) == (1, 1, 0)
    assert (metrics["num_completions_issued"], metrics["num_completions_committed"]) == (12, 2)
    assert metrics["waste_fraction"] == pytest.approx(10 / 12)


@pytest.mark.parametrize("event", [Lost(cid("a", 1), 0, "late"), Aborted(cid("a", 1), 0)])
def test_what_is_lost_comes_first_and_carries_the_same_seed(event: Lost | Aborted) -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(BALANCE), window=8)
    first = {r.id: r.seed for r in sampler.next_requests(6)}
    sampler.receive(event)
    sampler.receive(event)  # declared twice: one more request
    again = sampler.next_requests(2)
    assert [r.id for r in again] == [cid("a", 1), cid("a", 3)]
    assert again[0].seed == first[cid("a", 1)]
    assert sampler.progress().num_issued == 7
    sampler.receive(scored(cid("a", 0), 1.0))
    sampler.receive(scored(cid("a", 1), 1.0))
    sampler.receive(event)  # after the answer: nothing to do
    assert sampler.committed("a") == 2
    assert indices(sampler, 1) == [("b", 3)]
    tally = sampler._tally
    assert (tally.num_lost + tally.num_aborted, tally.num_duplicates) == (1, 2)


@pytest.mark.parametrize("again", [Lost(cid("a", 1), 0, "late"), Aborted(cid("a", 1), 0, num_tokens=7)])
def test_what_was_lost_before_the_exit_and_is_lost_again_is_a_duplicate(again: Lost | Aborted) -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset(POS, decide_every=1, min_pool=0))
    sampler.next_requests(2)
    sampler.receive(Lost(cid("a", 1), 0, "late"))
    sampler.receive(scored(cid("a", 0), 1.0))
    sampler.receive(again)
    metrics = sampler.result().metrics
    assert (metrics["num_lost"], metrics["num_duplicates"], metrics["tokens_wasted"]) == (1, 1, 0)


def test_foreign_events_are_rejected_and_counted() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset("grpo", group_size=4), step=3, policy_version=2)
    sampler.next_requests(2)
    for event in (
        scored(cid("a", 0, step=2), 1.0, policy_version=2),  # a replay of another epoch
        scored(cid("a", 0, step=3), 1.0, policy_version=1),  # sampled by older weights
        Failed(cid("a", 0, step=3), 1, "?"),
        scored(cid("z", 0, step=3), 1.0, policy_version=2),  # of no prompt
        scored(cid("a", 2, step=3), 1.0, policy_version=2),  # never issued
        Lost(cid("a", -1, step=3), 2, "?"),
        Aborted(cid("a", 4, step=3), 2),  # past the cap
    ):
        assert sampler.receive(event) == []
    assert sampler.num_committed == 0
    assert len(sampler.outstanding) == 2
    for index in range(4):
        sampler.next_requests(9)
        sampler.receive(scored(cid("a", index, step=3), 1.0, policy_version=2))
    assert sampler.result().metrics["num_rejected"] == 7


def test_is_open() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset(POS, decide_every=1, min_pool=0), window=3)
    sampler.next_requests(3)
    sampler.receive(scored(cid("a", 0), 0.0))
    sampler.receive(scored(cid("a", 2), 1.0))
    assert [i for i in range(5) if sampler.is_open(cid("a", i))] == [1]
    assert not sampler.is_open(cid("a", 1, step=1))
    assert not sampler.is_open(cid("z", 1))
    sampler.receive(scored(cid("a", 1), 1.0))
    assert not any(sampler.is_open(cid("a", i)) for i in range(5))


def test_what_is_not_kept_of_a_completion_changes_no_pool() -> None:
    script = {"a": "--v-+--+", "b": "v-------", "c": "++-v-+--"}
    policy = preset(BALANCE, max_rounds=1, decide_every=1)
    samplers = [AdaptiveSampler(prompts_of(list(script)), policy, keep_completions=keep) for keep in (True, False)]
    kept, forgotten = (finish(sampler, answer(script)) for sampler in samplers)
    for pool, thin in zip(kept.pools, forgotten.pools, strict=True):
        assert [isinstance(o, Failed) or o.reward for o in pool.outcomes] == [isinstance(o, Failed) or o.reward for o in thin.outcomes]
        assert (pool.mean, pool.m2, pool.min, pool.max, pool.num_issued, pool.exit) == (
            thin.mean, thin.m2, thin.min, thin.max, thin.num_issued, thin.exit,
        )  # fmt: skip
        assert len({id(o) for o in thin.outcomes if isinstance(o, Scored)}) <= 2
    assert [[s.reward for s in group.kept] for group in kept.groups] == [[s.reward for s in group.kept] for group in forgotten.groups]
    tokens = {"tokens_committed": 0.0, "tokens_wasted": 0.0, "completion_length_mean": math.nan, "truncated_fraction": math.nan}
    assert forgotten.metrics == pytest.approx({**kept.metrics, **tokens}, rel=0, abs=0, nan_ok=True)


def test_voids_advance_the_prefix_the_decision_and_the_cap_only() -> None:
    result = sample(preset(POS, round_size=4, max_rounds=2), a="+++v++++", b="vvvvvvvv")
    a, b = result.pools
    assert (drawn(a), a.count) == (("+++v++++", "satisfied"), 7)  # 3 scored at the first decision: below min_pool 4
    assert (drawn(b), b.count, b.mean, b.min, b.max) == (("v" * 8, "exhausted"), 0, 0.0, math.inf, -math.inf)
    assert [g.pool.prompt.prompt_id for g in result.groups] == ["a"]


def test_restore_issues_the_gaps_again() -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(BALANCE, max_rounds=1), window=4)
    sampler.restore([scored(cid("a", 3), 1.0), scored(cid("a", 0), 1.0), Lost(cid("b", 1), 0, "late")])
    assert sampler.committed("a") == 1
    assert indices(sampler, 4) == [("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert indices(sampler, 2) == [("b", 2), ("b", 3)]  # fewest issued first
    done = AdaptiveSampler(prompts_of(["a"]), preset(POS, decide_every=1, min_pool=0))
    done.restore([scored(cid("a", 0), 1.0), scored(cid("a", 3), 1.0)])
    assert done.done
    assert done.next_requests(9) == []  # 1 and 2 are of no use any more
    assert done.result().metrics["num_completions_issued"] == 4
    with pytest.raises(InputError, match="restore: 8 issued requests; a sampler that has issued none is needed"):
        AdaptiveSampler.restore(sampler, [])


# -------------------- refill


def test_refill_reads_no_further_than_it_must_and_reports_exhaustion() -> None:
    scripts = {"a": "++", "b": "+-", "c": "--", "d": "++", "e": "+-", "f": "+-"}
    policy = preset("dapo", group_size=2, max_prompts_factor=2)
    source = iter(prompts_of(list(scripts)))
    result = finish(AdaptiveSampler(source, policy, num_prompts=2), answer(scripts))
    assert [p.prompt.prompt_id for p in result.pools] == ["a", "b", "c", "d"]  # 2 x 2 prompts at most
    assert [g.pool.prompt.prompt_id for g in result.groups] == ["b"]
    assert (result.metrics["refill_exhausted"], result.metrics["num_dropped"]) == (1, 3)
    assert result.metrics["first_round_reward"] == 0.75  # of a and b, which were wanted before any outcome was known
    assert next(source).prompt_id == "e"


# -------------------- metrics


def test_metrics_by_hand() -> None:
    policy = preset(BALANCE, round_size=4, max_rounds=2)
    result = sample(policy, a="+-+-", b="++++++++", c="--------", d="+-------", e="vvvvvv+-")
    m = result.metrics
    assert m["first_round_reward"] == pytest.approx((0.5 + 1 + 0 + 0.25) / 4)  # e has no score in its first round
    assert m["pool_reward"] == pytest.approx((0.5 + 1 + 0 + 0.125 + 0.5) / 5)
    assert m["kept_reward"] == pytest.approx((2 + 4 + 0 + 1 + 1) / 18)
    assert m["signal_fraction"] == 3 / 5
    assert m["samples_per_prompt"] == (4 + 4 * 8) / 5
    assert (m["num_satisfied"], m["num_exhausted"], m["num_dropped"]) == (1, 4, 0)
    assert (m["open_missing_correct"], m["open_missing_wrong"], m["open_missing_both"]) == (2, 1, 1)
    assert (m["num_prompts"], m["num_groups"], m["num_completions_kept"], m["num_voids"]) == (5, 5, 18, 6)
    assert all(type(value) is float for value in m.values())


def test_a_mean_over_nothing_is_nan() -> None:
    metrics = sample(preset("grpo", group_size=2), a="vv").metrics
    assert [name for name, value in metrics.items() if math.isnan(value)] == [
        "first_round_reward",
        "pool_reward",
        "pass_rate",
        "kept_reward",
        "completion_length_mean",
        "truncated_fraction",
    ]


def test_progress() -> None:
    sampler = AdaptiveSampler(prompts_of(["a", "b"]), preset(POS, decide_every=1, min_pool=0))
    sampler.next_requests(4)
    sampler.receive(scored(cid("a", 0), 1.0))
    num_tokens = len(scored(cid("a", 0), 1.0).completion.token_ids)
    assert sampler.progress() == (2, 1, 1, 0, 4, 1, 1, 0, num_tokens, 0)
    assert (sampler.num_admitted, sampler.num_outstanding, sampler.num_committed) == (2, 2, 1)
    for index, reward in enumerate([0.0, 0.0, 0.5, 0.0, 1.0]):
        sampler.next_requests(1)
        sampler.receive(scored(cid("b", index), reward))
        assert sampler.progress().num_with_signal == (index >= 2)  # from the first reward that differs, counted once
