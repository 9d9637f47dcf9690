"""Any OpenAI-compatible endpoint as a replica of a `Fleet`, for sampling alone: its weights stay as they are."""

from __future__ import annotations

import math
import ssl
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from reinforce_ada.engines import answers
from reinforce_ada.engines.answers import Answer, UnfitError, fields, items, text_of
from reinforce_ada.engines.base import wrong_logprob
from reinforce_ada.engines.fleet import Loaded
from reinforce_ada.engines.http_replica import Background, HttpReplica, Limits
from reinforce_ada.engines.text import decode_after
from reinforce_ada.outside import GarbageError, one_line
from reinforce_ada.types import Completion, Request

MOST_IDS = 2**31  # token ids are int32
_SEEDS = 2**31  # the interface knows integers only, and some servers take no larger ones


class EndpointReplica(HttpReplica):
    """An endpoint with /v1/models and /v1/completions. It is down when its models do not answer; see `HttpReplica` for the rest.

    A vLLM server is asked for token ids and for the model's own distribution, as in training; any other gets the fields of the interface
    alone, since some refuse those that they do not know.
    """

    kind: ClassVar[str] = "OpenAI-compatible server"
    needed: ClassVar[str] = "one with /v1/models and /v1/completions"
    _health: ClassVar[str] = "/v1/models"
    _look_every_s: ClassVar[float] = 10.0  # an endpoint may count requests

    def __init__(
        self, background: Background, url: str, limits: Limits, headers: Mapping[str, str], trusted: ssl.SSLContext, model: str,
        tokenizer: Any,
    ) -> None:  # fmt: skip
        super().__init__(background, url, limits, headers, trusted)
        self._wanted, self._tokenizer, self._is_vllm = model, tokenizer, False

    def load(self, weights: Any, policy_version: int) -> None:
        """Load nothing: these are the weights of this version."""
        self._version = policy_version
        self._tell(Loaded(policy_version))

    async def _greet(self) -> str:
        served = answers.models_of(await self._ask("GET", "/v1/models"))
        found = [model for model in served if model.name == self._wanted] if self._wanted else served
        if self._wanted and not found:
            raise UnfitError(f"does not serve {one_line(self._wanted, 100)}; it has {_some(served)}")
        if len(found) != 1:
            raise UnfitError(f"serves {len(found)} models ({_some(found)}); model= names one")
        (model,) = found
        self._check_context(model)
        self._is_vllm = model.owner == "vllm"
        self.note = f"{self.name} serves {one_line(model.name, 100)}, for sampling alone: {self._what_it_gives()}"
        return model.name

    def _what_it_gives(self) -> str:
        if self._is_vllm:
            return "token ids and logprobs as it samples them"
        if self._tokenizer is None:
            return "completions are texts without token ids, which tokenizer= would make"
        return (
            "token ids are made of its texts, without end tokens; where the tokenizer splits a text otherwise than the model did, "
            "logprobs are NaN"
        )

    def _answer(self, request: Request) -> Answer:
        limits = self._limits
        return EndpointAnswer(request, limits.max_tokens, limits.vocab_size, gives_ids=self._is_vllm, tokenizer=self._tokenizer)

    def _payload(self, request: Request) -> dict[str, Any]:
        prompt = list(request.prompt.token_ids) or request.prompt.text
        if self._is_vllm:
            return {**super()._payload(request), "prompt": prompt}
        limits = self._limits
        further = {name: limits.fields[name] for name, off in (("top_k", -1), ("min_p", 0.0)) if limits.fields[name] != off}
        stop = {"stop": limits.stop} if limits.stop else {}
        logprobs = {} if self._tokenizer is None else {"logprobs": 1}  # 0 is none for some
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": limits.max_tokens,
            "temperature": limits.fields["temperature"],
            "top_p": limits.fields["top_p"],
            "seed": request.seed % _SEEDS,
            "stream": True,
            **further,
            **stop,
            **logprobs,
        }


def _some(served: Sequence[answers.Served]) -> str:
    names = [one_line(model.name, 60) for model in served[:3]]
    return ", ".join(names) + (f" and {len(served) - 3} more" if len(served) > 3 else "") or "none"


