"""linear_token_logprobs on the CPU: pieces of the vocabulary go through the products and csrc/ops/token_logprobs; nothing is [T, V]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._products import LANES, Hidden, add_hidden_gradient, logits_dtype, scratch_bytes
from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, address
from reinforce_ada.ops.token_logprobs.checks import IGNORED, check_temperature_values, wrong_token

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

    def of_rows(self, rows: Tensor | slice) -> tuple[Tensor | None, float, float, float]:
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return temperatures, self.temperature, self.logit_scale, self.soft_cap


def head_of(
    weight: Tensor, bias: Tensor | None, temperatures: Tensor | None, temperature: float, logit_scale: float, soft_cap: float | None
) -> Head:
    """With the bias in the dtype of the logits."""
    bias = None if bias is None else bias.to(logits_dtype(weight.dtype)).contiguous()
    return Head(weight, bias, temperatures, temperature, logit_scale, soft_cap or 0.0)


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
    temperatures = temperature.float().contiguous() if isinstance(temperature, Tensor) else None
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    extra = DEFAULT_EXTRA_BYTES if max_extra_bytes is None else max_extra_bytes
    ids = token_ids.long().contiguous()
    logprobs, _, h, s = _forward_op(
        hidden, weight, bias, ids, temperatures, scalar, float(logit_scale), float(soft_cap or 0), entropy, sum_p2, extra
    )
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
        logit = logits_dtype(dtype).itemsize
        # Beside the logits: packed hidden states, and in the backward the float32 sum and, in two bytes, the product added to it or the
        # result that it becomes.
        token = Hidden.bytes_per_token(dtype, width) + (dtype.itemsize * width if gathered else 0)
        if backward:
            token += 4 * width + (2 * width if dtype.itemsize == 2 else 0)
        least = min(vocab, 256)
        # torch's product takes 4 % longer over 4096 rows of the weight at a time than over 16384; the native ones do not care.
        most = 256 if logit == 2 and not backward else _MOST_TOKENS
        tokens = max(1, min(num_tokens, most, room // (token + least * logit)))
        piece = max(1, min(vocab, _MOST_PIECE, (room - tokens * token) // (tokens * logit)))
        return Plan(tokens, piece if piece == vocab or piece < LANES else piece // LANES * LANES)

    def chunks(self, active: Tensor) -> Iterator[Tensor]:
        """Indices of the tokens of each chunk."""
        return iter(torch.split(active, self.tokens)) if len(active) else iter(())

    def pieces(self, vocab: int) -> Iterator[slice]:
        return (slice(i, min(i + self.piece, vocab)) for i in range(0, vocab, self.piece))

    def buffer(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.tokens * self.piece, dtype=logits_dtype(dtype))


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
    check_values(_WHERE, token_ids, weight.shape[0], temperatures)
    with torch.autocast("cpu", enabled=False):
        return score(
            hidden, head_of(weight, bias, temperatures, temperature, logit_scale, soft_cap), token_ids, entropy, sum_p2, extra_bytes
        )


def check_values(where: str, token_ids: Tensor, vocab: int, temperatures: Tensor | None) -> None:
    """Here and not in the public function: under torch.compile the values are known only when the operator runs."""
    row = cpu.first_invalid_token(address(token_ids), token_ids.shape[0], vocab)
    if row >= 0:
        raise wrong_token(where, token_ids, row, vocab)
    if temperatures is not None:
        check_temperature_values(where, temperatures)


def score(
    hidden: Tensor, head: Head, token_ids: Tensor, entropy: bool, sum_p2: bool, extra_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, log2 of the normalizer, entropy, sum_p2), each [T]; zero for ignored tokens, empty where not asked for."""
    num_tokens = hidden.shape[0]
    state = torch.zeros(num_tokens, _STATE, dtype=torch.float64)
    active = (token_ids != IGNORED).nonzero().squeeze(1)
    room = for_logits(extra_bytes, hidden.dtype, head.bias_bytes)
    plan = Plan.of(len(active), head.weight, room, backward=False, gathered=len(active) < num_tokens)
    buffer = plan.buffer(hidden.dtype)
    for index in plan.chunks(active):
        rows, ids = Hidden(rows_of(hidden, index)), rows_of(token_ids, index)
        of_rows = head.of_rows(index)
        sums = torch.zeros(len(index), _STATE, dtype=torch.float64)
        for piece in plan.pieces(head.vocab):
            logits = rows.logits(head.weight[piece], _piece_of(head.bias, piece), buffer)
            _add_piece(logits, piece.start, ids, of_rows, sums, entropy, sum_p2)
        state[index] = sums
    return _finish(state, entropy, sum_p2)


