"""min_p, top_k and top_p: literal tables, the definition in float64, transformers' own processors, and what the engine samples."""

from __future__ import annotations

import math
from typing import Any

import engine_scenes as scenes
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reinforce_ada.engines.transformers import TransformersEngine
from reinforce_ada.engines.truncation import truncated
from reinforce_ada.training.models import tiny_config, tiny_tokenizer
from reinforce_ada.types import CompletionId, Prompt, Request

P = (0.1, 0.4, 0.05, 0.3, 0.15)
TABLE = [
    ({}, P),
    ({"top_k": 2}, (0, 4 / 7, 0, 3 / 7, 0)),
    ({"top_k": 5}, P),
    ({"top_k": 9}, P),
    ({"top_p": 0.69}, (0, 4 / 7, 0, 3 / 7, 0)),
    ({"top_p": 0.71}, (0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85)),
    ({"top_p": 1e-9}, (0, 1, 0, 0, 0)),
    ({"min_p": 0.37}, (0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85)),
    ({"min_p": 1.0}, (0, 1, 0, 0, 0)),
    # top_k first: .4, .3, .15 of .85. The first two have .82 of that, but .7 of the whole.
    ({"top_k": 3, "top_p": 0.8}, (0, 4 / 7, 0, 3 / 7, 0)),
    # min_p before top_p likewise.
    ({"min_p": 0.37, "top_p": 0.8}, (0, 4 / 7, 0, 3 / 7, 0)),
    ({"min_p": 0.2, "top_k": 4, "top_p": 0.9}, (0.1 / 0.95, 0.4 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95)),
]


@pytest.mark.parametrize(("settings", "expected"), TABLE, ids=lambda value: str(value))
def test_literal_distributions(settings: dict[str, Any], expected: tuple[float, ...]) -> None:
    probabilities = truncated(torch.tensor([P]).log(), **settings).softmax(-1)[0]
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    np.testing.assert_allclose(scenes.truncated_probabilities(np.log(P), **settings), expected, atol=1e-12)


def test_nothing_is_done_by_default() -> None:
    logits = torch.randn(2, 9)
    assert truncated(logits) is logits
    assert truncated(logits, top_p=1.0, top_k=0, min_p=0.0) is logits


def test_equally_likely_tokens_stay_together_at_top_k() -> None:
    kept = truncated(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), top_k=2)[0].isfinite()
    assert kept.tolist() == [True, True, True, False]


@given(
    seed=st.integers(0, 2**31), vocab=st.integers(1, 40), top_p=st.floats(0.01, 1), top_k=st.integers(0, 45),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)  # fmt: skip
def test_the_definition_in_float64(seed: int, vocab: int, top_p: float, top_k: int, min_p: float) -> None:
    z = np.random.default_rng(seed).normal(0, 2, vocab)
    settings = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    expected = scenes.truncated_probabilities(z, **settings)
    for d in (-1e-5, 1e-5):  # no sum or ratio at the edge, where float32 decides
        near = scenes.truncated_probabilities(z, 1.0, np.clip(top_p + d, 1e-9, 1), top_k, np.clip(min_p + d, 0, 1))
        assume(np.array_equal(near > 0, expected > 0))
    got = truncated(torch.tensor(z[None], dtype=torch.float32), **settings).softmax(-1)[0].double().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert math.isclose(got.sum(), 1, abs_tol=1e-6)


@pytest.mark.parametrize("settings", [*scenes.TRUNCATIONS.values(), {"top_p": 0.05}, {"top_k": 1}, {"min_p": 0.999}], ids=str)
def test_transformers_own_processors_leave_the_same_tokens(settings: dict[str, Any]) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(64, 384, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits
    for name, processor in (("min_p", MinPLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        if name in settings:
            expected = processor(settings[name])(None, expected)
    assert torch.equal(truncated(logits, **settings), expected)


# -------------------- the engine


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    scenes.spread(module)
    return module


def make_engine(module: Any, **settings: Any) -> TransformersEngine:
    limits = {"max_tokens": scenes.MAX_TOKENS, "max_model_len": scenes.MAX_MODEL_LEN, "max_num_seqs": 32}
    return TransformersEngine(module, tiny_tokenizer(), **{**limits, **settings})


@pytest.mark.parametrize("name", scenes.TRUNCATIONS)
def test_logprobs_are_those_of_the_truncated_distribution(llama: Any, name: str) -> None:
    requests, truncation = scenes.make_requests(scenes.make_prompts()), scenes.TRUNCATIONS[name]
    done = scenes.sample(make_engine(llama, temperature=0.7, **truncation), requests)
    assert scenes.largest_truncated_difference(llama, requests, done, 0.7, truncation) < 1e-4
    assert len({tuple(c.token_ids) for c in done.values()}) > 12  # of 24
    plain = scenes.sample(make_engine(llama, temperature=0.7), requests)
    assert scenes.largest_truncated_difference(llama, requests, plain, 0.7, truncation) > 0.1  # or there was nothing to tell apart


GRID = 2000


@pytest.mark.parametrize("name", scenes.TRUNCATIONS)
def test_each_token_takes_its_probability_of_the_uniforms(llama: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a grid of uniforms in place of random ones, shares are exact up to the grid, and nothing outside the support comes up."""
    grid = iter((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID)
    requests = [Request(CompletionId(1, "p", k), Prompt("p", (7, 8)), seed=k, policy_version=0) for k in range(GRID)]
    engine = make_engine(llama, max_tokens=1, max_num_seqs=GRID, **scenes.TRUNCATIONS[name])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: next(grid))
        done = scenes.sample(engine, requests)
    counts = np.bincount([int(c.token_ids[0]) for c in done.values()], minlength=384)
    expected = scenes.truncated_probabilities(scenes.logits_of(llama, (7, 8), (0,))[0], **scenes.TRUNCATIONS[name])
    assert np.abs(counts / GRID - expected).max() < 1.01 / GRID
    assert not counts[expected == 0].any()
    assert 1 < (expected > 0).sum() < 384


def test_greedy_takes_the_argmax_whatever_is_left(llama: Any) -> None:
    requests = scenes.make_requests(scenes.make_prompts())[::4]
    done = scenes.sample(make_engine(llama, temperature=0.0, **scenes.TRUNCATIONS["all"]), requests)
    assert scenes.not_greedy(llama, requests, done) == 0
    assert scenes.largest_logprob_difference(llama, requests, done, 1.0) < 1e-4  # of the whole distribution, as vLLM's
