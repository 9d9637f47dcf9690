"""The engine protocol: anything that turns requests into completions.

An engine is polled; it never calls back. `submit` takes at most `free_slots` requests. `poll` advances the engine and returns the
completions that have finished since the last call (possibly none), in any order. Completions that end because of `abort` may be returned
with finish_reason "abort" or not at all.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.outside import one_line
from reinforce_ada.types import Completion, CompletionId, Request


class Placement(NamedTuple):
    """Records that a request was given to a replica."""

    id: CompletionId
    replica: str
    at: float  # seconds of time.monotonic


@runtime_checkable
class Engine(Protocol):
    """The interface that the driver loop and the trainer need from a generator. What has a default here is optional for a subclass."""

    # Where requests have gone, oldest first; bounded, and emptied by its reader. None: a request starts wherever it is submitted.
    placements: deque[Placement] | None = None

    @property
    def free_slots(self) -> int:
        """Return how many more requests the engine can usefully take now."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Start these requests. Raises InputError when a request cannot be served, for example because the prompt is too long."""

    def poll(self) -> list[Completion]:
        """Advance, and return the completions that finished since the last call."""

    def abort(self, ids: Sequence[CompletionId]) -> None:
        """Stop these requests; ids that are not running are ignored."""

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Load new weights; completions submitted from now on carry `policy_version`. Called with nothing in flight."""

    def sleep(self) -> None:
        """Release as much memory as possible until `wake`. Called between sampling phases with nothing in flight; may do nothing."""
        return

    def wake(self) -> None:
        """Undo `sleep`."""
        return

    def close(self) -> None:
        """Release all resources; further calls are errors."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers that the engine reports, under names that begin with `engine_`.

        `engine_busy_slots` (requests being computed), `engine_queue` (requests that wait in it), `engine_slots` and `engine_replicas` (that
        can be used) are momentary values. Names that end in `_rate` are fractions since the start of the engine. All others are counts or
        seconds since its start (`engine_tokens`, `engine_sync_s`, `engine_restarts`, ..). The trainer logs the differences of the counts,
        and means over time of the first four. `metrics` must be cheap: it is called many times a second.
        """
        return {}


class LocalEngine(Engine):
    """An engine without weights and memory of its own: it holds at most `num_slots` requests until a subclass's `poll` answers them."""

    def __init__(self, name: str, num_slots: int) -> None:
        self._name, self._num_slots = name, num_slots
        self._running: dict[CompletionId, Request] = {}
        self._policy_version = 0

    @property
    def free_slots(self) -> int:
        return self._num_slots - len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Hold these until they are answered. Raises InputError beyond `free_slots`."""
        if len(requests) > self.free_slots:
            raise InputError(self._name, f"{len(requests)} requests", f"at most free_slots {self.free_slots} are possible")
        self._running.update((r.id, r) for r in requests)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        for request_id in ids:
            self._running.pop(request_id, None)

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        self._policy_version = policy_version

    def close(self) -> None:
        self._running.clear()


class Launch(NamedTuple):
    """The arguments that a run passes to the function `launch` of an engine's module, which returns the engine."""

    settings: Any  # the table [engine] of the configuration
    path: str  # the model: a folder or a hub id
    dtype: str
    device: str  # "cpu" or "cuda"
    module: Any  # the trainer's own model, for an engine that shares its weights
    tokenizer: Any
    vocab_size: int
    weights: Path  # a folder for weights that other processes load
    limits: Mapping[str, Any]  # max_tokens, max_model_len, max_num_seqs, temperature, top_p, top_k, min_p, stop: keywords of every engine
    say: Callable[[str], None]  # takes a line for the user


class PrefixHits:
    """The share of prompt tokens that came from the cache, over the completions for which the engine reports it."""

    def __init__(self) -> None:
        self._num_tokens = self._num_cached = 0

    def add(self, request: Request, completion: Completion) -> None:
        """Count this completion's prompt."""
        if completion.num_cached_tokens is not None:
            self._num_tokens += len(request.prompt.token_ids)
            self._num_cached += completion.num_cached_tokens

    def metrics(self) -> dict[str, float]:
        """Return `engine_prefix_hit_rate`, or nothing if no completion reported it."""
        return {"engine_prefix_hit_rate": self._num_cached / self._num_tokens} if self._num_tokens else {}