def score_logits(logits: Tensor, ids: Tensor, head: Head, of_rows: Any, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `score`, of logits [T, V] that are all there."""
    sums = torch.zeros(len(ids), _STATE, dtype=torch.float64)
    _add_piece(logits, 0, ids, of_rows, sums, entropy, False)
    return _finish(sums, entropy, False)


def _finish(state: Tensor, entropy: bool, sum_p2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _empty_results(state, entropy, sum_p2)
    cpu.token_logprobs_finish(address(state), len(state), *map(_address_or_none, results))
    return results


def _add_piece(logits: Tensor, first_id: int, ids: Tensor, of_rows: Any, sums: Tensor, entropy: bool, sum_p2: bool) -> None:
    temperatures, temperature, logit_scale, soft_cap = of_rows
    cpu.token_logprobs_add_piece(
        address(logits),
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


def _empty_results(hidden: Tensor, entropy: bool, sum_p2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens = hidden.shape[0]
    return (
        hidden.new_empty(num_tokens, dtype=torch.float32),
        hidden.new_empty(num_tokens, dtype=torch.float64),
        hidden.new_empty(num_tokens if entropy else 0, dtype=torch.float32),
        hidden.new_empty(num_tokens if sum_p2 else 0, dtype=torch.float32),
    )


def _address_or_none(x: Tensor) -> int:
    return address(x if x.numel() else None)


def _piece_of(bias: Tensor | None, piece: slice) -> Tensor | None:
    return None if bias is None else bias[piece]


# Backward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, token_ids, temperatures, *ctx.scalars, _, _, ctx.extra_bytes = inputs
    _, log2_normalizer, entropy, sum_p2 = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, temperatures, log2_normalizer, entropy)
    ctx.mark_non_differentiable(log2_normalizer, sum_p2)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, _: None, grad_entropy: Tensor | None, __: None) -> tuple[Tensor | None, ...]:
    g, h = (None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy))
    needed = list(ctx.needs_input_grad[:3])
    grads = _gradient_op(*ctx.saved_tensors, *ctx.scalars, g, h, *needed, ctx.extra_bytes)
    return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), *(None,) * 8


def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperatures: Tensor | None,
    log2_normalizer: Tensor,
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
            token_ids,
            (log2_normalizer, entropy),
            (grad_logprobs, grad_entropy),
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
    token_ids: Tensor,
    results: tuple[Tensor, Tensor],
    incoming: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor, Tensor],
    extra_bytes: int,
    *,
    onto_weight: bool = False,
) -> None:
    """Writes the gradients; `results` are log2_normalizer and entropy, `incoming` the gradients of logprobs and entropy.

    The logits are computed again. A token whose incoming gradients are 0 takes part in no product. With `onto_weight` the gradient of
    the weight is added to what is there.
    """
    grad_hidden, grad_weight, grad_bias = grads
    grad_hidden.zero_()
    active = _with_gradient(token_ids, incoming)
    if not len(active) and not onto_weight:
        grad_weight.zero_()
    bias_sums = torch.zeros(len(grad_bias), dtype=torch.float64)
    room = for_logits(extra_bytes, hidden.dtype, bias_sums.nbytes + head.bias_bytes)
    plan = Plan.of(len(active), head.weight, room, backward=True, gathered=len(active) < len(hidden))
    buffer = plan.buffer(hidden.dtype)
    for chunk, index in enumerate(plan.chunks(active)):
        rows = Hidden(rows_of(hidden, index))
        at_rows = [None if x is None or not len(x) else rows_of(x, index) for x in (token_ids, *results, *incoming)]
        sums = torch.zeros(rows.rows.shape if len(grad_hidden) else 0, dtype=torch.float32)
        for piece in plan.pieces(head.vocab):
            dz = rows.logits(head.weight[piece], _piece_of(head.bias, piece), buffer)
            gradient_over_logits(dz, piece, at_rows, head, head.of_rows(index), bias_sums)
            if len(grad_hidden):
                add_hidden_gradient(dz, head.weight[piece], sums)
            if len(grad_weight):
                rows.add_weight_gradient(dz, grad_weight[piece], first=chunk == 0 and not onto_weight)
        if len(grad_hidden):
            grad_hidden[index] = sums.to(grad_hidden.dtype)
    grad_bias.copy_(bias_sums)


def _with_gradient(token_ids: Tensor, incoming: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Indices of the tokens that some gradient reaches."""
    reached = torch.zeros_like(token_ids, dtype=torch.bool)
    for grad in incoming:
        if grad is not None:
            reached |= grad != 0
    return (reached & (token_ids != IGNORED)).nonzero().squeeze(1)


def gradient_over_logits(logits: Tensor, piece: slice, at_rows: list[Tensor | None], head: Head, of_rows: Any, bias_sums: Tensor) -> None:
    """Turns the logits of a piece of the vocabulary into their gradient, in place, and adds that of the bias to `bias_sums`.

    `at_rows` are the token ids, log2_normalizer, entropy, grad_logprobs and grad_entropy of these tokens.
    """
    ids, log2_normalizer, entropy, grad_logprobs, grad_entropy = at_rows
    temperatures, temperature, logit_scale, soft_cap = of_rows
    cpu.token_logprobs_gradient_piece(
        address(logits),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        piece.start,
        address(ids),
        address(temperatures),
        temperature,
        logit_scale,
        soft_cap,
        address(log2_normalizer),
        address(entropy),
        address(grad_logprobs),
        address(grad_entropy),
        address(logits),
        logits.stride(0),
        address(bias_sums[piece] if len(bias_sums) else None),
        torch.get_num_threads(),
    )


_gradient_op = NativeOp(
    "linear_token_logprobs_gradient",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, Tensor log2_normalizer, Tensor entropy, "
    "float temperature, float logit_scale, float soft_cap, Tensor? grad_logprobs, Tensor? grad_entropy, bool of_hidden, "
    "bool of_weight, bool of_bias, int extra_bytes) -> (Tensor, Tensor, Tensor)",
    _gradient,
    lambda hidden, weight, *rest: empty_gradients(hidden, weight, *rest[-4:-1]),
)

_forward_op = NativeOp(
    "linear_token_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, "
    "float soft_cap, bool entropy, bool sum_p2, int extra_bytes) "
    "-> (Tensor logprobs, Tensor log2_normalizer, Tensor entropy, Tensor sum_p2)",
    _forward,
    lambda hidden, *rest: _empty_results(hidden, *rest[-3:-1]),
    setup_context=_setup_context,
    backward=_backward,
)
