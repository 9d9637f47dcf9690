"""The models of the engine: its slots, the time of a decode step, and the lengths of completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from reinforce_ada.config.values import Range, check_fields, option
from reinforce_ada.errors import InputError

_Cost = Annotated[float, Range(0, 10**7)]
_Tokens = Annotated[int, Range(0, 10**7)]
_Median = Annotated[float, Range(0, 10**7, above=True)]
_Spread = Annotated[float, Range(0, 10)]


@dataclass(frozen=True)
class EngineModel:
    """A continuous-batching engine.

    A decode step with `busy` sequences takes step_ms + busy_ms * busy and generates one token of each; a request of L tokens ends L steps
    after it got its slot; a free slot is filled at once. A request that starts adds prefill_ms per prompt token to the step it joins.
    `sync_ms` is spent once, before the first step.
    """

    slots: Annotated[int, Range(1, 10**6)] = option(256, "sequences decoded together")
    step_ms: _Cost = option(8.0, "time of a decode step in ms")
    busy_ms: _Cost = option(0.03, "further time for each sequence in it in ms")
    prefill_ms: _Cost = option(0.0, "further time for each prompt token of a request that starts in ms")
    prompt_tokens: _Tokens = option(0, "tokens of a prompt")
    sync_ms: _Cost = option(0.0, "time of the weight synchronisation, once, in ms")

    def __post_init__(self) -> None:
        check_fields("EngineModel", self)
        if self.step_ms == 0 == self.busy_ms:
            raise InputError("EngineModel", "step_ms 0 and busy_ms 0", "a decode step that takes time is needed")

    def decode_s(self, num_steps: float, num_tokens: float) -> float:
        """Return the seconds of `num_steps` decode steps that generate `num_tokens` tokens in all."""
        return (self.step_ms * num_steps + self.busy_ms * num_tokens) / 1e3

    def prefill_s(self, num_requests: int) -> float:
        """Return the seconds that the prompts of `num_requests` requests take."""
        return self.prefill_ms * self.prompt_tokens * num_requests / 1e3


@dataclass(frozen=True)
class LengthModel:
    """The tokens of a completion: lognormal, with a median by class and a factor per prompt.

        log L = log(median of its class) + sigma_prompt * u[prompt] + sigma * z[completion],  u, z ~ N(0, 1);  L <= max_tokens

    The default medians are 600 e^(-1/3) and 600 e^(1/6): wrong answers e^0.5 times longer, and 600 the geometric mean at pass rate 1/3.
    """

    median_correct: _Median = option(430.0, "tokens of a correct answer, median")
    median_wrong: _Median = option(709.0, "tokens of a wrong answer, median")
    sigma: _Spread = option(0.8, "spread of log tokens within a prompt")
    sigma_prompt: _Spread = option(0.55, "spread of log tokens between prompts")
    max_tokens: Annotated[int, Range(1, 10**7)] = option(4096, "longest answer")

    def __post_init__(self) -> None:
        check_fields("LengthModel", self)
