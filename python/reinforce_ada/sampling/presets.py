"""Published algorithms by name, any keyword overridable: `preset("reinforce-ada-balance", round_size=4)`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.sampling.objectives import Objective, ObjectiveWeight
from reinforce_ada.sampling.policies import (
    All,
    Balance,
    Balanced,
    Baseline,
    Centered,
    Decide,
    Degenerate,
    DropOneClass,
    First,
    InverseSqrtRate,
    Knapsack,
    MaxVariance,
    NearestRate,
    Never,
    Policy,
    Positive,
    Refill,
    Rounds,
    Scale,
    SkipStreaks,
    at_least,
)


def grpo(
    *,
    group_size: int = 8,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    baseline: Baseline = "group",
    scale: Scale = "group",
) -> Policy:
    """A fixed number of completions per prompt; advantage = (reward - group mean) / (group std + 1e-6).

    The std is the sample std (ddof 1), as TRL and verl both compute it; eps 1e-6 is verl's (TRL adds 1e-4).
    Source: Shao et al. 2024, arXiv 2402.03300.
    """
    at_least("grpo", "group_size", group_size, 1)
    return Policy(
        name="grpo",
        group_size=group_size,
        allocate=Rounds(group_size, 1),
        decide=Never(),
        select=First(),
        weight=Centered(baseline, scale),
        decide_every=group_size,
        min_pool=0,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


def dapo(
    *,
    group_size: int = 16,
    max_prompts_factor: float = 10.0,
    positive_threshold: float = 0.7,
    baseline: Baseline = "group",
    scale: Scale = "group",
) -> Policy:
    """GRPO that drops one-class groups and samples another prompt for each, up to `max_prompts_factor` times the batch.

    Source: Yu et al. 2025, arXiv 2503.14476 (dynamic sampling; 16 completions per prompt).
    """
    at_least("dapo", "group_size", group_size, 1)
    return Policy(
        name="dapo",
        group_size=group_size,
        allocate=Rounds(group_size, 1),
        decide=DropOneClass(),
        select=First(),
        weight=Centered(baseline, scale),
        decide_every=group_size,
        min_pool=0,
        propose=Refill(max_prompts_factor),
        positive_threshold=positive_threshold,
        degenerate="drop",
    )


def reinforce_ada_pos(
    *,
    group_size: int = 4,
    round_size: int = 8,
    max_rounds: int = 4,
    decide_every: int | None = None,
    min_pool: int | None = None,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    num_correct: int = 1,
    baseline: Baseline = "pool",
    scale: Scale = "none",
) -> Policy:
    """Sample in rounds until `num_correct` correct completions; keep a balanced group; advantage = reward - pool mean.

    Source: Reinforce-Ada, arXiv 2510.04996, Algorithm 1 with the positive-focused exit.
    """
    return _reinforce_ada(
        "reinforce-ada-pos",
        Positive(num_correct),
        Centered(baseline, scale),
        group_size=group_size,
        allocate=Rounds(round_size, max_rounds),
        decide_every=decide_every,
        min_pool=min_pool,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


def reinforce_ada_balance(
    *,
    group_size: int = 4,
    round_size: int = 8,
    max_rounds: int = 4,
    decide_every: int | None = None,
    min_pool: int | None = None,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    num_correct: int | None = None,
    num_wrong: int | None = None,
    baseline: Baseline = "pool",
    scale: Scale = "none",
) -> Policy:
    """Sample in rounds until group_size//2 correct and the rest wrong; keep those; advantage = reward - pool mean.

    Source: Reinforce-Ada, arXiv 2510.04996, Algorithm 1 with the balanced exit.
    """
    at_least("reinforce-ada-balance", "group_size", group_size, 1)
    correct = group_size // 2 if num_correct is None else num_correct
    wrong = group_size - group_size // 2 if num_wrong is None else num_wrong
    return _reinforce_ada(
        "reinforce-ada-balance",
        Balance(correct, wrong),
        Centered(baseline, scale),
        group_size=group_size,
        allocate=Rounds(round_size, max_rounds),
        decide_every=decide_every,
        min_pool=min_pool,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


def reinforce_ada_exact(
    *,
    group_size: int = 4,
    round_size: int = 8,
    max_rounds: int = 4,
    decide_every: int = 1,
    min_pool: int | None = None,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    num_correct: int | None = None,
    num_wrong: int | None = None,
) -> Policy:
    """The balanced exit with objective "mean": the expected gradient of a prompt is that of its pass rate, whatever the pass rate.

    The rule is asked after every completion, from max(round_size, group_size) on: of all decide_every and min_pool this comes within 2 %
    of the smallest variance of the gradient per completion (docs/statistics.md has the numbers) and keeps the first round whole.
    Source: see `objectives.ObjectiveWeight`.
    """
    balance = reinforce_ada_balance(
        group_size=group_size,
        round_size=round_size,
        max_rounds=max_rounds,
        decide_every=decide_every,
        min_pool=max(round_size, group_size) if min_pool is None else min_pool,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
        num_correct=num_correct,
        num_wrong=num_wrong,
    )
    return dataclasses.replace(balance, name="reinforce-ada-exact", weight=ObjectiveWeight("mean"))


def reinforce_ada_est(
    *,
    group_size: int = 4,
    mean_budget: int = 8,
    min_budget: int | None = None,
    max_budget: int = 32,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    baseline: Baseline = "pool",
    scale: Scale = "none",
) -> Policy:
    """Budgets in proportion to 1/sqrt(pass rate) as remembered, all used; keep a balanced group; advantage = reward - pool mean.

    Needs memory. `mean_budget` is the cost of GRPO with groups of 8; `min_budget` is `group_size` by default, `max_budget` the cap of the
    other presets. Source: Reinforce-Ada, arXiv 2510.04996v3, estimation-based.
    """
    return Policy(
        name="reinforce-ada-est",
        group_size=group_size,
        allocate=InverseSqrtRate(
            mean=mean_budget, floor=group_size if min_budget is None else min_budget, cap=max_budget, round_size=max_budget
        ),
        decide=Never(),
        select=Balanced(),
        weight=Centered(baseline, scale),
        decide_every=max_budget,
        min_pool=0,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


def pods(
    *,
    group_size: int = 16,
    num_completions: int = 64,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    baseline: Baseline = "group",
    scale: Scale = "group",
) -> Policy:
    """Sample `num_completions`, train on the `group_size` whose rewards vary most, centred and scaled among themselves.

    Source: Xu et al. 2025, arXiv 2504.13818 (64 completions, 16 kept).
    """
    return Policy(
        name="pods",
        group_size=group_size,
        allocate=Rounds(num_completions, 1),
        decide=Never(),
        select=MaxVariance(),
        weight=Centered(baseline, scale),
        decide_every=num_completions,
        min_pool=0,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


def knapsack(
    *,
    mean_budget: int = 8,
    min_budget: int = 2,
    max_budget: int = 128,
    positive_threshold: float = 0.7,
    degenerate: Degenerate = "keep",
    baseline: Baseline = "group",
    scale: Scale = "group",
) -> Policy:
    """GRPO with the budgets of largest total value under the same number of completions; all are kept. Needs memory.

    Source: Li et al. 2025, arXiv 2509.25849 (8 on average, from 2 to 128).
    """
    return Policy(
        name="knapsack",
        group_size=mean_budget,
        allocate=Knapsack(mean=mean_budget, floor=min_budget, cap=max_budget, round_size=max_budget),
        decide=Never(),
        select=All(),
        weight=Centered(baseline, scale),
        decide_every=max_budget,
        min_pool=0,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


def _reinforce_ada(
    name: str,
    decide: Decide,
    weight: Centered,
    *,
    group_size: int,
    allocate: Rounds,
    decide_every: int | None,
    min_pool: int | None,
    positive_threshold: float,
    degenerate: Degenerate,
) -> Policy:
    return Policy(
        name=name,
        group_size=group_size,
        allocate=allocate,
        decide=decide,
        select=Balanced(),
        weight=weight,
        decide_every=allocate.round_size if decide_every is None else decide_every,
        min_pool=group_size if min_pool is None else min_pool,
        positive_threshold=positive_threshold,
        degenerate=degenerate,
    )


PRESETS: Mapping[str, Callable[..., Policy]] = MappingProxyType(
    {
        "grpo": grpo,
        "dapo": dapo,
        "reinforce-ada-pos": reinforce_ada_pos,
        "reinforce-ada-balance": reinforce_ada_balance,
        "reinforce-ada-exact": reinforce_ada_exact,
        "reinforce-ada-est": reinforce_ada_est,
        "pods": pods,
        "knapsack": knapsack,
    }
)


def preset(name: str, *, objective: Objective | None = None, alpha: float | None = None, **overrides: Any) -> Policy:
    """The policy of a published algorithm.

    Args:
        name: a key of `PRESETS`.
        objective: "mean" | "log" | "power" replaces the preset's weight by `ObjectiveWeight`; "as-published" and None leave it.
        alpha: exponent of objective "power".
        overrides: keywords of that preset's function (group_size, round_size, decide_every, ...).
    Returns: a Policy.
    Raises: InputError for an unknown name or override, with the nearest valid one, and for values that cannot go together.
    """
    if name not in PRESETS:
        raise unknown_name("preset", "name", name, PRESETS)
    where, known = f"preset {name!r}", inspect.signature(PRESETS[name]).parameters
    for key in overrides:
        if key not in known:
            raise unknown_name(where, "override", key, [*known, "objective", "alpha"])
    policy = PRESETS[name](**overrides)
    if objective is None or objective == "as-published":
        if alpha is not None:
            raise InputError(where, f"alpha {alpha} without an objective", 'objective "power" is needed with it')
        if objective is not None and isinstance(policy.weight, ObjectiveWeight):
            raise InputError(where, "objective 'as-published'", "this preset is not a published one", "reinforce-ada-balance is")
        return policy
    if replaced := [key for key in ("baseline", "scale") if key in overrides]:
        raise InputError(where, f"objective {objective!r} with {' and '.join(replaced)}", "the objective sets the advantages alone")
    weight = ObjectiveWeight(objective) if alpha is None else ObjectiveWeight(objective, alpha)
    return dataclasses.replace(policy, weight=weight)


_PROPOSE: Mapping[str, Callable[..., Refill]] = MappingProxyType({"nearest-rate": NearestRate, "skip-streaks": SkipStreaks})
CONFIGURED = (
    "group_size", "round_size", "max_rounds", "decide_every", "min_pool", "mean_budget", "positive_threshold", "degenerate",
    "objective", "alpha",
)  # fmt: skip


def configured(settings: Any) -> Policy:
    """The preset `settings.preset`, overridden by the attributes named in CONFIGURED, which may be None or missing; see `config.sampling`.

    `settings.propose` chooses the prompts; dropped ones are refilled as the preset does.

    Raises: InputError for names that are unknown and values that cannot go together.
    """
    values = {name: getattr(settings, name, None) for name in CONFIGURED}
    policy = preset(settings.preset, **{name: value for name, value in values.items() if value is not None})
    propose = getattr(settings, "propose", None)
    if propose is None:
        return policy
    if propose not in _PROPOSE:
        raise unknown_name(f"preset {settings.preset!r}", "propose", propose, _PROPOSE)
    factor = policy.propose.max_prompts_factor if isinstance(policy.propose, Refill) else 1.0
    return dataclasses.replace(policy, propose=_PROPOSE[propose](max_prompts_factor=factor))
