"""The HTTP engine for sampling alone, over an endpoint that is not vLLM's: what it asks, what a completion has, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenes import refusal
from hypothesis import given
from hypothesis import strategies as st

from completions_server import CompletionsServer, completions_server, one_sum
from reinforce_ada import AdaptiveSampler, Prompt, preset, run
from reinforce_ada.engines.endpoint import EndpointAnswer, tokens_of, wrong_answer
from reinforce_ada.engines.openai import HttpEngine
from reinforce_ada.outside import GarbageError
from reinforce_ada.sampling.sampler import request_seed
from reinforce_ada.types import Completion, CompletionId, Request

ROOT = Path(__file__).parents[2]
SUMS = [Prompt(f"p{a}", tuple(map(ord, f"{a}+{a + 3}")), text=f"{a}+{a + 3}", data={"answer": str(2 * a + 3)}) for a in range(1, 7)]


class Characters:
    """A tokenizer whose tokens are characters, but for "15", which is one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [1 if c == "\0" else ord(c) for c in text.replace("15", "\0")]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join("15" if i == 1 else chr(i) for i in ids)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


@contextmanager
def engine_of(server: CompletionsServer, **options: Any) -> Iterator[HttpEngine]:
    with closing(HttpEngine(server.url, **{"max_tokens": 8, "max_num_seqs": 8, "give_up_s": 20.0, **options})) as engine:
        yield engine


def one(engine: HttpEngine, prompt: Prompt, seed: int = 5) -> Completion:
    engine.submit([Request(CompletionId(0, prompt.prompt_id, 0), prompt, seed, 0)])
    while not (done := engine.poll()):
        pass
    return done[0]


def right(prompt: Prompt, text: str) -> float:
    return float(text == prompt.data["answer"])


# -------------------- what is asked, and what comes back


@pytest.mark.parametrize("form", ["legacy", "chat"])
def test_a_step_has_the_answers_of_the_seeds_and_becomes_tensors(form: str) -> None:
    policy, said = preset("reinforce-ada-balance"), []
    with completions_server(logprobs=form) as server, engine_of(server, tokenizer=Characters(), say=said.append) as engine:
        result = run(AdaptiveSampler(SUMS, policy), engine, right)
        assert engine.metrics()["engine_slots"] == 8
    assert said[0] == (
        f"engine: {server.url.removesuffix('/v1')} serves m, for sampling alone: token ids are made of its texts, without end tokens; "
        "where the tokenizer splits a text otherwise than the model did, logprobs are NaN"
    )
    for pool in result.pools:
        for index, scored in enumerate(pool.scored):
            tokens, _ = one_sum(pool.prompt.text, request_seed(0, 0, pool.prompt.prompt_id, index) % 2**31)
            assert scored.completion.text == "".join(text for text, _ in tokens)
            assert (scored.completion.finish_reason, scored.completion.policy_version) == ("stop", 0)
    step = result.to_tensors(policy)
    known = step.rollout_logprobs.isfinite()
    assert torch.equal(known, step.token_ids != 1)  # "15" is one token here, and was two for the model
    assert 0 < known.sum() < len(known)


def test_only_fields_of_the_interface_are_sent() -> None:
    with completions_server() as server, engine_of(server, tokenizer=Characters(), temperature=0.5, stop=(".",)) as engine:
        one(engine, SUMS[0], seed=2**40 + 3)
        (asked,) = server.bodies
    assert asked == {
        "model": "m", "prompt": list(SUMS[0].token_ids), "max_tokens": 8, "temperature": 0.5, "top_p": 1.0, "seed": 3, "stream": True,
        "stop": ["."], "logprobs": 1,
    }  # fmt: skip
    assert set(server.paths) == {"/v1/models", "/v1/completions"}


def test_what_was_asked_for_is_sent_all_the_same() -> None:
    with completions_server(vllm=True) as server, engine_of(server, top_k=5, min_p=0.1) as engine:
        one(engine, SUMS[0])
        assert (server.bodies[0]["top_k"], server.bodies[0]["min_p"]) == (5, 0.1)
    with completions_server() as server, engine_of(server, top_k=5) as engine:
        assert "400: " in refusal(lambda: one(engine, SUMS[0]))  # and so an endpoint that cannot do it says so
        assert server.bodies[0]["top_k"] == 5


def test_without_a_tokenizer_there_are_texts() -> None:
    said: list[str] = []
    with completions_server(logprobs="none") as server, engine_of(server, say=said.append, max_model_len=64) as engine:
        completion = one(engine, Prompt("p", text="7+8"))
        assert (completion.text in ("15", "16"), len(completion.token_ids), len(completion.rollout_logprobs)) == (True, 0, 0)
        assert server.bodies[0]["prompt"] == "7+8"
        assert "logprobs" not in server.bodies[0]
    assert "completions are texts without token ids, which tokenizer= would make" in said[0]


