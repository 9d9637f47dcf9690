"""OpenAI-compatible servers (vLLM's) as replicas of a `Fleet`: one streamed request per completion, over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reinforce_ada.engines.base import check_prompt_length, too_old
from reinforce_ada.engines.fleet import Down, Dropped, Fleet, Loaded, News, Refused, Up
from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_folder
from reinforce_ada.types import Completion, CompletionId, Request

_CONNECT_S = 5.0
_DATA = b"data: "  # of server-sent events
_TOKENS_A_MESSAGE = 16  # this process takes 130 000 tokens a second so, 20 000 one by one
_MOST_STOPS = 4  # the interface takes no more
_LOAD_S = 600.0  # 140 GB of weights from a shared disk at .5 GB/s
_CACHE_RETRIES, _CACHE_PAUSE_S = 50, 0.1  # requests that were just aborted hold their blocks for a step or two


class UnfitError(Exception):
    """A server that answers and cannot be used as it is."""


class BrokenError(Exception):
    """A server that says that it is broken."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of every server."""

    max_tokens: int
    max_model_len: int
    max_num_seqs: int
    temperature: float
    stop: tuple[str, ...]
    hung_after_s: float


# -------------------- the thread of all connections


class Background:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reinforce-ada-http", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run this there; its future may be cancelled."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the thread; what runs there is cancelled."""
        if not self._thread.is_alive():
            return
        with suppress(TimeoutError):
            self.begin(_cancel_all()).result(timeout=_CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # in which closed connections let go of their sockets


# -------------------- one server


class HttpReplica:
    """A server as a replica.

    It is down when a connection breaks, when /health does not answer, or when no stream has brought anything for `hung_after_s` while
    requests are running. Tokens and logprobs come as the server sampled them; nothing is tokenised again.
    """

    def __init__(self, background: Background, url: str, limits: Limits, headers: Mapping[str, str], trusted: ssl.SSLContext) -> None:
        import httpx

        self.name, self.num_slots = url, limits.max_num_seqs
        self._background, self._limits = background, limits
        self._model = ""
        self._version = -1
        self._last_news = 0.0
        self._tell: Callable[[News], None] = lambda news: None
        self._tasks: dict[CompletionId, Future[Any]] = {}
        self._others: list[Future[Any]] = []

        def new_client() -> httpx.AsyncClient:
            timeout = httpx.Timeout(None, connect=_CONNECT_S)
            return httpx.AsyncClient(base_url=url, headers=dict(headers), timeout=timeout, verify=trusted)

        self._new_client, self._client = new_client, new_client()
        # One for each stream, kept for the next: a client looks at every pair of its connections for every request, which with 128 of
        # them took most of this process's time.
        self._idle: list[httpx.AsyncClient] = []

    # -------------------- Replica

    def start(self, tell: Callable[[News], None]) -> None:
        """Greet the server, then watch it."""
        self._stop_all()
        self._tell = tell
        self._others = [self._background.begin(self._guarded(self._watch(), tell))]

    def load(self, weights: Any, policy_version: int) -> None:
        """Have it read the folder `weights`."""
        self._others.append(self._background.begin(self._guarded(self._load(str(weights), policy_version), self._tell)))

    def submit(self, requests: Sequence[Request]) -> None:
        """One stream for each."""
        self._last_news = time.monotonic()
        self._tasks = {i: task for i, task in self._tasks.items() if not task.done()}
        for request in requests:
            self._tasks[request.id] = self._background.begin(self._guarded(self._complete(request), self._tell))

    def abort(self, ids: Sequence[CompletionId]) -> None:
        """Close their streams, at which the server stops them."""
        for i in ids:
            if (task := self._tasks.pop(i, None)) is not None:
                task.cancel()

    def close(self) -> None:
        """Close all connections."""
        self._stop_all()
        for client in (self._client, *self._idle):
            with suppress(Exception):
                self._background.begin(client.aclose()).result(timeout=_CONNECT_S)

    def _stop_all(self) -> None:
        for task in (*self._tasks.values(), *self._others):
            task.cancel()
        self._tasks, self._others = {}, []

    # -------------------- what runs in the background

    async def _guarded(self, work: Coroutine[Any, Any, None], tell: Callable[[News], None]) -> None:
        """Whatever goes wrong is news."""
        import httpx

        try:
            await work
        except UnfitError as e:
            tell(Refused(str(e)))
        except BrokenError as e:
            tell(Down(str(e)))
        except httpx.HTTPError as e:
            tell(Down(_told(e)))
        except (ValueError, KeyError, TypeError, IndexError) as e:
            tell(Down(f"answered garbage: {type(e).__name__}: {e}"))

    async def _watch(self) -> None:
        tell = self._tell
        self._model = await self.greet()
        tell(Up())
        while True:
            await asyncio.sleep(min(1.0, self._limits.hung_after_s / 4))
            try:
                await asyncio.wait_for(self._ask("GET", "/health"), self._limits.hung_after_s)
            except asyncio.TimeoutError:
                tell(Down(f"/health has not answered for {self._limits.hung_after_s:g} s"))
                return
            running = any(not task.done() for task in list(self._tasks.values()))
            if running and time.monotonic() - self._last_news > self._limits.hung_after_s:
                tell(Down(f"no token for {self._limits.hung_after_s:g} s"))
                return

    async def greet(self) -> str:
        """The model's name. Raises: UnfitError for a server that cannot be used."""
        await self._ask("GET", "/health")
        version = str((await self._ask("GET", "/version")).get("version", ""))
        if wrong := too_old(version):
            raise UnfitError(wrong)
        served = (await self._ask("GET", "/v1/models"))["data"]
        if len(served) != 1:
            raise UnfitError(f"serves {len(served)} models; one is needed")
        longest = served[0].get("max_model_len")
        if longest is not None and longest < self._limits.max_model_len:
            raise UnfitError(
                f"a context of {longest} tokens; {self._limits.max_model_len} are needed: lower --max-model-len, or serve a longer one"
            )
        await self._forget_prefixes()
        return str(served[0]["id"])

    async def _load(self, folder: str, policy_version: int) -> None:
        tell = self._tell
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        try:
            await asyncio.wait_for(self._ask("POST", "/collective_rpc", call), _LOAD_S)
        except asyncio.TimeoutError:
            tell(Down(f"has not loaded {folder} in {_LOAD_S:g} s"))
            return
        await self._forget_prefixes()
        self._version = policy_version
        tell(Loaded(policy_version))

    async def _forget_prefixes(self) -> None:
        """Drop what is cached of prompts, which other weights computed."""
        for _ in range(_CACHE_RETRIES):
            if (await self._ask("POST", "/reset_prefix_cache")).get("success", True):
                return
            await asyncio.sleep(_CACHE_PAUSE_S)
        raise UnfitError("requests of others keep its cache in use; one that nobody else asks is needed")

    async def _complete(self, request: Request) -> None:
        tell, version = self._tell, self._version
        payload = {
            "model": self._model,
            "prompt": list(request.prompt.token_ids),
            "max_tokens": self._limits.max_tokens,
            "temperature": self._limits.temperature,
            "seed": request.seed,
            "stop": self._limits.stop,
            "logprobs": 0,  # the sampled token's only
            "return_token_ids": True,
            "stream": True,
            "stream_interval": _TOKENS_A_MESSAGE,
            "stream_options": {"include_usage": True},
        }
        answer = _Answer()
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            async with client.stream("POST", "/v1/completions", json=payload) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, (await response.aread()).decode(errors="replace"), "/v1/completions")
                async for line in _lines(response):
                    self._last_news = time.monotonic()
                    if line.startswith(_DATA) and line != _DATA + b"[DONE]":
                        answer.add(json.loads(line[len(_DATA) :]))
        finally:
            self._idle.append(client)
        if not answer.finish_reason:
            raise ValueError("a stream that ended before the completion did")
        if answer.finish_reason == "abort":  # by the server itself: what this side aborts has no stream any more
            tell(Dropped(request.id, "the server aborted it"))
        else:
            tell(answer.completion(request, version))

    async def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        response = await self._client.request(method, path, json=body)
        if response.status_code != 200:
            raise _refusal(response.status_code, response.text, path)
        return dict(response.json()) if response.content.strip() else {}


