"""The memory across steps: its formula, its size, and its effect on propose and allocate over many steps."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_world import finish, scored

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import (
    AdaptiveSampler,
    History,
    InversePowerRate,
    Memory,
    NearestRate,
    Policy,
    Refill,
    SkipStreaks,
    preset,
)
from reinforce_ada.sampling.policies.contracts import Decide
from reinforce_ada.sampling.policies.decide import DropOneClass
from reinforce_ada.types import CompletionId, Pool, Prompt, SamplingResult


def remembered(memory: Memory, key: str) -> History:
    return memory.history(Prompt("?", key=key))


def test_a_posterior_fades_and_grows() -> None:
    memory = Memory(decay=0.5)
    assert remembered(memory, "a") == History(1, 1, 0, False)
    memory.add(3, "a", 4, 2)
    assert remembered(memory, "a") == History(5, 3, 0, False)
    memory.advance(4)
    assert remembered(memory, "a") == History(3, 2, 0, False)
    memory.add(5, "a", 0, 8)
    assert remembered(memory, "a") == History(2, 9.5, 1, False)
    memory.add(5, "b", 1, 0)
    assert remembered(memory, "a") == History(2, 9.5, 1, False)  # another prompt's pool is nothing to it
    assert remembered(memory, "b") == History(2, 1, 1, True)
    memory.advance(1005)
    assert remembered(memory, "a") == History(1, 1, 1, False)
    assert len(memory) == 2


def test_without_decay_every_completion_counts() -> None:
    memory = Memory(decay=1)
    for step in range(5):
        memory.add(step, "a", 1, 3)
    assert remembered(memory, "a") == History(6, 16)


@pytest.mark.parametrize(
    ("pools", "streak", "all_correct"),
    [
        ([(8, 0)], 1, True),
        ([(0, 8), (0, 8), (0, 1)], 3, False),
        ([(8, 0), (8, 0), (7, 1)], 0, False),
        ([(8, 0), (0, 8)], 1, False),  # another class is another streak
        ([(0, 8), (0, 8), (8, 0), (8, 0)], 2, True),
        ([(8, 0), (0, 0)], 1, True),  # a pool of voids says nothing
        ([(0, 0)], 0, False),
    ],
)
def test_streaks(pools: list[tuple[int, int]], streak: int, all_correct: bool) -> None:
    memory = Memory()
    for step, pool in enumerate(pools):
        memory.add(step, "a", *pool)
    assert remembered(memory, "a")[2:] == (streak, all_correct)


visits = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9)), max_size=30)


@settings(max_examples=100, deadline=None)
@given(visits, st.floats(0.5, 1))
def test_the_posterior_is_the_faded_sum(gaps: list[tuple[int, str, int, int]], decay: float) -> None:
    memory, step, seen = Memory(decay), 0, []
    for gap, key, correct, wrong in gaps:
        step += gap
        memory.add(step, key, correct, wrong)
        seen.append((step, key, correct, wrong))
    for name in "abc":
        history = remembered(memory, name)
        assert history.a == pytest.approx(1 + sum(decay ** (step - at) * correct for at, key, correct, _ in seen if key == name))
        assert history.b == pytest.approx(1 + sum(decay ** (step - at) * wrong for at, key, _, wrong in seen if key == name))


def pool(prompt: Prompt, correct: int, wrong: int) -> Pool:
    return Pool(prompt, (), correct, wrong, 0, 0.0, 0.0, 0.0, 1.0, correct + wrong, "exhausted", correct + wrong)


def test_a_prompt_is_known_by_its_key_whatever_its_id() -> None:
    memory = Memory()
    memory.update(1, [pool(Prompt("17", key="sum"), 3, 1), pool(Prompt("18"), 0, 4)])
    assert memory.history(Prompt("17@2", key="sum")) == History(4, 2)
    assert memory.history(Prompt("17", key="another question")) == History()
    assert memory.history(Prompt("18")) == History(1, 5, 1, False)
    assert memory.step == 1
    memory.update(2, [])  # a step without pools is time all the same
    assert memory.history(Prompt("18")).b == 1 + 0.99 * 4


def test_steps_come_in_order_and_decay_is_a_share() -> None:
    memory = Memory()
    memory.add(5, "a", 1, 1)
    with pytest.raises(InputError, match=r"^Memory: step 4 after step 5; steps in order are needed; build it anew from the store$"):
        memory.add(4, "a", 1, 1)
    for decay in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"^Memory: decay .*; a number in \(0, 1\] is needed$"):
            Memory(decay)


def test_a_prompt_takes_under_200_bytes() -> None:
    tracemalloc.start()
    memory, count = Memory(), 100_000
    for i in range(count):
        memory.add(i // 1000, f"{i:016x}", i % 9, 8 - i % 9)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(memory) == count
    assert size / count < 200


# -------------------- over many steps


class World:
    """Prompts with known pass rates that return every epoch; the outcome of a completion depends only on its id."""

    def __init__(self, rate_of: Mapping[str, float], policy: Policy, *, per_step: int, seed: int = 0, schedule: str = "stream") -> None:
        self.rate_of, self.policy, self.per_step, self.seed, self.schedule = rate_of, policy, per_step, seed, schedule
        self.memory = Memory()
        self.position = 0
        self.results: list[SamplingResult] = []

    def prompts(self):
        names = list(self.rate_of)
        while True:
            epoch, offset = divmod(self.position, len(names))
            self.position += 1
            yield Prompt(f"{names[offset]}@{epoch}", key=names[offset])

    def outcome(self, request_id: CompletionId):
        rate = self.rate_of[request_id.prompt_id.partition("@")[0]]
        draw = random.Random(f"{self.seed} {request_id.step} {request_id.prompt_id} {request_id.index}").random()
        return scored(request_id, float(draw < rate))

    def run(self, num_steps: int, rng: random.Random | None = None) -> list[SamplingResult]:
        for step in range(len(self.results), len(self.results) + num_steps):
            sampler = AdaptiveSampler(
                self.prompts(),
                self.policy,
                step=step,
                seed=self.seed,
                num_prompts=self.per_step,
                memory=self.memory,
                schedule=self.schedule,
            )
            self.results.append(finish(sampler, self.outcome, slots=rng.randint(1, 90) if rng else 64, rng=rng))
            self.memory.update(step, self.results[-1].pools)
        return self.results

    def mean_budget(self, key: str, results: Sequence[SamplingResult]) -> float:
        return float(np.mean([p.cap for r in results for p in r.pools if p.prompt.key == key]))


RATES = {"hopeless": 0.0, "hard": 0.05, "fair": 0.5, "easy": 0.95}


def test_est_learns_the_rates_and_moves_budgets_to_the_hard() -> None:
    world = World(RATES, preset("reinforce-ada-est", group_size=2, mean_budget=16), per_step=4)
    first, *later = world.run(41)
    assert [p.cap for p in first.pools] == [16, 16, 16, 16]
    assert all(sum(p.cap for p in r.pools) == 64 == sum(p.count for p in r.pools) for r in later)  # the whole budget, and no more
    budget = {key: world.mean_budget(key, later[-20:]) for key in RATES}
    assert budget["hopeless"] > budget["hard"] > budget["fair"] > budget["easy"] > 2
    for key, rate in RATES.items():  # some hundred completions each, the earliest faded
        assert world.memory.history(Prompt("?", key=key)).mean == pytest.approx(rate, abs=0.07)


def test_knapsack_learns_the_rates_and_moves_budgets_to_where_both_classes_are_to_be_had() -> None:
    world = World(RATES, preset("knapsack"), per_step=4)
    first, *later = world.run(41)
    assert [p.cap for p in first.pools] == [8, 8, 8, 8]
    assert all(sum(p.count for p in r.pools) == 32 for r in later)
    budget = {key: world.mean_budget(key, later[-20:]) for key in RATES}
    assert budget["hard"] > 16  # 1 in 20: what the others can spare
    assert 4 < budget["fair"] < budget["hard"]
    assert budget["easy"] < 4


def test_knapsack_finds_more_signal_at_the_same_cost() -> None:
    """Two solved prompts leave 12 of 16: P(both classes) at .05 is .34 with 8 and .64 with 20, so .33 -> .41 over the four."""
    rate_of = {"solved": 1.0, "solved too": 1.0, "hard": 0.05, "fair": 0.5}
    results = {name: World(rate_of, preset(name), per_step=4).run(150) for name in ("knapsack", "grpo")}
    cost = {name: sum(r.metrics["num_completions_issued"] for r in results[name]) for name in results}
    assert cost["knapsack"] == cost["grpo"]
    signal = {name: np.mean([r.metrics["signal_fraction"] for r in results[name][10:]]) for name in results}
    assert signal["knapsack"] > signal["grpo"] + 0.04  # standard error of the difference: .013


def chooser(propose: Refill, decide: Decide | None = None) -> Policy:
    grpo = preset("grpo", group_size=4)
    return replace(grpo, propose=propose, decide=decide or grpo.decide)


def test_prompts_near_one_half_come_more_and_more() -> None:
    rate_of = {f"{i}": i / 31 for i in range(32)}
    world = World(rate_of, chooser(NearestRate()), per_step=8)
    results = world.run(60)
    distance = [np.mean([abs(rate_of[p.prompt.key] - 0.5) for p in r.pools]) for r in results]
    assert np.mean(distance[:2]) > 0.2  # as in the population: .25
    assert np.mean(distance[-30:]) < 0.12
    assert all(r.metrics["num_prompts"] == 8 and r.metrics["num_skipped"] == 24 for r in results)


def test_prompts_without_signal_are_skipped_and_tried_again_now_and_then() -> None:
    rate_of = {f"{kind}{i}": rate for i in range(6) for kind, rate in (("never", 0.0), ("always", 1.0), ("half", 0.5))}
    results = World(rate_of, chooser(SkipStreaks(explore_easy=0.3, explore_hard=0.7)), per_step=6).run(80)
    assert all(r.metrics["num_prompts"] == 6 for r in results)
    came = [p.prompt.key.rstrip("0123456789") for r in results[20:] for p in r.pools]
    share = {kind: came.count(kind) / len(came) for kind in ("half", "never", "always")}
    assert share["half"] > 0.55  # 1/3 without skipping; every second place is left when six of twelve candidates are to be had
    assert share["half"] > share["never"] > share["always"] > 0


def test_choosing_works_with_refill_and_runs_dry_without_an_error() -> None:
    rate_of = {"never": 0.0, "always": 1.0, "half": 0.5, "half too": 0.5}
    policy = chooser(SkipStreaks(max_prompts_factor=3), DropOneClass())
    results = World(rate_of, policy, per_step=2).run(30)
    assert any(r.metrics["num_prompts"] > 2 for r in results)
    assert all(r.metrics["num_prompts"] <= 6 for r in results)
    finite = AdaptiveSampler(iter([Prompt("never@0", key="never")]), policy, step=0, num_prompts=2, memory=Memory())
    result = finish(finite, World(rate_of, policy, per_step=2).outcome)
    assert (len(result.groups), result.metrics["refill_exhausted"]) == (0, 1.0)


POLICIES: dict[str, Callable[[], Policy]] = {
    "est": lambda: preset("reinforce-ada-est"),
    "knapsack": lambda: preset("knapsack"),
    "nearest rate": lambda: chooser(NearestRate(max_prompts_factor=2), DropOneClass()),
    "streaks": lambda: chooser(SkipStreaks(max_prompts_factor=2), DropOneClass()),
    "all of it": lambda: replace(
        preset("reinforce-ada-balance"),
        propose=NearestRate(),
        allocate=InversePowerRate(mean=12, floor=4, cap=32, round_size=4),
        decide_every=4,
    ),
}


def law(results: Sequence[SamplingResult]):
    return [[(p.prompt.prompt_id, p.cap, p.num_correct, p.num_wrong, p.exit) for p in r.pools] for r in results]


@pytest.mark.parametrize("name", POLICIES)
def test_steps_with_a_memory_depend_on_seeds_alone(name: str) -> None:
    rate_of = {f"{i}": i / 11 for i in range(12)}
    expected = law(World(rate_of, POLICIES[name](), per_step=4, seed=3).run(12))
    for seed, schedule in ((0, "stream"), (1, "stream"), (2, "rounds")):
        again = World(rate_of, POLICIES[name](), per_step=4, seed=3, schedule=schedule).run(12, random.Random(seed))
        assert law(again) == expected
    assert law(World(rate_of, POLICIES[name](), per_step=4, seed=4).run(12)) != expected
