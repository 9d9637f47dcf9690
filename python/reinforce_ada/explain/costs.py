"""What policies are ranked by."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Annotated

from reinforce_ada.config.values import Range, option

_Cost = Annotated[float, Range(0, 10**6)]


@dataclass(frozen=True)
class Costs:
    """What efficiencies depend on besides the policy and the pass rates."""

    # Cost of training on a completion / cost of generating one.
    cost_ratio: _Cost = option(
        MISSING, "rank policies by progress for their cost, if training on a completion costs X times its generation"
    )
    # For baseline "memory". The numbers of a group of 1 take 1 ms for each.
    remembered: Annotated[int, Range(0, 256)] = option(8, "of a ranking: earlier completions of each prompt in the memory")
    # In units of |grad p|^2 / (p (1 - p))^2.
    score_variance: _Cost = option(1.0, "of a ranking: variance of the scores of completions within a class")
