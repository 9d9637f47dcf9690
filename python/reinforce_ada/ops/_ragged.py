"""Packed rows: `cu_seqlens` [N + 1] says that sequence i has rows cu_seqlens[i] up to cu_seqlens[i + 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import describe


def first_wrong_offset(cu_seqlens: Tensor, rows: int) -> int | None:
    """Return the first index at which `cu_seqlens` does not start at 0, decreases, passes `rows` or fails to end there; None if right."""
    wrong = (cu_seqlens < 0) | (cu_seqlens > rows)
    wrong[0] |= cu_seqlens[0] != 0
    wrong[1:] |= cu_seqlens.diff() < 0
    wrong[-1] |= cu_seqlens[-1] != rows
    return int(wrong.nonzero()[0]) if wrong.any() else None


def sequence_of(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Return the sequence of each row, [rows] int64: torch 2.6 takes no other integers as an index in `scatter_reduce`."""
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=rows)


def wrong_offset(where: str, cu_seqlens: Tensor, at: int, rows: int) -> InputError:
    """Return the error for what `first_wrong_offset` found."""
    return InputError(where, f"cu_seqlens[{at}] = {int(cu_seqlens[at])}", f"offsets from 0 that never decrease and end at {rows}")


def check_cu_seqlens(where: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Check shape, dtype and device; the values are checked where they are read."""
    shaped = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] > 0 and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not shaped or cu_seqlens.device != device:
        raise InputError(where, f"cu_seqlens is {describe(cu_seqlens)}", f"[N + 1] int32 or int64 on {device}")
