"""The reward of the sums: what `reward.custom_reward_function.path` names."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any) -> float:
    """Return 1.0 if the completion is the sum and nothing else, otherwise 0.0."""
    return float(solution_str.strip() == ground_truth)
