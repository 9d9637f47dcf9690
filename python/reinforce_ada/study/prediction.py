"""What the exact statistics say of every arm before it has trained, from the held-out pass rates of the untrained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.explain.efficiency import Efficiency, PassRates, efficiency, expected
from reinforce_ada.sampling import History, Policy, Verdict, stopping_table
from reinforce_ada.sampling.statistics import Terminal, samples, signal
from reinforce_ada.study.settings import Arm, Study, policy_of


@dataclass(frozen=True)
class Prediction:
    """Exact expectations of an arm over prompts with the pass rates of the untrained model."""

    arm: str
    prompts_per_step: int
    completions_per_prompt: float
    signal: float  # probability that both classes are in a pool
    efficiency: Efficiency | None = None  # None for an arm without w(p)


def predict(study: Study, arm: Arm, rates: PassRates) -> Prediction:
    """Return the prediction for an arm, and its prompts per step."""
    policy = policy_of(study.shared, arm)
    completions, with_signal = expected_pool(policy, rates)
    if study.budget.completions_per_step is None:
        num_prompts = configuration.load(None, {**study.shared, **arm.keys}).sampling.prompts_per_step
    else:
        num_prompts = max(1, round(study.budget.completions_per_step / completions))
    return Prediction(arm.name, num_prompts, completions, with_signal, _efficiency(policy, rates, study.remembered))


def relative(predictions: Sequence[Prediction], baseline: str, name: str) -> dict[str, float]:
    """Return an efficiency of each arm relative to that of the baseline, nan where one of the two has none.

    Args:
        name: of the method of `Efficiency`, "per_generated" or "per_trained".
    """
    found = {p.arm: math.nan if p.efficiency is None else float(getattr(p.efficiency, name)()) for p in predictions}
    reference = found.get(baseline, math.nan)
    return {arm: value / reference if reference else math.nan for arm, value in found.items()}


def expected_pool(policy: Policy, rates: PassRates) -> tuple[float, float]:
    """Return the expected completions per wanted prompt, and P(both classes in the pool).

    If dropped prompts are replaced, the completions of the replacements are included: 1 / P(kept) prompts enter for each that is wanted,
    up to the policy's limit.
    """
    table = stopping_table(policy, policy.allocate.budgets([History()])[0])
    completions, with_signal, dropped = (expected(table, value, rates) for value in (samples, signal, _is_dropped))
    if policy.refills:
        most = float(getattr(policy.propose, "max_prompts_factor", math.inf))
        completions *= min(1 / (1 - dropped) if dropped < 1 else math.inf, most)
    return completions, with_signal


def _is_dropped(terminal: Terminal) -> float:
    return float(terminal.verdict is Verdict.DROP)


def _efficiency(policy: Policy, rates: PassRates, remembered: int) -> Efficiency | None:
    try:
        return efficiency(policy, rates, remembered=remembered if policy.weight_needs_memory else 0)
    except InputError:  # without w(p)
        return None
