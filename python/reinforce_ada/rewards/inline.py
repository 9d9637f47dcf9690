"""Scores in this process: for cheap, well-behaved rewards. A reward that can hang needs a process pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.protocol import Reward
from reinforce_ada.rewards.worker import as_reward
from reinforce_ada.types import Completion, Failed, Prompt, Scored

_log = logging.getLogger("reinforce_ada")


class InlineRewards:
    """A RewardRunner around a plain callable (prompt, text) -> float.

    An exception or a result that is no finite float is tried again, `max_attempts` times in all, and then becomes a Failed. The first
    traceback is logged as a warning; of later ones only the message is kept, in the event.
    """

    def __init__(self, reward: Reward, *, max_attempts: int = 3) -> None:
        if max_attempts < 1:
            raise InputError("InlineRewards", f"max_attempts {max_attempts}", "at least 1 is needed")
        self._reward = reward
        self._max_attempts = max_attempts
        self._pending: list[tuple[Prompt, Completion]] = []
        self._warned = False

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        """Start scoring; prompts[i] is the prompt of completions[i]."""
        self._pending.extend(zip(prompts, completions, strict=True))

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        """Score everything submitted since the last call."""
        pending, self._pending = self._pending, []
        return [self._score(prompt, completion) for prompt, completion in pending]

    def close(self) -> None:
        """Forget what has not been scored."""
        self._pending = []

    def _score(self, prompt: Prompt, completion: Completion) -> Scored | Failed:
        reason = ""
        for _ in range(self._max_attempts):
            try:
                return Scored(completion, as_reward(self._reward(prompt, completion.text)))
            except Exception as error:  # whatever a reward raises is its own failure, not the run's
                reason = f"{type(error).__name__}: {error}"
                self._warn(reason, error)
        return Failed(completion.id, completion.policy_version, f"{reason} ({self._max_attempts} attempts)")

    def _warn(self, reason: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("a reward failed (shown once): %s", reason, exc_info=error)
