"""linear_token_logprobs on the CPU: pieces of the vocabulary go through the products and csrc/ops/token_logprobs; nothing is [T, V]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._products import TILE, Hidden, add_hidden_gradient, gradient_bytes, logits_dtype, scratch_bytes
from reinforce_ada.ops._torch import address, dense, matrix
from reinforce_ada.ops.linear_token_logprobs.contract import (
    WHERE,
    GradientInputs,
    Gradients,
    Head,
    Inputs,
    Plan,
    ScoredTokens,
    empty_gradients,
    take,
)
from reinforce_ada.ops.token_logprobs import contract as logits_contract
from reinforce_ada.ops.token_logprobs import cpu as whole_rows
from reinforce_ada.ops.token_logprobs.contract import Scores, empty_scores
from reinforce_ada.ops.token_logprobs.cpu import NORMALIZERS, empty_normalizers

__all__ = ["NORMALIZERS", "empty_normalizers", "gradients", "scores"]

_EXTRA_BYTES = 8_000_000  # beyond it nothing gets faster: the pieces no longer fit the caches
_MOST_TOKENS = 1024  # of a chunk: the weight is then read from memory once for 2048 operations an element
_MOST_PIECE = 16384
_STATE = 6  # doubles of a row between pieces, csrc/ops/token_logprobs/token_logprobs.h


def _room(x: Inputs | GradientInputs) -> int:
    return _EXTRA_BYTES if x.extra_bytes is None else x.extra_bytes


def head_of(x: Inputs | GradientInputs) -> Head:
    """Return the output head, with the bias in the dtype of the logits."""
    return replace(x.head, bias=None if x.bias is None else dense(x.bias, logits_dtype(x.weight.dtype)))


def bias_bytes(head: Head) -> int:
    """Return the bytes of the bias if it is a copy in another dtype."""
    return 0 if head.bias is None or head.bias.dtype == head.weight.dtype else head.bias.nbytes


# Chunks of tokens and pieces of the vocabulary


def plan_of(num_tokens: int, weight: Tensor, room: int, *, backward: bool, gathered: bool) -> Plan:
    """Return the plan that fits in `room` bytes. If `gathered`, the hidden states of a chunk do not lie together and are copied."""
    vocab, width = weight.shape
    dtype = weight.dtype
    logit = gradient_bytes(dtype, vocab) if backward else logits_dtype(dtype).itemsize
    # Beside the logits: packed hidden states, and in the backward the float32 sum and, in two bytes, the product added to it or the
    # result that it becomes.
    token = Hidden.bytes_per_token(dtype, width) + (dtype.itemsize * width if gathered else 0)
    if backward:
        token += 4 * width + (2 * width if dtype.itemsize == 2 else 0)
    least = min(vocab, 256)
    # torch's product takes 4 % longer over 4096 rows of the weight at a time than over 16384; the native ones do not care.
    most = 256 if dtype == torch.bfloat16 and not backward else _MOST_TOKENS
    tokens = max(1, min(num_tokens, most, room // (token + least * logit)))
    piece = max(1, min(vocab, _MOST_PIECE, (room - tokens * token) // (tokens * logit)))
    return Plan(tokens, piece if piece == vocab or piece < TILE else piece // TILE * TILE)


def chunks(active: Tensor, tokens: int) -> Sequence[Tensor]:
    """Return the indices of the tokens of each chunk."""
    return torch.split(active, tokens) if len(active) else ()


def buffer_for(hidden: Tensor, tokens: int, piece: int) -> Tensor:
    """Return memory for this number of logits."""
    return hidden.new_empty(tokens * piece, dtype=logits_dtype(hidden.dtype))


def for_logits(extra_bytes: int, dtype: torch.dtype, held: int = 0) -> int:
    """Return what the products leave, or half if that is more (small ones need less), without what is `held` anyway."""
    return max(extra_bytes - scratch_bytes(dtype), extra_bytes // 2) - held


# Forward


def scores(x: Inputs) -> tuple[Tensor, ...]:
    """See contract.Kernels. Raises: InputError for ids and temperatures out of range."""
    whole_rows.check_values(WHERE, x.token_ids, x.weight.shape[0], x.temperatures)
    with torch.autocast("cpu", enabled=False):
        out, normalizers = score(x.hidden, head_of(x), x.token_ids, x.entropy, x.sum_p2, _room(x))
    return *out, normalizers


def score(hidden: Tensor, head: Head, token_ids: Tensor, entropy: bool, sum_p2: bool, extra_bytes: int) -> tuple[Scores, Tensor]:
    """Return (scores, normalizers), zero for ignored tokens."""
    num_tokens = hidden.shape[0]
    state = hidden.new_zeros((num_tokens, _STATE), dtype=torch.float64)
    active = (token_ids != IGNORED).nonzero().squeeze(1)
    room = for_logits(extra_bytes, hidden.dtype, bias_bytes(head))
    plan = plan_of(len(active), head.weight, room, backward=False, gathered=len(active) < num_tokens)
    buffer = buffer_for(hidden, plan.tokens, plan.piece)
    for index in chunks(active, plan.tokens):
        rows, ids, head_at = Hidden(take(hidden, index)), take(token_ids, index), head.at(index)
        sums = state.new_zeros((len(index), _STATE))
        for piece in plan.pieces(head.vocab):
            _add_piece(rows.logits(*head.piece(piece), buffer), piece.start, ids, head_at, sums, entropy, sum_p2)
        state[index] = sums
    return _finish(state, entropy, sum_p2)


def score_logits(logits: Tensor, ids: Tensor, head: Head, entropy: bool) -> tuple[Scores, Tensor]:
    """Return the same as `score`, for logits [T, V] that are all in memory."""
    sums = logits.new_zeros((len(ids), _STATE), dtype=torch.float64)
    _add_piece(logits, 0, ids, head, sums, entropy, False)
    return _finish(sums, entropy, False)


def _finish(state: Tensor, entropy: bool, sum_p2: bool) -> tuple[Scores, Tensor]:
    out, (normalizers,) = empty_scores(state, entropy, sum_p2), empty_normalizers(state)
    cpu.token_logprobs_finish(address(state), len(state), *map(address, (out.logprobs, normalizers, out.entropy, out.sum_p2)))
    return out, normalizers


def _add_piece(logits: Tensor, first_id: int, ids: Tensor, head: Head, sums: Tensor, entropy: bool, sum_p2: bool) -> None:
    cpu.token_logprobs_add_piece(
        *matrix(logits),
        first_id, address(ids), address(head.temperatures), head.temperature, head.logit_scale, head.soft_cap,
        address(sums), entropy, sum_p2, torch.get_num_threads(),
    )  # fmt: skip


# Backward


def gradients(x: GradientInputs, *normalizers: Tensor, onto: Tensor | None = None) -> Gradients:
    """See contract.Kernels."""
    grads = empty_gradients(x.hidden, x.weight, x.of_hidden, x.of_weight and onto is None, x.of_bias)
    scored = ScoredTokens(x.token_ids, normalizers, x.entropy, x.grad_logprobs, x.grad_entropy)
    with torch.autocast("cpu", enabled=False):
        add_gradients(x.hidden, head_of(x), scored, grads, _room(x), onto)
    return grads


def add_gradients(hidden: Tensor, head: Head, scored: ScoredTokens, grads: Gradients, extra_bytes: int, onto: Tensor | None) -> None:
    """Write the gradients of hidden, weight and bias. With `onto`, the weight's gradient is added to `onto` instead.

    The logits are computed again. A token whose incoming gradients are 0 takes part in no product.
    """
    grad_hidden, grad_weight, grad_bias = grads if onto is None else (grads[0], onto, grads[2])
    grad_hidden.zero_()
    active = scored.reached().nonzero().squeeze(1)
    if not len(active) and onto is None:
        grad_weight.zero_()
    bias_sums = grad_bias.new_zeros(len(grad_bias), dtype=torch.float64)
    room = for_logits(extra_bytes, hidden.dtype, bias_sums.nbytes + bias_bytes(head))
    plan = plan_of(len(active), head.weight, room, backward=True, gathered=len(active) < len(hidden))
    buffer = buffer_for(hidden, plan.tokens, plan.piece)
    for chunk, index in enumerate(chunks(active, plan.tokens)):
        rows, scored_at, head_at = Hidden(take(hidden, index)), scored.at(index), head.at(index)
        sums = hidden.new_zeros(rows.rows.shape if len(grad_hidden) else 0, dtype=torch.float32)
        for piece in plan.pieces(head.vocab):
            dz = rows.logits(*head.piece(piece), buffer)
            gradient_over_logits(dz, piece, scored_at, head_at, bias_sums)
            if len(grad_hidden):
                add_hidden_gradient(dz, head.weight[piece], sums)
            if len(grad_weight):
                rows.add_weight_gradient(dz, grad_weight[piece], first=chunk == 0 and onto is None)
        if len(grad_hidden):
            grad_hidden[index] = sums.to(grad_hidden.dtype)
    grad_bias.copy_(bias_sums)


def gradient_over_logits(logits: Tensor, piece: slice, scored: ScoredTokens, head: Head, bias_sums: Tensor) -> None:
    """Turn the logits of a piece of the vocabulary into their gradient, in place, and add that of the bias to `bias_sums`."""
    incoming = (scored.entropy, scored.grad_logprobs, scored.grad_entropy)
    x = logits_contract.GradientInputs(logits, scored.ids, *head.scoring, *incoming)
    sums = bias_sums[piece] if len(bias_sums) else None
    whole_rows.gradient(logits, x, *scored.normalizers, first_id=piece.start, bias_sums=sums)
