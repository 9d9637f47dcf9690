"""After every sync each engine generates with the new adapters: transformers here, vLLM in one process, on servers and in Ray actors."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import adapter_scenes
import engine_scenes as scenes
import pytest
import torch
from real_servers import engine_of, serving, wait_until_ready

from reinforce_ada.engines.transformers import TransformersEngine
from reinforce_ada.training import models

with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def greedy_engine(module: Any, tokenizer: Any, **settings: Any) -> TransformersEngine:
    limits = {"max_tokens": scenes.MAX_TOKENS, "max_model_len": scenes.MAX_MODEL_LEN, "max_num_seqs": 32, "temperature": 0.0}
    return TransformersEngine(module, tokenizer, **limits, **settings)


def test_the_transformers_engine_that_shares_the_trained_model(tiny_model: Path) -> None:
    """It cannot forget a module: nothing is sent."""
    model = adapter_scenes.adapted(str(tiny_model))
    engine = greedy_engine(model.causal_lm, model.tokenizer, is_trained=True)
    facts = adapter_scenes.play(engine, model, can_forget=False)
    adapter_scenes.check(facts)


def test_a_transformers_engine_with_a_model_of_its_own(tiny_model: Path) -> None:
    model = adapter_scenes.adapted(str(tiny_model))
    own = models.load(str(tiny_model), "float32", torch.device("cpu"))
    facts = adapter_scenes.play(greedy_engine(own.module, own.tokenizer), model)
    adapter_scenes.check(facts)
    assert list(facts["forgotten"]) == list(adapter_scenes.MODULES)


def test_bfloat16_agrees_within_its_rounding(tiny_model: Path) -> None:
    """The engine's weights are rounded once, and those of the trained model are not: mean and largest difference over all tokens."""
    model = adapter_scenes.adapted(str(tiny_model), "bfloat16")
    engine = greedy_engine(copy.deepcopy(models.load(str(tiny_model), "bfloat16", torch.device("cpu")).module), model.tokenizer)
    for version in range(1, 6):
        adapter_scenes.draw(model, version, adapter_scenes.LARGE / 2)
        sync = adapter_scenes.sampled(engine, model, version)
        assert sync["diff"] < 0.25 < sync["effect"], version


@with_vllm
@pytest.mark.vllm
def test_vllm_in_this_process(vllm_facts: dict[str, Any]) -> None:
    adapter_scenes.check(vllm_facts["adapters"])
    assert list(vllm_facts["adapters"]["forgotten"]) == list(adapter_scenes.MODULES)


@with_vllm
@pytest.mark.vllm
@pytest.mark.slow  # two servers start, and read 34 versions of the weights
@pytest.mark.timeout(1200)
def test_two_servers(tiny_model: Path, tmp_path: Path) -> None:
    model = adapter_scenes.adapted(str(tiny_model))
    limits = {"max_tokens": scenes.MAX_TOKENS, "temperature": 0.0}
    with serving(str(tiny_model), tmp_path) as two, engine_of(two, tmp_path / "weights", **limits) as engine:
        facts = adapter_scenes.play(engine, model, settle=partial(wait_until_ready, engine))
        assert len({placement.replica for placement in engine.placements}) == 2
    adapter_scenes.check(facts)


@with_vllm
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.vllm
@pytest.mark.slow  # two actors start, each with its vLLM
@pytest.mark.timeout(1200)
def test_two_ray_actors(tiny_model: Path, tmp_path: Path, play_apart: Callable[..., None]) -> None:
    play_apart("ray_adapters_child.py", tiny_model, tmp_path / "facts.json", timeout_s=1100)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts.pop("replicas") == 2
    adapter_scenes.check(facts)


@with_vllm
@pytest.mark.vllm
@pytest.mark.slow  # one more vLLM starts
def test_vllm_serves_saved_adapters_as_a_lora(tiny_model: Path, tmp_path: Path, play_apart: Callable[..., None]) -> None:
    """The folder that a run leaves, in peft's form, beside the trained model: greedy tokens, and logprobs within 1e-4."""
    base = tmp_path / "base"
    model = adapter_scenes.adapted(str(tiny_model))
    with model.module.disable_adapter():  # the base as `adapted` has spread it
        model.tokenizer.save_pretrained(base)
        copy.deepcopy(model.module).unload().save_pretrained(base)
    adapter_scenes.draw(model, 1, adapter_scenes.LARGE)
    model.save(tmp_path / "adapters")
    play_apart("saved_adapters_child.py", base, tmp_path / "adapters", tmp_path / "served.json", timeout_s=280)
    served = json.loads((tmp_path / "served.json").read_text())
    for request, said, plain in zip(adapter_scenes.REQUESTS, served["with"], served["without"], strict=True):
        ids = [token for token, _ in said]
        truth = scenes.logits_of(model.causal_lm, request.prompt.token_ids, ids).float().log_softmax(-1)
        assert truth.argmax(-1).tolist() == ids
        torch.testing.assert_close(truth[range(len(ids)), ids], torch.tensor([x for _, x in said]), rtol=0, atol=1e-4)
        assert max(abs(x - y) for (_, x), (_, y) in zip(said, plain, strict=True)) > 1e-2
