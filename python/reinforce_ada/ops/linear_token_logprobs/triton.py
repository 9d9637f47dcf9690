"""The Triton form of linear_token_logprobs: tiles, splits, pieces of the vocabulary, and the launches of `triton_kernels`.

The logits are never in memory: a tile of them is a product in registers, which is scored at once. The backward computes them again, a
piece of the vocabulary at a time, and keeps that piece of their gradient for the two products with it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reinforce_ada.ops._gpu import guard, triton_devices
from reinforce_ada.ops._torch import dense
from reinforce_ada.ops.linear_token_logprobs import triton_kernels
from reinforce_ada.ops.linear_token_logprobs.contract import GradientInputs, Gradients, Head, Inputs, Plan, ScoredTokens, empty_gradients
from reinforce_ada.ops.token_logprobs.contract import empty_scores
from reinforce_ada.ops.token_logprobs.gpu import NORMALIZERS, empty_normalizers

__all__ = ["NORMALIZERS", "empty_normalizers", "gradients", "scores"]

_EXTRA_BYTES = 256_000_000  # at 8192 tokens 15,000 entries of the vocabulary at a time: long products, and 1/10 of the logits
JOINED_ROWS = 128  # of a program of `combined_scores`, of 128 threads
SUMMED_COLUMNS = 128  # of a program of `bias_gradient`, of 128 threads
_THREADS = 128
_GROUP = 16  # blocks of rows that run together: 2048 hidden states of 4096 in half precision are 17 MB, which the L2 cache keeps
_STATES = 5  # float32 of a row and split between the two kernels of the forward
_WAVES = 4  # programs for each multiprocessor that the forward cuts its work into, so that the last ones leave few idle
_SPLITS = 16  # of the vocabulary at least, where it is as large: short float32 sums


class Tile(NamedTuple):
    """The tile of a product: `rows` by `columns` in the registers of `threads` threads, `depth` at a time through `stages` buffers."""

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


# The device


@cache
def _backend(device: torch.device) -> str:
    """Return the part of `TILES` for a device."""
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
    """Return how many blocks of a size hold n."""
    return -(-n // size)


def tile_of(hidden: Tensor, weight: Tensor) -> Tile:
    """Return the tile of the products of these matrices."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 for x in (hidden, weight)) and weight.shape[1] % 16 == 0
    return (TILES if aligned else UNALIGNED_TILES)[_backend(hidden.device)][weight.dtype.itemsize]


