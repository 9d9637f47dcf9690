"""The policy: five hooks and the numbers they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.sampling.policies.contracts import (
    Allocate,
    Allocation,
    Counts,
    Decide,
    Degenerate,
    ExitRule,
    Propose,
    Select,
    Verdict,
    Weight,
    Weighting,
    at_least,
    promises_of,
)
from reinforce_ada.sampling.policies.propose import AllPrompts
from reinforce_ada.sampling.policies.select import All

# A window table has 8 MB and takes 5 s there, the statistics of a rule that never stops 10 s; a cap twice as large takes 8 times as long.
LARGEST_CAP = 2048


@dataclass(frozen=True)
class Policy:
    """A sampling policy: the five hooks and the numbers they share.

    Args:
        name: shown in logs and tables.
        group_size: completions kept per prompt for the loss.
        allocate: sets the request budget of each prompt; its cap is at least `group_size`.
        decide: the exit rule; `decide_every` and `min_pool` say when it is asked.
        select: chooses which completions of the pool are kept.
        weight: specifies the advantages of the kept completions.
        propose: chooses which prompts enter the step.
        decide_every: committed completions between two decisions; a decision is also due at the cap.
        min_pool: scored completions needed before the exit rule is asked.
        positive_threshold: a completion is correct when its reward is strictly greater.
        degenerate: "drop" leaves pools with max == min out of the groups; "keep" leaves them in, with zero advantage.
    Raises: InputError when the parts or numbers cannot go together, and for a part that is not hashable.
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
        self._check_forms(where)
        at_least(1, where, group_size=self.group_size, decide_every=self.decide_every)
        at_least(0, where, min_pool=self.min_pool)
        cap = self.allocate.cap
        if cap < self.group_size:
            needed = f"at least group_size {self.group_size} is needed"
            raise InputError(where, f"a cap of {cap} completions per prompt", needed, "raise round_size or max_rounds")
        if cap > LARGEST_CAP:
            needed = f"at most {LARGEST_CAP}, for which windows and statistics have tables"
            raise InputError(where, f"a cap of {cap} completions per prompt", needed, "lower round_size or max_rounds")
        if self.min_pool > cap:
            raise InputError(where, f"min_pool {self.min_pool}", f"at most the cap of {cap} completions per prompt is possible")
        if sum(self.needs) > cap:
            needed = f"a cap of {cap} completions per prompt has room for {cap}"
            raise InputError(where, f"an exit rule that needs {sum(self.needs)} completions", needed)
        if not math.isfinite(self.positive_threshold):
            raise InputError(where, f"positive_threshold {self.positive_threshold}", "a finite number is needed")
        if self.degenerate not in get_args(Degenerate):
            raise unknown_name(where, "value of degenerate", self.degenerate, get_args(Degenerate))
        self._check_together(where)
        if isinstance(self.weight, Weighting):
            self.weight.check(self)

    def _check_forms(self, where: str) -> None:
        """Check that each part has the methods of its hook. Decide, select and weight may be plain functions; the others need more."""
        for hook, names, wrapper in (
            ("allocate", ("budgets()", "cap", "round_size", "__call__()", *Allocation.__annotations__), "Budgeted wraps a function"),
            ("propose", ("choose()", "candidates_per_prompt", "__call__()", "needs_memory"), "see AllPrompts"),
        ):
            part = getattr(self, hook)
            if missing := [name for name in names if not hasattr(part, name.removesuffix("()"))]:
                raise InputError(where, f"{hook} {part!r}", f"an object with .{missing[0]} is needed", wrapper)
        # These attributes are read only from a part derived from the base class; on any other part they would be ignored.
        for hook, base, names in (
            ("decide", ExitRule, ("needs", "pilot")), ("weight", Weighting, ("check", "objective", "needs_memory", "needs_prediction")),
        ):  # fmt: skip
            part = getattr(self, hook)
            if unheard := [name for name in names if hasattr(part, name) and not isinstance(part, base)]:
                raise InputError(where, f"{hook} {part!r} with .{unheard[0]}", f"a class derived from {base.__name__} is needed")
        for hook in ("propose", "allocate", "decide", "select", "weight"):
            try:
                hash(part := getattr(self, hook))
            except TypeError:
                needed = "a hashable one is needed: tables are kept by policy"
                raise InputError(where, f"{hook} {part!r}", needed, "@dataclass(frozen=True), and tuples for lists") from None

    def _check_together(self, where: str) -> None:
        """Reject parts that are each valid alone but contradict each other."""
        pilot, floor = promises_of(self.decide).pilot, self.allocate.floor
        if pilot is not None:
            if pilot > self.cap:
                raise InputError(where, f"a pilot of {pilot} completions", f"at most the cap of {self.cap} is possible")
            if pilot < self.min_pool:
                raise InputError(where, f"a pilot of {pilot} completions with min_pool {self.min_pool}", "at least min_pool is needed")
            if pilot % self.decide_every and pilot != self.cap:
                needed = f"a multiple of decide_every {self.decide_every} is needed, or the rule is never asked after it"
                raise InputError(where, f"a pilot of {pilot} completions", needed)
        if floor is not None and floor < self.group_size and not isinstance(self.select, All):
            needed = f"at least group_size {self.group_size} is needed to fill every group"
            raise InputError(where, f"budgets from {floor} completions on", needed, "raise floor, lower group_size, or select All()")
        if self.allocate.is_batch_wide and self.refills:
            needed = "prompts that enter together are needed"
            raise InputError(where, "a budget for the whole batch with a propose that refills", needed, "max_prompts_factor=1")

    @property
    def refills(self) -> bool:
        """Return whether a dropped prompt may be replaced."""
        many = 1_000_000  # among ten prompts a factor of 1.01 refills none
        return self.propose(many, many) > many

    @property
    def draws_prompts(self) -> bool:
        """Return whether it draws more prompts than a step trains: to replace dropped ones, or to choose among them."""
        return self.refills or self.propose.candidates_per_prompt > 1

    @property
    def cap(self) -> int:
        """Return the most completions that any prompt may use in a step."""
        return self.allocate.cap

    @property
    def needs(self) -> tuple[int, int]:
        """Return the least (correct, wrong) counts at which the exit rule can stop; (0, 0) if it promises nothing."""
        return promises_of(self.decide).needs

    @property
    def needs_memory(self) -> bool:
        """Return whether a hook reads the histories of prompts."""
        return self.propose.needs_memory or self.allocate.needs_memory or self.weight_needs_memory

    @property
    def weight_needs_memory(self) -> bool:
        """Return whether the weight reads what is remembered of a prompt, `Pool.prior`."""
        return isinstance(self.weight, Weighting) and self.weight.needs_memory

    @property
    def needs_prediction(self) -> bool:
        """Return whether the trainer has to complete the advantages by predicted pass rates."""
        return isinstance(self.weight, Weighting) and self.weight.needs_prediction

    @property
    def objective(self) -> str | None:
        """Return the objective whose gradient the advantages have as their expectation; None for one that is a result of the rules."""
        return self.weight.objective if isinstance(self.weight, Weighting) else None

    def verdict(self, counts: Counts, cap: int | None = None) -> Verdict:
        """Return the exit rule's verdict on a prompt with these committed counts if the rule is due, and CONTINUE otherwise.

        `cap` is the prompt's budget, if `allocate` gives each its own; None means the policy's cap.
        """
        is_asked = self.is_asked(counts.scored, counts.committed, self.cap if cap is None else cap)
        return self.decide(counts) if is_asked else Verdict.CONTINUE

    def is_asked(self, scored: int, committed: int, cap: int) -> bool:
        """Return whether the exit rule is due for a prompt with these numbers of scored and committed completions and this cap."""
        return scored >= self.min_pool and (committed % self.decide_every == 0 or committed == cap)

    @property
    def num_always_drawn(self) -> int:
        """Return how many completions every prompt draws before any decision, at most one round; their mean reward is unbiased."""
        first_multiple = -(-max(self.min_pool, 1) // self.decide_every) * self.decide_every
        return min(self.allocate.round_size, first_multiple, self.cap)
