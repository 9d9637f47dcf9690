"""The HTTP engine with real processes as servers: what it asks, what it refuses, and what is lost when they die, hang or answer garbage."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from engine_scenes import refusal
from scripted_server import completion
from scripted_servers import Process, answers, ask, servers, until

from reinforce_ada.driver import run
from reinforce_ada.engines.answers import lines
from reinforce_ada.engines.openai import HttpEngine
from reinforce_ada.errors import EngineLost
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import CompletionId, Prompt, Request, SamplingResult

MAX_TOKENS = 12
PROMPTS = [Prompt(f"p{i}", (5, 6, 7 + i)) for i in range(12)]
VERSION = 7


def reward(prompt: Prompt, text: str) -> float:
    """Of the last token, so that prompts end at different rounds."""
    return float(int(text.split()[-1]) % (2 + int(prompt.prompt_id[1:])) == 0)


@contextmanager
def engine_of(processes: Sequence[Process], folder: Path, **options: Any) -> Iterator[HttpEngine]:
    said: list[str] = options.pop("said", [])
    limits = {"max_tokens": MAX_TOKENS, "max_model_len": 64, "vocab_size": 1000, "max_num_seqs": 8, "hung_after_s": 5.0, "give_up_s": 20.0}
    with closing(HttpEngine([p.url for p in processes], folder / "weights", say=said.append, **{**limits, **options})) as engine:
        engine.sync_weights([("number", torch.tensor([float(VERSION)]))], VERSION)
        yield engine


def fresh() -> AdaptiveSampler:
    return AdaptiveSampler(PROMPTS, preset("reinforce-ada-balance"), step=1, policy_version=VERSION)


def pools(result: SamplingResult) -> dict[str, list[tuple[int, list[int], float]]]:
    return {
        pool.prompt.prompt_id: [(s.completion.id.index, s.completion.token_ids.tolist(), s.reward) for s in pool.scored]
        for pool in result.pools
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SamplingResult:
    with servers({"token_s": 0.0}) as one, engine_of(one, tmp_path_factory.mktemp("undisturbed")) as engine:
        return run(fresh(), engine, reward)


def disturbed(
    folder: Path, processes: Sequence[Process], at: Sequence[int], do: Callable[[int], None], **options: Any
) -> tuple[SamplingResult, HttpEngine]:
    """A run in which `do(k)` happens when the k-th of these numbers of completions is committed; store and metrics agree in the end."""
    left = list(at)

    def on_progress(progress: Any) -> None:
        if left and progress.num_committed >= left[0]:
            left.pop(0)
            do(len(at) - len(left) - 1)

    with engine_of(processes, folder, **options) as engine, RolloutStore(folder / "rollouts.sqlite", run={}) as store:
        result = run(fresh(), engine, reward, store, on_progress=on_progress)
        store.finish_step(1, result)
        assert not left, f"{len(left)} disturbances did not happen"
        replayed = fresh()
        replayed.restore(store.events(1))
        assert replayed.done
        assert pools(replayed.result()) == pools(result)
        assert result.metrics["samples_per_prompt"] * len(PROMPTS) == sum(len(pool.scored) for pool in result.pools)
        return result, engine


# -------------------- what is asked, and comes back


def test_completions_are_those_of_the_seeds(tmp_path: Path) -> None:
    requests = [Request(CompletionId(1, p.prompt_id, k), p, 1000 * i + k, VERSION) for i, p in enumerate(PROMPTS) for k in range(4)]
    with servers({}, {}) as two, engine_of(two, tmp_path) as engine:
        assert engine.free_slots == 16
        engine.submit(requests)
        done = []
        while len(done) < len(requests):
            done += engine.poll()
        for c in done:
            seed = next(r.seed for r in requests if r.id == c.id)
            tokens, logprobs, text, finish = completion(seed, VERSION, MAX_TOKENS)
            assert (c.token_ids.tolist(), c.text, c.finish_reason, c.policy_version) == (tokens, text, finish, VERSION)
            np.testing.assert_allclose(c.rollout_logprobs, logprobs, rtol=1e-6)
        sizes = [len(r.prompt.token_ids) for r in requests]
        assert engine.metrics()["engine_prefix_hit_rate"] == (sum(sizes) - len(sizes)) / sum(sizes)


# What vLLM's /v1/completions knows of sampling, and the value that leaves the model's own distribution alone.
FIELDS = {
    "temperature": 0.7, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "logit_bias": None, "allowed_token_ids": None, "bad_words": [], "min_tokens": 0, "max_tokens": MAX_TOKENS, "ignore_eos": False,
    "stop_token_ids": [], "stop": ["."], "n": 1, "use_beam_search": False, "echo": False, "suffix": None, "seed": 1, "logprobs": 0,
    "include_stop_str_in_output": False, "skip_special_tokens": True, "spaces_between_special_tokens": True, "truncate_prompt_tokens": None,
}  # fmt: skip


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9, "top_k": 20, "min_p": 0.05}], ids=str)
def test_every_field_of_sampling_is_named(tmp_path: Path, truncation: dict[str, float]) -> None:
    """A server fills what is left out from the folder of its model."""
    with servers({}) as one, engine_of(one, tmp_path, temperature=0.7, stop=(".",), **truncation) as engine:
        engine.submit([Request(CompletionId(1, "p", 0), PROMPTS[0], 1, VERSION)])
        until(lambda: engine.poll())
        asked = ask(f"{one[0].url}/active")["asked"]
    assert {name: asked[name] for name in FIELDS} == {**FIELDS, **truncation}
    assert "best_of" not in asked


def test_a_server_that_does_not_say_what_it_cached(tmp_path: Path) -> None:
    with servers({"tells_cached": False}) as one, engine_of(one, tmp_path) as engine:
        engine.submit([Request(CompletionId(1, "p", 0), PROMPTS[0], 1, VERSION)])
        until(lambda: engine.poll())
        assert "engine_prefix_hit_rate" not in engine.metrics()


def test_connections_are_used_again(tmp_path: Path) -> None:
    with servers({}) as one, engine_of(one, tmp_path) as engine:
        for turn in range(3):
            engine.submit([Request(CompletionId(1, "p", 8 * turn + k), PROMPTS[0], k, VERSION) for k in range(8)])
            done: list[Any] = []
            until(lambda done=done: done.extend(engine.poll()) or len(done) == 8)
        (replica,) = (m.replica for m in engine.members)
        assert 0 < len(replica._idle) <= 8  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_lines_of_a_stream_however_it_is_cut(size: int) -> None:
    text = "data: größer\r\n\r\ndata: {}\n\ndata: [DONE]\n\nno end".encode()

    class Response:
        headers: ClassVar[dict[str, str]] = {}

        async def aiter_raw(self) -> AsyncIterator[bytes]:
            for k in range(0, len(text), size):
                yield text[k : k + size]

    async def read() -> list[str]:
        return [line.decode() async for line in lines(Response(), 1000)]

    assert asyncio.run(read()) == ["data: größer", "", "data: {}", "", "data: [DONE]", ""]


def test_abort_closes_the_stream(tmp_path: Path) -> None:
    with servers({"token_s": 0.5}) as (one,), engine_of([one], tmp_path) as engine:
        requests = [Request(CompletionId(1, "p", k), PROMPTS[0], k + 10, VERSION) for k in range(8)]
        engine.submit(requests)
        assert engine.free_slots == 0
        until(lambda: ask(f"{one.url}/active")["active"] == 8)
        engine.abort([r.id for r in requests])
        assert engine.free_slots == 8
        until(lambda: ask(f"{one.url}/active")["active"] == 0)
        assert engine.poll() == []


def test_two_servers_give_the_pools_of_one(tmp_path: Path, undisturbed: SamplingResult) -> None:
    with servers({}, {}) as two:
        result, engine = disturbed(tmp_path, two, [], lambda _: None)
    assert pools(result) == pools(undisturbed)
    assert engine.counts.restarts == engine.counts.moved == 0


def certificate(folder: Path) -> Path:
    """A certificate of this machine's own address, signed by itself, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: SamplingResult) -> None:
    """With the authority that SSL_CERT_FILE names, and not without it."""
    path = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with servers({"certificate": str(path)}) as one:
        assert one[0].url.startswith("https://")
        with engine_of(one, tmp_path) as engine:
            assert pools(run(fresh(), engine, reward)) == pools(undisturbed)
        monkeypatch.delenv("SSL_CERT_FILE")
        said = refusal(lambda: HttpEngine([one[0].url], tmp_path, max_tokens=4, max_model_len=64, vocab_size=9))
        assert "certificate verify failed" in said.lower()
        assert "SSL_CERT_FILE names the authority" in said
        assert "\n" not in said