def test_a_vllm_server_gives_its_own_token_ids() -> None:
    said: list[str] = []
    with completions_server(vllm=True) as server, engine_of(server, tokenizer=Characters(), say=said.append) as engine:
        completion = one(engine, SUMS[0])
        assert set(completion.token_ids.tolist()) == {101}
        assert len(completion.rollout_logprobs) == len(completion.text)
        assert server.bodies[0]["repetition_penalty"] == 1.0  # the model's own distribution, whatever its folder says
        assert server.bodies[0]["return_token_ids"] is True
    assert said[0].endswith("token ids and logprobs as it samples them")


def test_an_end_token_is_left_out_and_an_empty_answer_is_one() -> None:
    def ends(prompt: Any, seed: int) -> Any:
        return ([("4", -0.5)] if seed else []) + [("<end>", -0.25)], "stop"

    with completions_server(ends) as server, engine_of(server, tokenizer=Characters(), max_tokens=1) as engine:
        completion = one(engine, SUMS[0])
        assert (completion.text, completion.token_ids.tolist(), completion.rollout_logprobs.tolist()) == ("4", [ord("4")], [-0.5])
        nothing = one(engine, SUMS[0], seed=0)
        assert (nothing.text, nothing.token_ids.tolist(), nothing.finish_reason) == ("", [], "stop")


# -------------------- tokens of a text


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("7", ["7"], [0]),
        ("72", ["7", "2"], [0, 1]),
        ("215", ["2", "1", "5"], [0, None]),  # the tokenizer has "15"
        ("215", ["2", "15"], [0, 1]),
        ("72", ["72"], [None, None]),
        ("7", ["7", "<end>"], [0]),  # special tokens have no text
        ("7", ["7.", "2"], [None]),  # a stop string: the token goes on after the text
        ("72", ["7", "", "2"], [0, None]),  # what the token without text is part of is not known
        ("72", ["x", "2"], [None, None]),
        ("72", [], [None, None]),
        ("", ["<end>"], []),
    ],
)
def test_tokens_of_a_text(text: str, pieces: list[str], expected: list[int | None]) -> None:
    sampled = [-1.0 - i for i in range(len(pieces))]
    ids, logprobs = tokens_of(Characters(), text, pieces, sampled)
    assert Characters().decode(ids) == text
    assert [None if math.isnan(x) else x for x in logprobs] == [None if i is None else sampled[i] for i in expected]


