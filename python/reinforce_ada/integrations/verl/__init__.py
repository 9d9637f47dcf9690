"""Adaptive sampling in verl's trainer, by configuration alone: no line of verl or of a training script changes (docs/verl.md).

    algorithm.adv_estimator=reinforce_ada
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=reinforce_ada.integrations.verl.AdaptiveAgentLoopManager
    trainer.v1.sampler.custom_sampler.path=pkg://reinforce_ada.integrations.verl
    trainer.v1.sampler.custom_sampler.name=AdaptiveReplayBuffer
    +reinforce_ada.preset=reinforce-ada-balance

Importing this package imports neither verl nor torch; the classes above are imported when verl asks for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"AdaptiveAgentLoopManager": "manager", "AdaptiveAgentLoopWorker": "worker", "AdaptiveReplayBuffer": "replay_buffer"}

__all__ = ["AdaptiveAgentLoopManager", "AdaptiveAgentLoopWorker", "AdaptiveReplayBuffer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
