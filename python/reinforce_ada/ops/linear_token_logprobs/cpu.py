"""linear_token_logprobs on the CPU: pieces of the vocabulary go through the products and csrc/ops/token_logprobs; nothing is [T, V]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._products import TILE, Hidden, add_hidden_gradient, gradient_bytes, logits_dtype, scratch_bytes
from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, address, constant, dense, resolved, row_address
from reinforce_ada.ops.token_logprobs import cpu as whole_rows

_WHERE = "linear_token_logprobs"

DEFAULT_EXTRA_BYTES = 8_000_000  # beyond it nothing gets faster: the pieces no longer fit the caches
_MOST_TOKENS = 1024  # of a chunk: the weight is then read from memory once for 2048 operations an element
_MOST_PIECE = 16384
_STATE = 6  # doubles of a row between pieces, csrc/ops/token_logprobs/token_logprobs.h


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: z = logit_scale (hidden weight^T + bias), capped, over the temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V], dtype of the logits
    temperatures: Tensor | None  # [T] float32
    temperature: float
    logit_scale: float
    soft_cap: float  # 0: none

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def bias_bytes(self) -> int:
        """Of the bias where it is a copy, in another dtype."""
        return 0 if self.bias is None or self.bias.dtype == self.weight.dtype else self.bias.nbytes

    @property
    def scoring(self) -> tuple[Tensor | None, float, float, float]:
        """What turns the products into log-probabilities, as the kernels of token_logprobs take it."""
        return self.temperatures, self.temperature, self.logit_scale, self.soft_cap

    def at(self, index: Tensor) -> Head:
        """For these tokens."""
        return self if self.temperatures is None else replace(self, temperatures=rows_of(self.temperatures, index))

    def piece(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """These rows of the weight, and of the bias."""
        return self.weight[rows], None if self.bias is None else self.bias[rows]


class Scored(NamedTuple):
    """Tokens with what the gradient of their logits needs; None for an incoming gradient that is 0."""

    ids: Tensor
    normalizers: Tensor
    entropy: Tensor  # empty where grad_entropy is None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None

    def at(self, index: Tensor) -> Scored:
        """These of them."""
        entropy = rows_of(self.entropy, index) if len(self.entropy) else self.entropy
        g, h = (None if grad is None else rows_of(grad, index) for grad in (self.grad_logprobs, self.grad_entropy))
        return Scored(rows_of(self.ids, index), rows_of(self.normalizers, index), entropy, g, h)


def head_of(
    weight: Tensor, bias: Tensor | None, temperatures: Tensor | None, temperature: float, logit_scale: float, soft_cap: float
) -> Head:
    """With the bias in the dtype of the logits."""
    bias = None if bias is None else dense(bias, logits_dtype(weight.dtype))
    return Head(weight, bias, temperatures, temperature, logit_scale, soft_cap)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    soft_cap: float | None,
    entropy: bool,
    sum_p2: bool,
    max_extra_bytes: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logprobs, entropy or None, sum_p2 or None), each [T] float32; see the public function."""
    temperatures = dense(temperature, torch.float32) if isinstance(temperature, Tensor) else None
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    extra = DEFAULT_EXTRA_BYTES if max_extra_bytes is None else max_extra_bytes
    rows = (resolved(hidden), resolved(weight), bias, constant(token_ids, torch.int64))
    logprobs, _, h, s = _forward_op(*rows, temperatures, scalar, float(logit_scale), float(soft_cap or 0), entropy, sum_p2, extra)
    return logprobs, h if entropy else None, s if sum_p2 else None


