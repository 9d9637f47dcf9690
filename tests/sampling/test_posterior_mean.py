"""The baseline that remembers: its values, that no memory biases it, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from reinforce_ada import advantages_of
from reinforce_ada.advantages import advantages_before_prediction
from reinforce_ada.errors import InputError
from reinforce_ada.explain.effective import effective_weight
from reinforce_ada.explain.page import explain
from reinforce_ada.sampling import (
    AdaptiveSampler,
    Balance,
    Balanced,
    Memory,
    NearestRate,
    PosteriorMean,
    Rounds,
    configured,
    preset,
)
from reinforce_ada.types import Completion, Failed, Prompt, SamplingResult, Scored

MEMORY = "reinforce-ada-memory"


def remembering(correct: int, wrong: int) -> Memory:
    memory = Memory(decay=1.0)
    memory.add(0, "p", correct, wrong)
    return memory


def sampled(rewards: list[float | None], memory: Memory, **overrides: object) -> tuple[SamplingResult, list[float]]:
    """The result of a step on one prompt with these rewards (None: a void), and the advantages of its scored completions."""
    policy = preset(MEMORY, group_size=len(rewards), **overrides)
    sampler = AdaptiveSampler([Prompt("p")], policy, step=1, memory=memory)
    while not sampler.done:
        for request in sampler.next_requests(16):
            reward = rewards[request.id.index]
            if reward is None:
                sampler.receive(Failed(request.id, 0, "a void"))
            else:
                tokens = np.array([1], dtype=np.int32)
                sampler.receive(Scored(Completion(request.id, tokens, np.zeros(1, np.float32), "", "stop", 0), reward))
    result = sampler.result()
    return result, [a for row in advantages_of(result, policy) for a in row]


@pytest.mark.parametrize(
    ("rewards", "before", "advantages"),
    [
        ([1.0], (0, 0), [1 / 2]),  # nothing remembered: the prior's mean
        ([0.0], (0, 0), [-1 / 2]),
        ([1.0], (6, 2), [1 - 7 / 10]),
        ([0.0], (6, 2), [-7 / 10]),
        ([1.0, 0.0], (0, 0), [1 - 1 / 3, -2 / 3]),  # Beta(1, 1) and the other one, which is wrong, or correct
        ([1.0, 1.0], (6, 2), [1 - 8 / 11] * 2),
        ([1.0, 0.0, 0.0, 0.0], (0, 4), [1 - 1 / 9, -2 / 9, -2 / 9, -2 / 9]),
        ([0.9, 0.2], (0, 0), [1 - 1 / 3, -2 / 3]),  # rewards count as 0 or 1 by the threshold
        ([1.0, None], (0, 0), [2 * (1 - 1 / 2)]),  # one scored of two: doubled, since the trainer divides by two
        ([None, None], (6, 2), []),
    ],
)
def test_advantages(rewards: list[float | None], before: tuple[int, int], advantages: list[float]) -> None:
    result, found = sampled(rewards, remembering(*before))
    assert found == pytest.approx(advantages, abs=1e-12)
    assert result.pools[0].prior == (1 + before[0], 1 + before[1])


def test_a_prompt_never_seen_has_the_prior_and_others_forget() -> None:
    memory = Memory(decay=0.5)
    memory.add(0, "other", 4, 0)
    memory.add(1, "p", 4, 0)
    memory.advance(3)
    result, found = sampled([1.0], memory)
    assert result.pools[0].prior == (2.0, 1.0)  # 4 * .5^2 are left
    assert found == pytest.approx([1 - 2 / 3])
    assert sampled([1.0], Memory())[1] == pytest.approx([1 / 2])


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("before", [(0, 0), (9, 1), (1, 30)])
@pytest.mark.parametrize("void", [False, True])
def test_no_memory_biases_the_gradient(n: int, before: tuple[int, int], void: bool) -> None:
    """E[g] = grad p by enumeration of all outcomes: scores grad p / p and -grad p / (1 - p), sum over the group divided by group_size."""
    for p in (0.05, 0.5, 0.8):
        total = 0.0
        for outcomes in product((1.0, 0.0), repeat=n):
            rewards = [*outcomes, None] if void else list(outcomes)
            _, advantages = sampled(rewards, remembering(*before))
            scores = [1 / p if r else -1 / (1 - p) for r in outcomes]
            chance = math.prod(p if r else 1 - p for r in outcomes)
            total += chance * sum(a * s for a, s in zip(advantages, scores, strict=True)) / len(rewards)
        assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("prior", [(1.0, 1.0), (3.0, 0.5)])
def test_the_effective_weight_is_one(n: int, prior: tuple[float, float]) -> None:
    weight = effective_weight(preset(MEMORY, group_size=n), prior=prior)
    rates = np.array([0.0, 0.02, 0.3, 0.5, 0.98, 1.0])
    np.testing.assert_allclose(weight(rates), 1.0, rtol=0, atol=1e-12)


def test_the_baseline_of_the_command_line_is_the_preset() -> None:
    class Settings:
        preset, group_size, baseline, scale = "grpo", 2, "memory", "none"

    policy = configured(Settings)
    assert policy.weight == preset(MEMORY).weight == PosteriorMean()
    assert policy.needs_memory
    assert policy.objective == "mean"
    assert preset(MEMORY).group_size == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: preset("grpo", baseline="memory"), "baseline 'memory' with scale 'group'; scale \"none\" is needed"),
        (lambda: preset("reinforce-ada-balance", baseline="memory"), "Balance, which stops because of outcomes"),
        (lambda: preset("dapo", baseline="memory", scale="none"), "DropOneClass, which stops because of outcomes"),
        (lambda: preset("pods", baseline="memory", scale="none"), "64 completions a prompt, of which 16 are kept"),
        (lambda: preset(MEMORY, degenerate="drop"), 'degenerate "drop", which leaves out pools'),
        (lambda: replace(preset(MEMORY), decide=Balance(1, 0)), "Balance, which stops because of outcomes"),
        (lambda: replace(preset(MEMORY), allocate=Rounds(4, 1), decide_every=4), "4 completions a prompt, of which 1 are kept"),
        (lambda: replace(preset(MEMORY, group_size=4), select=lambda rewards, correct, n: [0]), "which leaves completions out"),
        (lambda: AdaptiveSampler([Prompt("p")], preset(MEMORY)), "without memory"),
        (lambda: preset(MEMORY, scale="pool"), "baseline 'memory' with scale 'pool'; scale \"none\" is needed"),
        (lambda: preset("grpo", baseline="predicted"), "baseline 'predicted' with scale 'group'; scale \"none\" is needed"),
        (lambda: preset("pods", baseline="predicted", scale="none"), "baseline 'predicted': 64 completions a prompt"),
    ],
)
def test_refusals(make: object, says: str) -> None:
    with pytest.raises(InputError) as error:
        make()  # type: ignore[operator]
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_keeps_all_of_a_fixed_number_is_accepted() -> None:
    policy = replace(preset(MEMORY, group_size=4), select=Balanced(), propose=NearestRate())
    assert policy.needs_memory


# -------------------- with a predicted prior


def completed(rewards: list[float | None], memory: Memory, rate: float) -> list[float]:
    """The advantages of a step on one prompt whose predicted pass rate is `rate`."""
    result, _ = sampled(rewards, memory)
    (advantages,), (weight,) = advantages_before_prediction(result, preset(MEMORY, group_size=len(rewards), baseline="predicted"))
    return [a - weight * rate for a in advantages]


@pytest.mark.parametrize(
    ("rewards", "before", "rate", "advantages"),
    [
        ([1.0], (0, 0), 0.9, [0.1]),  # a single completion of a prompt never seen: the prediction alone
        ([0.0], (0, 0), 0.9, [-0.9]),
        ([1.0], (6, 2), 0.9, [1 - 7.8 / 10]),  # it counts as much as two completions
        ([1.0, 0.0], (0, 0), 0.9, [1 - 1.8 / 3, -2.8 / 3]),
        ([1.0, None], (0, 0), 0.25, [2 * 0.75]),
    ],
)
def test_advantages_with_a_prediction(rewards: list[float | None], before: tuple[int, int], rate: float, advantages: list[float]) -> None:
    assert completed(rewards, remembering(*before), rate) == pytest.approx(advantages, abs=1e-12)


@pytest.mark.parametrize("before", [(0, 0), (9, 1), (1, 30)])
@pytest.mark.parametrize("rewards", [[1.0], [0.0], [1.0, 0.0, 0.0], [1.0, None]])
def test_a_prediction_of_one_half_is_the_memory(rewards: list[float | None], before: tuple[int, int]) -> None:
    assert completed(rewards, remembering(*before), 0.5) == pytest.approx(sampled(rewards, remembering(*before))[1], abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("before", [(0, 0), (9, 1)])
@pytest.mark.parametrize("void", [False, True])
def test_no_prediction_biases_the_gradient(n: int, rate: float, before: tuple[int, int], void: bool) -> None:
    """E[g] = grad p by enumeration of all outcomes, whatever is predicted."""
    for p in (0.05, 0.8):
        total = 0.0
        for outcomes in product((1.0, 0.0), repeat=n):
            rewards = [*outcomes, None] if void else list(outcomes)
            scores = [1 / p if r else -1 / (1 - p) for r in outcomes]
            chance = math.prod(p if r else 1 - p for r in outcomes)
            advantages = completed(rewards, remembering(*before), rate)
            total += chance * sum(a * s for a, s in zip(advantages, scores, strict=True)) / len(rewards)
        assert total == pytest.approx(1.0, abs=1e-12)


def test_without_the_prediction_there_are_no_advantages() -> None:
    result, _ = sampled([1.0], Memory())
    policy = preset(MEMORY, baseline="predicted")
    assert policy.needs_prediction
    assert not preset(MEMORY).needs_prediction
    with pytest.raises(InputError, match="whose baseline is predicted; a trainer that predicts pass rates"):
        advantages_of(result, policy)


@pytest.mark.parametrize("n", [1, 3])
def test_it_is_explained_as_what_knows_nothing(n: int) -> None:
    predicted, memory = (effective_weight(preset(MEMORY, group_size=n, baseline=name)) for name in ("predicted", "memory"))
    np.testing.assert_allclose(predicted.plus, memory.plus, rtol=0, atol=1e-15)
    np.testing.assert_allclose(predicted.minus, memory.minus, rtol=0, atol=1e-15)
    np.testing.assert_allclose(predicted.noise_terms, memory.noise_terms, rtol=0, atol=1e-15)
    notes = [explain(preset(MEMORY, group_size=n, baseline=name)).notes for name in ("predicted", "memory")]
    assert [note for note in notes[0] if note not in notes[1]] == [
        "a predicted pass rate counts as 1/2 in these numbers, as if nothing were known: they are those of baseline memory"
    ]