def test_a_certificate_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    for name in ("nothing.pem", "text.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
        said = refusal(lambda: HttpEngine(["http://127.0.0.1:9"], tmp_path, max_tokens=4, max_model_len=64, vocab_size=9))
        assert f"{name}: " in said
        assert "a file of certificates (PEM)" in said


# -------------------- faults


def test_killed_servers_lose_nothing(tmp_path: Path, undisturbed: SamplingResult) -> None:
    """Six kills in one step; each server is started again at once, without weights."""
    with servers({}, {}) as two:

        def kill(k: int) -> None:
            two[k % 2].kill()
            threading.Timer(0.2, two[k % 2].start).start()

        result, engine = disturbed(tmp_path, two, [1, 20, 40, 60, 80, 100], kill)
        for process in two:
            process.ready()  # the last timer has run
    assert pools(result) == pools(undisturbed)
    assert engine.counts.restarts > 0
    assert engine.counts.moved > 0


def test_a_stopped_server_is_noticed(tmp_path: Path, undisturbed: SamplingResult) -> None:
    said: list[str] = []
    with servers({}, {}) as two:
        result, _ = disturbed(tmp_path, two, [10], lambda _: two[0].stop(), hung_after_s=0.5, said=said)
        two[0].go_on()
    assert pools(result) == pools(undisturbed)
    assert any(two[0].url in line and ("no progress for 0.5 s" in line or "has not answered for 0.5 s" in line) for line in said)


def test_a_server_that_answers_but_brings_no_token_is_noticed(tmp_path: Path, undisturbed: SamplingResult) -> None:
    """As vLLM's does whose engine hangs: its /health only asks whether the engine has died."""
    said: list[str] = []
    with servers({"token_s": 60.0}, {}) as two:
        result, _ = disturbed(tmp_path, two, [], lambda _: None, hung_after_s=0.5, said=said)
        assert answers(two[0].url)
    assert pools(result) == pools(undisturbed)
    assert any(two[0].url in line and "no progress for 0.5 s" in line for line in said)


def test_garbage_is_not_committed(tmp_path: Path, undisturbed: SamplingResult) -> None:
    said: list[str] = []
    with servers({"garbage": 10}, {}) as two:
        result, _ = disturbed(tmp_path, two, [], lambda _: None, said=said)
    assert pools(result) == pools(undisturbed)
    assert any("answered garbage" in line for line in said)


def test_without_any_server_the_run_stops_and_can_be_resumed(tmp_path: Path, undisturbed: SamplingResult) -> None:
    said: list[str] = []
    with servers({}, {}) as two, RolloutStore(tmp_path / "rollouts.sqlite", run={}) as store:

        def kill_all(progress: Any) -> None:
            if progress.num_committed >= 30:
                for process in two:
                    process.kill()

        with engine_of(two, tmp_path, give_up_s=1.5, said=said) as engine, pytest.raises(EngineLost, match="can be resumed"):
            run(fresh(), engine, reward, store, on_progress=kill_all)
        assert sum("no replica is there" in line for line in said) == 1
        resumed = fresh()
        resumed.restore(store.events(1))
        assert resumed.progress().num_committed >= 30
        for process in two:
            process.start()
            process.ready()
        with engine_of(two, tmp_path) as engine:
            assert pools(run(resumed, engine, reward, store)) == pools(undisturbed)


# -------------------- refusals


REFUSALS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "key": ([{"key": "secret"}], {}, "refuses the key (401); set VLLM_API_KEY"),
    "models": ([{}, {"model": "other"}], {}, "serves scripted; http"),
    "context": ([{"max_model_len": 32}], {}, "a context of 32 tokens; 64 are needed"),
    "old": ([{"version": "0.21.1"}], {}, "vLLM 0.21.1; at least 0.22 is needed"),
    "development mode": ([{"dev": False}], {}, "VLLM_SERVER_DEV_MODE=1 is needed"),
    "weights": ([{"takes_weights": False}], {}, "does not take the weights (500: "),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, options, message = REFUSALS[name]
    for variable in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)

    def attempt(processes: Sequence[Process]) -> None:
        with engine_of(processes, tmp_path, **options):
            pass

    with servers(*settings) as processes:
        said = refusal(lambda: attempt(processes))
        assert message in said
        assert "\n" not in said
        if name == "key":
            monkeypatch.setenv("VLLM_API_KEY", "secret")
            attempt(processes)


