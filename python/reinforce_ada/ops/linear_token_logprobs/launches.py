"""What launches the Triton kernels of linear_token_logprobs, behind torch's registration: tiles, splits, pieces of the vocabulary.

The logits are never there: a tile of them is a product in registers, scored at once. The backward computes them again, a piece of the
vocabulary at a time, and keeps that piece of their gradient for the two products with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._gpu import guard, triton_devices
from reinforce_ada.ops._torch import NativeOp, constant, dense, resolved

DEFAULT_EXTRA_BYTES = 256_000_000  # at 8192 tokens 15,000 entries of the vocabulary at a time: long products, and 1/10 of the logits
JOINED_ROWS = 128  # of a program of `combined_scores`, of 128 threads
SUMMED_COLUMNS = 128  # of a program of `bias_gradient`, of 128 threads
_THREADS = 128
_GROUP = 16  # blocks of rows that run together: 2048 hidden states of 4096 in half precision are 17 MB, which the L2 cache keeps
_STATES = 5  # float32 of a row and split between the two kernels of the forward
_WAVES = 4  # programs for each multiprocessor that the forward cuts its work into, so that the last ones leave few idle
_SPLITS = 16  # of the vocabulary at least, where it is as large: short float32 sums


class Tile(NamedTuple):
    """Of a product: `rows` by `columns` of the result in the registers of `threads` threads, `depth` at a time through `stages` buffers."""

    rows: int
    columns: int
    depth: int
    threads: int
    stages: int


# By bytes of an element. One tile serves every device of a backend. It fits 64 KB of shared memory, as on MI300X and below what any
# CUDA device has; larger ones spill registers in the epilogue of the logits.
TILES = {
    "cuda": {2: Tile(128, 128, 32, 256, 4), 4: Tile(64, 64, 16, 256, 3)},
    "hip": {2: Tile(64, 128, 64, 256, 2), 4: Tile(64, 64, 32, 256, 2)},
    "interpreter": {2: Tile(32, 64, 32, 32, 1), 4: Tile(32, 64, 32, 32, 1)},
}
# Where rows do not all begin at 16 bytes: elements are loaded one by one then, each from an address of its own in registers.
UNALIGNED_TILES = {
    "cuda": {2: Tile(64, 64, 32, 256, 2), 4: Tile(64, 64, 16, 256, 3)},
    "hip": {2: Tile(64, 64, 16, 256, 2), 4: Tile(64, 64, 16, 256, 2)},
    "interpreter": {2: Tile(32, 64, 16, 32, 1), 4: Tile(32, 64, 16, 32, 1)},
}


class Head(NamedTuple):
    """What turns hidden states into logits: z = logit_scale (hidden weight^T + bias), capped, over the temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperatures: Tensor | None  # [T] float32
    temperature: float
    logit_scale: float
    soft_cap: float  # 0: none


class Scored(NamedTuple):
    """Tokens with what the gradient of their logits needs, each [T]; None for an incoming gradient of the entropy that is 0."""

    ids: Tensor
    row_max: Tensor
    log2_sum: Tensor
    entropy: Tensor  # empty where grad_entropy is None
    grad_logprobs: Tensor
    grad_entropy: Tensor | None

    def at(self, rows: slice) -> Scored:
        """These of them."""
        h = None if self.grad_entropy is None else self.grad_entropy[rows]
        entropy = self.entropy[rows if len(self.entropy) else slice(0)]
        return Scored(self.ids[rows], self.row_max[rows], self.log2_sum[rows], entropy, self.grad_logprobs[rows], h)

    def reached(self) -> Tensor:
        """[T], whether a gradient reaches the token."""
        reached = self.grad_logprobs != 0
        if self.grad_entropy is not None:
            reached = reached | (self.grad_entropy != 0)
        return reached & (self.ids != IGNORED)


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
    scoring = (temperature, logit_scale, soft_cap, entropy, sum_p2)
    logprobs, _, _, h, s = scored(*arguments(hidden, weight, bias, token_ids, *scoring, max_extra_bytes))
    return logprobs, h if entropy else None, s if sum_p2 else None


def arguments(
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
) -> tuple[Any, ...]:
    """What the operator takes for those of the public function."""
    temperatures = dense(temperature, torch.float32) if isinstance(temperature, Tensor) else None
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    bias = None if bias is None else dense(bias)
    head = (temperatures, scalar, float(logit_scale), float(soft_cap or 0))
    extra = DEFAULT_EXTRA_BYTES if max_extra_bytes is None else max_extra_bytes
    return resolved(hidden), resolved(weight), bias, constant(token_ids, torch.int64), *head, entropy, sum_p2, extra


# The device


@cache
def _kernels() -> Any:
    """Imported when they are first launched: Triton need not be there for anybody else."""
    return import_module("reinforce_ada.ops.linear_token_logprobs.triton")


