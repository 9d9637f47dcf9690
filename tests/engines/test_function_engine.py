"""An engine around a function that returns tokens too, what it refuses, and how short its results are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from reinforce_ada import AdaptiveSampler, FunctionEngine, Prompt, preset, run
from reinforce_ada.errors import InputError
from reinforce_ada.types import Completion, CompletionId, Request, Scored


def plus(prompt: Prompt, text: str) -> float:
    return float(text == "+")


def sampler_of(names: Sequence[str]) -> AdaptiveSampler:
    return AdaptiveSampler([Prompt(name) for name in names], preset("reinforce-ada-balance"))


@pytest.mark.parametrize(
    "answer",
    [
        ("+", [5, 6], [-0.5, -1.0]),
        ("+", (5, 6), (-0.5, -1)),
        ("+", np.array([5, 6], np.int32), np.array([-0.5, -1.0], np.float32)),
        ("+", torch.tensor([5, 6]), torch.tensor([-0.5, -1.0])),
    ],
    ids=lambda answer: type(answer[1]).__name__,
)
def test_tokens_and_logprobs_of_a_function_arrive(answer: Any) -> None:
    engine = FunctionEngine(lambda prompts, seeds: [answer])
    engine.submit([Request(CompletionId(0, "a", 0), Prompt("a"), 1, 0)])
    (completion,) = engine.poll()
    assert (completion.text, completion.finish_reason) == ("+", "stop")
    assert (completion.token_ids.dtype, completion.rollout_logprobs.dtype) == (np.int32, np.float32)
    assert (completion.token_ids.tolist(), completion.rollout_logprobs.tolist()) == ([5, 6], [-0.5, -1.0])


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (("+", [5]), r"\('\+', \[5\]\) from generate; a text, or \(text, token_ids, logprobs\), for each prompt is needed"),
        ((b"+", [5], [-1.0]), "from generate; a text, or"),
        (["+", [5], [-1.0]], "from generate; a text, or"),
        (("+", [], []), "0 token_ids with 0 logprobs from generate for prompt 'a'; at least one token, and a logprob for each"),
        (("+", [5, 6], [-1.0]), "2 token_ids with 1 logprobs from generate for prompt 'a'; at least one token"),
        (("+", [5.0], [-1.0]), r"token_ids of shape \[1\] and dtype float64 from generate for prompt 'a'; one whole number for each token"),
        (("+", [True], [-1.0]), r"token_ids of shape \[1\] and dtype bool"),
        (("+", "56", [-1.0, -1.0]), r"token_ids of shape \[\]"),
        (("+", [[5], [6]], [-1.0, -1.0]), r"token_ids of shape \[2, 1\]"),
        (("+", [[5], [6, 7]], [-1.0, -1.0]), "token_ids of type list"),
        (("+", [-1], [-1.0]), r"token_ids from -1 to -1 from generate for prompt 'a'; token ids in \[0, 2\*\*31\)"),
        (("+", [2**31], [-1.0]), "token_ids from 2147483648 to 2147483648"),
        (("+", [2**64], [-1.0]), "dtype object"),
        (("+", [5], [0.5]), "a logprob that is not one: 0.5 from generate for prompt 'a'; natural logarithms of probabilities"),
        (("+", [5, 6], [-1.0, math.nan]), "a logprob that is not one: nan"),
        (("+", [5], [-math.inf]), "a logprob that is not one: -inf"),
        (("+", [5], [None]), "logprobs of shape .* and dtype object"),
        (("+", [5], torch.tensor([-1.0], requires_grad=True)), "logprobs of type Tensor .* a tensor on the CPU without a gradient"),
        (("+", [5], torch.tensor([-1.0], dtype=torch.bfloat16)), "logprobs of type Tensor"),
    ],
)  # fmt: skip
def test_tokens_of_another_form_are_refused(answer: Any, given: str) -> None:
    with pytest.raises(InputError, match=f"^FunctionEngine: .*{given}"):
        run(sampler_of("a"), FunctionEngine(lambda prompts, seeds: [answer] * len(prompts)), plus)


def test_results_are_short_in_a_notebook() -> None:
    prompt = Prompt("a", tuple(range(9999)), text="x\n" * 9999, data={"answer": "y" * 9999})
    completion = Completion(CompletionId(2, "a", 3), [7] * 9999, [-1.0] * 9999, "+\x1b[2J" + "z" * 9999, "length", 0)
    assert repr(prompt) == "<Prompt 'a': 9999 tokens, 'x\\n" + "x\\n" * 18 + "x…>"
    assert repr(completion).startswith("<Completion 3 of 'a' in step 2: 9999 tokens, length, '+\\x1b[2Jzz")
    assert repr(Scored(completion, 0.25)).startswith("<Scored 3 of 'a' in step 2: reward 0.25, '+")
    engine = FunctionEngine(lambda prompts, seeds: ["+-"[seed % 2] for seed in seeds])
    result = run(sampler_of("ab"), engine, plus)
    shown = [prompt, completion, Scored(completion, 0.25), *result.pools, *result.groups, *result.groups[0].kept, result]
    assert max(len(repr(value)) for value in shown) < 140
    assert repr(result.groups[0]) == f"<Group 'a': {len(result.groups[0].kept)} kept of {result.groups[0].pool.count} scored>"
