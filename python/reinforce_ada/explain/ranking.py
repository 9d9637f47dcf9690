"""Which policy makes the most progress for its cost: the exact efficiencies of policies side by side, for a cost of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reinforce_ada.explain.costs import Costs
from reinforce_ada.explain.efficiency import PassRates, efficiency
from reinforce_ada.explain.page import Explanation
from reinforce_ada.sampling import preset

Populations = Mapping[str, PassRates]  # name -> pass rates of its prompts


def ranking_record(e: Explanation, populations: Populations, costs: Costs) -> list[dict[str, str | float]]:
    """Return the efficiencies of a policy over each population, relative to GRPO with groups of 8 without a scale."""
    return [{"population": name, **_relative(e, rates, costs)} for name, rates in populations.items()]


def _relative(e: Explanation, rates: PassRates, costs: Costs) -> dict[str, float]:
    remembered = costs.remembered if e.policy.weight_needs_memory else 0
    found = efficiency(e.policy, rates, remembered=remembered, score_variance=costs.score_variance)
    reference = efficiency(preset("grpo", scale="none"), rates, score_variance=costs.score_variance)
    return {
        "generated": found.generated,
        "trained": found.trained,
        "per_generated": _quotient(found.per_generated(), reference.per_generated()),
        "per_trained": _quotient(found.per_trained(), reference.per_trained()),
        "per_cost": _quotient(found.per_cost(costs.cost_ratio), reference.per_cost(costs.cost_ratio)),
    }


def _quotient(value: float, reference: float) -> float:
    return value / reference if reference else 0.0


def ranking_page(explanations: Sequence[Explanation], populations: Populations, costs: Costs) -> str:
    """Return the printout: policies by their mean efficiency at the cost ratio, the best first, and which leads on each axis."""
    found = {e.label: [_relative(e, rates, costs) for rates in populations.values()] for e in explanations if e.weight is not None}
    left_out = [e.label for e in explanations if e.weight is None]
    order = sorted(found, key=lambda label: -_mean(found[label], "per_cost"))
    title = "best first by the mean of C"
    width = max(map(len, [title, *found])) + 2
    lines = [
        "Progress at equal cost along the gradient of the mean pass rate, relative to grpo (groups of 8) with scale none.",
        "  G  per generated completion",
        "  T  per trained completion",
        f"  C  at the cost of both, if training on a completion costs {costs.cost_ratio:.3g} times as much as generating one",
        "",
        f"{'':<{width}}" + "".join(f"{name:>22}" for name in populations),
        f"{title:<{width}}" + "".join(f"{'G':>8}{'T':>7}{'C':>7}" for _ in populations),
    ]
    for label in order:
        cells = "".join(f"{row['per_generated']:>8.2f}{row['per_trained']:>7.2f}{row['per_cost']:>7.2f}" for row in found[label])
        lines.append(f"{label:<{width}}" + cells)
    if len(order) > 1:
        lines += ["", *_leaders(found)]
    lines += ["", *(f"  {label}: no w(p), so that it has no efficiency" for label in left_out), *_assumptions(costs)]
    return "\n".join(lines) + "\n"


def _leaders(found: dict[str, list[dict[str, float]]]) -> list[str]:
    axes = {"per_generated": "generated completion", "per_trained": "trained completion", "per_cost": "cost of both"}
    return [f"  most progress per {axis}: {max(found, key=lambda label: _mean(found[label], key))}" for key, axis in axes.items()]


def _assumptions(costs: Costs) -> list[str]:
    return [
        f"  Assumed: scores of variance {costs.score_variance:g} within a class (--score-variance), where |grad p| = p (1 - p);",
        f"  {costs.remembered} earlier completions of each prompt where the baseline is the memory (--remembered);",
        "  gradients of different prompts that have little in common.",
        "  A budget that depends on earlier steps is that of a prompt not seen before.",
    ]


def _mean(rows: Sequence[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
