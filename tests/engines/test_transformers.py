"""The transformers engine against the model it serves, in fp32: the same scenes as vLLM plays, on four architectures."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import engine_scenes as scenes
import pytest
import torch

from reinforce_ada.engines.base import Engine
from reinforce_ada.engines.text import decode_after
from reinforce_ada.engines.transformers import TransformersEngine
from reinforce_ada.errors import EngineLost
from reinforce_ada.training.models import tiny_config, tiny_tokenizer
from reinforce_ada.types import CompletionId, Prompt, Request

REQUESTS = scenes.make_requests(scenes.make_prompts())


def make_module(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(model_type)
    if model_type == "gemma3_text":  # a window that is shorter than most prompts, in the first of both layers
        config.sliding_window, config.layer_types = 16, ["sliding_attention", "full_attention"]
    module = AutoModelForCausalLM.from_config(config).eval()
    scenes.spread(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def module(request: pytest.FixtureRequest) -> Any:
    return make_module(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_module("llama")


def make_engine(module: Any, tokenizer: Any, **settings: Any) -> TransformersEngine:
    return TransformersEngine(
        module, tokenizer, **{"max_tokens": scenes.MAX_TOKENS, "max_model_len": scenes.MAX_MODEL_LEN, "max_num_seqs": 32, **settings}
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(module: Any, tokenizer: Any, temperature: float) -> None:
    done = scenes.sample(make_engine(module, tokenizer, temperature=temperature), REQUESTS)
    assert scenes.largest_logprob_difference(module, REQUESTS, done, temperature) < 1e-4


def test_greedy_takes_the_argmax(module: Any, tokenizer: Any) -> None:
    done = scenes.sample(make_engine(module, tokenizer, temperature=0.0), REQUESTS[::4])
    assert scenes.not_greedy(module, REQUESTS[::4], done) == 0
    assert scenes.largest_logprob_difference(module, REQUESTS[::4], done, 1.0) < 1e-4


def test_tokens_follow_from_the_seed_alone(llama: Any, tokenizer: Any) -> None:
    expected = scenes.tokens(scenes.sample(make_engine(llama, tokenizer), REQUESTS))
    assert len({tuple(t) for t in expected.values()}) > 12
    assert scenes.tokens(scenes.sample(make_engine(llama, tokenizer), REQUESTS[::-1])) == expected
    assert scenes.tokens(scenes.sample(make_engine(llama, tokenizer, max_num_seqs=5), REQUESTS)) == expected


def test_sampled_tokens_have_the_models_frequencies(llama: Any, tokenizer: Any) -> None:
    """Of 2000 seeds at one prompt, each of the likelier tokens comes up within five standard errors of its probability."""
    prompt = Prompt("p", (7, 8))
    requests = [Request(CompletionId(1, "p", k), prompt, seed=k, policy_version=0) for k in range(2000)]
    done = scenes.sample(make_engine(llama, tokenizer, max_tokens=1, max_num_seqs=2000), requests)
    counts = torch.bincount(torch.tensor([int(c.token_ids[0]) for c in done.values()]), minlength=384)
    with torch.no_grad():
        p = llama(input_ids=torch.tensor([[7, 8]])).logits[0, -1].double().softmax(-1)
    likely = p > 0.005
    assert int(likely.sum()) > 5
    z = (counts - 2000 * p) / (2000 * p * (1 - p)).sqrt()
    assert float(z[likely].abs().max()) < 5


def test_settings_of_the_folder_are_not_taken_and_its_end_tokens_are(llama: Any, tokenizer: Any) -> None:
    expected = scenes.sample(make_engine(llama, tokenizer), REQUESTS)
    module = copy.deepcopy(llama)
    common = Counter(t for c in expected.values() for t in c.token_ids.tolist()).most_common(1)[0][0]
    settings = {**scenes.MISLEADING, "no_repeat_ngram_size": 2, "suppress_tokens": [3], "forced_eos_token_id": 1, "max_length": 3}
    for name, value in settings.items():
        setattr(module.generation_config, name, value)
    assert scenes.tokens(scenes.sample(make_engine(module, tokenizer), REQUESTS)) == scenes.tokens(expected)
    module.generation_config.eos_token_id = [1, common]
    ended = scenes.sample(make_engine(module, tokenizer), REQUESTS)
    assert any(c.token_ids[-1] == common and c.finish_reason == "stop" for c in ended.values())
    assert not any(common in c.token_ids[:-1] for c in ended.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_has_come_apart_ends_the_run_in_one_line(tokenizer: Any, value: float) -> None:
    module = make_module("llama")
    engine = make_engine(module, tokenizer)
    with torch.no_grad():
        module.lm_head.weight.fill_(value)
    with pytest.raises(EngineLost, match=r"^transformers: sampled garbage: a logprob that is not one: nan; the run can be resumed$"):
        scenes.sample(engine, REQUESTS[:2])


def test_finish_reasons_and_text(llama: Any, tokenizer: Any) -> None:
    done = scenes.sample(make_engine(llama, tokenizer), REQUESTS)
    for c in done.values():
        ids = c.token_ids.tolist()
        assert c.finish_reason == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == scenes.MAX_TOKENS or c.finish_reason == "stop"
        assert "<end>" not in c.text
        prompt = next(r.prompt.token_ids for r in REQUESTS if r.id == c.id)
        assert c.text == decode_after(tokenizer, prompt, ids)
    assert {c.finish_reason for c in done.values()} == {"stop", "length"}


def test_stop_strings_end_completions_and_are_not_in_their_text(llama: Any, tokenizer: Any) -> None:
    done = scenes.sample(make_engine(llama, tokenizer), REQUESTS)
    stop = ["never said", *scenes.common_texts(done)]
    assert scenes.cut_at(stop, done, scenes.sample(make_engine(llama, tokenizer, stop=stop), REQUESTS)) > 4  # of 24
    pairs = [c.text[k : k + 2] for c in done.values() for k in range(1, len(c.text) - 1)]
    two = next(pair for pair in pairs if "\ufffd" not in pair)  # over two tokens
    assert scenes.cut_at([two], done, scenes.sample(make_engine(llama, tokenizer, stop=(two,)), REQUESTS)) > 0


def test_aborts_leave_the_others_alone_and_the_id_may_come_again(llama: Any, tokenizer: Any) -> None:
    expected = scenes.tokens(scenes.sample(make_engine(llama, tokenizer), REQUESTS))
    engine = make_engine(llama, tokenizer)
    kept, again = scenes.abort_and_reissue(engine, REQUESTS)
    assert len(again) > 4
    assert {**scenes.tokens(kept), **scenes.tokens(again)} == expected
    assert not kept.keys() & again.keys()


def test_everything_aborted_frees_everything(llama: Any, tokenizer: Any) -> None:
    engine = make_engine(llama, tokenizer)
    engine.submit(REQUESTS)
    engine.poll()
    engine.abort([r.id for r in REQUESTS])
    assert engine.poll() == []
    assert engine.free_slots == 32
    engine.submit(REQUESTS[:2])
    engine.abort([REQUESTS[0].id])  # still queued
    assert {c.id for _ in range(scenes.MAX_TOKENS) for c in engine.poll()} == {REQUESTS[1].id}


def test_free_slots(llama: Any, tokenizer: Any) -> None:
    engine = make_engine(llama, tokenizer)
    assert isinstance(engine, Engine)
    assert engine.poll() == []
    engine.submit(REQUESTS[:3])
    assert engine.free_slots == 29
    engine.poll()
    assert engine.free_slots == 0  # a running batch takes no more
    engine.close()
    assert engine.free_slots == 32


def test_greedy_output_is_the_trained_models_after_every_sync(tokenizer: Any) -> None:
    trained = make_module("llama")
    engine = make_engine(copy.deepcopy(trained), tokenizer, temperature=0.0)
    outputs = []
    for version in range(1, 4):
        scenes.perturb(trained, seed=version)
        engine.sync_weights(scenes.weights(trained), version)
        done = scenes.sample(engine, REQUESTS[::4])
        assert scenes.not_greedy(trained, REQUESTS[::4], done) == 0
        assert {c.policy_version for c in done.values()} == {version}
        outputs.append(str(scenes.tokens(done)))
    assert len(set(outputs)) == 3


def test_with_the_trainers_own_module_a_sync_only_stamps(tokenizer: Any) -> None:
    module = make_module("llama")
    engine = make_engine(module, tokenizer)
    before = copy.deepcopy(module.state_dict())
    engine.sync_weights(scenes.weights(module), 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in scenes.weights(module))
    assert {c.policy_version for c in scenes.sample(engine, REQUESTS[:2]).values()} == {7}


def test_refusals_are_one_line(llama: Any, tokenizer: Any) -> None:
    engine = make_engine(llama, tokenizer)
    bad = scenes.bad_requests()
    assert scenes.refusal(lambda: engine.submit([bad["empty"]])) == "transformers: prompt 'empty' is empty; at least one token"
    needed = "at most max_model_len - max_tokens = 64 - 10; raise --max-model-len, or shorten the prompt"
    assert scenes.refusal(lambda: engine.submit([REQUESTS[0], bad["long"]])) == f"transformers: prompt 'long' has 55 tokens; {needed}"
    assert engine.free_slots == 32  # nothing of a refused submission stays
    engine.submit(REQUESTS[:3])
    refused = scenes.refusal(lambda: engine.sync_weights(scenes.weights(llama), 9))
    assert refused == "transformers: sync_weights with 3 requests in flight; none"
