"""Rewards: the protocol, the process pool, and the rewards that come with the package. Imports no torch."""

from __future__ import annotations

from reinforce_ada.rewards.choice import choice_match
from reinforce_ada.rewards.exact import exact_match
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.json_value import json_match
from reinforce_ada.rewards.latex import MathMatch
from reinforce_ada.rewards.number import number_match
from reinforce_ada.rewards.overlong import OverlongPenalty
from reinforce_ada.rewards.pool import RewardCounters, RewardPool
from reinforce_ada.rewards.protocol import Reward, RewardRunner
from reinforce_ada.rewards.reasoning_gym import ReasoningGymReward, make_entries
from reinforce_ada.rewards.unit_tests import UnitTests
from reinforce_ada.rewards.weighted import WeightedSum

__all__ = [
    "InlineRewards",
    "MathMatch",
    "OverlongPenalty",
    "ReasoningGymReward",
    "Reward",
    "RewardCounters",
    "RewardPool",
    "RewardRunner",
    "UnitTests",
    "WeightedSum",
    "choice_match",
    "exact_match",
    "json_match",
    "make_entries",
    "number_match",
]
