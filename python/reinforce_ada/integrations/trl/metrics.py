"""What TRL logs of a step: its plain names describe what was sampled before any decision, `sampling/selected_*` the rows that train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.integrations.trl.rounds import Rounds
from reinforce_ada.sampling import Policy
from reinforce_ada.types import SamplingResult

_LOGGED = (
    "first_round_reward", "pass_rate", "signal_fraction", "samples_per_prompt", "waste_fraction", "num_satisfied", "num_exhausted",
    "num_dropped", "num_voids",
)  # fmt: skip


def sampling_metrics(result: SamplingResult, rounds: Rounds, num_padding: int) -> dict[str, float]:
    """Return what the sampler says of a step, under `sampling/`; docs/metrics.md has the meaning of each."""
    generated = {"tokens_generated": float(sum(row.num_tokens for row in rounds.rows.values()))}
    calls = {"generate_calls": float(rounds.num_calls), "padding_rows": float(num_padding)}
    return {f"sampling/{name}": value for name, value in {**{n: result.metrics[n] for n in _LOGGED}, **generated, **calls}.items()}


def honest(result: SamplingResult, policy: Policy, rounds: Rounds, names: Sequence[str]) -> dict[str, float]:
    """Return TRL's metrics of rewards for the completions that every prompt draws whatever the outcomes.

    Kept rows were chosen for their rewards: a mean over them says nothing about the model. Means and deviations leave out nan.

    Args:
        names: of the reward functions.
    """
    first = [rounds.rows[o.id] for pool in result.pools for o in pool.outcomes[: min(policy.num_always_drawn, pool.cap)]]
    columns = dict(zip(names, np.array([row.rewards for row in first]).T, strict=True))
    total = np.array([row.reward for row in first])
    return {
        "reward": _mean(total),
        "reward_std": _deviation(total),
        "frac_reward_zero_std": 1 - result.metrics["signal_fraction"],
        **{f"rewards/{name}/mean": _mean(values) for name, values in columns.items()},
        **{f"rewards/{name}/std": _deviation(values) for name, values in columns.items()},
    }


def log(metrics: Mapping[str, list[float]], said: Mapping[str, float], selected: Mapping[str, float]) -> None:
    """Append to TRL's metrics of a step; where it has appended a number over selected rows, move that under a name of its own."""
    for name, value in selected.items():
        if metrics.get(name):
            metrics[f"sampling/selected_{name}"].append(metrics[name][-1])
            metrics[name][-1] = value
    for name, value in said.items():
        metrics[name].append(value)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _deviation(values: NDArray[np.float64]) -> float:
    """Return the sample's standard deviation, as TRL computes it."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else math.nan