# Chunks of tokens and pieces of the vocabulary


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is held at once: `tokens` hidden states against `piece` rows of the weight."""

    tokens: int
    piece: int

    @staticmethod
    def of(num_tokens: int, weight: Tensor, room: int, *, backward: bool, gathered: bool) -> Plan:
        """In `room` bytes. `gathered`: the hidden states of a chunk do not lie together and are copied."""
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

    def chunks(self, active: Tensor) -> Iterator[Tensor]:
        """Indices of the tokens of each chunk."""
        return iter(torch.split(active, self.tokens)) if len(active) else iter(())

    def pieces(self, vocab: int) -> Iterator[slice]:
        return (slice(i, min(i + self.piece, vocab)) for i in range(0, vocab, self.piece))

    def buffer(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(self.tokens * self.piece, dtype=logits_dtype(hidden.dtype))


def for_logits(extra_bytes: int, dtype: torch.dtype, held: int = 0) -> int:
    """What the products leave, or half of it where that is more (small ones need less), without what is `held` anyway."""
    return max(extra_bytes - scratch_bytes(dtype), extra_bytes // 2) - held


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x[index], without a copy where the indices are consecutive."""
    first, last = int(index[0]), int(index[-1])
    return x[first : last + 1] if last - first + 1 == len(index) else x.index_select(0, index)


# Forward


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    entropy: bool,
    sum_p2: bool,
    extra_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole_rows.check_values(_WHERE, token_ids, weight.shape[0], temperatures)
    head = head_of(weight, bias, temperatures, temperature, logit_scale, soft_cap)
    with torch.autocast("cpu", enabled=False):
        return score(hidden, head, token_ids, entropy, sum_p2, extra_bytes)


def score(
    hidden: Tensor, head: Head, token_ids: Tensor, entropy: bool, sum_p2: bool, extra_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, log2 of the normalizer, entropy, sum_p2), each [T]; zero for ignored tokens, empty where not asked for."""
    num_tokens = hidden.shape[0]
    state = hidden.new_zeros((num_tokens, _STATE), dtype=torch.float64)
    active = (token_ids != IGNORED).nonzero().squeeze(1)
    room = for_logits(extra_bytes, hidden.dtype, head.bias_bytes)
    plan = Plan.of(len(active), head.weight, room, backward=False, gathered=len(active) < num_tokens)
    buffer = plan.buffer(hidden)
    for index in plan.chunks(active):
        rows, ids, head_at = Hidden(rows_of(hidden, index)), rows_of(token_ids, index), head.at(index)
        sums = state.new_zeros((len(index), _STATE))
        for piece in plan.pieces(head.vocab):
            _add_piece(rows.logits(*head.piece(piece), buffer), piece.start, ids, head_at, sums, entropy, sum_p2)
        state[index] = sums
    return _finish(state, entropy, sum_p2)


def score_logits(logits: Tensor, ids: Tensor, head: Head, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `score`, of logits [T, V] that are all there."""
    sums = logits.new_zeros((len(ids), _STATE), dtype=torch.float64)
    _add_piece(logits, 0, ids, head, sums, entropy, False)
    return _finish(sums, entropy, False)


def _finish(state: Tensor, entropy: bool, sum_p2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = whole_rows.empty_results(state, entropy, sum_p2)
    cpu.token_logprobs_finish(address(state), len(state), *map(address, results))
    return results


def _add_piece(logits: Tensor, first_id: int, ids: Tensor, head: Head, sums: Tensor, entropy: bool, sum_p2: bool) -> None:
    temperatures, temperature, logit_scale, soft_cap = head.scoring
    cpu.token_logprobs_add_piece(
        row_address(logits),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        first_id,
        address(ids),
        address(temperatures),
        temperature,
        logit_scale,
        soft_cap,
        address(sums),
        entropy,
        sum_p2,
        torch.get_num_threads(),
    )


# Backward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, token_ids, temperatures, *ctx.scalars, _, _, ctx.extra_bytes = inputs
    _, normalizers, entropy, sum_p2 = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, temperatures, normalizers, entropy)
    ctx.mark_non_differentiable(normalizers, sum_p2)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, _: None, grad_entropy: Tensor | None, __: None) -> tuple[Tensor | None, ...]:
    g, h = (None if grad is None else dense(grad) for grad in (grad_logprobs, grad_entropy))
    needed = list(ctx.needs_input_grad[:3])
    grads = _gradient_op(*ctx.saved_tensors, *ctx.scalars, g, h, *needed, ctx.extra_bytes)
    return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), *(None,) * 8


