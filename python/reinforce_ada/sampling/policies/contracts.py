"""What the five hooks of a policy are: the records they see, and the calls they answer.

They see counts, rewards and what is remembered of earlier steps; no engine, no clock, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.types import Group, Prompt

if TYPE_CHECKING:
    from reinforce_ada.sampling.policies.policy import Policy

Baseline: TypeAlias = Literal["pool", "group", "leave-one-out"]
Scale: TypeAlias = Literal["none", "pool", "group", "batch"]
Degenerate: TypeAlias = Literal["keep", "drop"]


def at_least(where: str, name: str, value: int, minimum: int) -> None:
    """Raise InputError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(where, f"{name} {value!r}", f"an integer of at least {minimum} is needed")


# -------------------- records


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


class History(NamedTuple):
    """What earlier steps say of a prompt: the Beta(a, b) posterior of its pass rate, and its pools without signal in a row."""

    a: float = 1.0
    b: float = 1.0
    streak: int = 0  # the latest steps in a row whose pool had one class only
    all_correct: bool = False  # of the streak: were they correct?

    @property
    def mean(self) -> float:
        """a / (a + b)"""
        return self.a / (self.a + self.b)


@dataclass(frozen=True)
class AdvantageSpec:
    """How `ops.group_advantages` turns the kept rewards into advantages.

        group_advantages(spec.rewards(raw), group_of, pool=..., baseline=spec.baseline, scale=spec.scale, ...)

    advantage = (reward - baseline) / (std + eps) * class weight, with std over `scale` and `ddof`; scale "none" divides by nothing.
    """

    baseline: Baseline | NDArray[np.float64]  # or one value a group, [G]
    scale: Scale
    ddof: int = 1
    eps: float = 1e-6
    class_weights: NDArray[np.float64] | None = None  # [G, 2]: factors for advantages < 0 and >= 0
    threshold: float | None = None  # rewards count as 1 above it and as 0 elsewhere; None: as they are

    def rewards(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """The rewards that count, [N] float64."""
        return raw if self.threshold is None else (raw > self.threshold).astype(np.float64)


# -------------------- calls


class Remembers(Protocol):
    """The memory across steps, as the sampler asks it."""

    def history(self, prompt: Prompt, /) -> History: ...


class Propose(Protocol):
    """Which prompts of the source enter the step.

    Called with (num_prompts, num_dropped): how many may have entered, given how many groups are wanted and how many were dropped.
    `choose` picks exactly min(num, candidates) of up to num * candidates_per_prompt candidates; positions, increasing.
    """

    @property
    def candidates_per_prompt(self) -> int: ...

    @property
    def needs_memory(self) -> bool:
        """Whether it looks at what earlier steps say of a prompt."""
        ...

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int: ...

    def choose(self, histories: Sequence[History], num: int, rng: np.random.Generator, /) -> Sequence[int]: ...


class Allocate(Protocol):
    """How many requests a prompt gets: by the end of its current round when called, and at most (`budgets`, at most `cap`)."""

    @property
    def round_size(self) -> int: ...

    @property
    def cap(self) -> int: ...

    @property
    def floor(self) -> int | None:
        """The smallest budget of a prompt where each has its own; None where all have the cap, or nothing is promised."""
        ...

    @property
    def needs_memory(self) -> bool:
        """Whether it looks at what earlier steps say of a prompt."""
        ...

    @property
    def is_batch_wide(self) -> bool:
        """Whether the budget of a prompt depends on which others enter with it."""
        ...

    def __call__(self, counts: Counts, /) -> int: ...

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        """Most completions of each prompt, for prompts that enter together."""
        ...


class Allocation:
    """What most ways to allocate answer; one that answers otherwise says so."""

    floor: int | None = None
    needs_memory: bool = False
    is_batch_wide: bool = False


class Window(Protocol):
    """How many unanswered requests a prompt may have, from the counts of all its answers; at least 1. `cap` is the prompt's.

    Answers count as soon as they are there, also those that wait for an earlier one to be committed: what is issued changes no outcome,
    so the pools keep their law.
    """

    def __call__(self, counts: Counts, history: History, cap: int, /) -> int: ...


class Decide(Protocol):
    """The exit rule: stop, continue or drop, from the committed counts. A function, or an `ExitRule`, which may promise more."""

    def __call__(self, counts: Counts, /) -> Verdict: ...


class ExitRule:
    """What an exit rule promises: nothing, where it does not say otherwise."""

    pilot: int | None = None  # the committed count at which it must be asked

    @property
    def needs(self) -> tuple[int, int]:
        """(correct, wrong) completions without which it never stops."""
        return 0, 0


def promises_of(decide: Decide) -> ExitRule:
    """What the rule promises; a function promises nothing."""
    return decide if isinstance(decide, ExitRule) else ExitRule()


class Select(Protocol):
    """Which scored completions train.

    Args: rewards [count] float64 and correct [count] bool, both in request order; group_size.
    Returns: positions in [0, count), increasing.
    """

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]: ...


class Weight(Protocol):
    """The advantage of each kept completion, as a specification for `ops.group_advantages`. A function, or a `Weighting`."""

    def __call__(self, groups: Sequence[Group], policy: Policy, /) -> AdvantageSpec: ...


class Weighting:
    """A weight that is asked, when a policy is made, whether the two fit."""

    def check(self, policy: Policy) -> None:
        """Raises: InputError where they do not."""
