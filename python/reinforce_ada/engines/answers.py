"""Checks of everything that a server sends, once, as it arrives: statuses, bodies, messages of a stream. None of it is trusted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from reinforce_ada.engines.base import wrong_logprob, wrong_token
from reinforce_ada.engines.fleet import LONGEST_BACKOFF_S
from reinforce_ada.outside import GarbageError, one_line, parse_json, without_credentials
from reinforce_ada.types import Completion, Request

T = TypeVar("T")

TOKENS_A_MESSAGE = 16  # this process takes 130 000 tokens a second with this, 20 000 one by one
MOST_BODY_BYTES = 1 << 20  # limit of an answer that is not a stream
_TOKEN_BYTES = 4096  # limit of a stream for each token: vLLM writes 300 to 800 bytes if a token has a message of its own
_MOST_NAME = 4096
_DATA = b"data:"  # begins a message of server-sent events
_IGNORED = (b":", b"event:", b"id:", b"retry:")


class UnfitError(Exception):
    """The server answers but cannot be used as it is."""


class BrokenError(Exception):
    """The server reports a failure or does not answer."""


class BusyError(BrokenError):
    """The server asks to be tried again later: after `pause_s` seconds, which is 0 if it names no time."""

    def __init__(self, text: str, pause_s: float) -> None:
        super().__init__(text)
        self.pause_s = pause_s


# -------------------- time and size


async def within(work: Awaitable[T], limit_s: float, what: str) -> T:
    """Return the result of `work`. Raises: BrokenError if it takes longer than `limit_s`."""
    try:
        return await asyncio.wait_for(work, limit_s)
    except asyncio.TimeoutError:
        raise BrokenError(f"{what} for {limit_s:g} s") from None


async def _pieces(response: Any, most_bytes: int) -> AsyncIterator[bytes]:
    """Yield a body as it arrives. Refuse a compressed one: it was not asked for, and a few bytes of it can expand to gigabytes."""
    if (encoding := response.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise GarbageError(f"a body with the content-encoding {one_line(repr(encoding), 40)}, which was not asked for")
    size = 0
    async for data in response.aiter_raw():
        size += len(data)
        if size > most_bytes:
            raise GarbageError(f"more than {most_bytes} bytes")
        yield data


async def body(response: Any) -> bytes:
    """Return the whole of an answer that is not a stream."""
    return b"".join([data async for data in _pieces(response, MOST_BODY_BYTES)])


async def lines(response: Any, most_bytes: int) -> AsyncIterator[bytes]:
    """Yield the lines of a stream. Text after the last line break is not a line."""
    rest: list[bytes] = []  # joined once per line: a line that arrives byte by byte would otherwise be copied for each byte
    async for data in _pieces(response, most_bytes):
        first, *others = data.split(b"\n")
        rest.append(first)
        for other in others:
            yield b"".join(rest).rstrip(b"\r")
            rest = [other]


def most_stream_bytes(num_prompt_tokens: int, max_tokens: int) -> int:
    """Return the most bytes that the stream of one completion may take. Its first message repeats the prompt's ids."""
    return MOST_BODY_BYTES + 16 * num_prompt_tokens + _TOKEN_BYTES * max_tokens


# -------------------- values


def fields(value: Any, what: str) -> dict[str, Any]:
    """Return `value` as a JSON object. Raises: GarbageError for anything else."""
    if not isinstance(value, dict):
        raise GarbageError(f"{what} is {_kind(value)} where an object belongs")
    return value


