"""`group_advantages` is what trainers compute, by `CONVENTIONS`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from group_advantages_truth import every_build, pool_of

from reinforce_ada.ops import group_advantages
from reinforce_ada.ops.group_advantages import CONVENTIONS, conventions
from reinforce_ada.ops.group_advantages.conventions import binary_pool

# What trainers do. Groups 1 0 0 0 (mean .25, std 1/2, biased sqrt(3)/4), 2 4 (mean 3, std sqrt(2), biased 1), 5 alone, .5 .5

REWARDS = [1.0, 0, 0, 0, 2, 4, 5, 0.5, 0.5]
GROUPS = [0, 0, 0, 0, 1, 1, 2, 3, 3]
ROOT_2, ROOT_3 = math.sqrt(2), math.sqrt(3)
BATCH_STD = math.sqrt((46.5 - 13**2 / 9) / 8)  # of all nine: sum 13, sum of squares 46.5


def over(std: tuple[float, float], eps: float, alone: float) -> list[float]:
    return [0.75 / (std[0] + eps), *[-0.25 / (std[0] + eps)] * 3, -1 / (std[1] + eps), 1 / (std[1] + eps), alone, 0, 0]


EXPECTED = {
    "verl-grpo": over((0.5, ROOT_2), 1e-6, 5),
    "verl-dr-grpo": over((1, 1), 0, 5),
    "verl-rloo": [1, -1 / 3, -1 / 3, -1 / 3, -2, 2, 5, 0, 0],
    "verl-rloo-vectorized": [1, -1 / 3, -1 / 3, -1 / 3, -2, 2, 0, 0, 0],
    "trl-group": over((0.5, ROOT_2), 1e-4, 0),
    "trl-batch": over((BATCH_STD, BATCH_STD), 1e-4, 0),
    "trl-none": over((1, 1), 0, 0),
    "trl-rloo": [1, -1 / 3, -1 / 3, -1 / 3, -2, 2, 0, 0, 0],
    "trl-async": over((ROOT_3 / 4, 1), 1e-8, 0),
    "openrlhf-group-norm": over((0.5, ROOT_2), 1e-9, 0),
    "openrlhf-dr-grpo": over((1, 1), 0, 0),
    "openrlhf-rloo": [1, -1 / 3, -1 / 3, -1 / 3, -2, 2, 0, 0, 0],
    "skyrl-grpo": over((0.5, ROOT_2), 1e-6, 5),
    "skyrl-rloo": [1, -1 / 3, -1 / 3, -1 / 3, -2, 2, 0, 0, 0],
    "slime": over((0.5, ROOT_2), 1e-6, 0),
    "prime-rl": over((1, 1), 0, 0),
    "reinforce-ada": over((1, 1), 0, 5),  # without a pool of its own a group is its pool
    "reinforce-ada-std": over((0.5, ROOT_2), 1e-6, 5),
}


@every_build
@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_of_trainers(backend: str, name: str) -> None:
    order = torch.tensor([8, 1, 4, 6, 0, 2, 5, 3, 7])
    rewards, groups, expected = torch.tensor(REWARDS), torch.tensor(GROUPS), np.asarray(EXPECTED[name])
    got = group_advantages(rewards, groups, **CONVENTIONS[name], backend=backend)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-7, err_msg=name)
    got = group_advantages(rewards[order], groups[order], **CONVENTIONS[name], backend=backend)
    np.testing.assert_allclose(got.numpy(), expected[order], rtol=2e-7, err_msg=name)
    got = group_advantages(rewards, cu_seqlens=torch.tensor([0, 4, 6, 7, 9]), **CONVENTIONS[name], backend=backend)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-7, err_msg=name)


def test_every_convention_is_described_and_expected() -> None:
    described = [line.split("|")[1].strip() for line in str(conventions.__doc__).splitlines() if line.startswith("| ")][1:]
    assert described == list(CONVENTIONS) == list(EXPECTED)


@every_build
def test_the_official_pool_of_zeros_and_ones(backend: str) -> None:
    """2 of 8 correct: mean 1/4, std sqrt(1.5 / 7). 1 of 2: mean 1/2, std sqrt(1/2), whatever the rewards are. One in all: the reward.

    All correct: official (R - 1) / 2e-6; here 0, since the pool has no signal.
    """
    rewards, groups = torch.tensor([1.0, 0, 2, 4, 5, 0.5]), torch.tensor([0, 0, 1, 1, 2, 3])
    pool = binary_pool([2, 1, 1, 3], [6, 1, 0, 0])
    got = group_advantages(rewards, groups, pool=pool, **CONVENTIONS["reinforce-ada"], backend=backend)
    assert got.tolist() == [0.75, -0.25, 1.5, 3.5, 5, 0]
    got = group_advantages(rewards, groups, pool=pool, **CONVENTIONS["reinforce-ada-std"], backend=backend)
    a, b = math.sqrt(1.5 / 7) + 1e-6, math.sqrt(0.5) + 1e-6
    np.testing.assert_allclose(got.numpy(), [0.75 / a, -0.25 / a, 1.5 / b, 3.5 / b, 5, 0], rtol=2e-7)


def test_binary_pool() -> None:
    pool = binary_pool([2, 0, 3, 0], [6, 4, 0, 0])
    assert [x.tolist() for x in pool] == [[8, 4, 3, 0], [0.25, 0, 1, 0], [1.5, 0, 0, 0], [0, 0, 1, math.inf], [1, 0, 1, -math.inf]]


@every_build
def test_a_singleton_that_keeps_its_reward(backend: str) -> None:
    """Its baseline is 0; a scale over more than it still divides, and so do class weights multiply."""
    rewards, groups = torch.tensor([3.0, 1, 5]), torch.tensor([0, 1, 1])
    keep: dict[str, Any] = {"singleton": "reward", "eps": 0.0, "backend": backend}
    assert group_advantages(rewards, groups, **keep).tolist() == [3, -2, 2]
    assert group_advantages(rewards, groups, scale="batch", **keep).tolist() == [1.5, -1, 1]
    weights = torch.tensor([[1.0, 10], [1, 1]])
    assert group_advantages(rewards, groups, class_weights=weights, **keep).tolist() == [30, -2, 2]
    pool = pool_of([3.0, 1], [5.0])
    assert group_advantages(rewards, groups, pool=pool, **keep).tolist() == [1, 1, 5]
    assert group_advantages(rewards, groups, pool=pool, baseline="group", **keep).tolist() == [3, -2, 2]
    assert group_advantages(rewards, groups, baseline=torch.tensor([1.0, 1]), **keep).tolist() == [2, 0, 4]
