"""The protocols of a reward, and of a runner of rewards for the driver loop."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from reinforce_ada.types import Completion, Failed, Prompt, Scored


class Reward(Protocol):
    """Maps (prompt, completion text) to a finite float. It may also offer:

    - `batch(prompts, completions) -> floats`, which scores many completions in one call;
    - `prepare()`, which loads what the reward needs: called once in each worker, outside the time limit of calls, so that the first call
      has the limit of any other;
    - `timed_out(prompt, completion) -> float`, for a reward for which a call that takes too long says something about the completion, and
      is no failure of the reward. In the pool a call that exceeds its time limit ends its worker; the completion is then scored by
      `timed_out`, in a fresh worker;
    - `answer(completion)`, see `Answering`.
    """

    def __call__(self, prompt: Prompt, completion: str, /) -> float: ...


# (completion text) -> what it answers, in a form in which equal answers are equal values; None if it gives no answer.
Answer: TypeAlias = Callable[[str], Hashable | None]


@runtime_checkable
class Answering(Protocol):
    """A reward that can say what a completion answers. A majority vote over completions counts these answers."""

    def answer(self, completion: str, /) -> Hashable | None:
        """Return the answer, equal for completions that say the same; None if there is none."""


@runtime_checkable
class Diagnosed(Protocol):
    """A RewardRunner that keeps the last traceback."""

    @property
    def last_traceback(self) -> str:
        """Return the end of the traceback of the attempt that failed last, or ""."""


@runtime_checkable
class RewardRunner(Protocol):
    """The interface that the driver loop needs: submit completions, poll scores. Every submitted completion yields exactly one event."""

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        """Start scoring; prompts[i] is the prompt of completions[i]."""

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        """Return the events since the last call; wait up to `wait_s` seconds for the first one."""

    def close(self) -> None:
        """Stop the workers."""
