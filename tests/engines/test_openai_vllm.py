"""Two real vLLM servers under `reinforce-ada serve`, as one engine, in fp32: logprobs, seeds, aborts, weight syncs, and two SIGKILLs."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenes import (
    MAX_TOKENS,
    bad_requests,
    largest_logprob_difference,
    make_prompts,
    make_requests,
    not_greedy,
    perturb,
    refusal,
    sample,
    spread,
    tokens,
    weights,
)
from real_servers import Serving, build_model, engine_of, killed_step, serving, step, wait_until_ready

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
def module(folder: Path) -> Any:
    """Not what the servers start with: a weight sync that does nothing would show everywhere."""
    module = models.load(build_model(folder / "model"), "float32", torch.device("cpu")).module
    spread(module)
    return module


@pytest.fixture(scope="module")
def two(folder: Path, module: Any) -> Iterator[Serving]:
    with serving(str(folder / "model"), folder) as two:
        yield two


def scenes(two: Serving, folder: Path, **options: Any) -> Any:
    return engine_of(two, folder / "weights", **{"max_tokens": MAX_TOKENS, **options})


def test_tokens_follow_from_the_seeds_and_logprobs_are_the_models(two: Serving, folder: Path, module: Any) -> None:
    requests = make_requests(make_prompts())
    with scenes(two, folder) as engine:
        engine.sync_weights(weights(module), 0)
        wait_until_ready(engine)
        first = sample(engine, requests)
        assert len({tuple(t) for t in tokens(first).values()}) > 12  # of 24
        assert {c.finish_reason for c in first.values()} == {"stop", "length"}
        assert largest_logprob_difference(module, requests, first, 1.0) < 1e-4
        assert tokens(sample(engine, requests[::-1])) == tokens(first)
        # aborts free the slots, leave the others alone, and the ids may come again
        engine.submit(requests)
        assert engine.free_slots == 32 - len(requests)
        engine.abort([r.id for r in requests[1::2]])
        assert engine.free_slots == 32 - len(requests) // 2
        done = {}
        while len(done) < len(requests) // 2:
            done.update({c.id: c for c in engine.poll()})
        assert tokens({**done, **sample(engine, requests[1::2])}) == tokens(first)
        assert engine.free_slots == 32
    with scenes(two, folder, max_num_seqs=3, temperature=0.7) as engine:
        engine.sync_weights(weights(module), 0)
        assert largest_logprob_difference(module, requests, sample(engine, requests), 0.7) < 1e-4


def test_greedy_output_is_the_trained_models_after_every_sync(two: Serving, folder: Path, module: Any) -> None:
    requests, outputs = make_requests(make_prompts())[::4], set()
    with scenes(two, folder, temperature=0.0) as engine:
        for version in range(1, 4):
            perturb(module, seed=version)
            engine.sync_weights(weights(module), version)
            wait_until_ready(engine)
            done = sample(engine, [replaced(r, version) for r in requests])
            assert not_greedy(module, requests, done) == 0
            assert largest_logprob_difference(module, requests, done, 1.0) < 1e-4  # a prefix cached under old weights would show here
            assert {c.policy_version for c in done.values()} == {version}
            outputs.add(str(tokens(done)))
    assert len(outputs) == 3


def replaced(request: Any, version: int) -> Any:
    return type(request)(request.id, request.prompt, request.seed, version)


def test_refusals_are_one_line(two: Serving, folder: Path, module: Any) -> None:
    assert "a context of 128 tokens; 4096 are needed" in refusal(lambda: scenes(two, folder, max_model_len=4096).__enter__())
    with scenes(two, folder, max_model_len=64) as engine:
        engine.sync_weights(weights(module), 0)
        for request in bad_requests().values():
            assert "\n" not in refusal(lambda request=request: engine.submit([request]))
            assert refusal(lambda request=request: engine.submit([request]))


def test_two_kills_lose_nothing(two: Serving, folder: Path, module: Any) -> None:
    """The second comes while the first server starts again: for a while there is none, or only the one that has just come back."""
    with engine_of(two, folder / "weights") as engine:
        engine.sync_weights(weights(module), 5)
        wait_until_ready(engine)
        step(engine, 5, folder)  # the first is slow
        began = time.monotonic()
        expected, agrees = step(engine, 5, folder)
        usual_s = time.monotonic() - began
        assert agrees
        for replica, part in enumerate(("server", "whole group")):
            kill = killed_step(two, engine, 5, folder, expected, replica, part, 0.3 * usual_s)
            assert kill is not None, "the step was over before the kill"
            assert kill.same_pools
            assert kill.store_agrees
        assert engine.counts.moved > 0
        assert engine.counts.restarts > 0
