"""OpenAI-compatible servers (vLLM's) as replicas of a `Fleet`: one streamed request per completion, over HTTP."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

from reinforce_ada.engines import answers
from reinforce_ada.engines.answers import Answer, BrokenError, BusyError, UnfitError, within
from reinforce_ada.engines.base import Launch, sampling_fields, too_old
from reinforce_ada.engines.fleet import Down, Dropped, Fleet, Loaded, News, Refused, Up
from reinforce_ada.errors import InputError, needs
from reinforce_ada.files import replace_folder
from reinforce_ada.outside import GarbageError, one_line, server_url, without_credentials
from reinforce_ada.types import CompletionId, Request

_CONNECT_S, _GREET_S, _END_S = 5.0, 10.0, 1.0
_MOST_STOPS = 4  # the interface accepts no more
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
            self.begin(_cancel_all()).result(timeout=_CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CONNECT_S)
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

    def __init__(self, background: Background, url: str, limits: Limits, headers: Mapping[str, str], trusted: ssl.SSLContext) -> None:
        import httpx

        self.name, self.num_slots = url, limits.max_num_seqs
        self._background, self._limits = background, limits
        self._model = ""
        self._version = -1
        self._last_progress = 0.0
        self._tell: Callable[[News], None] = lambda news: None
        self._tasks: dict[CompletionId, Future[Any]] = {}
        self._unanswered: set[CompletionId] = set()  # in flight, whether or not their tasks have ended
        self._others: list[Future[Any]] = []

        def new_client() -> httpx.AsyncClient:
            timeout = httpx.Timeout(None, connect=_CONNECT_S)
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
            self._background.begin(_close_all(self._clients)).result(timeout=_CONNECT_S)

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
            tell(Down(_told(e), e.pause_s if isinstance(e, BusyError) else 0.0))

    async def _watch(self) -> None:
        tell, patience_s = self._tell, self._limits.hung_after_s
        self._model = await self.greet()
        tell(Up())
        while True:
            await asyncio.sleep(min(1.0, patience_s / 4))
            await within(self._ask("GET", "/health"), patience_s, "/health has not answered")
            if self._unanswered and time.monotonic() - self._last_progress > patience_s:
                raise BrokenError(f"no progress for {patience_s:g} s")

    async def greet(self) -> str:
        """Return the model's name. Raises: UnfitError for an unusable server, BrokenError for one that does not answer in time."""
        return await within(self._greet(), min(_GREET_S, self._limits.hung_after_s), "has not answered")

    async def _greet(self) -> str:
        await self._ask("GET", "/health")
        if wrong := too_old(answers.version_of(await self._ask("GET", "/version"))):
            raise UnfitError(wrong)
        served = answers.models_of(await self._ask("GET", "/v1/models"))
        if len(served) != 1:
            raise UnfitError(f"serves {len(served)} models; one is needed")
        ((name, longest),) = served
        if longest is not None and longest < self._limits.max_model_len:
            raise UnfitError(
                f"a context of {longest} tokens; {self._limits.max_model_len} are needed: lower --max-model-len, or serve a longer one"
            )
        await self._forget_prefixes()
        return name

    async def _load(self, folder: str, policy_version: int) -> None:
        tell = self._tell
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await within(self._ask("POST", "/collective_rpc", call), _LOAD_S, f"has not loaded {folder}")
        await within(self._forget_prefixes(), max(_GREET_S, self._limits.hung_after_s), "/reset_prefix_cache has not answered")
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
        answer = Answer(request, limits.max_tokens, limits.vocab_size)
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


def _told(error: Exception) -> str:
    if isinstance(error, BrokenError):
        return str(error)
    if isinstance(error, GarbageError):
        return f"answered garbage: {one_line(str(error), 200)}"
    said = one_line(without_credentials(str(error)), 200)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


# -------------------- weights


