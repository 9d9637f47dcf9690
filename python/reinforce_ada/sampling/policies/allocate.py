"""How many requests a prompt gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reinforce_ada.sampling.policies.contracts import Counts, History, at_least


@dataclass(frozen=True)
class Rounds:
    """`max_rounds` rounds of `round_size` requests; the cap is their product. GRPO is `Rounds(group_size, 1)`."""

    round_size: int
    max_rounds: int

    def __post_init__(self) -> None:
        at_least("Rounds", "round_size", self.round_size, 1)
        at_least("Rounds", "max_rounds", self.max_rounds, 1)

    @property
    def cap(self) -> int:
        return self.round_size * self.max_rounds

    def __call__(self, counts: Counts, /) -> int:
        return min((counts.committed // self.round_size + 1) * self.round_size, self.cap)

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        return [self.cap] * len(histories)