async def _lines(response: Any) -> AsyncIterator[bytes]:
    """Of a stream, as bytes."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


class _Answer:
    """A completion as it comes in."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason = ""
        self.num_cached_tokens: int | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        if "error" in chunk:
            raise BrokenError(" ".join(str(chunk["error"]).split())[:200])
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.tokens += choice.get("token_ids") or []
            self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if details := (chunk.get("usage") or {}).get("prompt_tokens_details"):  # in the last one, of servers that were told to
            self.num_cached_tokens = details.get("cached_tokens")

    def completion(self, request: Request, policy_version: int) -> Completion:
        return Completion(
            id=request.id,
            token_ids=np.asarray(self.tokens, dtype=np.int32),
            rollout_logprobs=np.asarray(self.logprobs, dtype=np.float32),
            text=self.text,
            finish_reason=self.finish_reason,
            policy_version=policy_version,
            num_cached_tokens=self.num_cached_tokens,
        )


def _refusal(status: int, text: str, path: str) -> Exception:
    """What a status other than 200 means."""
    said = " ".join(text.split())[:200]
    if status in (401, 403):
        return UnfitError(f"refuses the key ({status}); set VLLM_API_KEY or OPENAI_API_KEY to the server's")
    if status == 404 and path in ("/reset_prefix_cache", "/collective_rpc"):
        return UnfitError(f"has no {path}; VLLM_SERVER_DEV_MODE=1 is needed where it runs: reinforce-ada serve sets it")
    if path == "/collective_rpc":
        return UnfitError(f"does not take the weights ({status}: {said}); a server of the model that is trained is needed")
    if 400 <= status < 500:
        return UnfitError(f"{path} answers {status}: {said}")
    return BrokenError(f"{path} answers {status}: {said}")


