"""The rollout store: the journal of a run and the source of its report. Imports no torch."""

from __future__ import annotations

from reinforce_ada.rollouts.sample import Excerpt, SampledCompletion, SampledPool
from reinforce_ada.rollouts.store import PoolCounts, RolloutStore, Seen

__all__ = ["Excerpt", "PoolCounts", "RolloutStore", "SampledCompletion", "SampledPool", "Seen"]
