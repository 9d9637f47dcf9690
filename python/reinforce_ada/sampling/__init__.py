"""Adaptive sampling: policies, the sampler and its exact statistics. Pure Python and numpy; no torch, no engine."""

from __future__ import annotations

from reinforce_ada.sampling.memory import Memory
from reinforce_ada.sampling.metrics import Progress
from reinforce_ada.sampling.policies.allocate import Budgeted, InversePowerRate, Knapsack, Rounds
from reinforce_ada.sampling.policies.contracts import AdvantageSpec, Allocation, Counts, ExitRule, History, Verdict, Weighting
from reinforce_ada.sampling.policies.decide import Balance, Band, DropOneClass, Never, Positive
from reinforce_ada.sampling.policies.objective_weight import ObjectiveWeight
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.policies.posterior_mean import PosteriorMean
from reinforce_ada.sampling.policies.propose import AllPrompts, NearestRate, Refill, SkipStreaks
from reinforce_ada.sampling.policies.select import All, Balanced, First, MaxVariance
from reinforce_ada.sampling.policies.weight import Centered
from reinforce_ada.sampling.presets import PRESETS, configured, preset, sized_preset
from reinforce_ada.sampling.sampler import AdaptiveSampler, request_seed
from reinforce_ada.sampling.statistics import StoppingTable, stopping_table
from reinforce_ada.sampling.windows import CertainWindow, PosteriorWindow

__all__ = [
    "PRESETS",
    "AdaptiveSampler",
    "AdvantageSpec",
    "All",
    "AllPrompts",
    "Allocation",
    "Balance",
    "Balanced",
    "Band",
    "Budgeted",
    "Centered",
    "CertainWindow",
    "Counts",
    "DropOneClass",
    "ExitRule",
    "First",
    "History",
    "InversePowerRate",
    "Knapsack",
    "MaxVariance",
    "Memory",
    "NearestRate",
    "Never",
    "ObjectiveWeight",
    "Policy",
    "Positive",
    "PosteriorMean",
    "PosteriorWindow",
    "Progress",
    "Refill",
    "Rounds",
    "SkipStreaks",
    "StoppingTable",
    "Verdict",
    "Weighting",
    "configured",
    "preset",
    "request_seed",
    "sized_preset",
    "stopping_table",
]
