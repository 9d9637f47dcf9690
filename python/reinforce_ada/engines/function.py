"""An engine that wraps your own generate function, for adaptive sampling in an existing trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np

from reinforce_ada.engines.base import LocalEngine
from reinforce_ada.errors import InputError
from reinforce_ada.outside import is_utf8, one_line
from reinforce_ada.types import Completion, Prompt, Request


class FunctionEngine(LocalEngine):
    """An engine around your own batched generate function. Weights and tokens stay yours, so its completions carry text only.

    Args:
        generate: (prompts, seeds) -> texts, one each, from a prompt's `text` or `token_ids`; seeds are in [0, 2**63).
        batch_size: the most prompts in one call.
    """

    def __init__(self, generate: Callable[[Sequence[Prompt], Sequence[int]], Sequence[str]], *, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError("FunctionEngine", f"batch_size {batch_size}", "at least 1 is needed")
        if any(map(inspect.iscoroutinefunction, (generate, getattr(generate, "__call__", None)))):  # noqa: B004 - the method itself
            hint = "await it inside the sample function of reinforce_ada.arun"
            raise InputError("FunctionEngine", "an async generate function", "nobody awaits it: one that returns texts is needed", hint)
        super().__init__("FunctionEngine", batch_size)
        self._generate = generate

    def poll(self) -> list[Completion]:
        """Call `generate` once with all waiting requests."""
        requests, self._running = list(self._running.values()), {}
        if not requests:
            return []
        texts = self._generate([r.prompt for r in requests], [r.seed for r in requests])
        if isinstance(texts, str | bytes) or not hasattr(texts, "__len__") or len(texts) != len(requests):
            given = f"{len(texts)} texts" if isinstance(texts, list | tuple) else f"a {type(texts).__name__}"
            raise InputError("FunctionEngine", f"{given} from generate for {len(requests)} prompts", "one each is needed")
        return [self._complete(request, text) for request, text in zip(requests, texts, strict=True)]

    def _complete(self, request: Request, text: str) -> Completion:
        if not isinstance(text, str) or not is_utf8(text):
            raise InputError("FunctionEngine", f"{one_line(repr(text), 80)} from generate", "a text is needed")
        return Completion(request.id, np.empty(0, np.int32), np.empty(0, np.float32), text, "stop", self._policy_version)