@given(st.lists(st.sampled_from(["1", "5", "15", "7", "77", ""]), max_size=12))
def test_known_logprobs_are_those_of_the_same_text_at_the_same_place(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids, logprobs = tokens_of(Characters(), text, pieces, [-1.0 - i for i in range(len(pieces))])
    at = 0
    for token, logprob in zip(ids, logprobs, strict=True):
        own = Characters().decode([token])
        if not math.isnan(logprob):
            index = round(-1.0 - logprob)
            assert (pieces[index], len("".join(pieces[:index]))) == (own, at)
        at += len(own)


# -------------------- what is refused, in one line


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"models": ["a", "b"]}, {}, "serves 2 models (a, b); model= names one"),
        ({"models": []}, {}, "serves 0 models (none); model= names one"),
        ({"models": list("abcde")}, {"model": "x"}, "does not serve x; it has a, b, c and 2 more"),
        ({"key": "secret"}, {}, "refuses the key (401); set VLLM_API_KEY or OPENAI_API_KEY to the server's"),
    ],
)
def test_endpoints_that_cannot_be_used(settings: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with completions_server(**settings) as server:
        assert said in refusal(lambda: HttpEngine(server.url, max_tokens=8, **options))


def test_the_named_model_of_several_is_asked() -> None:
    with completions_server(models=["a", "b"]) as server, engine_of(server, model="b") as engine:
        one(engine, SUMS[0])
        assert server.bodies[0]["model"] == "b"


def test_an_endpoint_without_logprobs_is_refused_where_they_are_needed() -> None:
    with completions_server(logprobs="none") as server, engine_of(server, tokenizer=Characters()) as engine:
        said = refusal(lambda: one(engine, SUMS[0]))
    assert "gives no logprobs with its completions; leave out tokenizer= to sample texts alone" in said


def test_weights_are_refused_in_one_line() -> None:
    with completions_server() as server, engine_of(server) as engine:
        said = refusal(lambda: engine.sync_weights([("w", torch.zeros(1))], 1))
        assert said == (
            "engine: sync_weights of servers that sample alone; an engine with weights: HttpEngine(servers, FOLDER, ...) and servers of "
            "`reinforce-ada serve`"
        )
        later = Request(CompletionId(0, "p", 0), SUMS[0], 1, 3)
        assert "policy_version 3; 0: these servers sample alone" in refusal(lambda: engine.submit([later]))
        empty = Request(CompletionId(0, "p", 0), Prompt("p"), 1, 0)
        assert "prompt 'p' is empty; a text or token ids" in refusal(lambda: engine.submit([empty]))
        assert one(engine, SUMS[0]).text  # it still samples


def test_settings_of_the_other_use_are_refused(tmp_path: Path) -> None:
    for options in ({}, {"max_model_len": 64}, {"max_model_len": 64, "vocab_size": 9, "model": "m"}):
        said = refusal(lambda options=options: HttpEngine("http://127.0.0.1:9", str(tmp_path), max_tokens=8, **options))
        assert "the first two for sampling alone, the other two with weights" in said


def assembled(choices: list[dict[str, Any]]) -> Completion:
    """The completion of at most two tokens whose stream has these choices."""
    request = Request(CompletionId(0, "p", 0), SUMS[0], 1, 0)
    answer = EndpointAnswer(request, 2, 300, gives_ids=False, tokenizer=Characters())
    for choice in choices:
        answer.add(f"data: {json.dumps({'choices': [choice]})}".encode())
    return answer.completion(0)


WHOLE = {"index": 0, "text": "7", "logprobs": {"tokens": ["7"], "token_logprobs": [-0.5]}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([{**WHOLE, "logprobs": {"tokens": ["7", "8"], "token_logprobs": [-0.5]}}], "2 tokens with 1 logprobs"),
        ([{**WHOLE, "logprobs": {"tokens": ["7"], "token_logprobs": [0.5]}}], "a logprob that is not one: 0.5"),
        ([{**WHOLE, "logprobs": {"tokens": ["7"], "token_logprobs": [None]}}], "a logprob that is not one: None"),
        ([{**WHOLE, "logprobs": {"tokens": [7], "token_logprobs": [-0.5]}}], "a token is a number"),
        ([{**WHOLE, "logprobs": {"content": ["7"]}}], "a token is a string where an object belongs"),
        ([{**WHOLE, "logprobs": {"content": [{"token": "7"}]}}], "a logprob that is not one: None"),
        ([{**WHOLE, "logprobs": {"tokens": ["7"] * 9, "token_logprobs": [-0.5] * 9}}], "tokens has 9 items; 3 at most"),
        ([{**WHOLE, "finish_reason": None}] * 4, "more than 2 tokens"),
        ([{**WHOLE, "index": 1}], "an answer to another request"),
        ([{**WHOLE, "text": ["7"]}], "text is an array"),
        ([WHOLE, WHOLE], "a completion that goes on after its end"),
        ([{**WHOLE, "finish_reason": None}], "a stream that ended before the completion did"),
    ],
)
def test_garbage_is_found(choices: list[dict[str, Any]], said: str) -> None:
    assert assembled([WHOLE]).text == "7"
    with pytest.raises(GarbageError, match=said):
        assembled(choices)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"policy_version": 1}, "policy version 1 instead of 0"),
        ({"finish_reason": "content_filter"}, "finish_reason 'content_filter'"),
        ({"token_ids": [300], "rollout_logprobs": [math.nan]}, "token 300 of a vocabulary of 300"),
        ({"rollout_logprobs": [math.nan]}, ""),
        ({"token_ids": [], "rollout_logprobs": []}, ""),
        ({"token_ids": [7] * 9, "rollout_logprobs": [-1.0] * 9}, ""),
    ],
)
def test_what_is_wrong_with_a_completion(changed: dict[str, Any], said: str) -> None:
    whole = Completion(CompletionId(0, "p", 0), [7], [-1.0], "7", "stop", 0)
    assert wrong_answer(dataclasses.replace(whole, **changed), 0, 2, 300) == said


# -------------------- the example of docs/engines.md


def test_the_example_samples_and_keeps_tensors(tmp_path: Path, tiny_model: Path) -> None:
    prompts, kept = tmp_path / "sums.jsonl", tmp_path / "step.pt"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{a + 3}", "answer": 2 * a + 3}) + "\n" for a in range(1, 7)))
    with completions_server(lambda prompt, seed: one_sum("7+8", seed)) as server:
        command = [sys.executable, str(ROOT / "examples/sample_endpoint.py"), "--server", server.url, "--prompts", str(prompts)]
        more = ["--tokenizer", str(tiny_model), "--tensors", str(kept)]
        path = os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "for sampling alone" in lines[0]
    assert len([line for line in lines if line.startswith("<Pool '")]) == 6
    assert lines[-1].startswith("<StepTensors: ")
    tensors = torch.load(kept)
    assert tensors["token_ids"].shape == tensors["rollout_logprobs"].shape
