"""A policy is five small pure functions: propose, allocate, decide, select, weight.

They see counts and rewards only; no engine, no clock, no torch. Any frozen callable with the right signature is a policy part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.types import Group

Baseline: TypeAlias = Literal["pool", "group", "leave-one-out"]
Scale: TypeAlias = Literal["none", "pool", "group", "batch"]
Degenerate: TypeAlias = Literal["keep", "drop"]


def at_least(where: str, name: str, value: int, minimum: int) -> None:
    """Raise InputError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(where, f"{name} {value!r}", f"an integer of at least {minimum} is needed")


class Verdict(Enum):
    """What the exit rule says of a prompt."""

    CONTINUE = "continue"
    STOP = "stop"
    DROP = "drop"


class Counts(NamedTuple):
    """Class counts of a prompt's committed completions; voids are neither correct nor wrong."""

    correct: int
    wrong: int
    void: int = 0

    @property
    def scored(self) -> int:
        return self.correct + self.wrong

    @property
    def committed(self) -> int:
        return self.correct + self.wrong + self.void


@dataclass(frozen=True)
class AdvantageSpec:
    """How `ops.group_advantages` turns the kept rewards into advantages: `group_advantages(..., **dataclasses.asdict(spec))`.

    advantage = (reward - baseline) / (std + eps), with std over `scale` and `ddof`; scale "none" divides by nothing.
    """

    baseline: Baseline
    scale: Scale
    ddof: int = 1
    eps: float = 1e-6


# -------------------- protocols


class Propose(Protocol):
    """How many prompts of the source may have entered, given how many groups are wanted and how many were dropped."""

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int: ...


class Allocate(Protocol):
    """The request budget of a prompt: how many requests it has been handed by the end of its current round."""

    @property
    def round_size(self) -> int: ...

    @property
    def cap(self) -> int: ...

    def __call__(self, counts: Counts, /) -> int: ...


class Decide(Protocol):
    """The exit rule: stop, continue or drop, from the committed counts. It never stops below `needs` = (correct, wrong)."""

    @property
    def needs(self) -> tuple[int, int]: ...

    def __call__(self, counts: Counts, /) -> Verdict: ...


class Select(Protocol):
    """Which scored completions train.

    Args: rewards [count] float64 and correct [count] bool, both in request order; group_size.
    Returns: positions in [0, count), increasing.
    """

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]: ...


class Weight(Protocol):
    """The advantage of each kept completion, as a specification for `ops.group_advantages`."""

    def __call__(self, groups: Sequence[Group], /) -> AdvantageSpec: ...


# -------------------- propose


@dataclass(frozen=True)
class AllPrompts:
    """As many prompts enter as groups are wanted; a dropped one is not replaced."""

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int:
        return num_prompts


@dataclass(frozen=True)
class Refill:
    """One more prompt enters for every dropped one, up to `max_prompts_factor` times the number wanted (DAPO).

    The prompts that enter are the shortest prefix of the source with enough undropped ones, so timing cannot change them.
    """

    max_prompts_factor: float = 10.0

    def __post_init__(self) -> None:
        if not self.max_prompts_factor >= 1:
            raise InputError("Refill", f"max_prompts_factor {self.max_prompts_factor}", "at least 1 is needed")

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int:
        return min(num_prompts + num_dropped, math.floor(self.max_prompts_factor * num_prompts))


# -------------------- allocate


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


# -------------------- decide


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


# -------------------- select


@dataclass(frozen=True)
class First:
    """The first `group_size` scored completions."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return list(range(min(len(rewards), group_size)))


@dataclass(frozen=True)
class All:
    """Every scored completion."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        return list(range(len(rewards)))


@dataclass(frozen=True)
class Balanced:
    """n//2 correct and n - n//2 wrong completions, the earliest of each; a short class is filled from the other."""

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]:
        right, wrong = np.flatnonzero(correct).tolist(), np.flatnonzero(~correct).tolist()
        num_right = min(len(right), max(group_size // 2, group_size - len(wrong)))
        return sorted(right[:num_right] + wrong[: group_size - num_right])


# -------------------- weight


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

    def __call__(self, groups: Sequence[Group], /) -> AdvantageSpec:
        return AdvantageSpec(self.baseline, self.scale, self.ddof, self.eps)


# -------------------- policy


@dataclass(frozen=True)
class Policy:
    """A sampling policy: the five hooks and the numbers they share.

    Args:
        name: for logs and tables.
        group_size: completions kept per prompt for the loss.
        allocate: request budget per prompt; its cap is at least `group_size`.
        decide: exit rule, asked when the committed count is a multiple of `decide_every` (or reaches the cap) and at least
            `min_pool` of the committed completions are scored.
        select: which completions of the pool are kept.
        weight: advantage specification of the kept ones.
        propose: which prompts enter the step.
        decide_every: committed completions between two decisions.
        min_pool: scored completions before the first decision.
        positive_threshold: a completion is correct when its reward is strictly greater.
        degenerate: "drop" leaves pools with max == min out of the groups; "keep" leaves them in, with zero advantage.
    Raises: InputError when the numbers cannot go together.
    """

    name: str
    group_size: int
    allocate: Allocate
    decide: Decide
    select: Select
    weight: Weight
    decide_every: int
    min_pool: int
    propose: Propose = field(default_factory=AllPrompts)
    positive_threshold: float = 0.7
    degenerate: Degenerate = "keep"

    def __post_init__(self) -> None:
        where = f"Policy {self.name!r}"
        at_least(where, "group_size", self.group_size, 1)
        at_least(where, "decide_every", self.decide_every, 1)
        at_least(where, "min_pool", self.min_pool, 0)
        cap = self.allocate.cap
        if cap < self.group_size:
            needed = f"at least group_size {self.group_size} is needed"
            raise InputError(where, f"a cap of {cap} completions per prompt", needed, "raise round_size or max_rounds")
        if self.min_pool > cap:
            raise InputError(where, f"min_pool {self.min_pool}", f"at most the cap of {cap} completions per prompt is possible")
        if sum(self.decide.needs) > cap:
            needed = f"a cap of {cap} completions per prompt has room for {cap}"
            raise InputError(where, f"an exit rule that needs {sum(self.decide.needs)} completions", needed)
        if not math.isfinite(self.positive_threshold):
            raise InputError(where, f"positive_threshold {self.positive_threshold}", "a finite number is needed")
        if self.degenerate not in ("keep", "drop"):
            raise unknown_name(where, "value of degenerate", self.degenerate, ("keep", "drop"))

    @property
    def cap(self) -> int:
        """Most completions a prompt may use in a step."""
        return self.allocate.cap

    def verdict(self, counts: Counts) -> Verdict:
        """What happens to a prompt with these committed counts: the exit rule where it is due, CONTINUE elsewhere."""
        due = counts.committed % self.decide_every == 0 or counts.committed == self.cap
        return self.decide(counts) if due and counts.scored >= self.min_pool else Verdict.CONTINUE

    @property
    def num_always_drawn(self) -> int:
        """Completions every prompt draws before any decision, at most one round: their mean reward is unbiased."""
        first_multiple = -(-max(self.min_pool, 1) // self.decide_every) * self.decide_every
        return min(self.allocate.round_size, first_multiple, self.cap)
