"""Objectives: the expected gradient is that of the stated objective, exactly for small caps and by Monte Carlo at the published one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sampling_world import answer, finish, prompts_of, scored

from reinforce_ada import config as configuration
from reinforce_ada import ops
from reinforce_ada.errors import InputError
from reinforce_ada.sampling import (
    AdaptiveSampler,
    All,
    Balance,
    Balanced,
    Counts,
    DropOneClass,
    First,
    History,
    Never,
    ObjectiveWeight,
    Policy,
    Positive,
    Rounds,
    configured,
    preset,
    stopping_table,
)
from reinforce_ada.sampling.statistics import terminals_of
from reinforce_ada.training.batching import Batch, collate
from reinforce_ada.training.loss import RunLoss, inexact, loss_agg_of, num_seqs_of, samples_with_advantages
from reinforce_ada.types import CompletionId, SamplingResult

POS, BALANCE, EXACT = "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact"


def advantages(result: SamplingResult, policy: Policy) -> list[list[tuple[float, float]]]:
    """Return (reward, advantage) of each kept completion, as the trainer computes them."""
    rewards = [[s.reward for s in g.kept] for g in result.groups if g.kept]
    computed = [[s.advantage for s in group] for group in samples_with_advantages(result, policy)]
    return [list(zip(r, a, strict=True)) for r, a in zip(rewards, computed, strict=True)]


def one(policy: Policy, chars: str) -> SamplingResult:
    return finish(AdaptiveSampler(prompts_of(["p"]), policy), answer({"p": chars}))


# -------------------- the weights


def test_advantages_of_a_pool_by_hand() -> None:
    """With 12 correct and 4 wrong after two rounds, 2 and 2 kept, A+ = theta (a + b) / a, A- = -theta (a + b) / b."""
    policy = preset(BALANCE, objective="mean")
    result = one(policy, "++++++++----++++" + "v" * 16)
    theta = stopping_table(policy).at(Counts(12, 4)).reward_variance
    assert 0.1 < theta < 0.2
    assert advantages(result, policy) == [[(1.0, pytest.approx(2 * theta))] * 2 + [(0.0, pytest.approx(-2 * theta))] * 2]


@pytest.mark.parametrize(
    ("objective", "alpha", "slope"), [("mean", 1.0, lambda p: 1.0), ("log", 1.0, lambda p: 1 / p), ("power", 0.5, lambda p: 0.5 / p**0.5)]
)
def test_slopes(objective: str, alpha: float, slope: Callable[[float], float]) -> None:
    weight = ObjectiveWeight(objective, alpha)
    policy = dataclasses.replace(preset(BALANCE), weight=weight)
    t = stopping_table(policy).at(Counts(3, 13))
    result = one(policy, "-+------" + "---++---" + "v" * 16)
    (group,) = advantages(result, policy)
    assert [a for r, a in group if r] == pytest.approx([2 * slope(t.pass_rate) * t.reward_variance] * 2)
    assert weight.slope(0.0, 32) == pytest.approx(slope(1 / 32))  # clipped
    assert weight.slope(1e-9, 16) == pytest.approx(slope(1 / 16))
    assert weight.slope(1.0, 16) == pytest.approx(slope(1.0))


def test_graded_rewards_count_by_the_threshold() -> None:
    policy = preset("grpo", group_size=4, objective="mean", positive_threshold=0.5)
    rewards = [0.9, 0.1, -3.0, 0.6]
    sampler = AdaptiveSampler(prompts_of(["p"]), policy)
    (group,) = advantages(finish(sampler, lambda i: scored(i, rewards[i.index])), policy)
    theta = 2 * 2 / (4 * 3)
    assert group == [(r, pytest.approx(2 * theta if r > 0.5 else -2 * theta)) for r in rewards]


@pytest.mark.parametrize("chars", ["++++", "----", "vvv+", "vvvv"])
def test_one_class_gives_exactly_nothing(chars: str) -> None:
    policy = preset("grpo", group_size=4, objective="mean")
    assert all(a == 0 for group in advantages(one(policy, chars), policy) for _, a in group)


# -------------------- where there is no unbiased estimate


@dataclasses.dataclass(frozen=True)
class Best:
    """Keep only the best completions."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return sorted(np.argsort(-rewards, kind="stable")[:group_size].tolist())


