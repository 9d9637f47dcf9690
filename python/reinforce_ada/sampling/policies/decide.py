"""The decide hook: exit rules, which say when a prompt has what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import Counts, Decide, ExitRule, Verdict, at_least, promises_of


@dataclass(frozen=True)
class Never(ExitRule):
    """Sample up to the cap, whatever the outcomes."""

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.CONTINUE


@dataclass(frozen=True)
class Positive(ExitRule):
    """Stop at `num_correct` correct completions (Reinforce-Ada-pos)."""

    num_correct: int = 1

    def __post_init__(self) -> None:
        at_least(1, "Positive", num_correct=self.num_correct)

    @property
    def needs(self) -> tuple[int, int]:
        return self.num_correct, 0

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.STOP if counts.correct >= self.num_correct else Verdict.CONTINUE


@dataclass(frozen=True)
class Balance(ExitRule):
    """Stop at `num_correct` correct and `num_wrong` wrong completions (Reinforce-Ada-balance)."""

    num_correct: int
    num_wrong: int

    def __post_init__(self) -> None:
        at_least(0, "Balance", num_correct=self.num_correct, num_wrong=self.num_wrong)

    @property
    def needs(self) -> tuple[int, int]:
        return self.num_correct, self.num_wrong

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.STOP if counts.correct >= self.num_correct and counts.wrong >= self.num_wrong else Verdict.CONTINUE


@dataclass(frozen=True)
class DropOneClass(ExitRule):
    """Drop a prompt whose completions are all correct or all wrong, stop otherwise (DAPO's dynamic sampling)."""

    @property
    def needs(self) -> tuple[int, int]:
        return 1, 1

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.STOP if counts.correct and counts.wrong else Verdict.DROP


@dataclass(frozen=True)
class Band(ExitRule):
    """Drop a prompt whose rate of correct completions after a pilot of `pilot` is not strictly between `low` and `high` (SPEED-RL).

    Before and after the pilot `then` decides. If all completions of the pilot are voids, the prompt is dropped.
    Source: Zhang et al. 2025, arXiv 2506.09016 (0 < rate < 1).
    """

    low: float = 0.0
    high: float = 1.0
    pilot: int = 8
    then: Decide = field(default_factory=Never)

    def __post_init__(self) -> None:
        at_least(1, "Band", pilot=self.pilot)
        if not 0 <= self.low < self.high <= 1:
            raise InputError("Band", f"low {self.low} and high {self.high}", "0 <= low < high <= 1 is needed")

    @property
    def needs(self) -> tuple[int, int]:
        return promises_of(self.then).needs

    def __call__(self, counts: Counts, /) -> Verdict:
        if counts.committed == self.pilot and not self.low * counts.scored < counts.correct < self.high * counts.scored:
            return Verdict.DROP
        return self.then(counts)
