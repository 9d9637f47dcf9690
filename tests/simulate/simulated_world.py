"""Helpers of the simulator's tests: worlds written down by hand, and the sampler that takes answers as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import Counts, Policy, Verdict
from reinforce_ada.simulate.engine_model import LengthModel
from reinforce_ada.simulate.population import World
from reinforce_ada.types import CompletionId, Prompt, Request, Scored


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Check that the block raises InputError with this text in its message."""
    with pytest.raises(InputError) as e:
        yield
    assert message in str(e.value)


class ScriptedWorld(World):
    """A world with given outcomes and lengths: a text of + and -, and the tokens of each completion, for every prompt."""

    def __init__(self, outcomes: list[str], tokens: list[list[int]]) -> None:
        super().__init__(np.zeros(len(outcomes)), LengthModel(), 0)
        self._correct = np.array([[char == "+" for char in text] for text in outcomes])
        self._tokens = np.array(tokens)

    def draw(self, prompt_of: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        return self._correct[prompt_of, index], self._tokens[prompt_of, index]


class CompletionOrder:
    """The ablation in which answers enter the pool as they finish, short ones first, with `window` requests of each prompt out."""

    def __init__(self, num_prompts: int, policy: Policy, window: int) -> None:
        self._policy, self._window = policy, window
        self._counts = [Counts(0, 0)] * num_prompts
        self._issued = [0] * num_prompts
        self._out: list[set[int]] = [set() for _ in range(num_prompts)]
        self._open = set(range(num_prompts))
        self.taken: list[tuple[int, int]] = []  # (prompt, index), in the order of the pools

    @property
    def done(self) -> bool:
        return not self._open

    def next_requests(self, free_slots: int) -> list[Request]:
        found: list[Request] = []
        while len(found) < free_slots:
            able = [p for p in self._open if len(self._out[p]) < self._window and self._issued[p] < self._policy.cap]
            if not able:
                break
            prompt = min(able, key=lambda p: (self._issued[p], p))
            found.append(Request(CompletionId(0, str(prompt), self._issued[prompt]), Prompt(str(prompt)), 0, 0))
            self._out[prompt].add(self._issued[prompt])
            self._issued[prompt] += 1
        return found

    def receive(self, event: Scored) -> list[CompletionId]:
        prompt = int(event.id.prompt_id)
        if prompt not in self._open:
            return []
        correct, wrong, _ = self._counts[prompt]
        self._counts[prompt] = counts = Counts(correct + (event.reward > 0), wrong + (event.reward == 0))
        self._out[prompt].discard(event.id.index)
        self.taken.append((prompt, event.id.index))
        if self._policy.verdict(counts) is Verdict.CONTINUE and counts.committed < self._policy.cap:
            return []
        self._open.discard(prompt)
        return [CompletionId(0, str(prompt), other) for other in sorted(self._out[prompt])]

    def committed(self, prompt_id: str) -> int:
        return self._counts[int(prompt_id)].committed