class EndpointAnswer(Answer):
    """A completion of an endpoint, assembled from the lines of its stream."""

    def __init__(self, request: Request, max_tokens: int, vocab_size: int, *, gives_ids: bool, tokenizer: Any) -> None:
        super().__init__(request, max_tokens, vocab_size)
        self._gives_ids, self._tokenizer = gives_ids, tokenizer
        self._pieces: list[str] = []
        self._num_messages = 0

    def _num_tokens(self) -> int:
        return max(len(self._tokens), len(self._pieces), self._num_messages)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        if self._gives_ids:
            super()._take_choice(choice)
            return
        if self.finish_reason and choice.get("text"):
            raise GarbageError("a completion that goes on after its end")
        if choice.get("index", 0) != 0:
            raise GarbageError("an answer to another request")
        if text := text_of(choice.get("text") or "", "text", answers.MOST_BODY_BYTES):
            self._text.append(text)
            self._num_messages += 1
        if self._tokenizer is not None:
            for piece, logprob in _pieces(fields(choice.get("logprobs") or {}, "logprobs"), self._max_tokens + 1):
                self._pieces.append(piece)
                self._logprobs.append(logprob)
        if len(self._pieces) > self._max_tokens + 1:  # the end token may come on top
            raise GarbageError(f"more than {self._max_tokens} tokens")
        if choice.get("finish_reason") is not None:
            self.finish_reason = text_of(choice["finish_reason"], "finish_reason", 100)

    def _take_usage(self, usage: dict[str, Any]) -> None:
        if self._gives_ids and self._request.prompt.token_ids:
            super()._take_usage(usage)

    def completion(self, policy_version: int) -> Completion:
        """Return the whole completion. Raises: GarbageError if the stream ended before the completion did, UnfitError without logprobs."""
        if self._gives_ids:
            return super().completion(policy_version)
        if not self.finish_reason:
            raise GarbageError("a stream that ended before the completion did")
        text = "".join(self._text)
        ids: list[int] = []
        logprobs: list[float] = []
        if self._tokenizer is not None:
            if text and not self._pieces:
                raise UnfitError("gives no logprobs with its completions; leave out tokenizer= to sample texts alone")
            ids, logprobs = tokens_of(self._tokenizer, text, self._pieces, self._logprobs)
        return self._request.completed(ids, logprobs, text=text, finish_reason=self.finish_reason)


def _pieces(logprobs: dict[str, Any], most: int) -> Iterator[tuple[str, float]]:
    """Yield the text and the logprob of each token, from {tokens, token_logprobs} or from the chat interface's {content}."""
    content = [fields(entry, "a token") for entry in items(logprobs.get("content"), "content", most)]
    texts = [entry.get("token") for entry in content] or items(logprobs.get("tokens"), "tokens", most)
    values = [entry.get("logprob") for entry in content] or items(logprobs.get("token_logprobs"), "token_logprobs", most)
    if len(texts) != len(values):
        raise GarbageError(f"{len(texts)} tokens with {len(values)} logprobs")
    if wrong := wrong_logprob(values):
        raise GarbageError(wrong)
    for text, value in zip(texts, values, strict=True):
        yield text_of(text, "a token", answers.MOST_BODY_BYTES), value


def tokens_of(tokenizer: Any, text: str, pieces: Sequence[str], logprobs: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return the token ids of a text and their logprobs, from the texts and logprobs of the tokens that were sampled.

    The ids are the tokenizer's, of the text alone. Three things are lost against the ids that were sampled. The end token is missing, as no
    text has it. A text that the model wrote in other tokens than the tokenizer makes of it gets the tokenizer's. And a token has a logprob
    only if one of those sampled stands at the same place of the text; all others are NaN, and so are all of a text whose tokens do not
    decode to it one by one, such as those that hold a part of a character.
    """
    ids: list[int] = list(tokenizer.encode(text, add_special_tokens=False))
    own = [decode_after(tokenizer, ids[:i], [token]) for i, token in enumerate(ids)]
    if "".join(own) != text or not "".join(pieces).startswith(text):
        return ids, [math.nan] * len(ids)
    sampled = dict(zip(_spans(pieces), logprobs, strict=True))
    hidden = {begin for begin, end in sampled if begin == end}  # tokens without a text, such as a first byte: the next is not alone there
    return ids, [math.nan if span[0] in hidden else sampled.get(span, math.nan) for span in _spans(own)]


def _spans(pieces: Sequence[str]) -> list[tuple[int, int]]:
    ends = list(accumulate(map(len, pieces)))
    return list(zip([0, *ends], ends, strict=False))


def wrong_answer(completion: Completion, policy_version: int | None, max_tokens: int, vocab_size: int) -> str:
    """Return what is wrong with a completion that was sampled alone; "" if nothing is. Its logprobs may be NaN, and it may have no tokens.

    A text may have more tokens than the model needed for it, so `max_tokens` does not bound them.
    """
    if completion.policy_version != policy_version:
        return f"policy version {completion.policy_version} instead of {policy_version}"
    if completion.finish_reason not in ("stop", "length"):
        return f"finish_reason {one_line(repr(completion.finish_reason), 40)}"
    ids = completion.token_ids
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return f"token {np.max(ids)} of a vocabulary of {vocab_size}"
    return ""
