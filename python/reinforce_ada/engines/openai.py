"""OpenAI-compatible servers as one engine: vLLM's with weights that are synced, or any that returns logprobs for sampling alone."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from reinforce_ada.engines.answers import BrokenError, BusyError, UnfitError
from reinforce_ada.engines.base import Launch, garbage, sampling_fields
from reinforce_ada.engines.endpoint import MOST_IDS, EndpointReplica, wrong_answer
from reinforce_ada.engines.fleet import Fleet
from reinforce_ada.engines.http_replica import GREET_S, Background, HttpReplica, Limits, told
from reinforce_ada.errors import InputError, needs
from reinforce_ada.files import replace_folder
from reinforce_ada.outside import GarbageError, one_line, server_url, without_credentials
from reinforce_ada.types import Request

_log = logging.getLogger(__name__)

_MOST_STOPS = 4  # the interface accepts no more

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

    With `weights` the servers are vLLM's, 0.22 or newer, in development mode (`reinforce-ada serve`), and load what `sync_weights` gives
    them. Without, any OpenAI-compatible endpoint with /v1/models and /v1/completions will do, for sampling alone: its weights stay as they
    are, and the policy version is 0. A completion then has the token ids and logprobs of the server if that is vLLM; otherwise those that
    `tokenizer` makes of its text and of the logprobs that came with it (see `endpoint.tokens_of` for what this loses); without a tokenizer
    only the text.

    Args:
        servers: base URLs, such as http://host:8000, or one of them; all serve one model.
        weights: a folder that this process writes and every server reads; None for sampling alone.
        max_tokens, max_model_len, temperature, top_p, top_k, min_p, stop: see `VllmEngine`; four stop strings at most.
        vocab_size: the size of the model's vocabulary; a token id beyond it is garbage.
        max_num_seqs: the requests that each server takes at once.
        hung_after_s: a server whose requests make no progress for this long counts as dead.
        model: for sampling alone, the name of the model, where a server has several.
        tokenizer: for sampling alone, the model's tokenizer, as transformers loads it.
        give_up_s, say: see `Fleet`.
    `max_model_len` and `vocab_size` may be left out for sampling alone. TLS is httpx's: SSL_CERT_FILE names other authorities. The key is
    VLLM_API_KEY or OPENAI_API_KEY.
    Raises: InputError when httpx is not installed, no server answers, or one that does cannot be used.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        max_tokens: int,
        max_model_len: int | None = None,
        vocab_size: int | None = None,
        max_num_seqs: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        hung_after_s: float = 60.0,
        model: str = "",
        tokenizer: Any = None,
        give_up_s: float = 600.0,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        needs("engine", "httpx")
        self._is_alone = weights is None
        if len(stop) > _MOST_STOPS:
            raise InputError("engine", f"{len(stop)} stop strings", f"at most {_MOST_STOPS}, which is what servers take")
        if weights is not None and (max_model_len is None or vocab_size is None or model or tokenizer is not None):
            given = "weights, with model or tokenizer, or without max_model_len or vocab_size"
            raise InputError("engine", given, "the first two for sampling alone, the other two with weights", "leave out weights")
        vocab_size = vocab_size or MOST_IDS
        fields = sampling_fields(temperature, top_p, top_k, min_p)
        limits = Limits(max_tokens, max_model_len or 0, vocab_size, max_num_seqs, fields, tuple(stop), hung_after_s)
        urls, headers, trusted = _urls([servers] if isinstance(servers, str) else servers), _headers(), _trusted()
        self._background = Background()
        replicas: list[HttpReplica] = [
            EndpointReplica(self._background, url, limits, headers, trusted, model, tokenizer)
            if self._is_alone
            else HttpReplica(self._background, url, limits, headers, trusted)
            for url in urls
        ]
        greetings = [self._background.begin(replica.greet()) for replica in replicas]
        try:
            _check(replicas, greetings, say)
        except BaseException:
            for replica, greeting in zip(replicas, greetings, strict=True):
                greeting.cancel()
                replica.close()
            self._background.close()
            raise
        publish = _refuse_weights if weights is None else partial(write_weights, Path(weights).resolve())
        super().__init__(
            replicas, publish, max_tokens=max_tokens, vocab_size=vocab_size, give_up_s=give_up_s, say=say,
            max_model_len=None if self._is_alone else max_model_len,  # a prompt that is a text has a length that only the server knows
            policy_version=0 if self._is_alone else None, wrong=wrong_answer if self._is_alone else garbage,
        )  # fmt: skip

    def submit(self, requests: Sequence[Request]) -> None:
        """Start these requests; see `Fleet.submit`. Raises: InputError also for what sampling alone cannot serve."""
        for request in requests if self._is_alone else ():
            if request.policy_version != 0:
                given = f"a request of policy_version {request.policy_version}"
                raise InputError("engine", given, "0: these servers sample alone, and nobody syncs their weights")
            if not (request.prompt.token_ids or request.prompt.text):
                raise InputError("engine", f"prompt {request.id.prompt_id!r} is empty", "a text or token ids")
        super().submit(requests)

    def close(self) -> None:
        """Close the connections; the servers keep running."""
        super().close()
        self._background.close()


def _refuse_weights(named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> Any:
    needed = "an engine with weights: HttpEngine(servers, FOLDER, ...) and servers of `reinforce-ada serve`"
    raise InputError("engine", "sync_weights of servers that sample alone", needed)


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
            models[replica.name] = greeting.result(timeout=2 * GREET_S)
        except UnfitError as e:
            raise InputError("engine", f"{replica.name}: {e}", "another server, or another setting") from e
        except (BrokenError, httpx.HTTPError) as e:
            silent.append(f"{replica.name}: {told(e)}")
            is_any_busy |= isinstance(e, BusyError)
        except Exception as e:
            raise InputError("engine", f"{replica.name} is no {replica.kind} ({told(e)})", replica.needed) from e
    if not models and not is_any_busy:
        untrusted = any("CERTIFICATE_VERIFY_FAILED" in line for line in silent)
        hint = "SSL_CERT_FILE names the authority of its certificate" if untrusted else "reinforce-ada serve starts some"
        raise InputError("engine", "; ".join(silent), "a server that answers", hint)
    if len(set(models.values())) > 1:
        shown = "; ".join(f"{url} serves {one_line(name, 100)}" for url, name in models.items())
        raise InputError("engine", shown, "the same model on every server")
    for note in (replica.note for replica in replicas if replica.note):
        say(f"engine: {note}")
    for line in silent:
        say(f"engine: not there yet: {line}")


def launch(run: Launch) -> HttpEngine:
    """Return the engine of a run."""
    servers = [url.strip() for url in run.settings.servers.split(",") if url.strip()]
    patience = {"hung_after_s": run.settings.hung_after_s, "give_up_s": run.settings.give_up_s}
    engine = HttpEngine(servers, run.weights, vocab_size=run.vocab_size, say=run.say, **patience, **run.limits)
    run.say(f"engine: {len(servers)} servers, weights in {run.weights}")
    return engine
