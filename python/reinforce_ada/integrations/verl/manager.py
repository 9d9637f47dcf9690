"""verl's agent loop manager with adaptive workers; it runs in the process of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils.tensordict_utils import assign_non_tensor_stack

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.verl import plugin  # noqa: F401 - it registers the estimator, if verl found no entry point
from reinforce_ada.integrations.verl.hooks import LOOP, WORKER
from reinforce_ada.integrations.verl.memory import RunMemory, key_of_chat
from reinforce_ada.integrations.verl.settings import HISTORY, WHERE, check, settings_of
from reinforce_ada.integrations.verl.worker import AdaptiveAgentLoopWorker


class AdaptiveAgentLoopManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """Checks the settings, makes adaptive workers, and keeps the memory of a policy that has one.

    Raises: InputError, when the trainer makes it, for settings that cannot be combined and for a verl whose hooks are others.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        for hooks in (WORKER, LOOP):
            hooks.check(WHERE, AdaptiveAgentLoopWorker.__base__)
        super().__init__(config, *args, **kwargs)
        settings = settings_of(config)
        check(config, settings.policy, has_rewards=self.reward_loop_worker_handles is not None)
        self.agent_loop_workers_class = ray.remote(AdaptiveAgentLoopWorker)
        remembers = settings.policy.needs_memory
        self._memory = RunMemory(Path(config.trainer.default_local_dir, "reinforce_ada_memory.jsonl")) if remembers else None

    def generate_sequences(self, prompts: Any) -> None:
        """Give the prompts to the workers and return at once, as verl's own manager does.

        Raises: InputError for training prompts with an n of their own, and for messages that cannot be remembered.
        """
        if not self._is_validation(prompts):
            if "__rollout_n__" in prompts:
                raise InputError(WHERE, "prompts with an n of their own", "the policy decides how many sessions one gets")
            if self._memory is not None:
                self._add_histories(prompts, self._memory)
        super().generate_sequences(prompts)

    @staticmethod
    def _is_validation(prompts: Any) -> bool:
        if "validate" not in prompts:
            return False
        return bool(prompts["validate"])  # get() would return verl's wrapper of the value

    def _add_histories(self, prompts: Any, memory: RunMemory) -> None:
        memory.open(int(prompts["global_steps"]))
        memory.add(seen for rows in ray.get([worker.take_seen.remote() for worker in self.agent_loop_workers]) for seen in rows)
        keys = [key_of_chat(chat) for chat in prompts["raw_prompt"]]
        assign_non_tensor_stack(prompts, HISTORY, [[key, *memory.history(key)] for key in keys])
