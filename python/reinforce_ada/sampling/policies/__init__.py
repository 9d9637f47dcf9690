"""A policy is five small pure functions: propose, allocate, decide, select, weight.

Any frozen callable with the right signature (see contracts) is a policy part.
"""

from __future__ import annotations

from reinforce_ada.sampling.policies.allocate import Rounds
from reinforce_ada.sampling.policies.contracts import (
    AdvantageSpec,
    Allocate,
    Baseline,
    Counts,
    Decide,
    Degenerate,
    History,
    Propose,
    Remembers,
    Scale,
    Select,
    Verdict,
    Weight,
    Window,
    at_least,
)
from reinforce_ada.sampling.policies.decide import Balance, DropOneClass, Never, Positive
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.policies.propose import AllPrompts, Refill
from reinforce_ada.sampling.policies.select import All, Balanced, First
from reinforce_ada.sampling.policies.weight import Centered

__all__ = [
    "AdvantageSpec",
    "All",
    "AllPrompts",
    "Allocate",
    "Balance",
    "Balanced",
    "Baseline",
    "Centered",
    "Counts",
    "Decide",
    "Degenerate",
    "DropOneClass",
    "First",
    "History",
    "Never",
    "Policy",
    "Positive",
    "Propose",
    "Refill",
    "Remembers",
    "Rounds",
    "Scale",
    "Select",
    "Verdict",
    "Weight",
    "Window",
    "at_least",
]
