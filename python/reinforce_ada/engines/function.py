"""An engine that wraps your own generate function, for adaptive sampling in an existing trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.engines.base import LocalEngine, wrong_logprob
from reinforce_ada.errors import InputError
from reinforce_ada.outside import is_utf8, one_line
from reinforce_ada.types import Completion, Prompt, Request

_WHERE = "FunctionEngine"
_FORMS = "a text, or (text, token_ids, logprobs), for each prompt is needed"

# What `generate` returns for one prompt.
Generated: TypeAlias = "str | tuple[str, Sequence[int], Sequence[float]]"


class FunctionEngine(LocalEngine):
    """An engine around your own batched generate function. Loading weights into it stays your affair.

    Args:
        generate: (prompts, seeds) -> one answer for each prompt, from its `text` or `token_ids`; seeds are in [0, 2**63). An answer is

            - a text; its completion then carries no tokens, which is enough for pools and advantages; or
            - (text, token_ids, logprobs): the L >= 1 tokens that were sampled, the end token among them, as L whole numbers in
              [0, 2**31), and their log-probabilities under the distribution that they were sampled from, as L finite numbers, at most 0.
              Lists, numpy arrays and torch tensors on the CPU will do. `SamplingResult.to_tensors` and the rollout store use them.
        batch_size: the most prompts in one call.
    Raises: InputError for a function that is async, and from `poll` for an answer in another form.
    """

    def __init__(self, generate: Callable[[Sequence[Prompt], Sequence[int]], Sequence[Generated]], *, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError(_WHERE, f"batch_size {batch_size}", "at least 1 is needed")
        if any(map(inspect.iscoroutinefunction, (generate, getattr(generate, "__call__", None)))):  # noqa: B004 - the method itself
            hint = "await it inside the sample function of reinforce_ada.arun"
            raise InputError(_WHERE, "an async generate function", "nobody awaits it: one that returns texts is needed", hint)
        super().__init__(_WHERE, batch_size)
        self._generate = generate

    def poll(self) -> list[Completion]:
        """Call `generate` once with all waiting requests."""
        requests, self._running = list(self._running.values()), {}
        if not requests:
            return []
        answers: Any = self._generate([r.prompt for r in requests], [r.seed for r in requests])
        if isinstance(answers, str | bytes) or not hasattr(answers, "__len__") or len(answers) != len(requests):
            given = f"{len(answers)} answers" if isinstance(answers, list | tuple) else f"a {type(answers).__name__}"
            raise InputError(_WHERE, f"{given} from generate for {len(requests)} prompts", _FORMS)
        return [self._complete(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _complete(self, request: Request, answer: Any) -> Completion:
        text, token_ids, logprobs = answer if isinstance(answer, tuple) and len(answer) == 3 else (answer, (), ())
        if not isinstance(text, str) or not is_utf8(text):
            raise InputError(_WHERE, f"{one_line(repr(answer), 80)} from generate", _FORMS)
        if text is answer:
            return Completion(request.id, np.empty(0, np.int32), np.empty(0, np.float32), text, "stop", self._policy_version)
        ids, logs = _array(request, "token_ids", token_ids, "iu"), _array(request, "logprobs", logprobs, "fiu")
        if not 0 < len(ids) == len(logs):
            raise _unfit(request, f"{len(ids)} token_ids with {len(logs)} logprobs", "at least one token, and a logprob for each")
        if ids.min() < 0 or ids.max() >= 2**31:
            raise _unfit(request, f"token_ids from {ids.min()} to {ids.max()}", "token ids in [0, 2**31)")
        if wrong := wrong_logprob([float(logs.min()), float(logs.max())]):  # either is NaN if any is
            raise _unfit(request, wrong, "natural logarithms of probabilities: finite numbers, at most 0")
        return Completion(request.id, ids, logs, text, "stop", self._policy_version)


def _array(request: Request, name: str, value: Any, kinds: str) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.asarray(value)
    except Exception as error:  # a tensor on a GPU, with a gradient or of bfloat16, or rows of several lengths
        given = f"{name} of type {type(value).__name__} ({one_line(str(error), 100)})"
        raise _unfit(request, given, "a list of numbers, an array, or a tensor on the CPU without a gradient") from error
    if found.ndim != 1 or (found.size and found.dtype.kind not in kinds):
        given = f"{name} of shape {list(found.shape)} and dtype {found.dtype}"
        raise _unfit(request, given, f"one {'whole number' if kinds == 'iu' else 'number'} for each token")
    return found


def _unfit(request: Request, given: str, needed: str) -> InputError:
    return InputError(_WHERE, f"{given} from generate for prompt {one_line(request.id.prompt_id, 60)!r}", needed)