def write_weights(folder: Path, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> Path:
    """Write the tensors where servers find them, as a safetensors file in `folder`/version-<n>; the latest two versions are kept."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(aside: Path) -> None:
        # Tied weights share memory, which the format cannot express.
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in named_tensors}, aside / "model.safetensors")

    path = folder / f"version-{policy_version}"
    hint = "every server must be able to read it"
    replace_folder(path, write, durable=False, where="engine", hint=hint, failures=(SafetensorError,))
    for old in folder.glob("version-*"):
        number = old.name.removeprefix("version-")
        if number.isdecimal() and int(number) not in (policy_version, policy_version - 1):
            shutil.rmtree(old, ignore_errors=True)
    return path


# -------------------- the engine


class HttpEngine(Fleet):
    """Several servers as one engine.

    Args:
        servers: base URLs, such as http://host:8000, of vLLM 0.22 or newer in development mode (`reinforce-ada serve`), all with one model.
        weights: a folder that this process writes and every server reads.
        vocab_size: the size of the model's vocabulary; a token id beyond it is garbage.
        max_num_seqs: the requests that each server takes at once.
        hung_after_s: a server whose requests make no progress for this long counts as dead.
        max_tokens, max_model_len, temperature, top_p, top_k, min_p, stop: see `VllmEngine`; four stop strings at most.
        give_up_s, say: see `Fleet`.
    TLS is httpx's: SSL_CERT_FILE names other authorities. The key is VLLM_API_KEY or OPENAI_API_KEY.
    Raises: InputError when httpx is not installed, no server answers, or one that does cannot be used.
    """

    def __init__(
        self,
        servers: Sequence[str],
        weights: Path,
        *,
        max_tokens: int,
        max_model_len: int,
        vocab_size: int,
        max_num_seqs: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        hung_after_s: float = 60.0,
        give_up_s: float = 600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        needs("engine", "httpx")
        if len(stop) > _MOST_STOPS:
            raise InputError("engine", f"{len(stop)} stop strings", f"at most {_MOST_STOPS}, which is what servers take")
        fields = sampling_fields(temperature, top_p, top_k, min_p)
        limits = Limits(max_tokens, max_model_len, vocab_size, max_num_seqs, fields, tuple(stop), hung_after_s)
        urls, headers, trusted = _urls(servers), _headers(), _trusted()
        self._background = Background()
        replicas = [HttpReplica(self._background, url, limits, headers, trusted) for url in urls]
        greetings = [self._background.begin(replica.greet()) for replica in replicas]
        try:
            _check(replicas, greetings, say)
        except BaseException:
            for replica, greeting in zip(replicas, greetings, strict=True):
                greeting.cancel()
                replica.close()
            self._background.close()
            raise
        super().__init__(
            replicas, partial(write_weights, weights.resolve()), max_tokens=max_tokens, vocab_size=vocab_size, max_model_len=max_model_len,
            give_up_s=give_up_s, say=say,
        )  # fmt: skip

    def close(self) -> None:
        """Close the connections; the servers keep running."""
        super().close()
        self._background.close()


def _urls(servers: Sequence[str]) -> list[str]:
    if not servers:
        raise InputError("engine", "no servers", "--servers URL,URL", "reinforce-ada serve starts some")
    try:
        urls = [server_url(url) for url in servers]
    except GarbageError as e:
        raise InputError("engine", f"server {e}", "a URL such as http://host:8000", "VLLM_API_KEY holds the key") from None
    if twice := next((url for url in urls if urls.count(url) > 1), ""):
        raise InputError("engine", f"server {twice} twice", "each server once")
    return urls


def _headers() -> dict[str, str]:
    """Return the headers. Compressed bodies are declined: compression would save nothing, and a hostile body would grow."""
    headers = {"Accept-Encoding": "identity"}
    for variable in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        if key := os.environ.get(variable):
            if not (key.isascii() and key.isprintable()):
                raise InputError("engine", f"{variable} has characters that no header can hold", "printable ASCII")
            return {**headers, "Authorization": f"Bearer {key}"}
    return headers


def _trusted() -> ssl.SSLContext:
    """Return the TLS authorities as httpx finds them. Raises: InputError if these, or the proxy that httpx would use, are not valid."""
    import httpx

    try:
        trusted = httpx.create_ssl_context()
    except OSError as e:
        raise InputError("engine", f"SSL_CERT_FILE={os.environ.get('SSL_CERT_FILE')}: {e}", "a file of certificates (PEM)") from e
    try:
        httpx.AsyncClient(verify=trusted)
    except (ValueError, ImportError, httpx.InvalidURL) as e:
        said = one_line(without_credentials(str(e)))
        raise InputError("engine", f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: {said}", "a proxy that httpx can use") from e
    return trusted


def _check(replicas: Sequence[HttpReplica], greetings: Sequence[Future[str]], say: Callable[[str], None]) -> None:
    """Require that a server answers or asks to be tried later, and that all that answer fit and serve the same model."""
    import httpx

    models: dict[str, str] = {}
    silent: list[str] = []
    is_any_busy = False
    for replica, greeting in zip(replicas, greetings, strict=True):
        try:
            models[replica.name] = greeting.result(timeout=2 * _GREET_S)
        except UnfitError as e:
            raise InputError("engine", f"{replica.name}: {e}", "another server, or another setting") from e
        except (BrokenError, httpx.HTTPError) as e:
            silent.append(f"{replica.name}: {_told(e)}")
            is_any_busy |= isinstance(e, BusyError)
        except Exception as e:
            raise InputError("engine", f"{replica.name} is no vLLM server ({_told(e)})", "an OpenAI-compatible server of vLLM") from e
    if not models and not is_any_busy:
        untrusted = any("CERTIFICATE_VERIFY_FAILED" in line for line in silent)
        hint = "SSL_CERT_FILE names the authority of its certificate" if untrusted else "reinforce-ada serve starts some"
        raise InputError("engine", "; ".join(silent), "a server that answers", hint)
    if len(set(models.values())) > 1:
        shown = "; ".join(f"{url} serves {one_line(name, 100)}" for url, name in models.items())
        raise InputError("engine", shown, "the same model on every server")
    for line in silent:
        say(f"engine: not there yet: {line}")


def launch(run: Launch) -> HttpEngine:
    """Return the engine of a run."""
    servers = [url.strip() for url in run.settings.servers.split(",") if url.strip()]
    patience = {"hung_after_s": run.settings.hung_after_s, "give_up_s": run.settings.give_up_s}
    engine = HttpEngine(servers, run.weights, vocab_size=run.vocab_size, say=run.say, **patience, **run.limits)
    run.say(f"engine: {len(servers)} servers, weights in {run.weights}")
    return engine