def sampling_fields(temperature: float, top_p: float, top_k: int, min_p: float) -> dict[str, Any]:
    """Return the settings of the sampling distribution as vLLM and its servers name them."""
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k or -1, "min_p": min_p}


OLDEST_VLLM = (0, 22)


def too_old(vllm_version: str) -> str:
    """Return what is wrong with this version of vLLM; "" if nothing is, or if it is not a number (a build from source)."""
    found = re.match(r"(\d+)\.(\d+)", vllm_version)
    if found is None or (int(found[1]), int(found[2])) >= OLDEST_VLLM:
        return ""
    return f"vLLM {one_line(vllm_version, 40)}; at least {'.'.join(map(str, OLDEST_VLLM))} is needed"


def check_prompt_length(where: str, request: Request, max_tokens: int, max_model_len: int) -> None:
    """Raise InputError when prompt and completion do not fit into max_model_len, or the prompt is empty."""
    size = len(request.prompt.token_ids)
    if size == 0:
        raise InputError(where, f"prompt {request.id.prompt_id!r} is empty", "at least one token")
    if size + max_tokens > max_model_len:
        raise InputError(
            where,
            f"prompt {request.id.prompt_id!r} has {size} tokens",
            f"at most max_model_len - max_tokens = {max_model_len} - {max_tokens}",
            "raise --max-model-len, or shorten the prompt",
        )


# A log-probability is at most 0; rounding puts some of a certain token just above. Below float32's range it would become an infinity.
_MOST_LOGPROB, _LEAST_LOGPROB = 1e-3, -3e38


def wrong_token(token_ids: Sequence[Any], vocab_size: int) -> str:
    """Return what is wrong with these token ids; "" if nothing is."""
    for token in token_ids:
        if type(token) is not int:
            return f"a token id that is no whole number: {one_line(repr(token), 40)}"
        if not 0 <= token < vocab_size:
            return f"token {one_line(str(token), 40)} of a vocabulary of {vocab_size}"
    return ""


def wrong_logprob(logprobs: Sequence[Any]) -> str:
    """Return what is wrong with these log-probabilities; "" if nothing is."""
    for logprob in logprobs:
        if type(logprob) not in (int, float) or not _LEAST_LOGPROB <= logprob <= _MOST_LOGPROB:
            return f"a logprob that is not one: {one_line(repr(logprob), 40)}"
    return ""


def garbage(completion: Completion, policy_version: int | None, max_tokens: int, vocab_size: int) -> str:
    """Return what is wrong with a completion; "" if nothing is."""
    tokens, logprobs = completion.token_ids, completion.rollout_logprobs
    if completion.policy_version != policy_version:
        return f"policy version {completion.policy_version} instead of {policy_version}"
    if completion.finish_reason not in ("stop", "length"):
        return f"finish_reason {one_line(repr(completion.finish_reason), 40)}"
    if tokens.ndim != 1 or tokens.shape != logprobs.shape:
        return f"{tokens.shape} tokens with {logprobs.shape} logprobs"
    if not 0 < len(tokens) <= max_tokens:
        return f"{len(tokens)} tokens of at most {max_tokens}"
    ends = [int(tokens.min()), int(tokens.max())], [float(logprobs.min()), float(logprobs.max())]  # NaN if any is NaN
    return wrong_token(ends[0], vocab_size) or wrong_logprob(ends[1])


def check_own(where: str, completion: Completion, max_tokens: int, vocab_size: int) -> Completion:
    """Return a completion of an engine in this process. Raises: EngineLost for garbage, which a model with infinities in its weights
    samples."""
    if wrong := garbage(completion, completion.policy_version, max_tokens, vocab_size):
        raise EngineLost(f"{where}: sampled garbage: {wrong}; the run can be resumed")
    return completion
