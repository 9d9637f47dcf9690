"""A result as tensors, on literal tables, and the loop of docs/own_loop.md, which trains with them."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reinforce_ada import AdaptiveSampler, FunctionEngine, Policy, Prompt, advantages_of, ops, preset, run
from reinforce_ada.errors import InputError
from reinforce_ada.training.tensors import StepTensors
from reinforce_ada.types import Group, SamplingResult

PAGE = Path(__file__).parents[2] / "docs" / "own_loop.md"
PROMPTS = [Prompt("a", (10, 11, 12)), Prompt("b", (20,))]
GRPO = preset("grpo", group_size=2, scale="none")


def sampled(answers: list[object], policy: Policy = GRPO, prompts: list[Prompt] = PROMPTS) -> SamplingResult:
    """A step with these answers, in the order of the requests: rounds ask prompt after prompt."""
    left = iter(answers)
    engine = FunctionEngine(lambda prompts, seeds: [next(left) for _ in prompts])
    return run(AdaptiveSampler(prompts, policy), engine, lambda prompt, text: float(text))


def by_prompt(a0: object, a1: object, b0: object, b1: object) -> list[object]:
    order = {r.id[1:]: r for r in AdaptiveSampler(PROMPTS, GRPO).next_requests(4)}
    given = {("a", 0): a0, ("a", 1): a1, ("b", 0): b0, ("b", 1): b1}
    return [given[i] for i in order]


STEP = by_prompt(("1", [1, 2], [-0.5, -1.5]), ("0", [3], [-2.0]), ("0", [4, 5, 6], [-1.0, -0.25, -3.0]), ("1", [7], [0.0]))


def test_layout() -> None:
    batch = sampled(STEP).to_tensors(GRPO, pad_id=9)
    assert batch.input_ids.tolist() == [[10, 11, 12, 1, 2], [10, 11, 12, 3, 9], [20, 4, 5, 6, 9], [20, 7, 9, 9, 9]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.row_of.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert batch.column_of.tolist() == [2, 3, 2, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 6, 7]
    assert batch.rollout_logprobs.tolist() == [-0.5, -1.5, -2.0, -1.0, -0.25, -3.0, 0.0]
    assert batch.token_mask.tolist() == [True] * 7
    assert batch.rewards.tolist() == [1, 0, 0, 1]
    assert batch.advantages.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert batch.group_of.tolist() == [0, 0, 1, 1]
    # the column after the one that predicts a token is the token itself
    assert torch.equal(batch.input_ids[batch.row_of, batch.column_of + 1], batch.token_ids)


def test_dtypes_are_those_of_the_page() -> None:
    batch = sampled(STEP).to_tensors(GRPO)
    rows = re.findall(r"^\| (`.+?`) \| \[(.+?)\] (\w+) \|", PAGE.read_text(), re.MULTILINE)
    shown = {name: (shape, dtype) for names, shape, dtype in rows for name in re.findall(r"`(\w+)`", names)}
    sizes = {"N": 4, "S": 5, "T": 7, "N + 1": 5}
    assert set(shown) == {f.name for f in fields(StepTensors)}
    for name, (shape, dtype) in shown.items():
        tensor = getattr(batch, name)
        assert list(tensor.shape) == [sizes[letter] for letter in shape.split(", ")]
        assert str(tensor.dtype) == f"torch.{dtype}"


def test_groups_are_numbered_as_pool_stats_are() -> None:
    policy = preset("reinforce-ada-balance", group_size=2, round_size=4, max_rounds=2, scale="none")
    result = sampled([(f"{i % 3 == 0:d}", [i + 1], [-1.0]) for i in range(16)], policy)
    batch = result.to_tensors(policy)
    ours = ops.group_advantages(batch.rewards, batch.group_of, pool=result.pool_stats())
    assert batch.advantages.tolist() == pytest.approx(ours.tolist(), abs=1e-7)
    assert batch.advantages.tolist() == [float(np.float32(a)) for group in advantages_of(result, policy) for a in group]
    emptied = replace(result, groups=(Group(result.pools[0], ()), *result.groups))
    assert emptied.to_tensors(policy).group_of.tolist() == [i + 1 for i in batch.group_of.tolist()]


def test_tokens_of_tools_are_masked() -> None:
    result = sampled(STEP)
    first, *others = result.groups[0].kept
    tool = replace(first, completion=replace(first.completion, token_mask=[1, 0]))
    batch = replace(result, groups=(replace(result.groups[0], kept=(tool, *others)), result.groups[1])).to_tensors(GRPO)
    assert batch.token_mask.tolist() == [True, False, *[True] * 5]


def test_it_moves_and_is_one_line() -> None:
    batch = sampled(STEP).to_tensors(GRPO)
    assert repr(batch) == "<StepTensors: 4 completions of 2 groups, 7 tokens, rows of 5>"
    moved = batch.to("meta")
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}
    assert moved.num_seqs == 4


@pytest.mark.parametrize(
    ("answers", "prompts", "policy", "message"),
    [
        (["1", "0", "0", "1"], PROMPTS, GRPO, "a completion of prompt 'a' that is a text without token_ids; the tokens that were sampled"),
        (STEP[:2], [Prompt("a", text="a")], GRPO, "prompt 'a' has no token_ids; those of the model's tokenizer"),
        (STEP, PROMPTS, preset("grpo", group_size=2, scale="none", baseline="predicted"), "whose baseline is predicted"),
    ],
)  # fmt: skip
def test_what_has_no_tensors(answers: list[object], prompts: list[Prompt], policy: Policy, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampled(answers, GRPO, prompts).to_tensors(policy)


def test_a_step_that_kept_nothing() -> None:
    result = sampled(STEP)
    with pytest.raises(InputError, match="a step of 2 prompts that kept no completion; at least one; skip a step whose metrics have num_"):
        replace(result, groups=()).to_tensors(GRPO)


def test_ids_and_logprobs_of_different_lengths() -> None:
    result = sampled(STEP)
    first, *others = result.groups[0].kept
    short = replace(first, completion=replace(first.completion, rollout_logprobs=[-1.0]))
    wrong = replace(result, groups=(replace(result.groups[0], kept=(short, *others)),))
    with pytest.raises(InputError, match=r"token_ids of shape \[2\] and rollout_logprobs of shape \[1\]; one logprob for each token"):
        wrong.to_tensors(GRPO)


def test_the_loop_of_the_page_learns(capsys: pytest.CaptureFixture[str]) -> None:
    loop, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(compile(loop, PAGE.name, "exec"), {"__name__": "__main__"})
    rewards = [float(x) for x in re.findall(r"^step \d+: reward (\d\.\d\d)", capsys.readouterr().out, re.MULTILINE)]
    assert len(rewards) == 5
    assert rewards[0] < 0.25  # 1/12 a digit by chance
    assert rewards[-1] > 0.8