@cache
def _backend(device: torch.device) -> str:
    """The part of `TILES` for a device."""
    if triton_devices() == ("cpu",):
        return "interpreter"
    return "cuda" if torch.version.hip is None else "hip"


@cache
def _multiprocessors(device: torch.device) -> int:
    return 4 if _backend(device) == "interpreter" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _warp_size(device: torch.device) -> int:
    return 1 if _backend(device) == "interpreter" else torch.cuda.get_device_properties(device).warp_size


def ceil_div(n: int, size: int) -> int:
    """How many blocks of a size hold n."""
    return -(-n // size)


def tile_of(hidden: Tensor, weight: Tensor) -> Tile:
    """Of the products of these."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 for x in (hidden, weight)) and weight.shape[1] % 16 == 0
    return (TILES if aligned else UNALIGNED_TILES)[_backend(hidden.device)][weight.dtype.itemsize]


def _options(device: torch.device, threads: int) -> dict[str, Any]:
    # fp_fusion said in so many words: Triton warns where it is left to a default that will change.
    return {"num_warps": threads // _warp_size(device), "enable_fp_fusion": True}


def _tile_of_gradient(tile: Tile, head: Head) -> Tile:
    """Of the logits' gradient. The slope of a soft cap beside 64 sums is more than the 255 registers a thread has on sm_90."""
    crowded = head.soft_cap != 0 and tile.rows * tile.columns > 32 * tile.threads
    return tile._replace(columns=tile.columns // 2) if crowded else tile


def _product_options(tile: Tile, device: torch.device) -> dict[str, Any]:
    backend = _backend(device)
    options = {
        "INTERPRETED": backend == "interpreter",
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": _GROUP,
        "num_stages": tile.stages,
        **_options(device, tile.threads),
    }
    # Left to itself ptxas spills some registers so that a second block fits a multiprocessor.
    return {**options, "maxnreg": 255} if backend == "cuda" else options


# Forward


def score_inputs(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, row_max, log2_sum, entropy, sum_p2), each [T] float32; the last two empty where not asked for."""
    results = empty_results(hidden, entropy, sum_p2)
    num_tokens = len(token_ids)
    if num_tokens == 0:
        return results
    vocab, width = weight.shape
    tile = tile_of(hidden, weight)
    blocks, tiles = ceil_div(num_tokens, tile.rows), ceil_div(vocab, tile.columns)
    splits = _splits(blocks, tiles, num_tokens, _multiprocessors(hidden.device), extra_bytes)
    states = hidden.new_empty((_STATES if entropy or sum_p2 else 3, splits, num_tokens), dtype=torch.float32)
    logprobs, row_max, log2_sum, h, s = results
    with guard(hidden):
        _kernels().partial_scores[(blocks * splits,)](
            *(hidden, weight, bias, token_ids, temperatures, states, num_tokens, vocab, width),
            *(hidden.stride(0), weight.stride(0), temperature, logit_scale, soft_cap),
            *(splits, ceil_div(tiles, splits)),
            HAS_CAP=soft_cap != 0,
            MOMENTS=entropy or sum_p2,
            **_product_options(tile, hidden.device),
        )
        _kernels().combined_scores[(ceil_div(num_tokens, JOINED_ROWS),)](
            *(states, token_ids, temperatures, logprobs, row_max, log2_sum, h if entropy else None, s if sum_p2 else None),
            *(num_tokens, vocab, splits, temperature),
            BLOCK=JOINED_ROWS,
            **_options(hidden.device, _THREADS),
        )
    return results


def _splits(blocks: int, tiles: int, num_tokens: int, multiprocessors: int, extra_bytes: int) -> int:
    """Into how many parts the vocabulary is cut: few rows shall fill the device too."""
    wanted = max(_SPLITS, ceil_div(_WAVES * multiprocessors, blocks))
    return int(max(1, min(wanted, tiles, extra_bytes // (4 * _STATES * num_tokens))))


def empty_results(hidden: Tensor, entropy: bool, sum_p2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, row_max, log2_sum, entropy, sum_p2) for each row, the last two empty where not asked for."""
    num_tokens = hidden.shape[0]
    logprobs, row_max, log2_sum = (hidden.new_empty(num_tokens, dtype=torch.float32) for _ in range(3))
    h, s = (hidden.new_empty(num_tokens if wanted else 0, dtype=torch.float32) for wanted in (entropy, sum_p2))
    return logprobs, row_max, log2_sum, h, s


# Backward


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves what `gradients_of` needs."""
    hidden, weight, bias, token_ids, temperatures, *ctx.scalars, ctx.with_entropy, _, ctx.extra_bytes = inputs
    _, row_max, log2_sum, entropy, sum_p2 = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, temperatures, row_max, log2_sum, entropy)
    ctx.mark_non_differentiable(row_max, log2_sum, sum_p2)
    ctx.set_materialize_grads(False)


def incoming_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Of logprobs and entropy."""
    # An entropy that was not asked for is empty, and so would be its gradient.
    g, h = (None if grad is None else dense(grad) for grad in (grads[0], grads[3] if ctx.with_entropy else None))
    return g, h


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    results = _gradient_op(*ctx.saved_tensors, *ctx.scalars, *incoming_gradients(ctx, grads), *needed, ctx.extra_bytes)
    return *(grad if wanted else None for grad, wanted in zip(results, needed, strict=True)), *(None,) * 8


def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperatures: Tensor | None,
    row_max: Tensor,
    log2_sum: Tensor,
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
    *,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; with `onto` that of the weight is added to it."""
    grads = empty_gradients(hidden, weight, of_hidden, of_weight and onto is None, of_bias)
    head = Head(weight, bias, temperatures, temperature, logit_scale, soft_cap)
    g = torch.zeros_like(row_max) if grad_logprobs is None else grad_logprobs
    of_tokens = Scored(token_ids, row_max, log2_sum, entropy, g, grad_entropy)
    add_gradients(hidden, head, of_tokens, grads if onto is None else (grads[0], onto, grads[2]), extra_bytes, onto_weight=onto is not None)
    return grads


def gradients_onto(
    ctx: Any, grads: Sequence[Tensor | None], onto: Tensor, of_hidden: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of hidden and bias; that of the weight is added to `onto`."""
    inputs: list[Any] = [*ctx.saved_tensors, *ctx.scalars, *incoming_gradients(ctx, grads), of_hidden, True, of_bias, ctx.extra_bytes]
    results = _gradient(*inputs, onto=onto)
    return results[0] if of_hidden else None, results[2] if of_bias else None


def empty_gradients(hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden [T, D], weight [V, D] and bias [V]; empty where not wanted."""
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of the logits' gradient is there at once: `tokens` rows of `piece` columns."""

    tokens: int
    piece: int

    @staticmethod
    def of(num_tokens: int, weight: Tensor, tile: Tile, room: int) -> Plan:
        """In `room` bytes: all tokens at once where that leaves room for a tile of columns, then as many columns as fit."""
        vocab, width = weight.shape
        size = weight.dtype.itemsize
        sums = 0 if size == 4 else 4 * width  # of the gradient of hidden, float32 between pieces
        least = min(vocab, tile.columns)
        tokens = max(1, min(num_tokens, room // (sums + least * (size + 4))))
        tokens = tokens if tokens == num_tokens or tokens < tile.rows else tokens // tile.rows * tile.rows
        # A column is its gradient, and for the bias its sum over each block of rows.
        piece = max(least, (room - tokens * sums) // (tokens * size + 4 * ceil_div(tokens, tile.rows)))
        return Plan(tokens, vocab if piece >= vocab else piece // tile.columns * tile.columns)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        return (slice(i, min(i + self.tokens, num_tokens)) for i in range(0, num_tokens, self.tokens))

    def pieces(self, vocab: int) -> Iterator[slice]:
        return (slice(i, min(i + self.piece, vocab)) for i in range(0, vocab, self.piece))


def add_gradients(
    hidden: Tensor,
    head: Head,
    of_tokens: Scored,
    grads: tuple[Tensor, Tensor, Tensor],
    extra_bytes: int,
    *,
    onto_weight: bool = False,
) -> None:
    """Writes the gradients of hidden, weight and bias (empty ones are not wanted); with `onto_weight` adds that of the weight."""
    grad_hidden, grad_weight, grad_bias = grads
    num_tokens, vocab = len(hidden), len(head.weight)
    if num_tokens == 0:
        grad_bias.zero_()
        if not onto_weight:
            grad_weight.zero_()
        return
    bias_sums = grad_bias.new_empty(len(grad_bias), dtype=torch.float64)
    tile = tile_of(hidden, head.weight)
    plan = Plan.of(num_tokens, head.weight, tile, extra_bytes - bias_sums.nbytes)
    dz = hidden.new_empty(plan.tokens * _padded(plan.piece))
    in_parts = len(grad_hidden) > 0 and plan.piece < vocab and hidden.dtype != torch.float32
    sums = hidden.new_empty(plan.tokens if in_parts else 0, hidden.shape[1], dtype=torch.float32)
    reached = of_tokens.reached()
    with guard(hidden):
        for rows in plan.chunks(num_tokens):
            chunk = _Chunk(hidden[rows], head, of_tokens, rows, reached[rows], dz, tile)
            add = onto_weight or rows.start > 0
            for columns in plan.pieces(vocab):
                chunk.write_dz(columns, bias_sums, add=rows.start > 0)
                if len(grad_weight):
                    chunk.write_weight_gradient(columns, grad_weight[columns], add=add)
                if len(grad_hidden):
                    out = sums[: len(chunk.hidden)] if in_parts and columns.stop < vocab else grad_hidden[rows]
                    before = sums if in_parts else out
                    chunk.write_hidden_gradient(columns, before if columns.start else None, out)
    grad_bias.copy_(bias_sums)


def _padded(columns: int) -> int:
    """Distance of the rows of so many columns, in elements: they then begin at multiples of 16 bytes."""
    return ceil_div(columns, 16) * 16


class _Chunk:
    """Rows whose gradient is made together, a piece of the vocabulary at a time."""

    def __init__(self, hidden: Tensor, head: Head, of_tokens: Scored, rows: slice, reached: Tensor, dz: Tensor, tile: Tile) -> None:
        self.hidden, self.head, self.reached, self.dz = hidden, head, reached, dz
        self.scored = of_tokens.at(rows)
        self.temperatures = None if head.temperatures is None else head.temperatures[rows]
        self.tile, self.options = tile, _product_options(tile, hidden.device)

    def write_dz(self, columns: slice, bias_sums: Tensor, *, add: bool) -> None:
        """The gradient of the logits of these columns, and its sums to those of the bias unless they are empty."""
        head, hidden, scored = self.head, self.hidden, self.scored
        (num_tokens, width), num_columns = hidden.shape, columns.stop - columns.start
        blocks = ceil_div(num_tokens, self.tile.rows)
        sums = hidden.new_empty((blocks, num_columns), dtype=torch.float32) if len(bias_sums) else None
        tile = _tile_of_gradient(self.tile, head)
        _kernels().logits_gradient[(blocks * ceil_div(num_columns, tile.columns),)](
            *(hidden, head.weight, head.bias, scored.ids, self.temperatures, self.reached, scored.row_max, scored.log2_sum),
            *(scored.entropy, scored.grad_logprobs, scored.grad_entropy, self.dz, sums, num_tokens, len(head.weight), width),
            *(hidden.stride(0), head.weight.stride(0), _padded(num_columns), head.temperature, head.logit_scale, head.soft_cap),
            *(columns.start, num_columns),
            HAS_CAP=head.soft_cap != 0,
            **_product_options(tile, hidden.device),
        )
        if sums is not None:
            _kernels().bias_gradient[(ceil_div(num_columns, SUMMED_COLUMNS),)](
                *(sums, bias_sums[columns], blocks, num_columns),
                ADD=add,
                BLOCK=SUMMED_COLUMNS,
                **_options(hidden.device, _THREADS),
            )

    def write_weight_gradient(self, columns: slice, grad: Tensor, *, add: bool) -> None:
        """That of these rows of the weight, onto what is there where `add`."""
        (num_tokens, width), num_columns = self.hidden.shape, columns.stop - columns.start
        _kernels().weight_gradient[(ceil_div(num_columns, self.tile.rows) * ceil_div(width, self.tile.columns),)](
            *(self.dz, self.hidden, self.reached, grad if add else None, grad, num_tokens, num_columns, width),
            *(_padded(num_columns), self.hidden.stride(0)),
            **self.options,
        )

    def write_hidden_gradient(self, columns: slice, before: Tensor | None, grad: Tensor) -> None:
        """What these columns add to `before`."""
        (num_tokens, width), num_columns = self.hidden.shape, columns.stop - columns.start
        weight = self.head.weight[columns]
        _kernels().hidden_gradient[(ceil_div(num_tokens, self.tile.rows) * ceil_div(width, self.tile.columns),)](
            *(self.dz, weight, self.reached, before, grad, num_tokens, num_columns, width, _padded(num_columns), weight.stride(0)),
            **self.options,
        )


_gradient_op = NativeOp(
    "linear_token_logprobs_gradient_triton",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, Tensor row_max, Tensor log2_sum, "
    "Tensor entropy, float temperature, float logit_scale, float soft_cap, Tensor? grad_logprobs, Tensor? grad_entropy, "
    "bool of_hidden, bool of_weight, bool of_bias, int extra_bytes) -> (Tensor, Tensor, Tensor)",
    _gradient,
    lambda hidden, weight, *rest: empty_gradients(hidden, weight, *rest[-4:-1]),
    device_type=None,
)

scored = NativeOp(
    "linear_token_logprobs_triton",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, "
    "float soft_cap, bool entropy, bool sum_p2, int extra_bytes) "
    "-> (Tensor logprobs, Tensor row_max, Tensor log2_sum, Tensor entropy, Tensor sum_p2)",
    score_inputs,
    lambda hidden, *rest: empty_results(hidden, *rest[-3:-1]),
    setup_context=setup_context,
    backward=_backward,
    device_type=None,
)
