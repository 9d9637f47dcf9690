"""verl's replay buffer, which also gives the trainer the sampler's metrics of the step."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from reinforce_ada.integrations.verl.hooks import BUFFER
from reinforce_ada.integrations.verl.settings import TAG, TRAIN, WHERE
from reinforce_ada.sampling.metrics import joined

_LOGGED = (
    "first_round_reward", "pass_rate", "pool_reward", "signal_fraction", "samples_per_prompt", "issued_per_prompt", "waste_fraction",
    "num_satisfied", "num_exhausted", "num_voids", "num_completions_committed", "num_completions_kept",
)  # fmt: skip


class _Metrics:
    """Reads what the workers wrote on the prompts of a batch, before verl clears them; docs/metrics.md has the meaning of each."""

    def _materialize_batch(self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: Any) -> Any:
        tags = (tq.kv_list(partition_id=TRAIN) or {}).get(TRAIN, {}) if partition_id == TRAIN else {}
        found = [tags[uid][TAG] for uid in selected_prompt_uids if TAG in tags.get(uid, {})]
        self._found = {f"{TAG}/{name}": value for name, value in joined(found).items() if name in _LOGGED} if found else {}
        return super()._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)  # type: ignore[misc]

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        batch, metrics = super().sample(*args, **kwargs)  # type: ignore[misc]
        return batch, {**metrics, **self._found}


class SyncBuffer(_Metrics, ReplayBuffer):  # type: ignore[misc]
    """The replay buffer of verl's trainer mode "sync", with the sampler's metrics."""


class AsyncBuffer(_Metrics, ReplayBufferAsync):  # type: ignore[misc]
    """The replay buffer of verl's other trainer modes, with the sampler's metrics."""


def AdaptiveReplayBuffer(trainer_mode: str, **kwargs: Any) -> Any:  # noqa: N802 - verl calls it as a class
    """Return the replay buffer of this mode of verl's trainer, which adds `reinforce_ada/*` to the metrics of a step."""
    buffer = SyncBuffer if trainer_mode == "sync" else AsyncBuffer
    BUFFER.check(WHERE, ReplayBuffer)
    return buffer(trainer_mode=trainer_mode, **kwargs)