@dataclasses.dataclass(frozen=True)
class Floored(Rounds):
    """Budgets of 1, which are announced if `floor` is 1."""

    floor: int = 1

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        return [1] * len(histories)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset(POS, objective="mean", decide_every=1, min_pool=0), r"'mean': a pool that can end after 1 draw \(1 correct, 0"),
        (lambda: preset(POS, objective="mean", decide_every=1, min_pool=1), "two draws are needed .*; min_pool 2 or decide_every 2"),
        (lambda: preset(BALANCE, objective="mean", group_size=1), "group_size 1; at least 2 is needed, to keep both classes"),
        (lambda: preset("dapo", objective="mean"), "Refill, which admits prompts because others were dropped"),
        (lambda: policy_with(decide=DropOneClass()), "DropOneClass, which drops prompts because of their outcomes"),
        (lambda: policy_with(allocate=Floored(8, 4), select=All()), "a pool that can end after 1 draw"),
        (lambda: policy_with(select=First()), r"First, which keeps one class of .*; a selection that keeps both.*; Balanced\(\)"),
        (lambda: policy_with(select=Best()), "Best, which keeps one class of"),
        (lambda: preset("grpo", objective="mean", scale="group"), "preset 'grpo': objective 'mean' with scale; the objective sets"),
        (lambda: preset(POS, objective="mean", baseline="pool", scale="none"), "with baseline and scale"),
        (lambda: preset(EXACT, objective="as-published"), "this preset is not a published one; reinforce-ada-balance is"),
        (lambda: preset(POS, alpha=2.0), "alpha 2.0 without an objective"),
        (lambda: preset(POS, objective="log", alpha=2.0), "alpha 2.0 with objective 'log'"),
        (lambda: preset(POS, objective="power", alpha=0.0), "alpha 0.0; a positive number"),
        (lambda: preset(POS, objective="men"), "unknown objective 'men'; known: log, mean, power; did you mean 'mean'?"),
    ],
)
def test_clashes_are_one_line(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_budget_that_nobody_announced() -> None:
    policy = policy_with(allocate=Floored(8, 4, floor=4))
    with pytest.raises(InputError, match="objective 'mean': a budget of 1 completion; at least 2 are needed"):
        advantages(one(policy, "+" * 32), policy)


def policy_with(**parts: object) -> Policy:
    return dataclasses.replace(preset(EXACT), **parts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: preset(POS, objective="mean"),
        lambda: preset(POS, objective="mean", decide_every=1, min_pool=2),
        lambda: preset(POS, objective="mean", decide_every=2, min_pool=0),
        lambda: preset(BALANCE, objective="mean", group_size=2, decide_every=1, min_pool=0),
        lambda: preset("grpo", objective="mean", group_size=2),
        lambda: policy_with(select=All()),
        lambda: preset("grpo", objective="power", alpha=3.0),
        lambda: preset("grpo", objective="as-published", scale="none"),
    ],
)
def test_what_goes_together(make: Callable[[], Policy]) -> None:
    assert make().group_size >= 2


def test_the_preset() -> None:
    policy = preset(EXACT)
    assert policy == dataclasses.replace(preset(BALANCE, decide_every=1, min_pool=8), name=EXACT, weight=ObjectiveWeight("mean"))
    assert (preset(EXACT, group_size=16).min_pool, preset(EXACT, round_size=4, max_rounds=8).min_pool) == (16, 4)
    assert configured(configuration.load(None, {"preset": POS, "objective": "power", "alpha": "0.5"}).sampling) == preset(
        POS, objective="power", alpha=0.5
    )
    assert configured(configuration.load().sampling) == preset(BALANCE)


