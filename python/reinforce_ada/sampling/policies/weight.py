"""The weight hook: the advantage of each kept completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.sampling.policies.contracts import AdvantageSpec, Baseline, Scale, Weighting
from reinforce_ada.types import Group

if TYPE_CHECKING:
    from reinforce_ada.sampling.policies.policy import Policy


@dataclass(frozen=True)
class Centered(Weighting):
    """Set advantage = (reward - baseline) / (std + eps) * class weight, by the same rule for every group.

    `class_weights` are the factors for advantages below 0 (the wrong ones, for rewards of 0 and 1) and for the others.
    """

    baseline: Baseline = "pool"
    scale: Scale = "none"
    ddof: int = 1
    eps: float = 1e-6
    class_weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, known in (("baseline", get_args(Baseline)), ("scale", get_args(Scale))):
            if getattr(self, name) not in known:
                raise unknown_name("Centered", name, getattr(self, name), known)
        weights = self.class_weights
        if weights is not None and not (len(weights) == 2 and all(0 <= w < math.inf for w in weights)):
            raise InputError("Centered", f"class_weights {weights}", "two finite numbers of at least 0 are needed: wrong, correct")

    def __call__(self, groups: Sequence[Group], policy: Policy, /) -> AdvantageSpec:
        weights = None if self.class_weights is None else np.tile(np.array(self.class_weights, dtype=np.float64), (len(groups), 1))
        return AdvantageSpec(self.baseline, self.scale, self.ddof, self.eps, weights)
