"""The advantages of a sampling result: over whole pools, in the order of its groups, with nothing for a group that kept nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import reinforce_ada
from reinforce_ada.advantages import advantages_of
from reinforce_ada.sampling import AdaptiveSampler, Policy, preset
from reinforce_ada.types import Completion, Failed, Prompt, SamplingResult, Scored


def sampled(policy: Policy, rewards: dict[str, list[float | None]]) -> SamplingResult:
    """A step in which the completions of each prompt get these rewards in request order, and a void for None."""
    sampler = AdaptiveSampler([Prompt(name) for name in rewards], policy)
    while not sampler.done:
        for r in sampler.next_requests(1):
            reward = rewards[r.id.prompt_id][r.id.index]
            completion = Completion(r.id, np.zeros(1, np.int32), np.zeros(1, np.float32), "", "stop", 0)
            sampler.receive(Failed(r.id, 0, "none") if reward is None else Scored(completion, reward))
    return sampler.result()


def test_the_baseline_is_the_whole_pool():
    policy = preset("reinforce-ada-balance", group_size=2, round_size=4, max_rounds=2)
    result = sampled(policy, {"even": [1, 1, 0, 0], "late": [0, 0, 0, 0, 0, 1, 0, 0]})
    assert advantages_of(result, policy) == [[0.5, -0.5], [-0.125, 0.875]]
    assert [[s.reward for s in g.kept] for g in result.groups] == [[1, 0], [0, 1]]


def test_a_group_of_voids_has_no_advantage():
    policy = preset("grpo", group_size=2, scale="none")
    result = sampled(policy, {"scored": [1, 0], "other": [1, 1]})
    assert advantages_of(result, policy) == [[0.5, -0.5], [0, 0]]
    nothing = replace(result, groups=tuple(replace(g, kept=()) for g in result.groups))
    assert advantages_of(nothing, policy) == [[], []]
    assert advantages_of(sampled(policy, {"scored": [1, 0], "void": [None, None]}), policy) == [[0.5, -0.5]]


@pytest.mark.parametrize("name", ["grpo", "reinforce-ada-pos", "reinforce-ada-exact"])
def test_large_rewards_keep_their_differences(name):
    policy = preset(name, group_size=4, positive_threshold=1e9 + 0.5)
    result = sampled(policy, {"one": [1e9, 1e9 + 1, 1e9, 1e9 + 1, *[1e9] * 28]})
    (advantages,) = reinforce_ada.advantages_of(result, policy)
    assert np.sign(advantages).tolist() == [1 if s.reward > 1e9 else -1 for s in result.groups[0].kept]
