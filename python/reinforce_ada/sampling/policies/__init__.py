"""A policy is five small pure functions: propose, allocate, decide, select, weight.

Any hashable callable with the right signature (see `contracts`) can be a part of a policy.
"""

from __future__ import annotations

from reinforce_ada.sampling.policies.allocate import BatchBudget, Budgeted, InverseSqrtRate, Knapsack, Rounds
from reinforce_ada.sampling.policies.contracts import (
    AdvantageSpec,
    Allocate,
    Allocation,
    Baseline,
    Counts,
    Decide,
    Degenerate,
    ExitRule,
    History,
    Propose,
    Remembers,
    Scale,
    Select,
    Verdict,
    Weight,
    Weighting,
    Window,
    at_least,
    promises_of,
)
from reinforce_ada.sampling.policies.decide import Balance, Band, DropOneClass, Never, Positive
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.policies.propose import AllPrompts, NearestRate, Refill, SkipStreaks
from reinforce_ada.sampling.policies.select import All, Balanced, First, MaxVariance
from reinforce_ada.sampling.policies.weight import Centered

__all__ = [
    "AdvantageSpec",
    "All",
    "AllPrompts",
    "Allocate",
    "Allocation",
    "Balance",
    "Balanced",
    "Band",
    "Baseline",
    "BatchBudget",
    "Budgeted",
    "Centered",
    "Counts",
    "Decide",
    "Degenerate",
    "DropOneClass",
    "ExitRule",
    "First",
    "History",
    "InverseSqrtRate",
    "Knapsack",
    "MaxVariance",
    "NearestRate",
    "Never",
    "Policy",
    "Positive",
    "Propose",
    "Refill",
    "Remembers",
    "Rounds",
    "Scale",
    "Select",
    "SkipStreaks",
    "Verdict",
    "Weight",
    "Weighting",
    "Window",
    "at_least",
    "promises_of",
]