# -------------------- E[g] = grad p, exactly


def factor(result: SamplingResult, policy: Policy, p: float) -> Iterator[tuple[str, float]]:
    """Return for each kept group its prompt and the factor of grad p in its expected gradient, with the fixed denominator."""
    for group, kept in zip([g for g in result.groups if g.kept], advantages(result, policy), strict=True):
        total = sum(a / p if r > policy.positive_threshold else -a / (1 - p) for r, a in kept)
        yield group.pool.prompt.prompt_id, total / policy.group_size


def rules(cap: int, **settings: object) -> list[Policy]:
    base = dataclasses.replace(preset(BALANCE, objective="mean"), allocate=Rounds(cap, 1), **settings)
    return [dataclasses.replace(base, decide=rule) for rule in (Positive(1), Positive(2), Balance(2, 2), Balance(1, 2), Never())]


SMALL = [
    *rules(8, decide_every=8, min_pool=4),
    *rules(8, decide_every=1, min_pool=2),
    *rules(7, decide_every=3, min_pool=3, group_size=3, degenerate="drop"),
    *rules(8, decide_every=2, min_pool=0, group_size=6),
    *rules(8, decide_every=1, min_pool=5, group_size=2, select=All()),
    *rules(5, decide_every=4, min_pool=4, group_size=5, select=Balanced()),
]


@pytest.mark.parametrize("void", [None, 0, 1, 4])
@pytest.mark.parametrize("policy", SMALL, ids=lambda p: f"{p.decide}-{p.cap}-{p.decide_every}-{p.min_pool}-{p.group_size}")
def test_every_outcome_string_sums_to_one(policy: Policy, void: int | None) -> None:
    """Run the real sampler and operator over all strings: the factors, weighted by their probability, add up to 1."""
    if void is not None and policy.min_pool < 2:
        policy = dataclasses.replace(policy, min_pool=2)  # a void can leave one draw at the first decision otherwise
    bits = policy.cap - (void is not None)
    strings = {
        "".join(b): "".join(b) if void is None else "".join((*b[:void], "v", *b[void:])) for b in itertools.product("+-", repeat=bits)
    }
    schedule = "rounds" if void == 1 else "stream"
    sampler = AdaptiveSampler(prompts_of(list(strings)), policy, schedule=schedule)
    result = finish(sampler, answer(strings), slots=300, rng=random.Random(2))
    p = 0.3
    expected = sum(p ** s.count("+") * (1 - p) ** s.count("-") * f for s, f in factor(result, policy, p))
    assert expected == pytest.approx(1.0, abs=2e-6)  # the advantages are float32


# -------------------- E[g] = grad p, by Monte Carlo on a softmax policy


class Softmax:
    """Six responses of different lengths, the first three correct; probabilities softmax(z), so the score of response i is e_i - pi.

    grad p = sum over correct i of pi_i (e_i - pi).
    """

    lengths = np.array([3, 7, 12, 5, 9, 16])

    def __init__(self, p: float) -> None:
        self.p = p
        self.pi = np.array([0.5, 0.3, 0.2, 0.6, 0.3, 0.1]) * np.repeat([p, 1 - p], 3)
        self.cumulative = np.cumsum(self.pi)
        self.cumulative[-1] = 1.0

    def draw(self, seed: int) -> int:
        return int(np.searchsorted(self.cumulative, random.Random(seed).random(), side="right"))

    def score(self, response: int) -> NDArray[np.float64]:
        return np.eye(6)[response] - self.pi

    @property
    def gradient(self) -> NDArray[np.float64]:
        return sum(self.pi[i] * self.score(i) for i in range(3))


RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
NUM_PROMPTS = 200  # of each rate


