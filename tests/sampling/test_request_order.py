"""Completions are committed in request order: the gradient has no bias when wrong answers take longer."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from sampling_world import prompts_of, scored

from reinforce_ada.sampling import (
    AdaptiveSampler,
    Counts,
    preset,
    stopping_table,
)
from reinforce_ada.sampling.statistics import terminals_of
from reinforce_ada.types import CompletionId

POS, BALANCE, EXACT = "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact"


# -------------------- request order


class Timed:
    """p = 1/2, four responses: correct ones of 100 and 300 tokens, wrong ones e times longer; a token takes one unit of time."""

    pi = np.full(4, 0.25)
    lengths = np.array([100.0, 300.0, 100 * math.e, 300 * math.e])
    gradient = np.array([0.125, 0.125, -0.125, -0.125])

    def draw(self, seed: int) -> int:
        return random.Random(seed).randrange(4)


def mean_gradient(theta: NDArray[np.float64], kept: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Return the mean over prompts of theta * (mean score of the kept correct - mean score of the kept wrong)."""
    total = np.zeros(4)
    for t, responses in zip(theta, kept, strict=True):
        right, wrong = ([r for r in responses if (r < 2) == is_right] for is_right in (True, False))
        if right and wrong:
            total += t * (np.eye(4)[right].mean(0) - np.eye(4)[wrong].mean(0))
    return total / len(kept)


def cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def lengths_by_class(pools: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the mean committed lengths of correct and of wrong completions, in units of their true means."""
    responses = np.concatenate([np.array(pool, dtype=int) for pool in pools])
    lengths = Timed.lengths[responses]
    return float(lengths[responses < 2].mean() / 200), float(lengths[responses >= 2].mean() / (200 * math.e))


NUM_TIMED, WINDOW = 12_000, 8
TIMED = preset(EXACT, min_pool=4)


def test_request_order_has_no_bias_when_wrong_answers_take_longer() -> None:
    model, policy = Timed(), TIMED
    sampler = AdaptiveSampler(prompts_of([f"{i}" for i in range(NUM_TIMED)]), policy, window=WINDOW, seed=5)
    drawn: dict[CompletionId, int] = {}
    finishing: list[tuple[float, CompletionId]] = []
    aborted: set[CompletionId] = set()
    now = 0.0
    while not sampler.done:
        for request in sampler.next_requests(4096 - len(finishing)):
            drawn[request.id] = response = model.draw(request.seed)
            heapq.heappush(finishing, (now + model.lengths[response], request.id))
        now, request_id = heapq.heappop(finishing)
        if request_id not in aborted:
            aborted.update(sampler.receive(scored(request_id, float(drawn[request_id] < 2))))
    result = sampler.result()
    pools = [[drawn[o.id] for o in pool.outcomes] for pool in result.pools]
    theta = np.array([t.reward_variance for t in terminals_of(result.pools, policy)])
    kept = [[drawn[s.id] for s in group.kept] for group in result.groups]
    assert lengths_by_class(pools) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))
    assert cosine(mean_gradient(theta, kept), model.gradient) >= 0.9999
    assert result.metrics["pass_rate"] == pytest.approx(0.5, abs=0.01)


def test_completion_order_would_be_biased() -> None:
    """Consume the same law of timing in completion order: a slot starts the next draw at once, and the rule sees answers as they finish."""
    rng, policy = random.Random(5), TIMED
    pools, theta, kept = [], [], []
    for _ in range(NUM_TIMED // 4):
        slots: list[tuple[float, int, int]] = []
        pool: list[int] = []
        counts, now, started = Counts(0, 0), 0.0, 0
        while counts.committed < policy.cap and policy.verdict(counts).name == "CONTINUE":
            while len(slots) < WINDOW and started < policy.cap:
                response = rng.randrange(4)
                heapq.heappush(slots, (now + Timed.lengths[response], started, response))
                started += 1
            now, _, response = heapq.heappop(slots)
            pool.append(response)
            counts = Counts(counts.correct + (response < 2), counts.wrong + (response >= 2))
        correct = np.array([r < 2 for r in pool])
        kept.append([pool[i] for i in policy.select(correct.astype(float), correct, policy.group_size)])
        theta.append(stopping_table(policy).at(counts).reward_variance)
        pools.append(pool)
    assert lengths_by_class(pools)[1] < 0.85  # wrong ones: the short ones come first
    assert np.mean([np.mean(np.array(pool) < 2) for pool in pools]) > 0.55
    assert cosine(mean_gradient(np.array(theta), kept), Timed.gradient) < 0.99
