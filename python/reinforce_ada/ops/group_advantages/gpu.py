"""The part that the CUDA and Triton kernels of group_advantages share: rows in segments."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from reinforce_ada.ops.group_advantages.contract import Inputs


class Launch(Protocol):
    """The function that launches the kernels of a backend. It writes into its tensors, allocates nothing and never waits for the device."""

    def __call__(self, x: Inputs, order: Tensor | None, offsets: Tensor, workspace: Tensor, out: Tensor, /) -> None:
        """Write the advantages of the rows in segments to `out` [N], which is full of NaN.

        Segment s has the rows order[offsets[s]] up to order[offsets[s + 1]], or without `order` the rows from offsets[s] on. Its number is
        that of its group in the statistics of x. order is int64 [N], offsets int64 [S + 1]. Rows of no segment stay NaN. Without `order`
        the offsets are the caller's: wherever they do not go from 0 to N without decreasing, all rows stay NaN, and nothing outside of
        the tensors is read.
        """


def in_segments(x: Inputs, launch: Launch, workspace_size: int) -> Tensor:
    """Return the advantages [N] of a launch whose workspace has this many float64 numbers."""
    if x.cu_seqlens is not None:
        order, offsets = None, x.cu_seqlens
    else:
        assert x.group_of is not None
        order, offsets = segments(x.group_of, x.num_groups)
    out = torch.full_like(x.rewards, math.nan)
    launch(x, order, offsets, x.rewards.new_empty(workspace_size, dtype=torch.float64), out)
    return out


def segments(group_of: Tensor, num_groups: int | None) -> tuple[Tensor, Tensor]:
    """Return (order, offsets): rows sorted by group, and where each segment of them begins. The call does not wait for the device.

    If G is known, segment g is group g and offsets is [G + 1]. Otherwise the s-th segment is that of the s-th group number that occurs, and
    the rest of offsets [N + 1] are empty segments. Rows whose number is out of range lie in no segment.
    """
    numbers, order = group_of.sort(stable=True)
    if num_groups is None:
        first = torch.ones_like(numbers, dtype=torch.bool)
        first[1:] = numbers[1:] != numbers[:-1]
        numbers, num_groups = (first & (numbers >= 0)).cumsum(0) - 1, numbers.shape[0]
    return order, torch.searchsorted(numbers, torch.arange(num_groups + 1, dtype=torch.int64, device=numbers.device))