def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperatures: Tensor | None,
    normalizers: Tensor,
    entropy: Tensor,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    extra_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = empty_gradients(hidden, weight, of_hidden, of_weight, of_bias)
    with torch.autocast("cpu", enabled=False):
        add_gradients(
            hidden,
            head_of(weight, bias, temperatures, temperature, logit_scale, soft_cap),
            Scored(token_ids, normalizers, entropy, grad_logprobs, grad_entropy),
            grads,
            extra_bytes,
        )
    return grads


def empty_gradients(hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden [T, D], weight [V, D] and bias [V]; empty where not wanted."""
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


def add_gradients(
    hidden: Tensor,
    head: Head,
    scored: Scored,
    grads: tuple[Tensor, Tensor, Tensor],
    extra_bytes: int,
    *,
    onto_weight: bool = False,
) -> None:
    """Writes the gradients of hidden, weight and bias.

    The logits are computed again. A token whose incoming gradients are 0 takes part in no product. With `onto_weight` the gradient of
    the weight is added to what is there.
    """
    grad_hidden, grad_weight, grad_bias = grads
    grad_hidden.zero_()
    active = _with_gradient(scored)
    if not len(active) and not onto_weight:
        grad_weight.zero_()
    bias_sums = grad_bias.new_zeros(len(grad_bias), dtype=torch.float64)
    room = for_logits(extra_bytes, hidden.dtype, bias_sums.nbytes + head.bias_bytes)
    plan = Plan.of(len(active), head.weight, room, backward=True, gathered=len(active) < len(hidden))
    buffer = plan.buffer(hidden)
    for chunk, index in enumerate(plan.chunks(active)):
        rows, scored_at, head_at = Hidden(rows_of(hidden, index)), scored.at(index), head.at(index)
        sums = hidden.new_zeros(rows.rows.shape if len(grad_hidden) else 0, dtype=torch.float32)
        for piece in plan.pieces(head.vocab):
            dz = rows.logits(*head.piece(piece), buffer)
            gradient_over_logits(dz, piece, scored_at, head_at, bias_sums)
            if len(grad_hidden):
                add_hidden_gradient(dz, head.weight[piece], sums)
            if len(grad_weight):
                rows.add_weight_gradient(dz, grad_weight[piece], first=chunk == 0 and not onto_weight)
        if len(grad_hidden):
            grad_hidden[index] = sums.to(grad_hidden.dtype)
    grad_bias.copy_(bias_sums)


def _with_gradient(scored: Scored) -> Tensor:
    """Indices of the tokens that some gradient reaches."""
    reached = torch.zeros_like(scored.ids, dtype=torch.bool)
    for grad in (scored.grad_logprobs, scored.grad_entropy):
        if grad is not None:
            reached |= grad != 0
    return (reached & (scored.ids != IGNORED)).nonzero().squeeze(1)


def gradient_over_logits(logits: Tensor, piece: slice, scored: Scored, head: Head, bias_sums: Tensor) -> None:
    """Turns the logits of a piece of the vocabulary into their gradient, in place, and adds that of the bias to `bias_sums`."""
    whole_rows.write_gradient(
        logits,
        logits,
        scored.ids,
        *head.scoring,
        scored.normalizers,
        scored.entropy,
        scored.grad_logprobs,
        scored.grad_entropy,
        first_id=piece.start,
        bias_sums=bias_sums[piece] if len(bias_sums) else None,
    )


_gradient_op = NativeOp(
    "linear_token_logprobs_gradient",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, Tensor normalizers, Tensor entropy, "
    "float temperature, float logit_scale, float soft_cap, Tensor? grad_logprobs, Tensor? grad_entropy, bool of_hidden, "
    "bool of_weight, bool of_bias, int extra_bytes) -> (Tensor, Tensor, Tensor)",
    _gradient,
    lambda hidden, weight, *rest: empty_gradients(hidden, weight, *rest[-4:-1]),
)

_forward_op = NativeOp(
    "linear_token_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, "
    "float soft_cap, bool entropy, bool sum_p2, int extra_bytes) "
    "-> (Tensor logprobs, Tensor normalizers, Tensor entropy, Tensor sum_p2)",
    _forward,
    lambda hidden, *rest: whole_rows.empty_results(hidden, *rest[-3:-1]),
    setup_context=_setup_context,
    backward=_backward,
)
