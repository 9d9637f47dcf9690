"""The models of the engine: its slots, the time of a decode step, and the lengths of completions."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line


def check_range(where: str, name: str, value: float, low: float, high: float, *, strict: bool = False) -> None:
    """Raise InputError unless `value` is a number from `low` (above it if `strict`) to `high`."""
    if low < value <= high or (value == low and not strict):
        return
    needed = (
        f"at most {high:g} is possible" if value > high else f"a finite number {'above' if strict else 'of at least'} {low:g} is needed"
    )
    raise InputError(where, f"{name} {one_line(str(value), 40)}", needed)


def _number(default: float, about: str) -> Any:
    """Declare a number of a model: its default and the line that `--help` prints."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class EngineModel:
    """A continuous-batching engine.

    A decode step with `busy` sequences takes step_ms + busy_ms * busy and generates one token of each; a request of L tokens ends L steps
    after it got its slot; a free slot is filled at once. A request that starts adds prefill_ms per prompt token to the step it joins.
    `sync_ms` is spent once, before the first step.
    """

    slots: int = _number(256, "sequences decoded together")
    step_ms: float = _number(8.0, "time of a decode step")
    busy_ms: float = _number(0.03, "further time for each sequence in it")
    prefill_ms: float = _number(0.0, "further time for each prompt token of a request that starts")
    prompt_tokens: int = _number(0, "tokens of a prompt")
    sync_ms: float = _number(0.0, "weight synchronisation, once")

    def __post_init__(self) -> None:
        check_range("EngineModel", "slots", self.slots, 1, 1e6)
        for f in fields(self)[1:]:
            check_range("EngineModel", f.name, getattr(self, f.name), 0, 1e7)
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

    median_correct: float = _number(430.0, "tokens of a correct answer, median")
    median_wrong: float = _number(709.0, "tokens of a wrong answer, median")
    sigma: float = _number(0.8, "spread of log tokens within a prompt")
    sigma_prompt: float = _number(0.55, "spread of log tokens between prompts")
    max_tokens: int = _number(4096, "longest answer")

    def __post_init__(self) -> None:
        check_range("LengthModel", "median_correct", self.median_correct, 0, 1e7, strict=True)
        check_range("LengthModel", "median_wrong", self.median_wrong, 0, 1e7, strict=True)
        check_range("LengthModel", "sigma", self.sigma, 0, 10)
        check_range("LengthModel", "sigma_prompt", self.sigma_prompt, 0, 10)
        check_range("LengthModel", "max_tokens", self.max_tokens, 1, 1e7)