def test_servers_that_are_not_there(tmp_path: Path) -> None:
    options = {"max_tokens": 4, "max_model_len": 64, "vocab_size": 9}
    assert "reinforce-ada serve starts some" in refusal(lambda: HttpEngine(["http://127.0.0.1:9"], tmp_path, **options))
    assert "a URL such as http://host:8000" in refusal(lambda: HttpEngine(["localhost"], tmp_path, **options))
    assert "http://a:1 twice; each" in refusal(lambda: HttpEngine(["http://a:1", "http://b:1", "http://a:1/v1/"], tmp_path, **options))
    assert "no servers" in refusal(lambda: HttpEngine([], tmp_path, **options))
    five = {**options, "stop": list("abcde")}
    assert "5 stop strings; at most 4" in refusal(lambda: HttpEngine(["http://127.0.0.1:9"], tmp_path, **five))


@pytest.mark.parametrize("status", [503, 429])
def test_a_server_that_is_busy_at_the_start_is_waited_for(status: int, tmp_path: Path, undisturbed: SamplingResult) -> None:
    said: list[str] = []
    with servers({"busy": 2, "busy_status": status}) as one, engine_of(one, tmp_path, said=said) as engine:
        assert pools(run(fresh(), engine, reward)) == pools(undisturbed)
    assert said[0] == f"engine: not there yet: {one[0].url}: /version answers {status}"


