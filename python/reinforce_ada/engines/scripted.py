"""An engine with predetermined output, for tests and examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from reinforce_ada.engines.base import LocalEngine
from reinforce_ada.errors import InputError
from reinforce_ada.types import Completion, CompletionId, Request


class ScriptedEngine(LocalEngine):
    """An engine that answers from a script, in a chosen order of finishing.

    Args:
        script: prompt_id -> outcomes such as "+-+-", where completion k is the k-th character (repeating past the end), or a function of
            the request that returns the text.
        slots: the requests that it holds at once.
        num_per_poll: how many requests finish at each poll; None finishes all that are running.
        shuffle_seed: requests finish in an order drawn from this seed; None finishes them in the order of submission.
    Attributes: num_submitted, num_finished, num_aborted, max_running: counts over its life.
    """

    def __init__(
        self,
        script: Mapping[str, str] | Callable[[Request], str],
        *,
        slots: int = 64,
        num_per_poll: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if slots < 1 or (num_per_poll is not None and num_per_poll < 1):
            raise InputError("ScriptedEngine", f"slots {slots}, num_per_poll {num_per_poll}", "at least 1 of each is needed")
        super().__init__("ScriptedEngine", slots)
        self._text = script if callable(script) else _outcome_of(script)
        self._num_per_poll = num_per_poll
        self._rng = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        self.num_submitted = self.num_finished = self.num_aborted = self.max_running = 0

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.num_submitted += len(requests)
        self.max_running = max(self.max_running, len(self._running))

    def poll(self) -> list[Completion]:
        """Return the next `num_per_poll` completions."""
        ids = list(self._running)
        if self._rng is not None:
            ids = [ids[i] for i in self._rng.permutation(len(ids))]
        requests = [self._running.pop(i) for i in ids[: self._num_per_poll]]
        self.num_finished += len(requests)
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        """Return the scripted text as a completion. Its tokens are the UTF-8 bytes of the text, with log-probability 0 each."""
        text = self._text(request)
        token_ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
        return Completion(request.id, token_ids, np.zeros(len(token_ids), np.float32), text, "stop", self._policy_version)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        before = len(self._running)
        super().abort(ids)
        self.num_aborted += before - len(self._running)


def _outcome_of(script: Mapping[str, str]) -> Callable[[Request], str]:
    for prompt_id, outcomes in script.items():
        if not outcomes:
            raise InputError("ScriptedEngine", f"no outcomes for prompt {prompt_id!r}", "at least one character is needed")
    return lambda request: script[request.id.prompt_id][request.id.index % len(script[request.id.prompt_id])]
