"""The memory of each prompt across steps: a Beta posterior of its pass rate that fades, and its streak of one-class pools."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.sampling.policies.contracts import History
from reinforce_ada.types import Pool, Prompt


class Memory:
    """The memory across steps: a fold over the pools of the finished steps, by `Prompt.key`.

        a = 1 + sum_j decay^(t - t_j) * correct_j,   b = 1 + sum_j decay^(t - t_j) * wrong_j

    The sums run over the prompt's pools j at steps t_j, and t is the last step added; without new pools the posterior returns to
    Beta(1, 1), where it started. A pool that stopped because of its outcomes does not bias a posterior: the stopping rule is not in the
    likelihood. The same pools in the same order give the same memory to the bit, whether they are added one by one or all at once.

    Args:
        decay: the factor per step on the counts, in (0, 1]; half is left after ln 2 / (1 - decay) steps.

    Columns and one dictionary take under 200 bytes a prompt with keys of 16 characters; `history` is O(1).
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay <= 1:
            raise InputError("Memory", f"decay {decay}", "a number in (0, 1] is needed")
        self.decay = decay
        self.step: int | None = None  # the last one added
        self._row_of: dict[str, int] = {}
        self._correct = array("d")  # as of the prompt's own last step
        self._wrong = array("d")
        self._seen_at = array("q")
        self._streak = array("i")  # pools in a row with one class: above 0 all correct, below 0 all wrong

    def __len__(self) -> int:
        """Return the number of prompts that are remembered."""
        return len(self._row_of)

    def history(self, prompt: Prompt, /) -> History:
        """Return the history of a prompt, as of the last step added; the prior for a prompt never seen."""
        row = self._row_of.get(key_of(prompt))
        if row is None or self.step is None:
            return History()
        left = self.decay ** (self.step - self._seen_at[row])
        streak = self._streak[row]
        return History(1 + left * self._correct[row], 1 + left * self._wrong[row], abs(streak), streak > 0)

    def update(self, step: int, pools: Iterable[Pool]) -> None:
        """Add the pools of a finished step, in their order."""
        self.advance(step)
        for pool in pools:
            self.add(step, key_of(pool.prompt), pool.num_correct, pool.num_wrong)

    def advance(self, step: int) -> None:
        """Move time forward to this step. Raises: InputError for a step before the last one added."""
        if self.step is not None and step < self.step:
            raise InputError("Memory", f"step {step} after step {self.step}", "steps in order are needed", "build it anew from the store")
        self.step = step

    def add(self, step: int, key: str, num_correct: int, num_wrong: int) -> None:
        """Add one pool; a pool without scored completions changes nothing. Raises: InputError for a step before the last one added."""
        self.advance(step)
        if num_correct + num_wrong == 0:
            return
        row = self._row_of.setdefault(key, len(self._row_of))
        if row == len(self._correct):
            self._correct.append(0.0)
            self._wrong.append(0.0)
            self._seen_at.append(step)
            self._streak.append(0)
        left = self.decay ** (step - self._seen_at[row])
        self._correct[row] = left * self._correct[row] + num_correct
        self._wrong[row] = left * self._wrong[row] + num_wrong
        self._seen_at[row] = step
        self._streak[row] = _streak(self._streak[row], num_correct, num_wrong)

    def state(self) -> dict[str, Any]:
        """Return everything that is remembered as what JSON has, for a checkpoint; `from_state` is the way back, to the bit."""
        rows = zip(self._row_of, self._correct, self._wrong, self._seen_at, self._streak, strict=True)
        return {"decay": self.decay, "step": self.step, "rows": [list(row) for row in rows]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Memory:
        """Return the memory that gave this state."""
        memory = cls(state["decay"])
        memory.step = state["step"]
        columns: tuple[array[Any], ...] = (memory._correct, memory._wrong, memory._seen_at, memory._streak)
        for key, *values in state["rows"]:
            memory._row_of[key] = len(memory._row_of)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return memory


def key_of(prompt: Prompt) -> str:
    """Return the key under which a prompt is remembered."""
    return prompt.key or prompt.prompt_id


def _streak(before: int, num_correct: int, num_wrong: int) -> int:
    if num_correct and num_wrong:
        return 0
    return max(before, 0) + 1 if num_correct else min(before, 0) - 1