def _options(device: torch.device, threads: int) -> dict[str, Any]:
    # fp_fusion said in so many words: Triton warns where it is left to a default that will change.
    return {"num_warps": threads // _warp_size(device), "enable_fp_fusion": True}


def _tile_of_gradient(tile: Tile, head: Head) -> Tile:
    """Return the tile of the logits' gradient. The slope of a soft cap and 64 sums exceed the 255 registers of a thread on sm_90."""
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


def scores(x: Inputs) -> tuple[Tensor, ...]:
    """See contract.Kernels."""
    hidden, weight = x.hidden, x.weight
    out, (row_max, log2_sum) = empty_scores(hidden, x.entropy, x.sum_p2), empty_normalizers(hidden)
    num_tokens = len(x.token_ids)
    if num_tokens == 0:
        return *out, row_max, log2_sum
    vocab, width = weight.shape
    tile = tile_of(hidden, weight)
    blocks, tiles = ceil_div(num_tokens, tile.rows), ceil_div(vocab, tile.columns)
    splits = _splits(blocks, tiles, num_tokens, _multiprocessors(hidden.device), _room(x))
    states = hidden.new_empty((_STATES if x.entropy or x.sum_p2 else 3, splits, num_tokens), dtype=torch.float32)
    with guard(hidden):
        triton_kernels.partial_scores[(blocks * splits,)](
            *(hidden, weight, _bias(x), x.token_ids, x.temperatures, states, num_tokens, vocab, width),
            *(hidden.stride(0), weight.stride(0), x.temperature, x.logit_scale, x.soft_cap),
            *(splits, ceil_div(tiles, splits)),
            HAS_CAP=x.soft_cap != 0,
            MOMENTS=x.entropy or x.sum_p2,
            **_product_options(tile, hidden.device),
        )
        triton_kernels.combined_scores[(ceil_div(num_tokens, JOINED_ROWS),)](
            *(states, x.token_ids, x.temperatures, out.logprobs, row_max, log2_sum),
            *(out.entropy if x.entropy else None, out.sum_p2 if x.sum_p2 else None, num_tokens, vocab, splits, x.temperature),
            BLOCK=JOINED_ROWS,
            **_options(hidden.device, _THREADS),
        )
    return *out, row_max, log2_sum


def _room(x: Inputs | GradientInputs) -> int:
    return _EXTRA_BYTES if x.extra_bytes is None else x.extra_bytes


def _bias(x: Inputs | GradientInputs) -> Tensor | None:
    return None if x.bias is None else dense(x.bias)


def _splits(blocks: int, tiles: int, num_tokens: int, multiprocessors: int, extra_bytes: int) -> int:
    """Return into how many parts the vocabulary is cut, so that even few rows fill the device."""
    wanted = max(_SPLITS, ceil_div(_WAVES * multiprocessors, blocks))
    return int(max(1, min(wanted, tiles, extra_bytes // (4 * _STATES * num_tokens))))


# Backward


def gradients(x: GradientInputs, *normalizers: Tensor, onto: Tensor | None = None) -> Gradients:
    """See contract.Kernels."""
    grads = empty_gradients(x.hidden, x.weight, x.of_hidden, x.of_weight and onto is None, x.of_bias)
    g = torch.zeros_like(normalizers[0]) if x.grad_logprobs is None else x.grad_logprobs
    scored = ScoredTokens(x.token_ids, normalizers, x.entropy, g, x.grad_entropy)
    add_gradients(x.hidden, replace(x.head, bias=_bias(x)), scored, grads, _room(x), onto)
    return grads


def plan_of(num_tokens: int, weight: Tensor, tile: Tile, room: int) -> Plan:
    """Return the plan in `room` bytes: all tokens at once if that leaves room for a tile of columns, then as many columns as fit."""
    vocab, width = weight.shape
    size = weight.dtype.itemsize
    sums = 0 if size == 4 else 4 * width  # of the gradient of hidden, float32 between pieces
    least = min(vocab, tile.columns)
    tokens = max(1, min(num_tokens, room // (sums + least * (size + 4))))
    tokens = tokens if tokens == num_tokens or tokens < tile.rows else tokens // tile.rows * tile.rows
    # A column is its gradient, and for the bias its sum over each block of rows.
    piece = max(least, (room - tokens * sums) // (tokens * size + 4 * ceil_div(tokens, tile.rows)))
    return Plan(tokens, vocab if piece >= vocab else piece // tile.columns * tile.columns)


def add_gradients(hidden: Tensor, head: Head, scored: ScoredTokens, grads: Gradients, extra_bytes: int, onto: Tensor | None) -> None:
    """Write the gradients of hidden, weight and bias; an empty tensor means that its gradient is not wanted.

    With `onto`, the weight's gradient is added to `onto` instead.
    """
    grad_hidden, grad_weight, grad_bias = grads if onto is None else (grads[0], onto, grads[2])
    num_tokens, vocab = len(hidden), len(head.weight)
    if num_tokens == 0:
        grad_bias.zero_()
        if onto is None:
            grad_weight.zero_()
        return
    bias_sums = grad_bias.new_empty(len(grad_bias), dtype=torch.float64)
    tile = tile_of(hidden, head.weight)
    plan = plan_of(num_tokens, head.weight, tile, extra_bytes - bias_sums.nbytes)
    dz = hidden.new_empty(plan.tokens * _padded(plan.piece))
    in_parts = len(grad_hidden) > 0 and plan.piece < vocab and hidden.dtype != torch.float32
    sums = hidden.new_empty(plan.tokens if in_parts else 0, hidden.shape[1], dtype=torch.float32)
    reached = scored.reached()
    with guard(hidden):
        for start in range(0, num_tokens, plan.tokens):
            rows = slice(start, min(start + plan.tokens, num_tokens))
            chunk = _Chunk(hidden[rows], head.at(rows), scored.at(rows), reached[rows], dz, tile)
            add = onto is not None or start > 0
            for columns in plan.pieces(vocab):
                chunk.write_dz(columns, bias_sums, add=start > 0)
                if len(grad_weight):
                    chunk.write_weight_gradient(columns, grad_weight[columns], add=add)
                if len(grad_hidden):
                    out = sums[: len(chunk.hidden)] if in_parts and columns.stop < vocab else grad_hidden[rows]
                    before = sums if in_parts else out
                    chunk.write_hidden_gradient(columns, before if columns.start else None, out)
    grad_bias.copy_(bias_sums)


def _padded(columns: int) -> int:
    """Return the distance, in elements, of rows of this many columns at which they begin at multiples of 16 bytes."""
    return ceil_div(columns, 16) * 16


class _Chunk:
    """Rows whose gradient is computed together, a piece of the vocabulary at a time."""

    def __init__(self, hidden: Tensor, head: Head, scored: ScoredTokens, reached: Tensor, dz: Tensor, tile: Tile) -> None:
        self.hidden, self.head, self.scored, self.reached, self.dz = hidden, head, scored, reached, dz
        self.tile, self.options = tile, _product_options(tile, hidden.device)

    def write_dz(self, columns: slice, bias_sums: Tensor, *, add: bool) -> None:
        """Write the gradient of the logits of these columns, and add its sums to those of the bias unless they are empty."""
        head, hidden, scored = self.head, self.hidden, self.scored
        (num_tokens, width), num_columns = hidden.shape, columns.stop - columns.start
        blocks = ceil_div(num_tokens, self.tile.rows)
        sums = hidden.new_empty((blocks, num_columns), dtype=torch.float32) if len(bias_sums) else None
        tile = _tile_of_gradient(self.tile, head)
        triton_kernels.logits_gradient[(blocks * ceil_div(num_columns, tile.columns),)](
            *(hidden, head.weight, head.bias, scored.ids, head.temperatures, self.reached, *scored.normalizers),
            *(scored.entropy, scored.grad_logprobs, scored.grad_entropy, self.dz, sums, num_tokens, len(head.weight), width),
            *(hidden.stride(0), head.weight.stride(0), _padded(num_columns), head.temperature, head.logit_scale, head.soft_cap),
            *(columns.start, num_columns),
            HAS_CAP=head.soft_cap != 0,
            **_product_options(tile, hidden.device),
        )
        if sums is not None:
            triton_kernels.bias_gradient[(ceil_div(num_columns, SUMMED_COLUMNS),)](
                *(sums, bias_sums[columns], blocks, num_columns),
                ADD=add,
                BLOCK=SUMMED_COLUMNS,
                **_options(hidden.device, _THREADS),
            )

    def write_weight_gradient(self, columns: slice, grad: Tensor, *, add: bool) -> None:
        """Write the gradient of these rows of the weight; with `add`, add it to what is there."""
        (num_tokens, width), num_columns = self.hidden.shape, columns.stop - columns.start
        triton_kernels.weight_gradient[(ceil_div(num_columns, self.tile.rows) * ceil_div(width, self.tile.columns),)](
            *(self.dz, self.hidden, self.reached, grad if add else None, grad, num_tokens, num_columns, width),
            *(_padded(num_columns), self.hidden.stride(0)),
            **self.options,
        )

    def write_hidden_gradient(self, columns: slice, before: Tensor | None, grad: Tensor) -> None:
        """Write the sum of `before` and what these columns add to the gradient of hidden."""
        (num_tokens, width), num_columns = self.hidden.shape, columns.stop - columns.start
        weight = self.head.weight[columns]
        triton_kernels.hidden_gradient[(ceil_div(num_tokens, self.tile.rows) * ceil_div(width, self.tile.columns),)](
            *(self.dz, weight, self.reached, before, grad, num_tokens, num_columns, width, _padded(num_columns), weight.stride(0)),
            **self.options,
        )
