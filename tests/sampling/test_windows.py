"""The posterior window: its probabilities against enumeration, its requests, and that it changes no pool."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_world import Chaos, answer, drawn, prompts_of, scored, sequential

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdaptiveSampler, Counts, History, Policy, Verdict, preset
from reinforce_ada.sampling.windows import CertainWindow, PosteriorWindow, survivals, window_of
from reinforce_ada.types import Aborted, CompletionId, Event

BALANCE, POS = "reinforce-ada-balance", "reinforce-ada-pos"
EACH = preset(BALANCE, decide_every=1)


def brute_survival(policy: Policy, history: History, start: Counts, num: int) -> float:
    """Return P(open after `num` more completions), by enumerating all sequences."""
    total = 0.0
    for sequence in product((True, False), repeat=num):
        correct, wrong, void = start
        probability = 1.0
        is_open = start.committed == 0 or policy.verdict(start) is Verdict.CONTINUE
        for right in sequence:
            mean = (history.a + correct) / (history.a + history.b + correct + wrong)
            probability *= mean if right else 1 - mean
            correct, wrong = correct + right, wrong + (not right)
            now = Counts(correct, wrong, void)
            is_open &= policy.verdict(now) is Verdict.CONTINUE and now.committed < policy.cap
        total += probability * is_open
    return total


def survival_table(policy: Policy, history: History, *, void: int = 0) -> np.ndarray:
    """Return all of `survivals` at once: [cap + 1, cap + 1, cap + 1] by (correct, wrong, j)."""
    table = np.zeros((policy.cap + 1,) * 3)
    for count, survival in survivals(policy, history, void=void):
        for correct, row in enumerate(survival):
            table[correct, count - correct, : len(row)] = row
    return table


def survival_cube(policy: Policy, history: History, *, void: int = 0) -> np.ndarray:
    """Compute the recursion as it is written, over a cube of all states."""
    cap = policy.cap
    survival = np.zeros((cap + 1, cap + 1, cap + 1))
    for count in range(cap - void - 1, -1, -1):
        correct = np.arange(count + 1)
        wrong = count - correct
        is_open = [count + void == 0 or policy.verdict(Counts(c, count - c, void), cap) is Verdict.CONTINUE for c in correct.tolist()]
        mean = ((history.a + correct) / (history.a + history.b + count))[:, None]
        later = mean * survival[correct + 1, wrong, :-1] + (1 - mean) * survival[correct, wrong + 1, :-1]
        survival[correct, wrong, 0] = is_open
        survival[correct, wrong, 1:] = np.array(is_open)[:, None] * later
    return survival


POLICIES = [
    preset(BALANCE),
    preset(BALANCE, decide_every=1, min_pool=0),
    preset(BALANCE, round_size=5, max_rounds=9, decide_every=3),
    preset(POS, decide_every=1, min_pool=7),
    preset(POS, round_size=16, max_rounds=4),
    preset("grpo", group_size=40),
    preset("dapo", group_size=16),
]


@pytest.mark.parametrize("policy", POLICIES, ids=[f"{p.name}-{p.cap}-{p.decide_every}" for p in POLICIES])
@pytest.mark.parametrize("void", [0, 1, 5])
@pytest.mark.parametrize("history", [History(), History(0.5, 2.0), History(1024, 0.0625)])
def test_one_diagonal_at_a_time_gives_what_the_whole_cube_gives(policy: Policy, void: int, history: History) -> None:
    cube = survival_cube(policy, history, void=void)
    np.testing.assert_allclose(survival_table(policy, history, void=void), cube, rtol=0, atol=1e-13)
    for least in (0.05, 0.4, 1.0):
        windows = np.maximum((cube >= least - 1e-12).sum(axis=2), 1)
        assert (PosteriorWindow(policy, least).table(history, void, policy.cap) == windows).all()


def test_a_cap_of_1024_takes_a_second_and_a_few_megabytes() -> None:
    window = PosteriorWindow(preset(BALANCE, round_size=8, max_rounds=128))
    window(Counts(0, 0), History(), 1024)  # the rule has been asked
    started = time.process_time()
    window(Counts(0, 0), History(2.0, 1.0), 1024)
    seconds = time.process_time() - started
    tracemalloc.start()
    try:
        assert window(Counts(0, 500), History(1.0, 2.0), 1024) == 524
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6
    assert seconds < 2  # half of one on a machine with nothing else to do


def test_tables_together_stay_within_their_bound() -> None:
    window = PosteriorWindow(preset(BALANCE, round_size=8, max_rounds=64))
    for void in range(370, 512):  # half a megabyte each
        window.table(History(), void, 512)
    assert 60 << 20 < sum(table.nbytes for table in window._tables.values()) <= 64 << 20


@pytest.mark.parametrize("name", [BALANCE, POS])
@pytest.mark.parametrize("decide_every", [1, 2, 3])
@pytest.mark.parametrize("void", [0, 1])
@pytest.mark.parametrize("history", [History(), History(0.5, 2.5)])
def test_survival_is_that_of_every_sequence_enumerated(name: str, decide_every: int, void: int, history: History) -> None:
    policy = preset(name, group_size=2, round_size=4, max_rounds=2, decide_every=decide_every, min_pool=2)
    table = survival_table(policy, history, void=void)
    for correct, wrong in ((0, 0), (1, 0), (0, 2), (2, 1), (1, 4)):
        for num in range(policy.cap - correct - wrong - void + 1):
            truth = brute_survival(policy, history, Counts(correct, wrong, void), num)
            assert table[correct, wrong, num] == pytest.approx(truth, abs=1e-12)


def test_survival_of_a_uniform_prior_by_hand() -> None:
    """All numbers of correct ones among j are equally likely, and 2 to j - 2 of them end the prompt: S_j = 4 / (j + 1)."""
    table = survival_table(EACH, History())
    assert table[0, 0, :12].tolist() == pytest.approx([1, 1, 1, 1, *(4 / (j + 1) for j in range(4, 12))])
    window = {s: PosteriorWindow(EACH, s)(Counts(0, 0), History(), 32) for s in (0.5, 0.4, 1.0)}
    assert window == {0.5: 8, 0.4: 10, 1.0: 4}  # 4/8 and 4/10 are the last not below


def test_a_prompt_that_keeps_failing_gets_its_whole_budget_and_an_easy_one_what_it_lacks() -> None:
    window = PosteriorWindow(EACH)
    assert window(Counts(0, 8), History(), 32) == 24
    assert window(Counts(8, 0), History(), 32) == 24
    assert window(Counts(2, 1), History(), 32) == 3  # S = 1, 3/5, 3/5 * 4/6
    assert window(Counts(2, 2), History(), 32) == 1  # at least 1, also where the answers end it
    assert window(Counts(0, 8), History(), 16) == 8  # never past the prompt's own cap


def test_a_window_of_rounds_reaches_to_decision_points() -> None:
    """Survival is constant between two decisions: all 8 of a round are needed or none, so the window is whole rounds."""
    window = PosteriorWindow(preset(BALANCE))
    assert window(Counts(0, 0), History(), 32) == 16  # S_8 = 4/9
    assert window(Counts(0, 5), History(), 32) == 27


def test_history_narrows_the_window_of_a_prompt_known_to_be_mixed() -> None:
    window = PosteriorWindow(EACH)
    assert [window(Counts(0, 0), History(a, b), 32) for a, b in ((1, 1), (16, 16), (1, 16))] == [10, 6, 32]


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_windows_are_monotone(one: float, other: float, decide_every: int) -> None:
    policy = preset(BALANCE, round_size=8, max_rounds=2, decide_every=decide_every)
    survival = survival_table(policy, History())
    assert (survival[..., 1:] <= survival[..., :-1] + 1e-12).all()
    narrow, wide = (PosteriorWindow(policy, s).table(History(), 0, policy.cap) for s in (max(one, other), min(one, other)))
    assert (narrow >= 1).all()
    assert (narrow <= wide).all()


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_a_survival_that_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"PosteriorWindow: min_survival .*; a probability above 0 is needed"):
        PosteriorWindow(EACH, value)


# -------------------- in the sampler


def issued(sampler: AdaptiveSampler, slots: int = 99) -> list[int]:
    return [request.id.index for request in sampler.next_requests(slots)]


def give(sampler: AdaptiveSampler, answers: dict[int, str]) -> list[int]:
    """Answer these requests and return the indices to abort."""
    return [i.index for index, char in answers.items() for i in sampler.receive(answer({"a": char * 99})(CompletionId(0, "a", index)))]


def test_answers_that_wait_for_an_earlier_one_count_already() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), EACH, window=PosteriorWindow(EACH))
    assert issued(sampler) == list(range(10))
    assert give(sampler, dict.fromkeys(range(1, 9), "-")) == []
    assert sampler.num_committed == 0  # nothing is committed before the first
    assert issued(sampler) == list(range(10, 32))  # and still: eight failures in eight


def test_what_the_answers_settle_is_aborted_before_the_prompt_exits() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), EACH, window=lambda counts, history, cap: 9)
    assert issued(sampler) == list(range(9))
    assert give(sampler, {7: "+", 1: "+", 2: "+", 3: "-"}) == []
    assert give(sampler, {4: "-"}) == [5, 6, 8]  # 1 to 4 hold two of each: it ends at 5, whatever 0 brings
    assert issued(sampler) == []
    assert [sampler.is_open(CompletionId(0, "a", i)) for i in (0, 4, 5)] == [True, False, False]
    assert sampler.receive(scored(CompletionId(0, "a", 6), 1.0, num_tokens=3)) == []  # answers all the same: waste
    assert give(sampler, {0: "+"}) == []
    (pool,) = sampler.result().pools
    assert (drawn(pool), pool.num_issued) == (("+++--", "satisfied"), 9)
    assert sampler.result().metrics["tokens_wasted"] == 1 + 3


def test_it_settles_at_decision_points_only() -> None:
    policy = preset(BALANCE, round_size=4, max_rounds=4)
    sampler = AdaptiveSampler(prompts_of(["a"]), policy, window=lambda counts, history, cap: 12)
    assert issued(sampler) == list(range(12))
    assert give(sampler, {1: "+", 2: "+", 3: "-"}) == []
    assert give(sampler, {4: "-"}) == [8, 9, 10, 11]  # at 4 it may go on, at 8 it ends


def test_a_rule_that_is_not_monotone_settles_nothing_it_may_take_back() -> None:
    class ExactlyOne:
        def __call__(self, counts: Counts, /) -> Verdict:
            return Verdict.STOP if counts.correct == 1 and counts.wrong else Verdict.CONTINUE

    policy = Policy("one", 1, EACH.allocate, ExactlyOne(), EACH.select, EACH.weight, decide_every=2, min_pool=0)
    sampler = AdaptiveSampler(prompts_of(["a"]), policy, window=lambda counts, history, cap: 8)
    issued(sampler)
    assert give(sampler, {1: "+", 2: "-", 3: "-"}) == []  # a correct 0 makes two
    assert give(sampler, {0: "-"}) == [4, 5, 6, 7]


def test_fixed_windows_look_at_the_committed_prefix_alone() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), EACH, window=9)
    issued(sampler)
    assert give(sampler, {1: "+", 2: "+", 3: "-", 4: "-"}) == []


class SettlingChaos(Chaos):
    """A Chaos in which a prompt may give up a part of its requests before it exits."""

    def deliver(self, event: Event) -> None:
        if self.is_foreign(event):
            self.num_foreign += 1
        elif event.id in self.running:
            self.running.remove(event.id)
        self.journal.append(event)
        to_abort = self.sampler.receive(event)
        assert set(to_abort) <= {i for i in self.running if i.prompt_id == event.id.prompt_id}
        self.running = [i for i in self.running if i not in to_abort]
        self.stray += to_abort
        assert sorted(self.sampler.outstanding) == sorted(self.running)
        assert self.sampler.num_outstanding == len(self.running)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Policy, dict[str, str]]:
    policy = preset(
        draw(st.sampled_from([BALANCE, POS])),
        group_size=draw(st.integers(1, 4)),
        round_size=draw(st.integers(2, 5)),
        max_rounds=draw(st.integers(2, 4)),
        decide_every=draw(st.integers(1, 5)),
        min_pool=draw(st.integers(0, 3)),
    )
    chars = st.text(st.sampled_from("+-v" if draw(st.booleans()) else "+-"), min_size=policy.cap, max_size=policy.cap)
    return policy, {str(i): draw(chars) for i in range(draw(st.integers(1, 4)))}


def pools_of(sampler: AdaptiveSampler) -> Sequence[tuple[str, str]]:
    return [drawn(pool) for pool in sampler.result().pools]


@given(cases(), st.sampled_from([0.05, 0.4, 1.0]), st.integers(1, 40), st.sampled_from([0.0, 0.3]), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_the_pools_are_those_of_the_sequential_sampler(case, min_survival: float, slots: int, mess: float, seed: int) -> None:
    """The pools hold for any order, loss, delay and repetition, and again from the journal at any moment."""
    policy, script = case
    rng = random.Random(seed)
    chaos = SettlingChaos(new(policy, script, min_survival), script, rng, slots=slots, mess=mess)
    chaos.run(rng.randrange(40))
    half = list(chaos.journal)
    chaos.run()
    assert pools_of(chaos.sampler) == [sequential(chars, policy) for chars in script.values()]
    resumed = new(policy, script, min_survival)
    resumed.restore(half)
    again = SettlingChaos(resumed, script, rng, slots=slots, mess=mess)
    again.run()
    assert pools_of(again.sampler) == pools_of(chaos.sampler)


def new(policy: Policy, script: dict[str, str], min_survival: float) -> AdaptiveSampler:
    return AdaptiveSampler(prompts_of(list(script)), policy, step=7, window=PosteriorWindow(policy, min_survival))


def test_a_settled_request_that_the_engine_drops_is_not_issued_again() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), EACH, window=lambda counts, history, cap: 9)
    issued(sampler)
    assert give(sampler, {1: "+", 2: "+", 3: "-", 4: "-"}) == [5, 6, 7, 8]
    assert sampler.receive(Aborted(CompletionId(0, "a", 5), 0, 7)) == []
    assert issued(sampler) == []
    give(sampler, {0: "-"})
    assert sampler.done
    assert sampler.result().metrics["tokens_wasted"] == 7 + 1  # and index 4, answered but past the end


@pytest.mark.parametrize(
    ("schedule", "given", "latency_bound", "window"),
    [
        ("rounds", None, True, None),
        ("stream", 5, True, 5),
        ("stream", 5, False, 5),
        ("stream", None, False, 8),
        ("stream", None, True, PosteriorWindow(preset("reinforce-ada-balance"))),
        ("stream", "posterior", False, PosteriorWindow(preset("reinforce-ada-balance"))),
    ],
)
def test_the_window_of_a_configuration(schedule: str, given: object, latency_bound: bool, window: object) -> None:
    settings = SimpleNamespace(schedule=schedule, window=given)
    assert window_of(settings, preset("reinforce-ada-balance"), latency_bound=latency_bound) == window


def test_a_window_past_the_cap_is_the_cap() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), EACH, window=lambda counts, history, cap: 10**12)
    assert [request.id.index for request in sampler.next_requests(99)] == list(range(32))


def test_a_window_of_nothing_is_a_window_of_one() -> None:
    script = {"a": "-" * 5 + "+" * 27, "b": "+-" * 16}
    sampler = AdaptiveSampler(prompts_of(list(script)), EACH, window=lambda counts, history, cap: 0)
    while not sampler.done:
        requests = sampler.next_requests(8)
        assert len(requests) == sampler.num_active
        for request in requests:
            sampler.receive(answer(script)(request.id))
    assert [len(pool.outcomes) for pool in sampler.result().pools] == [7, 4]


# -------------------- what is needed for certain


@pytest.mark.parametrize(
    ("policy", "counts", "window"),
    [
        (preset("grpo"), (0, 0, 0), 8),
        (preset("grpo"), (3, 1, 0), 4),
        (preset("reinforce-ada-balance"), (0, 0, 0), 8),  # it decides at 8, 16, 24 and 32
        (preset("reinforce-ada-balance"), (8, 0, 0), 8),
        (preset("reinforce-ada-exact"), (0, 0, 0), 8),  # from 8 on it decides after each one
        (preset("reinforce-ada-exact"), (8, 0, 0), 2),  # two wrong ones are missing
        (preset("reinforce-ada-exact"), (8, 1, 0), 1),
        (preset("reinforce-ada-exact"), (7, 0, 1), 2),
        (preset("reinforce-ada-exact"), (31, 0, 0), 1),  # the cap
        (preset("reinforce-ada-pos"), (0, 8, 0), 8),
        (preset("dapo", group_size=4), (0, 0, 0), 4),
    ],
)
def test_the_certain_window(policy: Policy, counts: tuple[int, int, int], window: int) -> None:
    assert CertainWindow(policy)(Counts(*counts), History(), policy.cap) == window


@settings(max_examples=100, deadline=None)
@given(
    policy=st.sampled_from([preset("reinforce-ada-balance"), preset("reinforce-ada-exact"), preset("reinforce-ada-pos", decide_every=1)]),
    correct=st.integers(0, 20),
    wrong=st.integers(0, 20),
)
def test_the_certain_window_is_the_posterior_one_that_wastes_nothing(policy: Policy, correct: int, wrong: int) -> None:
    counts = Counts(correct, wrong)
    if counts.committed < policy.cap and policy.verdict(counts) is Verdict.CONTINUE:
        assert CertainWindow(policy)(counts, History(), policy.cap) == PosteriorWindow(policy, 1.0)(counts, History(), policy.cap)
