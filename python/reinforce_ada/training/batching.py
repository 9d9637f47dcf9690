"""Kept completions as tensors: minibatches of shuffled groups, micro-batches within a token budget, prompts shared within a row.

A row is one prompt followed by several of its completions. Completions see the prompt and themselves, never each other, and each continues
the prompt's positions. A group of 4 short answers to a 96-token prompt therefore costs about 108 tokens of forward, not 400.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reinforce_ada.types import Completion, Prompt

PAD = -1  # segment of padding; 0 is the prompt, 1.. are the completions of the row


class Sample(NamedTuple):
    """One completion with its advantage, as the loss needs it."""

    prompt: Prompt
    completion: Completion
    advantage: float
    prediction_weight: float = 0.0  # factor of the predicted pass rate that is still to be subtracted


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One forward pass: R rows of S tokens, holding N completions of T tokens in all."""

    input_ids: Tensor  # [R, S] int64
    position_ids: Tensor  # [R, S] int64
    segment_of: Tensor  # [R, S] int64: PAD, 0 (prompt) or 1.. (completion)
    row_of: Tensor  # [T] int64: row of the state that predicts each completion token
    column_of: Tensor  # [T] int64: column of that state
    token_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [N + 1] int64
    advantages: Tensor  # [N] fp32
    prediction_weights: Tensor  # [N] fp32
    rollout_logprobs: Tensor  # [T] fp32
    token_mask: Tensor  # [T] bool: False for tokens that the policy did not write, which are context and train nothing
    num_written: int  # tokens that it did write
    ref_logprobs: Tensor | None = None  # [T] fp32 of the reference policy, where the loss has a KL to it

    @property
    def num_seqs(self) -> int:
        return self.advantages.numel()

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


def attention_mask(batch: Batch, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive mask [R, 1, S, S]: 0 where state i may attend to j, the dtype's minimum elsewhere.

    State i sees j if j <= i and j is in the prompt or in i's own completion; with a `window`, its position must also be less than that many
    behind. Padding sees itself, so that no softmax row is empty.
    """
    seg = batch.segment_of
    size = seg.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=seg.device).tril()
    same = seg[:, :, None] == seg[:, None, :]
    visible = causal & (same | (seg[:, None, :] == 0))
    if window is not None:
        visible &= batch.position_ids[:, :, None] - batch.position_ids[:, None, :] < window
    mask = torch.zeros(visible.shape, dtype=dtype, device=seg.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def shuffled_minibatches(groups: Sequence[Sequence[Sample]], count: int, seed: Sequence[int]) -> list[list[Sample]]:
    """Return `count` lists of samples, each of whole groups, in a seeded random order of groups.

    The shuffle matters: groups arrive easiest first, so unshuffled minibatches would be sorted by difficulty.
    """
    order = np.random.default_rng(list(seed)).permutation(len(groups))
    parts = np.array_split(order, count)
    return [[s for g in part for s in groups[g]] for part in parts if len(part)]


def shares_of(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """Return `count` lists with about equal numbers of tokens to compute, the completions of a prompt together. Some may be empty.

    The largest group goes first, and each group to the smallest list, so no list is above the mean by more than the largest group.
    """
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        groups.setdefault(s.prompt.prompt_id, []).append(s)
    shares: list[list[Sample]] = [[] for _ in range(count)]
    loads = [0] * count
    for group in sorted(groups.values(), key=_row_length, reverse=True):
        least = loads.index(min(loads))
        shares[least] += group
        loads[least] += _row_length(group)
    return shares


def micro_batches(samples: Sequence[Sample], tokens_per_pass: int, *, share_prompts: bool, pad_id: int) -> Iterator[Batch]:
    """Yield the samples as batches of at most `tokens_per_pass` padded tokens (one row at least), longest rows first."""
    rows = sorted(rows_of(samples, tokens_per_pass if share_prompts else 0), key=_row_length, reverse=True)
    start = 0
    while start < len(rows):
        count = max(1, tokens_per_pass // _row_length(rows[start]))
        yield collate(rows[start : start + count], pad_id)
        start += count


def rows_of(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Put samples of one prompt into one row, and begin a new row when the next would exceed max_tokens; 0 gives each its own row."""
    rows: list[list[Sample]] = []
    open_rows: dict[str, list[Sample]] = {}
    for s in samples:
        row = open_rows.get(s.prompt.prompt_id)
        if row is None or _row_length([*row, s]) > max_tokens:
            rows.append(row := [])
            open_rows[s.prompt.prompt_id] = row
        row.append(s)
    return rows


def _row_length(row: Sequence[Sample]) -> int:
    return len(row[0].prompt.token_ids) + sum(s.completion.token_ids.size for s in row)


def collate(rows: Sequence[Sequence[Sample]], pad_id: int) -> Batch:
    """Return one batch of these rows; the samples of a row share its prompt."""
    size = max(map(_row_length, rows))
    input_ids = np.full((len(rows), size), pad_id, dtype=np.int64)
    position_ids = np.zeros((len(rows), size), dtype=np.int64)
    segment_of = np.full((len(rows), size), PAD, dtype=np.int64)
    row_of, column_of, lengths = [], [], []
    for r, row in enumerate(rows):
        prompt = row[0].prompt.token_ids
        end = len(prompt)
        input_ids[r, :end], position_ids[r, :end], segment_of[r, :end] = prompt, np.arange(end), 0
        for segment, sample in enumerate(row, start=1):
            ids = sample.completion.token_ids
            here = slice(end, end + ids.size)
            input_ids[r, here], segment_of[r, here] = ids, segment
            position_ids[r, here] = len(prompt) + np.arange(ids.size)
            # A completion's first token is predicted by the prompt's last state, the others by their predecessor.
            column_of.append(np.concatenate([[len(prompt) - 1], np.arange(end, end + ids.size - 1)])[: ids.size])
            row_of.append(np.full(ids.size, r))
            lengths.append(ids.size)
            end += ids.size
    samples = [s for row in rows for s in row]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segment_of=torch.from_numpy(segment_of),
        row_of=torch.from_numpy(np.concatenate(row_of).astype(np.int64)),
        column_of=torch.from_numpy(np.concatenate(column_of).astype(np.int64)),
        token_ids=torch.from_numpy(np.concatenate([s.completion.token_ids for s in samples]).astype(np.int64)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
        advantages=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        prediction_weights=torch.tensor([s.prediction_weight for s in samples], dtype=torch.float32),
        rollout_logprobs=torch.from_numpy(np.concatenate([s.completion.rollout_logprobs for s in samples]).astype(np.float32)),
        token_mask=torch.from_numpy(np.concatenate([_mask(s.completion) for s in samples])),
        num_written=sum(s.completion.num_written for s in samples),
    )


def _mask(completion: Completion) -> NDArray[np.bool_]:
    given = completion.token_mask
    return np.ones(completion.token_ids.size, dtype=np.bool_) if given is None else given
