"""The presets by name: published algorithms, `reinforce-ada-exact` and `reinforce-ada-memory`.

Any keyword can be overridden: `preset("reinforce-ada-balance", round_size=4)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.sampling.policies.allocate import InversePowerRate, Knapsack, Rounds
from reinforce_ada.sampling.policies.contracts import Allocate, Decide, Propose, Select, Weight, at_least
from reinforce_ada.sampling.policies.decide import Balance, DropOneClass, Never, Positive
from reinforce_ada.sampling.policies.objective_weight import ObjectiveName, ObjectiveWeight
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.policies.posterior_mean import PosteriorMean
from reinforce_ada.sampling.policies.propose import AllPrompts, NearestRate, Refill, SkipStreaks
from reinforce_ada.sampling.policies.select import All, Balanced, First, MaxVariance
from reinforce_ada.sampling.policies.weight import Centered

_WITHOUT_KEYWORD = {"decide_every": None, "min_pool": None, "degenerate": "drop"}  # the values in a preset without these keywords


def _weight(k: Any) -> Weight:
    """Return the weight of a baseline and a scale; baselines "memory" and "predicted" have no scale."""
    if k.baseline not in ("memory", "predicted"):
        return Centered(k.baseline, k.scale)
    if k.scale != "none":
        given = f"baseline {k.baseline!r} with scale {k.scale!r}"
        raise InputError(f"preset {k.name!r}", given, 'scale "none" is needed: its expected gradient is that of the mean pass rate')
    return PosteriorMean(predicted=k.baseline == "predicted")


@dataclass(frozen=True)
class Preset:
    """A preset: its keywords with their defaults, and how they make a policy. Calling it returns the policy.

    Every part is a function of the keywords. If `decide_every` is None, the exit rule is asked at the end of every round.
    """

    name: str
    keywords: Mapping[str, Any]
    allocate: Callable[[Any], Allocate]
    select: Select
    decide: Callable[[Any], Decide] = lambda k: Never()
    weight: Callable[[Any], Weight] = _weight
    propose: Callable[[Any], Propose] = lambda k: AllPrompts()
    group_size: Callable[[Any], int] = lambda k: k.group_size
    min_pool: Callable[[Any], int] = lambda k: 0

    def __call__(self, **overrides: Any) -> Policy:
        """Return the policy. Raises: InputError for an unknown keyword, and for values that cannot go together."""
        for key in overrides:
            if key not in self.keywords:
                raise unknown_name(f"preset {self.name!r}", "override", key, [*self.keywords, "objective", "alpha"])
        k = SimpleNamespace(**{"name": self.name, **_WITHOUT_KEYWORD, **self.keywords, **overrides})
        allocate = self.allocate(k)
        return Policy(
            name=self.name,
            group_size=self.group_size(k),
            allocate=allocate,
            decide=self.decide(k),
            select=self.select,
            weight=self.weight(k),
            decide_every=allocate.round_size if k.decide_every is None else k.decide_every,
            min_pool=self.min_pool(k) if k.min_pool is None else k.min_pool,
            propose=self.propose(k),
            positive_threshold=k.positive_threshold,
            degenerate=k.degenerate,
        )


def _fixed(k: Any) -> Rounds:
    at_least(1, k.name, group_size=k.group_size)
    return Rounds(k.group_size, 1)


def _rounds(k: Any) -> Rounds:
    return Rounds(k.round_size, k.max_rounds)


def _balance(k: Any) -> Balance:
    """Return a rule that needs half of the group correct and the rest wrong, unless keywords set the numbers."""
    at_least(1, k.name, group_size=k.group_size)
    correct = k.group_size // 2 if k.num_correct is None else k.num_correct
    wrong = k.group_size - k.group_size // 2 if k.num_wrong is None else k.num_wrong
    return Balance(correct, wrong)


def _inverse_power_rate(k: Any) -> InversePowerRate:
    floor = k.group_size if k.min_budget is None else k.min_budget
    return InversePowerRate(
        mean=k.mean_budget, floor=floor, cap=k.max_budget, round_size=k.max_budget, exponent=k.exponent, prior=k.prior
    )  # fmt: skip


_GROUP = {"baseline": "group", "scale": "group"}
_POOL = {"baseline": "pool", "scale": "none"}
_ALL = {"positive_threshold": 0.7, "degenerate": "keep"}
_ADA = {"group_size": 4, "round_size": 8, "max_rounds": 4, "decide_every": None, "min_pool": None, **_ALL}

_ROWS = (
    # A fixed number of completions per prompt; advantage = (reward - group mean) / (group std + 1e-6). The std is the sample std (ddof 1),
    # as TRL and verl both compute it; eps 1e-6 is verl's (TRL adds 1e-4). Source: Shao et al. 2024, arXiv 2402.03300.
    Preset("grpo", {"group_size": 8, **_ALL, **_GROUP}, _fixed, First()),
    # GRPO that drops one-class groups and samples another prompt for each, up to `max_prompts_factor` times the batch.
    # Source: Yu et al. 2025, arXiv 2503.14476 (dynamic sampling; 16 completions per prompt).
    Preset(
        "dapo",
        {"group_size": 16, "max_prompts_factor": 10.0, "positive_threshold": 0.7, **_GROUP},
        _fixed,
        First(),
        decide=lambda k: DropOneClass(),
        propose=lambda k: Refill(k.max_prompts_factor),
    ),
    # Sample in rounds until `num_correct` correct completions; keep a balanced group; advantage = reward - pool mean.
    # Source: Reinforce-Ada, arXiv 2510.04996, Algorithm 1 with the positive-focused exit.
    Preset(
        "reinforce-ada-pos",
        {**_ADA, "num_correct": 1, **_POOL},
        _rounds,
        Balanced(),
        decide=lambda k: Positive(k.num_correct),
        min_pool=lambda k: k.group_size,
    ),
    # Sample in rounds until group_size//2 correct and the rest wrong; keep those; advantage = reward - pool mean.
    # Source: Reinforce-Ada, arXiv 2510.04996, Algorithm 1 with the balanced exit.
    Preset(
        "reinforce-ada-balance",
        {**_ADA, "num_correct": None, "num_wrong": None, **_POOL},
        _rounds,
        Balanced(),
        decide=_balance,
        min_pool=lambda k: k.group_size,
    ),
    # The balanced exit with objective "mean": the expected gradient of a prompt is that of its pass rate, whatever the pass rate. The rule
    # is asked after every completion, from max(round_size, group_size) on: this choice of decide_every and min_pool is within 2 % of the
    # smallest variance of the gradient per completion (docs/statistics.md has the numbers) and keeps the first round whole.
    Preset(
        "reinforce-ada-exact",
        {**_ADA, "decide_every": 1, "num_correct": None, "num_wrong": None},
        _rounds,
        Balanced(),
        decide=_balance,
        weight=lambda k: ObjectiveWeight("mean"),
        min_pool=lambda k: max(k.round_size, k.group_size),
    ),
    # Budgets in proportion to 1/sqrt(remembered pass rate), all used; keep a balanced group; advantage = reward - pool mean. The mean
    # budget is the cost of GRPO with groups of 8, the largest the cap of the other presets. Source: Reinforce-Ada, arXiv 2510.04996v3.
    Preset(
        "reinforce-ada-est",
        {"group_size": 4, "mean_budget": 8, "min_budget": None, "max_budget": 32, "exponent": 0.5, "prior": (1.0, 1.0), **_ALL, **_POOL},
        _inverse_power_rate,
        Balanced(),
    ),
    # One completion per prompt, or a few; advantage = reward - posterior mean of the pass rate, given earlier steps and other completions.
    # With 8 completions remembered a group of 1 makes 1.8 to 2.0 times the progress of GRPO with groups of 8 for the same completions; with
    # none a group of 2 makes more progress than a group of 1 (docs/statistics.md has the numbers).
    Preset(
        "reinforce-ada-memory",
        {"group_size": 1, "baseline": "memory", "scale": "none", **_ALL},
        _fixed,
        All(),
    ),
    # Sample `num_completions`, train on the `group_size` whose rewards vary most, centred and scaled among themselves.
    # Source: Xu et al. 2025, arXiv 2504.13818 (64 completions, 16 kept).
    Preset("pods", {"group_size": 16, "num_completions": 64, **_ALL, **_GROUP}, lambda k: Rounds(k.num_completions, 1), MaxVariance()),
    # GRPO with the budgets of largest total value under the same number of completions; all are kept.
    # Source: Li et al. 2025, arXiv 2509.25849 (8 on average, from 2 to 128).
    Preset(
        "knapsack",
        {"mean_budget": 8, "min_budget": 2, "max_budget": 128, **_ALL, **_GROUP},
        lambda k: Knapsack(mean=k.mean_budget, floor=k.min_budget, cap=k.max_budget, round_size=k.max_budget),
        All(),
        group_size=lambda k: k.mean_budget,
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({row.name: row for row in _ROWS})


def preset(name: str, *, objective: ObjectiveName | None = None, alpha: float | None = None, **overrides: Any) -> Policy:
    """Return the policy of a preset.

    Args:
        name: a key of `PRESETS`.
        objective: "mean" | "log" | "power" replaces the preset's weight by `ObjectiveWeight`; "as-published" and None keep it.
        alpha: exponent of objective "power".
        overrides: keywords of that preset (group_size, round_size, decide_every, ...).
    Raises: InputError for an unknown name or override, with the nearest valid one, and for values that cannot go together.
    """
    if name not in PRESETS:
        raise unknown_name("preset", "name", name, PRESETS)
    where = f"preset {name!r}"
    policy = PRESETS[name](**overrides)
    if objective is None or objective == "as-published":
        if alpha is not None:
            raise InputError(where, f"alpha {alpha} without an objective", 'objective "power" is needed with it')
        if objective is not None and policy.objective is not None:
            raise InputError(where, "objective 'as-published'", "this preset is not a published one", "reinforce-ada-balance is")
        return policy
    if replaced := [key for key in ("baseline", "scale") if key in overrides]:
        raise InputError(where, f"objective {objective!r} with {' and '.join(replaced)}", "the objective sets the advantages alone")
    weight = ObjectiveWeight(objective) if alpha is None else ObjectiveWeight(objective, alpha)
    return dataclasses.replace(policy, weight=weight)


def sized_preset(name: str, group_size: int, /, **options: Any) -> Policy:
    """Return the policy of a preset that keeps `group_size` completions, unless the preset has no group size or `options` set another."""
    sizes = {"group_size": group_size} if name in PRESETS and "group_size" in PRESETS[name].keywords else {}
    return preset(name, **{**sizes, **options})


_PROPOSE: Mapping[str, Callable[..., Refill]] = MappingProxyType({"nearest-rate": NearestRate, "skip-streaks": SkipStreaks})
CONFIGURED = (
    "group_size", "round_size", "max_rounds", "decide_every", "min_pool", "mean_budget", "num_completions", "positive_threshold",
    "baseline", "scale", "degenerate", "objective", "alpha",
)  # fmt: skip


def configured(settings: Any) -> Policy:
    """Return the preset `settings.preset` with the attributes named in CONFIGURED, which may be None or missing; see `config.sampling`.

    `settings.propose` names the rule that chooses prompts; dropped prompts are refilled as in the preset.

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
