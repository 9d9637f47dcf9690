"""Real vLLM servers under `reinforce-ada serve`, as one engine, in fp32: logprobs, seeds, aborts, weight syncs, and two SIGKILLs.

The default run starts one, make test-slow two: each is two processes that take 20 s of a processor to import vLLM. What two are for, which
server gets what and what moves when one fails, test_fleet.py and test_openai.py say of scripted servers.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_conformance
import engine_scenes as scenes
import pytest
import torch
from real_servers import Serving, engine_of, killed_step, serving, step, wait_until_ready

from reinforce_ada.engines import answers
from reinforce_ada.training import models

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.timeout(420),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def module(tiny_model: Path) -> Any:
    """Not what the servers start with: a weight sync that does nothing would show everywhere."""
    module = models.load(str(tiny_model), "float32", torch.device("cpu")).module
    scenes.spread(module)
    return module


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids="replicas={}".format)
def servers(request: pytest.FixtureRequest, folder: Path, tiny_model: Path) -> Iterator[Serving]:
    with serving(str(tiny_model), folder, request.param) as servers:
        yield servers


def engine_for_scenes(servers: Serving, folder: Path, **options: Any) -> Any:
    return engine_of(servers, folder / "weights", **{"max_tokens": scenes.MAX_TOKENS, **options})


def test_the_servers_conform(servers: Serving, folder: Path, tiny_model: Path, in_process: dict[str, Any]) -> None:
    module = models.load(str(tiny_model), "float32", torch.device("cpu")).module
    with engine_for_scenes(servers, folder, max_model_len=scenes.MAX_MODEL_LEN) as engine:
        engine.sync_weights(scenes.weights(module), 0)
        wait_until_ready(engine)
        engine_conformance.check(engine_conformance.play(engine, module), in_process, num_replicas=len(servers.ports))


def test_logprobs_at_another_temperature(servers: Serving, folder: Path, module: Any) -> None:
    requests = scenes.make_requests(scenes.make_prompts())
    with engine_for_scenes(servers, folder, max_num_seqs=3, temperature=0.7) as engine:
        engine.sync_weights(scenes.weights(module), 0)
        assert scenes.largest_logprob_difference(module, requests, scenes.sample(engine, requests), 0.7) < 1e-4


def test_greedy_output_is_the_trained_models_after_every_sync(servers: Serving, folder: Path, module: Any) -> None:
    requests, outputs = scenes.make_requests(scenes.make_prompts())[::4], set()
    with engine_for_scenes(servers, folder, temperature=0.0) as engine:
        for version in range(1, 4):
            scenes.perturb(module, seed=version)
            engine.sync_weights(scenes.weights(module), version)
            wait_until_ready(engine)
            done = scenes.sample(engine, [replaced(r, version) for r in requests])
            assert scenes.not_greedy(module, requests, done) == 0
            worst = scenes.largest_logprob_difference(module, requests, done, 1.0)
            assert worst < 1e-4  # a prefix cached under old weights would show here
            assert {c.policy_version for c in done.values()} == {version}
            outputs.add(str(scenes.tokens(done)))
    assert len(outputs) == 3


def replaced(request: Any, version: int) -> Any:
    return type(request)(request.id, request.prompt, request.seed, version)


def test_stop_strings(servers: Serving, folder: Path, module: Any) -> None:
    requests = scenes.make_requests(scenes.make_prompts())
    with engine_for_scenes(servers, folder) as engine:
        engine.sync_weights(scenes.weights(module), 0)
        done = scenes.sample(engine, requests)
    stop = scenes.common_texts(done, 4)
    with engine_for_scenes(servers, folder, stop=stop) as engine:
        engine.sync_weights(scenes.weights(module), 0)
        assert scenes.cut_at(stop, done, scenes.sample(engine, requests)) > 2


def test_tokens_come_in_few_messages(servers: Serving, folder: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token, the rest up to 16 at a time, the counts: one by one they take this process's time."""
    messages: list[Any] = []
    add = answers.Answer.add

    def counted(answer: Any, line: bytes) -> bool:
        if line.startswith(b"data: {"):
            messages.append(line)
        return add(answer, line)

    monkeypatch.setattr(answers.Answer, "add", counted)
    requests = scenes.make_requests(scenes.make_prompts())
    with engine_for_scenes(servers, folder) as engine:
        engine.sync_weights(scenes.weights(module), 0)
        scenes.sample(engine, requests)
    assert len(messages) <= 3 * len(requests)


def test_a_short_context_is_refused(servers: Serving, folder: Path) -> None:
    assert "a context of 128 tokens; 4096 are needed" in scenes.refusal(
        lambda: engine_for_scenes(servers, folder, max_model_len=4096).__enter__()
    )


# Two more starts of vLLM; make test-engine-kills kills a server 20 times.
@pytest.mark.parametrize("servers", [pytest.param(2, marks=pytest.mark.slow, id="replicas=2")], indirect=True)
def test_two_kills_lose_nothing(servers: Serving, folder: Path, module: Any) -> None:
    """The second comes while the first server starts again: for a while there is none, or only the one that has just come back."""
    with engine_of(servers, folder / "weights") as engine:
        engine.sync_weights(scenes.weights(module), 5)
        wait_until_ready(engine)
        step(engine, 5, folder)  # the first is slow
        began = time.monotonic()
        expected, agrees = step(engine, 5, folder)
        usual_s = time.monotonic() - began
        assert agrees
        for replica, part in enumerate(("server", "whole group")):
            # A step takes less when more is cached and nothing else runs: until one is hit in its middle.
            attempts = (
                killed_step(servers, engine, 5, folder, expected, replica, part, share * usual_s) for share in (0.3, 0.2, 0.1, 0.05, 0.02)
            )
            kill = next((k for k in attempts if k is not None), None)
            assert kill is not None, "every step was over before the kill"
            assert kill.same_pools
            assert kill.store_agrees
        assert engine.counts.moved > 0
        assert engine.counts.restarts > 0
