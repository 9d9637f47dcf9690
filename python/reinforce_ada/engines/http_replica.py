"""A vLLM server as a replica of a `Fleet`: one streamed request per completion, over HTTP."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, ClassVar

from reinforce_ada.engines import answers
from reinforce_ada.engines.answers import Answer, BrokenError, BusyError, UnfitError, within
from reinforce_ada.engines.base import too_old
from reinforce_ada.engines.fleet import Down, Dropped, Loaded, News, Refused, Up
from reinforce_ada.outside import GarbageError, one_line, without_credentials
from reinforce_ada.types import CompletionId, Request

CONNECT_S, GREET_S, _END_S = 5.0, 10.0, 1.0
_LOAD_S = 600.0  # 140 GB of weights from a shared disk at .5 GB/s
_CACHE_RETRIES, _CACHE_PAUSE_S = 50, 0.1  # requests that were just aborted hold their blocks for a step or two

# Every further field of the interface that changes the distribution or the tokens that come back. A server fills a missing field from the
# generation_config.json in the folder of its model, whose penalties would sample from another policy than is trained.
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": None, "allowed_token_ids": None,
    "bad_words": [], "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "n": 1, "use_beam_search": False, "echo": False,
    "suffix": None, "include_stop_str_in_output": False, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of every server and request."""

    max_tokens: int
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    fields: dict[str, Any]  # temperature, top_p, top_k, min_p
    stop: tuple[str, ...]
    hung_after_s: float


# -------------------- the thread for all connections


