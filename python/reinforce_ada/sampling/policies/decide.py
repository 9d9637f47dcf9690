"""Exit rules: when a prompt has what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from reinforce_ada.sampling.policies.contracts import Counts, Verdict, at_least


@dataclass(frozen=True)
class Never:
    """Sample up to the cap, whatever comes."""

    @property
    def needs(self) -> tuple[int, int]:
        return 0, 0

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.CONTINUE


@dataclass(frozen=True)
class Positive:
    """Stop at `num_correct` correct completions (Reinforce-Ada-pos)."""

    num_correct: int = 1

    def __post_init__(self) -> None:
        at_least("Positive", "num_correct", self.num_correct, 1)

    @property
    def needs(self) -> tuple[int, int]:
        return self.num_correct, 0

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.STOP if counts.correct >= self.num_correct else Verdict.CONTINUE


@dataclass(frozen=True)
class Balance:
    """Stop at `num_correct` correct and `num_wrong` wrong completions (Reinforce-Ada-balance)."""

    num_correct: int
    num_wrong: int

    def __post_init__(self) -> None:
        at_least("Balance", "num_correct", self.num_correct, 0)
        at_least("Balance", "num_wrong", self.num_wrong, 0)

    @property
    def needs(self) -> tuple[int, int]:
        return self.num_correct, self.num_wrong

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.STOP if counts.correct >= self.num_correct and counts.wrong >= self.num_wrong else Verdict.CONTINUE


@dataclass(frozen=True)
class DropOneClass:
    """Drop a prompt whose completions are all correct or all wrong, stop otherwise (DAPO's dynamic sampling)."""

    @property
    def needs(self) -> tuple[int, int]:
        return 1, 1

    def __call__(self, counts: Counts, /) -> Verdict:
        return Verdict.STOP if counts.correct and counts.wrong else Verdict.DROP
