"""Rewards: the protocol, the process pool, and the rewards that come with the package. Imports no torch."""

from __future__ import annotations

from reinforce_ada.rewards.exact import exact_match
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.latex import MathMatch
from reinforce_ada.rewards.number import number_match
from reinforce_ada.rewards.pool import RewardCounters, RewardPool
from reinforce_ada.rewards.protocol import BatchReward, Reward, RewardRunner
from reinforce_ada.rewards.reasoning_gym import ReasoningGymReward, make_entries
from reinforce_ada.rewards.weighted import WeightedSum

__all__ = [
    "BatchReward",
    "InlineRewards",
    "MathMatch",
    "ReasoningGymReward",
    "Reward",
    "RewardCounters",
    "RewardPool",
    "RewardRunner",
    "WeightedSum",
    "exact_match",
    "make_entries",
    "number_match",
]
