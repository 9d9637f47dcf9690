"""Scoring in this process, for cheap, well-behaved rewards. A reward that can hang needs a process pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.loading import as_reward, check_reward, describe
from reinforce_ada.rewards.protocol import Reward
from reinforce_ada.types import Completion, Failed, Prompt, Scored

_log = logging.getLogger(__name__)


class InlineRewards:
    """A RewardRunner around a plain callable (prompt, text) -> float.

    After an exception, a `sys.exit()` or a result that is not a finite float the call is tried again, `max_attempts` times in all, and then
    becomes a Failed. The first traceback is logged as a warning; of later ones only the message is kept, in the event.
    Raises: InputError for anything that cannot be called like this, for example an async function.
    """

    def __init__(self, reward: Reward, *, max_attempts: int = 3) -> None:
        if max_attempts < 1:
            raise InputError("InlineRewards", f"max_attempts {max_attempts}", "at least 1 is needed")
        check_reward(reward, repr(reward))
        self._reward = reward
        self._max_attempts = max_attempts
        self._pending: list[tuple[Prompt, Completion]] = []
        self.last_traceback = ""  # of the attempt that failed last

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        self._pending.extend(zip(prompts, completions, strict=True))

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        """Score everything submitted since the last call."""
        pending, self._pending = self._pending, []
        return [self._score(prompt, completion) for prompt, completion in pending]

    def close(self) -> None:
        self._pending = []

    def _score(self, prompt: Prompt, completion: Completion) -> Scored | Failed:
        reason = ""
        for _ in range(self._max_attempts):
            try:
                return Scored(completion, as_reward(self._reward(prompt, completion.text)))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # anything that a reward raises is its own failure, not the run's
                reason, trace = describe(error)
                if not self.last_traceback:
                    _log.warning("a reward failed (shown once): %s", reason, exc_info=error)
                self.last_traceback = trace
        return Failed(completion.id, completion.policy_version, f"{reason} ({self._max_attempts} attempts)")