def items(value: Any, what: str, most: int) -> list[Any]:
    """Return `value` as a JSON array; null is an empty one. Raises: GarbageError for anything else, and for more than `most` items."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise GarbageError(f"{what} is {_kind(value)} where an array belongs")
    if len(value) > most:
        raise GarbageError(f"{what} has {len(value)} items; {most} at most")
    return value


def text_of(value: Any, what: str, most: int) -> str:
    """Return `value` as a string. Raises: GarbageError for anything else, and for more than `most` characters."""
    if not isinstance(value, str):
        raise GarbageError(f"{what} is {_kind(value)} where a string belongs")
    if len(value) > most:
        raise GarbageError(f"{what} has {len(value)} characters")
    return value


def count(value: Any, what: str) -> int:
    """Return `value` as a whole number of 0 or more. Raises: GarbageError for anything else."""
    if type(value) is not int or value < 0:
        raise GarbageError(f"{what} is {_kind(value)} where a count belongs")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a truth value", dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return kinds[type(value)]


# -------------------- requests and answers


def refusal(status: int, retry_after: str, text: str, path: str) -> Exception:
    """Return the exception that a status other than 200 stands for."""
    said = one_line(without_credentials(text), 200)
    answers = f"{path} answers {status}" + (f": {said}" if said else "")
    if status in (429, 502, 503, 504):
        is_number = re.fullmatch(r"[0-9]{1,9}", retry_after.strip())  # otherwise a date, or nothing
        return BusyError(answers, min(float(retry_after), LONGEST_BACKOFF_S) if is_number else 0.0)
    if status in (401, 403):
        return UnfitError(f"refuses the key ({status}); set VLLM_API_KEY or OPENAI_API_KEY to the server's")
    if status == 404 and path in ("/reset_prefix_cache", "/collective_rpc"):
        return UnfitError(f"has no {path}; VLLM_SERVER_DEV_MODE=1 is needed where it runs: reinforce-ada serve sets it")
    if path == "/collective_rpc":
        return UnfitError(f"does not take the weights ({status}: {said}); a server of the model that is trained is needed")
    if 300 <= status < 500:
        return UnfitError(answers)
    return BrokenError(answers)


class Served(NamedTuple):
    """A model that a server has."""

    name: str
    max_model_len: int | None  # of prompt and completion; None if the server does not say
    owner: str  # "vllm" for vLLM; "" if the server does not say


def models_of(text: bytes) -> list[Served]:
    """Return the models from an answer of /v1/models."""
    found = []
    for entry in items(fields(parse_json(text), "the answer").get("data"), "data", 1000):
        model = fields(entry, "a model")
        longest = model.get("max_model_len")
        name = text_of(model.get("id"), "the name of a model", _MOST_NAME)
        owner = model.get("owned_by")
        found.append(Served(name, None if longest is None else count(longest, "max_model_len"), owner if isinstance(owner, str) else ""))
    return found


def version_of(text: bytes) -> str:
    """Return the version from an answer of /version; "" if it has none."""
    return text_of(fields(parse_json(text), "the answer").get("version", ""), "the version", 100)


def was_successful(text: bytes) -> bool:
    """Return whether /reset_prefix_cache succeeded. Older versions send an empty body on success."""
    return not text.strip() or fields(parse_json(text), "the answer").get("success", True) is True


class Answer:
    """A completion, assembled from the lines of its stream."""

    def __init__(self, request: Request, max_tokens: int, vocab_size: int) -> None:
        self._request, self._max_tokens, self._vocab_size = request, max_tokens, vocab_size
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._num_cached_tokens: int | None = None
        self._progress = 0
        self._is_over = False
        self.finish_reason = ""

    def add(self, line: bytes) -> bool:
        """Take a line of the stream. Return whether it was progress: the first token, a sixteenth further one, or the end.

        Raises: GarbageError, or BrokenError if the server reports an error.
        """
        if not line or line.startswith(_IGNORED):
            return False
        if not line.startswith(_DATA):
            raise GarbageError(f"no line of an event stream: {one_line(line[:100].decode(errors='replace'))}")
        if self._is_over:
            raise GarbageError("a stream that goes on after its end")
        data = line[len(_DATA) :].strip()
        if data == b"[DONE]":
            self._is_over = True
            return False
        self._take(fields(parse_json(data), "a message"))
        before, self._progress = self._progress, -(-self._num_tokens() // TOKENS_A_MESSAGE) + bool(self.finish_reason)
        return self._progress > before

    def _num_tokens(self) -> int:
        return len(self._tokens)

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("error") is not None:
            raise BrokenError(one_line(str(message["error"]), 200))
        for choice in items(message.get("choices"), "choices", 1):
            self._take_choice(fields(choice, "a choice"))
        if message.get("usage") is not None:
            self._take_usage(fields(message["usage"], "usage"))

    def _take_choice(self, choice: dict[str, Any]) -> None:
        tokens = items(choice.get("token_ids"), "token_ids", self._max_tokens)
        logprobs = items(fields(choice.get("logprobs") or {}, "logprobs").get("token_logprobs"), "token_logprobs", self._max_tokens)
        if self.finish_reason and (tokens or logprobs or choice.get("text")):
            raise GarbageError("a completion that goes on after its end")
        if choice.get("index", 0) != 0:
            raise GarbageError("an answer to another request")
        if wrong := wrong_token(tokens, self._vocab_size) or wrong_logprob(logprobs):
            raise GarbageError(wrong)
        self._text.append(text_of(choice.get("text", ""), "text", MOST_BODY_BYTES))
        self._tokens += tokens
        self._logprobs += logprobs
        if max(len(self._tokens), len(self._logprobs)) > self._max_tokens:
            raise GarbageError(f"more than {self._max_tokens} tokens")
        if choice.get("finish_reason") is not None:
            self.finish_reason = text_of(choice["finish_reason"], "finish_reason", 100)

    def _take_usage(self, usage: dict[str, Any]) -> None:
        """Check the counts in the last message, which show whether anything was lost or cut on the way."""
        num_prompt_tokens = len(self._request.prompt.token_ids)
        for name, expected in (("completion_tokens", len(self._tokens)), ("prompt_tokens", num_prompt_tokens)):
            if usage.get(name) is not None and count(usage[name], name) != expected:
                raise GarbageError(f"{name} {one_line(str(usage[name]), 20)} where there were {expected}")
        if usage.get("prompt_tokens_details") is not None:  # only servers with --enable-prompt-tokens-details send it
            cached = fields(usage["prompt_tokens_details"], "prompt_tokens_details").get("cached_tokens")
            self._num_cached_tokens = None if cached is None else count(cached, "cached_tokens")
            if cached is not None and cached > num_prompt_tokens:
                raise GarbageError("more cached tokens than the prompt has")

    def completion(self, policy_version: int) -> Completion:
        """Return the whole completion. Raises: GarbageError if the stream ended before the completion did."""
        if not self.finish_reason:
            raise GarbageError("a stream that ended before the completion did")
        if len(self._tokens) != len(self._logprobs):
            raise GarbageError(f"{len(self._tokens)} tokens with {len(self._logprobs)} logprobs")
        return Completion(
            id=self._request.id,
            token_ids=np.asarray(self._tokens, dtype=np.int32),
            rollout_logprobs=np.asarray(self._logprobs, dtype=np.float32),
            text="".join(self._text),
            finish_reason=self.finish_reason,
            policy_version=policy_version,
            num_cached_tokens=self._num_cached_tokens,
        )