@pytest.mark.parametrize("key", ["line\nbreak", "schlüssel", "\x1b[2J"])
def test_a_key_that_no_header_can_hold(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    said = refusal(lambda: HttpEngine(["http://127.0.0.1:9"], tmp_path, max_tokens=4, max_model_len=64, vocab_size=9))
    assert said == "engine: VLLM_API_KEY has characters that no header can hold; printable ASCII"


def test_a_proxy_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@proxy:port")
    said = refusal(lambda: HttpEngine(["http://127.0.0.1:9"], tmp_path, max_tokens=4, max_model_len=64, vocab_size=9))
    assert said.startswith("engine: HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: ")
    assert "secret" not in said


def test_without_httpx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refusal(lambda: HttpEngine(["http://127.0.0.1:9"], tmp_path, max_tokens=4, max_model_len=64, vocab_size=9))
    assert said == 'engine: httpx is not installed; pip install "reinforce-ada[train]"'


def test_over_long_prompts_are_refused(tmp_path: Path) -> None:
    with servers({}) as one, engine_of(one, tmp_path) as engine:
        long = Request(CompletionId(1, "long", 0), Prompt("long", (1,) * 60), 0, VERSION)
        assert "has 60 tokens" in refusal(lambda: engine.submit([long]))


def test_old_weights_are_deleted(tmp_path: Path) -> None:
    with servers({}) as one, engine_of(one, tmp_path) as engine:
        for version in range(VERSION + 1, VERSION + 4):
            engine.sync_weights([("number", torch.tensor([float(version)]))], version)
        assert ask(f"{one[0].url}/active")["weights"] == VERSION + 3
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["version-10", "version-9"]
