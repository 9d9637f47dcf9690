"""A sampler's requests, answered without rounds by the vLLM that TRL has in this process: a prompt that exits frees its slots at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reinforce_ada.driver import run
from reinforce_ada.engines.vllm import VllmEngine
from reinforce_ada.integrations.trl.rounds import Rounds, event_of
from reinforce_ada.sampling import AdaptiveSampler, Policy, PosteriorWindow
from reinforce_ada.types import Completion, Failed, Prompt, SamplingResult, Scored

# What VllmEngine samples from: the model's own distribution at a temperature. TRL 1.0 to 1.16 have these in both places.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


def can_stream(trainer: Any) -> bool:
    """Return whether TRL has a vLLM in this process, the only one, that samples from the model's own distribution."""
    vllm = getattr(trainer, "vllm_generation", None)
    if vllm is None or trainer.vllm_mode != "colocate" or trainer.accelerator.num_processes > 1 or trainer.rollout_func is not None:
        return False
    is_plain = not (vllm.enable_sleep_mode or vllm.generation_kwargs or vllm.structured_outputs_regex)
    return is_plain and all(getattr(trainer, name) in values for name, values in _NEUTRAL.items())


class Stream(Rounds):
    """Drives one sampler to its end with TRL's own vLLM; TRL decodes and scores what it finishes.

    Most requests wait for nothing but a slot. It is for one process: there is no lock-step.
    """

    schedule = "stream"

    def window(self, policy: Policy) -> PosteriorWindow:
        """Return how far ahead of its committed prefix a prompt is asked: as far as it will probably need."""
        return PosteriorWindow(policy)

    def tokenized(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts with the tokens that TRL makes of them."""
        token_ids = self._trainer._tokenize_prompts([prompt.data["prompt"] for prompt in prompts])[0]
        return [replace(prompt, token_ids=tuple(ids)) for prompt, ids in zip(prompts, token_ids, strict=True)]

    def run(self, sampler: AdaptiveSampler) -> SamplingResult:
        """Return the result of the sampler."""
        trainer = self._trainer
        if trainer.state.global_step != trainer._last_loaded_step:  # TRL would load them with the first answer, when it has been sampled
            trainer.vllm_generation.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        vllm = trainer.vllm_generation
        engine = VllmEngine.around(
            vllm.llm, max_tokens=trainer.max_completion_length, max_num_seqs=vllm.max_num_seqs, temperature=trainer.temperature
        )
        return run(sampler, engine, _Scores(self))

    def scored(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Scored | Failed]:
        """Return an event for each completion: TRL takes their tokens as those of a rollout_func, decodes and scores them."""
        inputs = [dict(prompt.data) for prompt in prompts]
        rollouts = {
            "prompt_ids": [list(prompt.token_ids) for prompt in prompts],
            "completion_ids": [completion.token_ids.tolist() for completion in completions],
            "logprobs": [completion.rollout_logprobs.tolist() for completion in completions],
        }
        self._trainer.rollout_func = lambda prompts, trainer: rollouts
        try:
            rows = self._answer(inputs)
        finally:
            self._trainer.rollout_func = None
        self.num_calls += 1
        self.rows.update((completion.id, row) for completion, row in zip(completions, rows, strict=True))
        return [event_of(completion.id, row) for completion, row in zip(completions, rows, strict=True)]


class _Scores:
    """The runner of rewards that the driver asks: it scores at once."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._events: list[Scored | Failed] = []

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        self._events += self._stream.scored(prompts, completions)

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Stop nothing."""
