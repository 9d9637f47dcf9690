"""The advantage of each kept completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reinforce_ada.errors import unknown_name
from reinforce_ada.sampling.policies.contracts import AdvantageSpec, Baseline, Scale
from reinforce_ada.types import Group

if TYPE_CHECKING:
    from reinforce_ada.sampling.policies.policy import Policy


@dataclass(frozen=True)
class Centered:
    """advantage = (reward - baseline) / (std + eps), the same rule for every group."""

    baseline: Baseline = "pool"
    scale: Scale = "none"
    ddof: int = 1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.baseline not in ("pool", "group", "leave-one-out"):
            raise unknown_name("Centered", "baseline", self.baseline, ("pool", "group", "leave-one-out"))
        if self.scale not in ("none", "pool", "group", "batch"):
            raise unknown_name("Centered", "scale", self.scale, ("none", "pool", "group", "batch"))

    def __call__(self, groups: Sequence[Group], policy: Policy, /) -> AdvantageSpec:
        return AdvantageSpec(self.baseline, self.scale, self.ddof, self.eps)