def gradients(policy: Policy, schedule: str, seed: int, **sampling: object) -> dict[float, NDArray[np.float64]]:
    """Return the gradient of each prompt [NUM_PROMPTS, 6]: kept scores times advantages over group_size, 0 where nothing was kept."""
    models = {p: Softmax(p) for p in RATES}
    model_of = {f"{p} {i}": models[p] for i in range(NUM_PROMPTS) for p in RATES}
    sampler = AdaptiveSampler(prompts_of(list(model_of)), policy, schedule=schedule, seed=seed, **sampling)
    drawn: dict[CompletionId, int] = {}
    rng, running = random.Random(seed), []
    while not sampler.done:
        running += sampler.next_requests(512 - len(running))
        rng.shuffle(running)
        batch, running = running[:128], running[128:]
        aborted: set[CompletionId] = set()
        for request in batch:
            model = model_of[request.prompt.prompt_id]
            drawn[request.id] = response = model.draw(request.seed)
            aborted.update(sampler.receive(scored(request.id, float(response < 3), int(model.lengths[response]))))
        running = [r for r in running if r.id not in aborted]
    result = sampler.result()
    found = {name: np.zeros(6) for name in model_of}
    groups = [g for g in result.groups if g.kept]
    for group, kept in zip(groups, samples_with_advantages(result, policy), strict=True):
        name = group.pool.prompt.prompt_id
        found[name] = sum(s.advantage * model_of[name].score(drawn[s.completion.id]) for s in kept) / policy.group_size
    return {p: np.array([found[f"{p} {i}"] for i in range(NUM_PROMPTS)]) for p in RATES}


def standard_errors(policy: Policy, p: float) -> NDArray[np.float64]:
    """Return the exact standard errors [6] of means over NUM_PROMPTS of theta * (mean score of a correct - mean score of b wrong).

    Given the pool a component is theta times a mean of a draws that hit it with its probability c within the class, so its second
    moment is theta^2 (c (1 - c) / a + c^2). Sample errors would not do: at p = .02 some components are never drawn.
    """
    second, model = np.zeros(6), Softmax(p)
    within = model.pi / np.repeat([p, 1 - p], 3)
    for t in stopping_table(policy).terminals:
        correct = np.repeat([True, False], [t.correct, t.wrong])
        kept = correct[policy.select(correct.astype(float), correct, policy.group_size)]
        if 0 < kept.sum() < len(kept):
            count = np.repeat([kept.sum(), len(kept) - kept.sum()], 3)
            moments = t.reward_variance**2 * (within * (1 - within) / count + within**2)
            second += t.num_paths * p**t.correct * (1 - p) ** t.wrong * moments
    return np.sqrt((second - model.gradient**2) / NUM_PROMPTS)


def deviations(found: dict[float, NDArray[np.float64]], policy: Policy) -> list[float]:
    """Return for each rate the largest distance of a mean gradient's component from grad p, in standard errors."""
    return [float(np.max(np.abs(g.mean(0) - Softmax(p).gradient) / standard_errors(policy, p))) for p, g in found.items()]


@pytest.mark.parametrize(
    ("name", "overrides", "schedule"),
    [
        (POS, {}, "rounds"),
        (POS, {"decide_every": 1, "min_pool": 4}, "stream"),
        (POS, {"decide_every": 1, "min_pool": 2, "max_rounds": 2}, "stream"),
        (POS, {"decide_every": 3, "min_pool": 3, "round_size": 5, "max_rounds": 5, "group_size": 3}, "stream"),
        (BALANCE, {}, "rounds"),
        (BALANCE, {"decide_every": 1, "min_pool": 4}, "stream"),
        (BALANCE, {"max_rounds": 8, "min_pool": 12, "decide_every": 4}, "stream"),
        (BALANCE, {"round_size": 4, "max_rounds": 3, "group_size": 6, "degenerate": "drop"}, "rounds"),
        (EXACT, {}, "stream"),
        ("grpo", {}, "rounds"),
    ],
)
def test_monte_carlo_gradient_is_that_of_the_pass_rate(name: str, overrides: dict, schedule: str) -> None:
    """Seven rates and six components in each case, all within 4.5 standard errors; the seed is fixed."""
    policy = preset(name, **overrides, **({} if name == EXACT else {"objective": "mean"}))
    assert max(deviations(gradients(policy, schedule, seed=11), policy)) < 4.5


