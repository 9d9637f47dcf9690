"""A sampling result as the tensors of a training loop of one's own; `SamplingResult.to_tensors` is the way to them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.advantages import advantages_of
from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.sampling import Policy
from reinforce_ada.training.batching import PAD, Sample, collate
from reinforce_ada.types import Group, SamplingResult, Scored


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StepTensors:
    """The kept completions of a step: N rows of S tokens for the model, and T completion tokens for the operators, packed.

    Completion n has the tokens cu_seqlens[n] up to cu_seqlens[n + 1]. If the model makes `hidden`, [N, S, D], of `input_ids`, then
    `hidden[row_of, column_of]`, [T, D], are the states that predict `token_ids`, as `ops.linear_policy_loss` takes them; the same indices
    pick rows of logits for `ops.token_logprobs`.
    """

    input_ids: Tensor  # [N, S] int64: the prompt, then the completion, then padding
    attention_mask: Tensor  # [N, S] bool: False for padding
    row_of: Tensor  # [T] int64: row of the state that predicts each completion token
    column_of: Tensor  # [T] int64: column of that state
    token_ids: Tensor  # [T] int64
    token_mask: Tensor  # [T] bool: False for tokens that the policy did not write, which train nothing
    rollout_logprobs: Tensor  # [T] fp32, as the engine reported them; NaN where it could not
    cu_seqlens: Tensor  # [N + 1] int64, from 0 to T
    advantages: Tensor  # [N] fp32
    rewards: Tensor  # [N] fp64, raw
    group_of: Tensor  # [N] int64: the position in `SamplingResult.groups`

    @property
    def num_seqs(self) -> int:
        return self.advantages.numel()

    def to(self, device: torch.device | str) -> StepTensors:
        """Return the same tensors on this device."""
        return StepTensors(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __repr__(self) -> str:
        (rows, size), num_groups = self.input_ids.shape, len(set(self.group_of.tolist()))
        return f"<StepTensors: {rows} completions of {num_groups} groups, {self.token_ids.numel()} tokens, rows of {size}>"


def tensors_of(result: SamplingResult, policy: Policy, pad_id: int) -> StepTensors:
    """Return the tensors of a result; see `SamplingResult.to_tensors`."""
    advantages = advantages_of(result, policy)
    kept = [(i, group, scored) for i, group in enumerate(result.groups) for scored in group.kept]
    if not kept:
        hint = "skip a step whose metrics have num_completions_kept 0"
        raise InputError("to_tensors", f"a step of {len(result.pools)} prompts that kept no completion", "at least one", hint)
    for _, group, scored in kept:
        _check(group, scored)
    values: list[Any] = [a for group in advantages for a in group]
    rows = [[Sample(group.pool.prompt, s.completion, a)] for (_, group, s), a in zip(kept, values, strict=True)]
    batch = collate(rows, pad_id)
    return StepTensors(
        input_ids=batch.input_ids,
        attention_mask=batch.segment_of != PAD,
        row_of=batch.row_of,
        column_of=batch.column_of,
        token_ids=batch.token_ids,
        token_mask=batch.token_mask,
        rollout_logprobs=batch.rollout_logprobs,
        cu_seqlens=batch.cu_seqlens,
        advantages=batch.advantages,
        rewards=torch.tensor([s.reward for _, _, s in kept], dtype=torch.float64),
        group_of=torch.tensor([i for i, _, _ in kept]),
    )


def _check(group: Group, scored: Scored) -> None:
    completion, name = scored.completion, one_line(repr(group.pool.prompt.prompt_id), 60)
    if not group.pool.prompt.token_ids:
        raise InputError("to_tensors", f"prompt {name} has no token_ids", "those of the model's tokenizer", "Prompt(id, token_ids, ...)")
    shapes = list(completion.token_ids.shape), list(completion.rollout_logprobs.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 1:
        given = f"a completion of prompt {name} with token_ids of shape {shapes[0]} and rollout_logprobs of shape {shapes[1]}"
        raise InputError("to_tensors", given, "one logprob for each token")
    if not completion.token_ids.size and completion.text:
        given = f"a completion of prompt {name} that is a text without token_ids"
        hint = "a generate function may return (text, token_ids, logprobs); a sample function, request.completed(token_ids, logprobs, ...)"
        raise InputError("to_tensors", given, "the tokens that were sampled", hint)
