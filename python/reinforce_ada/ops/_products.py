"""The three matrix products of an output head, for a chunk of hidden states and some rows of the weight.

    logits = hidden weight^T + bias        grad_hidden += dz weight        grad_weight += dz^T hidden

bfloat16 goes through torch (oneDNN: 200 GFLOP/s a core with avx512_bf16, more with AMX). float32 and float16 go through
csrc/ops/linear_token_logprobs, with logits and dz in float32: with 96 to 1024 tokens torch's float32 products run at 46 to 99
GFLOP/s and its float16 products at 1 to 20, whereas these run at 85 to 110.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._torch import DTYPE_CODES, address, row_address

LANES = 16  # packed hidden states are padded to a multiple of the widest vector
TILE = 32  # bfloat16 values in a row of an AMX tile


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits of a head of `dtype`: bfloat16 for bfloat16, as in a model, and float32 for everything else."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def gradient_bytes(dtype: torch.dtype, vocab: int) -> int:
    """Return the bytes of one logit's gradient while that of hidden is computed, with a copy if rows are not whole tiles (see `_apart`)."""
    copied = dtype == torch.bfloat16 and vocab % TILE != 0
    return logits_dtype(dtype).itemsize * (2 if copied else 1)


def scratch_bytes(dtype: torch.dtype) -> int:
    """Return the memory that the products take for themselves on one thread; oneDNN packs both factors."""
    return 5_000_000 if dtype == torch.bfloat16 else 1_000_000


class Hidden:
    """Hidden states [T, D] as the products take them, with a copy of `bytes_per_token` for each."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = _apart(rows) if rows.dtype == torch.bfloat16 else rows
        self._packed = None if rows.dtype == torch.bfloat16 else _pack(rows)

    @staticmethod
    def bytes_per_token(dtype: torch.dtype, width: int) -> int:
        if dtype != torch.bfloat16:
            return 4 * width
        return 0 if width % TILE == 0 else 2 * _whole_tiles(width)

    def logits(self, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
        """Return logits [T, V'] for V' rows of the weight, at the start of the flat `buffer`; bias and buffer are of `logits_dtype`."""
        num_tokens, vocab = self.rows.shape[0], weight.shape[0]
        out = buffer[: num_tokens * vocab].view(num_tokens, vocab)
        if self._packed is None:
            if bias is None:
                return torch.mm(self.rows, weight.T, out=out)
            return torch.addmm(bias, self.rows, weight.T, out=out)
        cpu.linear_logits(
            address(self._packed),
            *_matrix(weight),
            address(bias),
            num_tokens,
            vocab,
            weight.shape[1],
            weight.stride(0),
            address(out),
            vocab,
            torch.get_num_threads(),
        )
        return out

    def add_weight_gradient(self, dz: Tensor, into: Tensor, *, first: bool) -> None:
        """Add dz^T hidden to `into` [V', D], or write it if it is the `first`; each call rounds once, to the dtype of hidden."""
        if self._packed is not None:
            cpu.linear_grad_weight(
                row_address(dz),
                dz.stride(0),
                *_matrix(self.rows),
                dz.shape[0],
                dz.shape[1],
                self.rows.shape[1],
                self.rows.stride(0),
                address(into),
                first,
                torch.get_num_threads(),
            )
        elif first:
            torch.mm(dz.T, self.rows, out=into)
        else:
            into.addmm_(dz.T, self.rows)


def add_hidden_gradient(dz: Tensor, weight: Tensor, into: Tensor) -> None:
    """Add dz weight to `into` [T, D] float32."""
    if dz.dtype == torch.float32:
        cpu.linear_grad_hidden(
            row_address(dz),
            dz.stride(0),
            *_matrix(weight),
            dz.shape[0],
            dz.shape[1],
            weight.shape[1],
            weight.stride(0),
            address(into),
            torch.get_num_threads(),
        )
    else:
        into.add_(_apart(dz) @ weight)


def _apart(left: Tensor) -> Tensor:
    """Return the left factor of a product with its rows followed by zeros up to whole tiles; `left` itself if they are whole.

    With AMX, oneDNN reads a row that ends inside a tile to the end of that tile and multiplies what follows it by zero, so a NaN or an
    infinity in the next row, or in memory that is not ours, becomes NaN in this one (torch 2.13, K = 97 or 100; not K = 96).
    """
    num_rows, width = left.shape
    if width % TILE == 0:
        return left
    return left.new_zeros(num_rows, _whole_tiles(width))[:, :width].copy_(left)


def _whole_tiles(width: int) -> int:
    return -(-width // TILE) * TILE


def _matrix(x: Tensor) -> tuple[int, int]:
    return row_address(x), DTYPE_CODES[x.dtype]


def _pack(rows: Tensor) -> Tensor:
    num_tokens, width = rows.shape
    packed = rows.new_empty(-(-num_tokens // LANES) * LANES * width, dtype=torch.float32)
    cpu.pack_hidden(*_matrix(rows), num_tokens, width, rows.stride(0), address(packed), torch.get_num_threads())
    return packed