class Background:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reinforce-ada-http", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run this coroutine in the loop; its future may be cancelled."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the thread and cancel what runs in it."""
        if not self._thread.is_alive():
            return
        with suppress(Exception):  # a task that does not end is left until the process ends
            self.begin(_cancel_all()).result(timeout=CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CONNECT_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    # Most have been cancelled already; cancelling them again while they close their connections would leave sockets open.
    pending = (await asyncio.wait(others, timeout=_END_S))[1] if others else set()
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await asyncio.sleep(0)  # lets closed connections release their sockets


# -------------------- one server


class HttpReplica:
    """A server as a replica.

    It is down when a connection breaks, when /health does not answer, when it sends anything invalid, or when no stream has made progress
    for `hung_after_s` while requests are running. Tokens and logprobs arrive as the server sampled them; nothing is tokenized again.
    """

    kind: ClassVar[str] = "vLLM server"
    needed: ClassVar[str] = "an OpenAI-compatible server of vLLM"
    _health: ClassVar[str] = "/health"
    _look_every_s: ClassVar[float] = 1.0

    def __init__(self, background: Background, url: str, limits: Limits, headers: Mapping[str, str], trusted: ssl.SSLContext) -> None:
        import httpx

        self.name, self.num_slots = url, limits.max_num_seqs
        self.note = ""  # what a user should know about this server, once it has been greeted
        self._background, self._limits = background, limits
        self._model = ""
        self._version = -1
        self._last_progress = 0.0
        self._tell: Callable[[News], None] = lambda news: None
        self._tasks: dict[CompletionId, Future[Any]] = {}
        self._unanswered: set[CompletionId] = set()  # in flight, whether or not their tasks have ended
        self._others: list[Future[Any]] = []

        def new_client() -> httpx.AsyncClient:
            timeout = httpx.Timeout(None, connect=CONNECT_S)
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
            client = httpx.AsyncClient(base_url=url, headers=dict(headers), timeout=timeout, verify=trusted, cookies=no_cookies)
            self._clients.append(client)
            return client

        self._clients: list[httpx.AsyncClient] = []
        self._new_client, self._client = new_client, new_client()
        # One client per stream, reused for the next: a client checks every pair of its connections at every request, which with 128 of them
        # took most of this process's time.
        self._idle: list[httpx.AsyncClient] = []

    # -------------------- Replica

    def start(self, tell: Callable[[News], None]) -> None:
        """Check the server, then watch it."""
        self._stop_all()
        self._tell = tell
        self._others = [self._background.begin(self._guarded(self._watch(), tell))]

    def load(self, weights: Any, policy_version: int) -> None:
        """Ask the server to read the folder `weights`."""
        self._others.append(self._background.begin(self._guarded(self._load(str(weights), policy_version), self._tell)))

    def submit(self, requests: Sequence[Request]) -> None:
        """Open one stream for each request."""
        self._last_progress = time.monotonic()
        self._tasks = {i: task for i, task in self._tasks.items() if not task.done()}
        self._unanswered.update(request.id for request in requests)
        for request in requests:
            self._tasks[request.id] = self._background.begin(self._guarded(self._complete(request), self._tell))

    def abort(self, ids: Sequence[CompletionId]) -> None:
        """Close their streams, which makes the server stop them."""
        self._unanswered.difference_update(ids)
        for i in ids:
            if (task := self._tasks.pop(i, None)) is not None:
                task.cancel()

    def close(self) -> None:
        self._stop_all()
        with suppress(Exception):
            self._background.begin(_close_all(self._clients)).result(timeout=CONNECT_S)

    def _stop_all(self) -> None:
        for task in (*self._tasks.values(), *self._others):
            task.cancel()
        self._tasks, self._unanswered, self._others = {}, set(), []

    # -------------------- background tasks

    async def _guarded(self, work: Coroutine[Any, Any, None], tell: Callable[[News], None]) -> None:
        """Report every error to the fleet: a task that ended silently would keep its requests for ever."""
        try:
            await work
        except UnfitError as e:
            tell(Refused(str(e)))
        except Exception as e:
            tell(Down(told(e), e.pause_s if isinstance(e, BusyError) else 0.0))

    async def _watch(self) -> None:
        tell, patience_s = self._tell, self._limits.hung_after_s
        self._model = await self.greet()
        tell(Up())
        while True:
            await asyncio.sleep(min(self._look_every_s, patience_s / 4))
            await within(self._ask("GET", self._health), patience_s, f"{self._health} has not answered")
            if self._unanswered and time.monotonic() - self._last_progress > patience_s:
                raise BrokenError(f"no progress for {patience_s:g} s")

    async def greet(self) -> str:
        """Return the model's name. Raises: UnfitError for an unusable server, BrokenError for one that does not answer in time."""
        return await within(self._greet(), min(GREET_S, self._limits.hung_after_s), "has not answered")

    async def _greet(self) -> str:
        await self._ask("GET", "/health")
        if wrong := too_old(answers.version_of(await self._ask("GET", "/version"))):
            raise UnfitError(wrong)
        served = answers.models_of(await self._ask("GET", "/v1/models"))
        if len(served) != 1:
            raise UnfitError(f"serves {len(served)} models; one is needed")
        (model,) = served
        self._check_context(model)
        await self._forget_prefixes()
        return model.name

    def _check_context(self, model: answers.Served) -> None:
        longest, needed = model.max_model_len, self._limits.max_model_len
        if longest is not None and longest < needed:
            raise UnfitError(f"a context of {longest} tokens; {needed} are needed: lower --max-model-len, or serve a longer one")

    async def _load(self, folder: str, policy_version: int) -> None:
        tell = self._tell
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await within(self._ask("POST", "/collective_rpc", call), _LOAD_S, f"has not loaded {folder}")
        await within(self._forget_prefixes(), max(GREET_S, self._limits.hung_after_s), "/reset_prefix_cache has not answered")
        self._version = policy_version
        tell(Loaded(policy_version))

    async def _forget_prefixes(self) -> None:
        """Drop the cached prefixes, which other weights computed."""
        for _ in range(_CACHE_RETRIES):
            if answers.was_successful(await self._ask("POST", "/reset_prefix_cache")):
                return
            await asyncio.sleep(_CACHE_PAUSE_S)
        raise UnfitError("requests of others keep its cache in use; one that nobody else asks is needed")

    async def _complete(self, request: Request) -> None:
        tell, version, limits = self._tell, self._version, self._limits
        answer = self._answer(request)
        most_bytes = answers.most_stream_bytes(len(request.prompt.token_ids), limits.max_tokens)
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            async with client.stream("POST", "/v1/completions", json=self._payload(request)) as response:
                await _check_status(response, "/v1/completions")
                async for line in answers.lines(response, most_bytes):
                    if answer.add(line):
                        self._last_progress = time.monotonic()
        finally:
            self._idle.append(client)
        completion = answer.completion(version)
        self._unanswered.discard(request.id)
        if answer.finish_reason == "abort":  # by the server itself: a request that this side aborts has no stream any more
            tell(Dropped(request.id, "the server aborted it"))
        else:
            tell(completion)

    def _answer(self, request: Request) -> Answer:
        return Answer(request, self._limits.max_tokens, self._limits.vocab_size)

    def _payload(self, request: Request) -> dict[str, Any]:
        return {
            **NEUTRAL,
            "model": self._model,
            "prompt": list(request.prompt.token_ids),
            "max_tokens": self._limits.max_tokens,
            **self._limits.fields,
            "seed": request.seed,
            "stop": self._limits.stop,
            "logprobs": 0,  # the sampled token's only
            "return_token_ids": True,
            "stream": True,
            "stream_interval": answers.TOKENS_A_MESSAGE,
            "stream_options": {"include_usage": True},
        }

    async def _ask(self, method: str, path: str, content: Any = None) -> bytes:
        async with self._client.stream(method, path, json=content) as response:
            await _check_status(response, path)
            return await answers.body(response)


async def _check_status(response: Any, path: str) -> None:
    """Raise the exception that a status other than 200 stands for, whatever its body holds."""
    status = response.status_code
    if status != 200:
        said = f"see {response.headers['location']} " if "location" in response.headers else ""
        with suppress(GarbageError):
            said += (await answers.body(response)).decode(errors="replace")
        raise answers.refusal(status, response.headers.get("retry-after", ""), said, path)


async def _close_all(clients: Sequence[Any]) -> None:
    await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)


def told(error: Exception) -> str:
    """Return in one line what an error in the background says of its server."""
    if isinstance(error, BrokenError):
        return str(error)
    if isinstance(error, GarbageError):
        return f"answered garbage: {one_line(str(error), 200)}"
    said = one_line(without_credentials(str(error)), 200)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
