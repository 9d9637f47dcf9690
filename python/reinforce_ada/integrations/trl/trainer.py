"""The part that stands before a GRPOTrainer: sample first, then play back what was kept.

Three methods are overridden, and each falls back to TRL's own, which does the work of every round. Tokenisation, chat templates, vLLM,
adapters and reward functions of every kind are therefore TRL's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.trl import metrics
from reinforce_ada.integrations.trl.checks import Adaptive, check, check_no_images, policy_of
from reinforce_ada.integrations.trl.playback import Playback, kept_rows
from reinforce_ada.integrations.trl.rounds import Rounds
from reinforce_ada.integrations.trl.stream import Stream, can_stream
from reinforce_ada.sampling import AdaptiveSampler, Memory
from reinforce_ada.types import Prompt, SamplingResult

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # the one that is meant comes behind this class, see `adaptive`


class AdaptiveSampling(GRPOTrainer):  # type: ignore[misc]  # TRL has no types
    """Adaptive sampling for the GRPOTrainer that follows in the order of bases; see `adaptive`."""

    def __init__(self, *args: Any, adaptive: Adaptive = "reinforce-ada-balance", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sampling_policy = policy_of(adaptive, self.num_generations)
        check(self, self._sampling_policy)
        self._sampling_state = SamplingState()
        self._playback: Playback | None = None
        self.sampling_result: SamplingResult | None = None  # of the latest generation
        self.add_callback(self._sampling_state)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        rounds = (Stream if can_stream(self) else Rounds)(self, super()._generate, super()._calculate_rewards)
        result = self._sample(inputs, rounds)
        kept = kept_rows(result, self._sampling_policy, rounds.rows)
        self._playback = playback = Playback(kept, rounds, len(inputs), self.accelerator.process_index)
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._playback = None
        playback.correct(batch, self.accelerator.gather)
        self._log(result, rounds, playback)
        return batch

    def _generate(self, prompts: list[Any]) -> Any:
        return super()._generate(prompts) if self._playback is None else self._playback.generated()

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        if self._playback is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, values in self._playback.extra_logs().items():
            self._pending_extra_logs[name].extend(values)
        return self._playback.rewards().to(self.accelerator.device)

    def _sample(self, inputs: Sequence[Mapping[str, Any]], rounds: Rounds) -> SamplingResult:
        """Return the pools of a step, the same on every process."""
        state = self._sampling_state
        prompts = rounds.tokenized(_prompts(gather_object(list(inputs)), self.num_generations))
        sampler = AdaptiveSampler(
            prompts, self._sampling_policy, step=state.step, schedule=rounds.schedule, window=rounds.window(self._sampling_policy),
            seed=self.args.seed, memory=state.memory,
        )  # fmt: skip
        result = rounds.run(sampler)
        state.finish(result if self._sampling_policy.needs_memory else None)
        self.sampling_result = result
        return result

    def _log(self, result: SamplingResult, rounds: Rounds, playback: Playback) -> None:
        said = metrics.sampling_metrics(result, rounds, playback.num_padding)
        selected = metrics.honest(result, self._sampling_policy, rounds, self.reward_func_names)
        metrics.log(self._metrics["train"], said, selected)
        logged = self._logs["advantages"]  # TRL has just appended its own to this table of completions
        for _ in range(min(len(playback.advantages), len(logged))):
            logged.pop()
        logged.extend(playback.advantages)


def _prompts(rows: Sequence[Mapping[str, Any]], num_generations: int) -> list[Prompt]:
    """Return a prompt for each group of rows. Raises: InputError for rows that do not come in groups, and for images."""
    check_no_images(rows[0])
    firsts = rows[::num_generations]
    if len(rows) % num_generations or any(row["prompt"] != firsts[i // num_generations]["prompt"] for i, row in enumerate(rows)):
        given = f"{len(rows)} rows that do not come in groups"
        raise InputError("adaptive", given, f"num_generations {num_generations} rows of each prompt in a row are needed")
    return [Prompt(str(i), data=row, key=_key(row)) for i, row in enumerate(firsts)]


def _key(row: Mapping[str, Any]) -> str:
    """Return what a policy's memory knows a row by: 16 hexadecimal digits of its content."""
    content = json.dumps(dict(row), sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


class SamplingState(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers has no types
    """The sampler's step and what the policy remembers, saved in and restored from the state of TRL's checkpoints."""

    def __init__(self) -> None:
        self.step = 0
        self.memory = Memory()

    def finish(self, result: SamplingResult | None) -> None:
        """End a step, and remember its pools where the policy looks back."""
        if result is not None:
            self.memory.update(self.step, result.pools)
        self.step += 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"args": {}, "attributes": {"step": self.step, "memory": self.memory.state()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint; one of a trainer without adaptive sampling has nothing to say."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.step, self.memory = saved["step"], Memory.from_state(saved["memory"])
