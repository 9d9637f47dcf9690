"""The three matrix products behind an output head, for a chunk of hidden states and a piece of the vocabulary.

    logits = hidden weight^T        grad_hidden += dz weight        grad_weight += dz^T hidden

bfloat16 goes through torch (oneDNN: 200 GFLOP/s a core with avx512_bf16, more with AMX). float32 and float16 logits come from
csrc/ops/linear_token_logprobs in float32: torch transposes the weight for every chunk (46 to 88 GFLOP/s against 90 to 110), and its
float16 products run at 1 to 20. The gradients of float16 are products of float32 copies of a piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._torch import DTYPE_CODES, address

LANES = 16  # packed hidden states are padded to a multiple of the widest vector


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the logits of a head of `dtype` are computed in: bfloat16 as it is, as a model does; everything else in float32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


class Hidden:
    """Hidden states [T, D] as the products take them; holds `bytes_per_token` for each beside them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._packed = None if rows.dtype == torch.bfloat16 else _pack(rows)

    @staticmethod
    def bytes_per_token(dtype: torch.dtype, width: int) -> int:
        return 0 if dtype == torch.bfloat16 else 4 * width

    def logits(self, weight: Tensor, buffer: Tensor) -> Tensor:
        """[T, V'] of `logits_dtype` for V' rows of the weight, at the start of the flat `buffer`."""
        num_tokens, vocab = self.rows.shape[0], weight.shape[0]
        out = buffer[: num_tokens * vocab].view(num_tokens, vocab)
        if self._packed is None:
            return torch.mm(self.rows, weight.T, out=out)
        cpu.linear_logits(
            address(self._packed),
            address(weight),
            DTYPE_CODES[weight.dtype],
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
        """into [V', D] += dz^T hidden, or = where it is the `first`; rounded to the dtype of `into` once a call."""
        if dz.dtype == self.rows.dtype == into.dtype:
            if first:
                torch.mm(dz.T, self.rows, out=into)
            else:
                into.addmm_(dz.T, self.rows)
            return
        product = dz.T @ self.rows.to(dz.dtype)
        if first:
            into.copy_(product)
        else:
            into.add_(product)


def add_hidden_gradient(dz: Tensor, weight: Tensor, into: Tensor) -> None:
    """into [T, D] float32 += dz weight."""
    if dz.dtype == into.dtype:
        into.addmm_(dz, weight.to(dz.dtype))
    else:
        into.add_(dz @ weight)


def _pack(rows: Tensor) -> Tensor:
    num_tokens, width = rows.shape
    packed = torch.empty(-(-num_tokens // LANES) * LANES * width, dtype=torch.float32)
    cpu.pack_hidden(
        address(rows), DTYPE_CODES[rows.dtype], num_tokens, width, rows.stride(0), address(packed), torch.get_num_threads()
    )
    return packed
