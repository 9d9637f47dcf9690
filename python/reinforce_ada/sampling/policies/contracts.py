"""The protocols of a policy's five hooks, and the records they receive.

Hooks receive counts, rewards and the histories of earlier steps, but no engine, no clock and no torch.
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


def at_least(minimum: int, where: str, **values: int) -> None:
    """Raise InputError unless every one of the named `values` is an integer of at least `minimum`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(where, f"{name} {value!r}", f"an integer of at least {minimum} is needed")


# -------------------- records


class Verdict(Enum):
    """The decision of the exit rule on a prompt."""

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
    """The history of a prompt in earlier steps: the Beta(a, b) posterior of its pass rate, and its streak of one-class pools."""

    a: float = 1.0
    b: float = 1.0
    streak: int = 0  # number of its latest pools in a row that had one class only
    all_correct: bool = False  # whether the pools of the streak were all correct

    @property
    def mean(self) -> float:
        """Return the posterior mean of the pass rate, a / (a + b)."""
        return self.a / (self.a + self.b)


@dataclass(frozen=True)
class AdvantageSpec:
    """The specification by which `ops.group_advantages` turns the kept rewards into advantages.

        group_advantages(spec.rewards(raw), group_of, pool=..., baseline=spec.baseline, scale=spec.scale, ...)

    advantage = (reward - baseline) / (std + eps) * class weight, with std over `scale` and `ddof`; scale "none" skips the division.
    """

    baseline: Baseline | NDArray[np.float64]  # a name, or one value per group, [G]
    scale: Scale
    ddof: int = 1
    eps: float = 1e-6
    class_weights: NDArray[np.float64] | None = None  # [G, 2]: factors for advantages < 0 and >= 0
    threshold: float | None = None  # rewards become 1 above it and 0 elsewhere; None leaves them as they are
    prediction_weights: NDArray[np.float64] | None = None  # [G]: factors of the predicted pass rates, still to be subtracted

    def rewards(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rewards after `threshold`, [N] float64."""
        return raw if self.threshold is None else (raw > self.threshold).astype(np.float64)


# -------------------- calls


class Remembers(Protocol):
    """The memory across steps, as the sampler uses it."""

    def history(self, prompt: Prompt, /) -> History: ...


class Propose(Protocol):
    """The hook that chooses which prompts of the source enter the step.

    A call with (num_prompts, num_dropped), the groups wanted and the prompts dropped, returns how many prompts may have entered.
    `choose` returns the increasing positions of exactly min(num, candidates) of up to num * candidates_per_prompt candidates.
    """

    @property
    def candidates_per_prompt(self) -> int: ...

    @property
    def needs_memory(self) -> bool:
        """Return whether it reads the histories of prompts."""
        ...

    def __call__(self, num_prompts: int, num_dropped: int, /) -> int: ...

    def choose(self, histories: Sequence[History], num: int, rng: np.random.Generator, /) -> Sequence[int]: ...


class Allocate(Protocol):
    """The hook that sets how many requests a prompt gets: by the end of its current round (a call), and in all (`budgets`, <= `cap`)."""

    @property
    def round_size(self) -> int: ...

    @property
    def cap(self) -> int: ...

    @property
    def floor(self) -> int | None:
        """Return the smallest budget of a prompt if each has its own; None if all have the cap, or if nothing is promised."""
        ...

    @property
    def needs_memory(self) -> bool:
        """Return whether it reads the histories of prompts."""
        ...

    @property
    def is_batch_wide(self) -> bool:
        """Return whether the budget of a prompt depends on which others enter with it."""
        ...

    def __call__(self, counts: Counts, /) -> int: ...

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        """Return the most completions of each prompt, for prompts that enter together."""
        ...


class Allocation:
    """A base class with the answers that most allocations give; a subclass overrides those that differ."""

    floor: int | None = None
    needs_memory: bool = False
    is_batch_wide: bool = False

    def __call__(self: Allocate, counts: Counts, /) -> int:
        """Return the end of the current round of `round_size`, or the cap."""
        return min((counts.committed // self.round_size + 1) * self.round_size, self.cap)


class Window(Protocol):
    """A function from the counts of all of a prompt's answers to the number of unanswered requests it may have; at least 1.

    `cap` is the prompt's budget. Answers count as soon as they arrive, even if they wait for an earlier one to be committed: issuing a
    request changes no outcome, so the pools keep their law.
    """

    def __call__(self, counts: Counts, history: History, cap: int, /) -> int: ...


class Decide(Protocol):
    """The exit rule: stop, continue or drop, given the committed counts. It is a function, or an `ExitRule`, which may promise more."""

    def __call__(self, counts: Counts, /) -> Verdict: ...


class ExitRule:
    """A base class with the promises of an exit rule; those that it does not override promise nothing."""

    pilot: int | None = None  # the committed count at which the rule must be asked

    @property
    def needs(self) -> tuple[int, int]:
        """Return the least (correct, wrong) counts at which the rule can stop."""
        return 0, 0


def promises_of(decide: Decide) -> ExitRule:
    """Return the promises of an exit rule; a function promises nothing."""
    return decide if isinstance(decide, ExitRule) else ExitRule()


class Select(Protocol):
    """The hook that chooses which scored completions are trained on.

    Args: rewards [count] float64 and correct [count] bool, both in request order; group_size.
    Returns: positions in [0, count), increasing.
    """

    def __call__(self, rewards: NDArray[np.float64], correct: NDArray[np.bool_], group_size: int, /) -> list[int]: ...


class Weight(Protocol):
    """The hook that specifies the advantages of kept completions for `ops.group_advantages`. It is a function, or a `Weighting`."""

    def __call__(self, groups: Sequence[Group], policy: Policy, /) -> AdvantageSpec: ...


class Weighting:
    """A weight that checks, when a policy is made, that it fits the policy, and may promise more.

    A weight with an `objective` gives advantages with which the sum over a group's completions, divided by group_size, has the gradient of
    that objective as its expectation. The denominator is fixed: the trainer divides by group_size * prompts that entered.
    """

    objective: str | None = None  # "mean", "log" or "power" of the pass rate
    needs_memory: bool = False  # it reads Pool.prior
    needs_prediction: bool = False  # its advantages lack predicted pass rates, see AdvantageSpec.prediction_weights

    def check(self, policy: Policy) -> None:
        """Raise InputError if the weight does not fit the policy."""
