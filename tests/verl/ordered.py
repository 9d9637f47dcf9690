"""The replay buffer of reinforce_ada with the rows in the order of the data, so that two runs can be compared."""

from __future__ import annotations

from typing import Any

from verl_on_cpu_rollout import OrderedReplayBuffer

from reinforce_ada.integrations.verl.replay_buffer import SyncBuffer


class OrderedAdaptiveReplayBuffer(OrderedReplayBuffer, SyncBuffer):  # type: ignore[misc]
    """Both: the rows are sorted, and the sampler's metrics are added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