@pytest.mark.parametrize(
    ("policy", "printed"),
    [
        (preset("grpo", group_size=4, scale="none"), ".75 .75 .75 .75 .75 .75 .75"),
        (preset("grpo"), "2.41 2.18 1.84 1.74 1.84 2.18 2.41"),
        (preset(POS), "5.88 2.80 1.23 .97 1.15 1.58 1.73"),
        (preset(BALANCE), "7.17 3.95 1.35 1.00 1.35 3.95 7.17"),
        (preset(BALANCE, scale="pool"), "34.0 12.6 2.92 1.98 2.92 12.6 34.0"),
    ],
    ids=["grpo-4", "grpo-8-std", "pos", "balance", "balance-std"],
)
def test_monte_carlo_weights_of_the_published_rules(policy: Policy, printed: str) -> None:
    """w(p), measured along grad p, is within 4.5 standard errors; the measure above shows that it is not grad p."""
    found = gradients(policy, "stream", seed=11)
    assert max(deviations(found, preset(EXACT))) > (3 if policy.name == "grpo" else 10)
    for (p, g), w in zip(found.items(), map(float, printed.split()), strict=True):
        along = g @ Softmax(p).gradient / (Softmax(p).gradient @ Softmax(p).gradient)
        assert abs(along.mean() - w) <= 4.5 * along.std(ddof=1) / math.sqrt(NUM_PROMPTS)


def test_plugging_in_the_pool_mean_is_not_enough() -> None:
    """k w / (N (N - 1)), unbiased for a fixed number of draws, is 20 % too large if the rule stops at the first success."""
    policy = preset(POS, objective="mean")
    table = stopping_table(policy)
    for p in (0.05, 0.1):
        plain = table.expect(lambda t: t.correct * t.wrong / (t.count * (t.count - 1)), p) / (p * (1 - p))
        assert plain > 1.15


# -------------------- rewards of any size


@pytest.mark.parametrize("base", [0.0, 1e9, -1e9, 1e12])
def test_rewards_are_centred_before_they_are_rounded(base: float) -> None:
    """base, base + 1, base + 1 under "balance": -2/3 and twice +1/3, whatever the base is."""
    policy = dataclasses.replace(preset("reinforce-ada-balance", group_size=3), positive_threshold=base + 0.5)
    sampler = AdaptiveSampler(prompts_of(["p"]), policy)
    result = finish(sampler, lambda request: scored(request, base + (request.index % 4 > 0)))
    (group,) = samples_with_advantages(result, policy)
    low, high = min(s.advantage for s in group), max(s.advantage for s in group)
    assert high - low == pytest.approx(1, abs=1e-6)
    assert low < 0 < high


# -------------------- the fixed denominator


def loss_gradient(policy: Policy, script: dict[str, str], num_minibatches: int = 1) -> NDArray[np.float64]:
    """Return d loss / d (total logprob of each prompt's completions of each class), [P, 2], through the real loss."""
    result = finish(AdaptiveSampler(prompts_of(list(script)), policy), answer(script))
    names = list(script)
    total = np.zeros((len(names), 2))
    groups = [g for g in samples_with_advantages(result, policy) if g]
    for part in np.array_split(np.arange(len(groups)), num_minibatches):
        rows = [[s] for i in part for s in groups[i]]
        batch: Batch = collate(rows, 0)
        logprobs = torch.full((batch.num_written,), -1.0, requires_grad=True)
        loss, _ = ops.policy_loss(
            logprobs, batch.advantages, batch.token_mask, cu_seqlens=batch.cu_seqlens,
            loss_agg="seq-mean-token-sum", num_seqs_global=num_seqs_of([s for row in rows for s in row], result, policy, num_minibatches),
        )  # fmt: skip
        loss.backward()
        assert logprobs.grad is not None
        for row, gradient in zip(rows, logprobs.grad.tolist(), strict=True):
            s = row[0]
            is_correct = script[s.prompt.prompt_id][s.completion.id.index] == "+"
            total[names.index(s.prompt.prompt_id), int(is_correct)] += gradient
    return total / num_minibatches


