"""Rows that share a prompt: layout, mask and minibatches, on literal tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reinforce_ada.errors import InputError
from reinforce_ada.training.batching import PAD, Sample, attention_mask, collate, micro_batches, rows_of, shuffled_minibatches
from reinforce_ada.types import Completion, CompletionId, Prompt


def sample(prompt: Prompt, index: int, ids: list[int], advantage: float = 0.0) -> Sample:
    completion = Completion(CompletionId(1, prompt.prompt_id, index), ids, [-0.5] * len(ids), "", "stop", 0)
    return Sample(prompt, completion, advantage)


A, B = Prompt("a", (10, 11, 12)), Prompt("b", (20,))


def test_layout_of_a_shared_row():
    batch = collate([[sample(A, 0, [1, 2], 0.5), sample(A, 1, [3], -0.5)], [sample(B, 0, [4, 5], 1.0)]], pad_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 1, 2, 3], [20, 4, 5, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]]
    assert batch.segment_of.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, PAD, PAD, PAD]]
    # first tokens are predicted by the prompt's last state, the others by their predecessor
    assert batch.row_of.tolist() == [0, 0, 0, 1, 1]
    assert batch.column_of.tolist() == [2, 3, 2, 0, 1]
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5]
    assert batch.advantages.tolist() == [0.5, -0.5, 1.0]
    assert batch.token_mask.tolist() == [True] * 5
    assert (batch.num_written, batch.num_seqs) == (5, 3)


def test_a_mask_travels_with_its_tokens():
    tool = sample(A, 0, [1, 2, 3])
    tool = tool._replace(completion=replace(tool.completion, token_mask=[1, 0, 1]))
    batch = collate([[tool, sample(A, 1, [4])], [sample(B, 0, [5])]], pad_id=0)
    assert batch.token_mask.tolist() == [True, False, True, True, True]
    assert (batch.num_written, tool.completion.num_written) == (4, 2)
    assert batch.to(torch.device("cpu")).num_written == 4


@pytest.mark.parametrize("mask", [[1, 0], [1, 0, 2], [[1, 0, 1]], [0.5, 1, 1]])
def test_a_mask_of_another_form_is_refused(mask):
    with pytest.raises(InputError, match="0 or 1 for each of 3 tokens is needed"):
        replace(sample(A, 0, [1, 2, 3]).completion, token_mask=mask)


def test_completions_see_the_prompt_and_themselves_only():
    batch = collate([[sample(B, 0, [1, 2]), sample(B, 1, [3])], [sample(B, 0, [4])]], pad_id=0)
    seen = (attention_mask(batch, torch.float32) == 0)[:, 0].int().tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert seen[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]  # padding sees padding: no empty softmax row


def test_micro_batches_hold_every_sample_once_within_the_budget():
    samples = [sample(Prompt(f"{i}", tuple(range(1, 2 + i))), k, [7] * (1 + k)) for i in range(9) for k in range(3)]
    for share in (True, False):
        batches = list(micro_batches(samples, 40, share_prompts=share, pad_id=0))
        assert sum(b.num_seqs for b in batches) == len(samples)
        assert sum(b.num_written for b in batches) == sum(1 + k for _ in range(9) for k in range(3))
        assert all(b.input_ids.numel() <= 40 or b.input_ids.shape[0] == 1 for b in batches)


def test_a_row_over_the_budget_still_gets_its_pass():
    (batch,) = micro_batches([sample(A, 0, [1] * 50)], 8, share_prompts=True, pad_id=0)
    assert batch.input_ids.shape == (1, 53)


def test_a_group_over_the_budget_is_split_into_rows_that_repeat_the_prompt():
    samples = [sample(A, k, [k + 1] * 4) for k in range(5)]  # a row of the prompt and two completions is 11 tokens
    assert [[s.completion.id.index for s in row] for row in rows_of(samples, 11)] == [[0, 1], [2, 3], [4]]
    assert [len(row) for row in rows_of(samples, 0)] == [1] * 5
    batches = list(micro_batches(samples, 11, share_prompts=True, pad_id=0))
    assert [b.input_ids.shape for b in batches] == [(1, 11), (1, 11), (1, 7)]


def test_minibatches_keep_groups_whole_and_are_seeded():
    groups = [[sample(Prompt(f"{i}", (1,)), k, [2]) for k in range(4)] for i in range(10)]
    parts = shuffled_minibatches(groups, 3, (0, 5))
    assert [len(p) for p in parts] == [16, 12, 12]
    order = [s.prompt.prompt_id for p in parts for s in p]
    assert sorted(order) == sorted(s.prompt.prompt_id for g in groups for s in g)
    assert all(len(set(order[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert order != [s.prompt.prompt_id for g in groups for s in g]
    assert order == [s.prompt.prompt_id for p in shuffled_minibatches(groups, 3, (0, 5)) for s in p]
    assert order != [s.prompt.prompt_id for p in shuffled_minibatches(groups, 3, (0, 6)) for s in p]


def test_more_minibatches_than_groups_and_no_groups():
    assert len(shuffled_minibatches([[sample(A, 0, [1])]], 4, (0,))) == 1
    assert shuffled_minibatches([], 2, (0,)) == []


def test_shuffling_unsorts_difficulty():
    """Groups come easiest first; over many seeds every group is equally likely in the first minibatch."""
    groups = [[sample(Prompt(f"{i}", (1,)), 0, [2])] for i in range(8)]
    first = np.zeros(8)
    for seed in range(400):
        for s in shuffled_minibatches(groups, 4, (seed,))[0]:
            first[int(s.prompt.prompt_id)] += 1
    assert first == pytest.approx(np.full(8, 100), abs=40)  # 4 standard errors of a binomial(400, 1/4)