def _told(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


# -------------------- weights


class WeightsFolder:
    """Where servers find weights: `folder`/version-<n>, a safetensors file each; the latest two are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def __call__(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> Path:
        """Write them aside, then give them their name."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self._folder / f"version-{policy_version}"

        def write(aside: Path) -> None:
            # Tied weights share memory, which the format has no word for.
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in named_tensors}
            try:
                save_file(tensors, aside / "model.safetensors")
            except SafetensorError as e:  # a full disk, say
                raise OSError(str(e)) from e

        replace_folder(path, write, durable=False, where="engine", hint="every server must be able to read it")
        self._forget(policy_version)
        return path

    def _forget(self, latest: int) -> None:
        for path in self._folder.glob("version-*"):
            number = path.name.removeprefix("version-")
            if number.isdecimal() and int(number) not in (latest, latest - 1):
                shutil.rmtree(path, ignore_errors=True)


# -------------------- the engine


class HttpEngine(Fleet):
    """Servers as one engine.

    Args:
        servers: base URLs, such as http://host:8000; of one model, vLLM 0.22 or newer, in development mode (`reinforce-ada serve`).
        weights: a folder that this process writes and every server reads.
        max_num_seqs: requests at once, of each server.
        hung_after_s: a server with requests that brings nothing for so long is taken for dead.
        max_tokens, max_model_len, temperature, stop: of sampling; four stop strings at most.
        give_up_s, say: as `Fleet` takes them.
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
        max_num_seqs: int = 128,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        hung_after_s: float = 60.0,
        give_up_s: float = 600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise InputError("engine", "httpx is not installed", 'pip install "reinforce-ada[train]"')
        if len(stop) > _MOST_STOPS:
            raise InputError("engine", f"{len(stop)} stop strings", f"at most {_MOST_STOPS}, which is what servers take")
        limits = Limits(max_tokens, max_model_len, max_num_seqs, temperature, tuple(stop), hung_after_s)
        self._limits = limits
        urls, headers, trusted = _urls(servers), _headers(), _trusted()
        self._background = Background()
        replicas = [HttpReplica(self._background, url, limits, headers, trusted) for url in urls]
        try:
            _check(self._background, replicas, say)
        except BaseException:
            for replica in replicas:
                replica.close()
            self._background.close()
            raise
        super().__init__(replicas, WeightsFolder(weights), max_tokens=max_tokens, give_up_s=give_up_s, say=say)

    def submit(self, requests: Sequence[Request]) -> None:
        """As `Fleet.submit`. Raises InputError for a prompt that leaves no room for max_tokens."""
        for request in requests:
            check_prompt_length("engine", request, self._limits.max_tokens, self._limits.max_model_len)
        super().submit(requests)

    def close(self) -> None:
        """Let go of the servers, which go on."""
        super().close()
        self._background.close()


def _urls(servers: Sequence[str]) -> list[str]:
    urls = [_base(url) for url in servers]
    if twice := next((url for url in urls if urls.count(url) > 1), ""):
        raise InputError("engine", f"server {twice} twice", "each server once")
    return urls


def _headers() -> dict[str, str]:
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _trusted() -> ssl.SSLContext:
    """The authorities of https, as httpx finds them."""
    import httpx

    try:
        return httpx.create_ssl_context()
    except OSError as e:
        raise InputError("engine", f"SSL_CERT_FILE={os.environ.get('SSL_CERT_FILE')}: {e}", "a file of certificates (PEM)") from e


def _base(url: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?", url):
        raise InputError("engine", f"server {url!r}", "a URL such as http://host:8000")
    return url.rstrip("/").removesuffix("/v1")


def _check(background: Background, replicas: Sequence[HttpReplica], say: Callable[[str], None]) -> None:
    """Some server must answer, all that do must fit, and serve the same."""
    import httpx

    if not replicas:
        raise InputError("engine", "no servers", "--servers URL,URL", "reinforce-ada serve starts some")
    greetings = [background.begin(asyncio.wait_for(r.greet(), 2 * _CONNECT_S)) for r in replicas]
    models: dict[str, str] = {}
    silent: list[str] = []
    for replica, greeting in zip(replicas, greetings, strict=True):
        try:
            models[replica.name] = greeting.result()
        except UnfitError as e:
            raise InputError("engine", f"{replica.name}: {e}", "another server, or another setting") from e
        except (httpx.HTTPError, asyncio.TimeoutError, TimeoutError) as e:
            silent.append(f"{replica.name}: {_told(e)}")
        except (ValueError, KeyError, TypeError) as e:
            raise InputError("engine", f"{replica.name} is no vLLM server ({_told(e)})", "an OpenAI-compatible server of vLLM") from e
    if not models:
        untrusted = any("CERTIFICATE_VERIFY_FAILED" in line for line in silent)
        hint = "SSL_CERT_FILE names the authority of its certificate" if untrusted else "reinforce-ada serve starts some"
        raise InputError("engine", "; ".join(silent), "a server that answers", hint)
    if len(set(models.values())) > 1:
        raise InputError("engine", "; ".join(f"{url} serves {name}" for url, name in models.items()), "the same model on every server")
    for line in silent:
        say(f"engine: not there yet: {line}")