SCRIPT = {"a": "+-+-++++", "b": "--------", "c": "++++++++", "d": "--+---+-", "e": "+v-v-+--", "f": "vvvvvv-+", "g": "vvvvvvvv"}


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_keep_and_drop_give_the_same_gradient(num_minibatches: int) -> None:
    keep = preset(EXACT, max_rounds=1)
    drop = dataclasses.replace(keep, degenerate="drop")
    found = [loss_gradient(policy, SCRIPT, num_minibatches) for policy in (keep, drop)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    result = finish(AdaptiveSampler(prompts_of(list(SCRIPT)), keep), answer(SCRIPT))
    theta = [t.reward_variance for t in terminals_of(result.pools, keep)]
    # The mean over a class of a prompt counts theta, over all prompts that entered; f keeps 2 of 4 and is no exception.
    signal = [name in "adef" for name in SCRIPT]
    for row, t, has_signal in zip(found[0], theta, signal, strict=True):
        np.testing.assert_allclose(row, [t / 7, -t / 7] if has_signal else [0, 0], rtol=1e-6)


def test_published_weights_keep_their_own_count() -> None:
    policy = preset(BALANCE, max_rounds=1)
    keep, drop = (loss_gradient(dataclasses.replace(policy, degenerate=d), SCRIPT) for d in ("keep", "drop"))
    assert np.abs(keep).sum() < 0.75 * np.abs(drop).sum()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({}, ["approximate here: gradients longer than max_grad_norm 1 are cut, the longer the more (max_grad_norm 1e6)"]),
        ({"max_grad_norm": 1e6}, []),
        ({"max_grad_norm": 1e6, "preset": BALANCE, "objective": "mean"}, []),
        ({"loss_agg": "token-mean"}, ["loss_agg 'token-mean' has a denominator that depends on the outcomes", "max_grad_norm 1 "]),
        ({"loss_agg": "seq-mean-token-mean"}, ["loss_agg 'seq-mean-token-mean'"]),
        ({"loss_agg": "seq-mean-token-sum", "max_grad_norm": 1e6}, []),
        ({"loss_agg": "seq-mean-token-sum-norm", "max_grad_norm": 1e6}, []),
        (
            {"loss_agg": "seq-mean-token-sum", "minibatches": 4},
            ["the second of 4 minibatches", "no longer those that sampled"],
        ),
        ({"loss_agg": "seq-mean-token-sum", "minibatches": 4, "loss": "reinforce"}, ["the second of 4 minibatches"]),
        ({"loss_agg": "seq-mean-token-sum", "entropy_coef": 0.01}, ["entropy_coef 0.01 adds an objective of its own"]),
        ({"minibatches": 2}, ["of 2 minibatches", "max_grad_norm 1 "]),
        ({"objective": "log"}, []),
        ({"preset": BALANCE}, []),
    ],
)
def test_the_trainer_says_what_is_not_exact(overrides: dict, said: list[str]) -> None:
    config = configuration.load(None, {"preset": EXACT, **overrides})
    line = inexact(config, configured(config.sampling))
    assert bool(line) == bool(said)
    assert all(text in line for text in said)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"preset": EXACT}, "seq-mean-token-sum-norm"),
        ({"preset": BALANCE, "objective": "log"}, "seq-mean-token-sum-norm"),
        ({"preset": BALANCE}, "token-mean"),
        ({"preset": EXACT, "loss_agg": "token-mean"}, "token-mean"),
    ],
)
def test_an_objective_brings_the_aggregation_that_it_needs(overrides: dict, expected: str) -> None:
    config = configuration.load(None, overrides)
    assert loss_agg_of(config) == RunLoss.from_config(config).loss_agg == expected
