"""group_advantages on a GPU: what its CUDA and its Triton form share, behind torch's registration."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from reinforce_ada.ops._torch import NativeOp, is_eager, run_when_traced
from reinforce_ada.ops.group_advantages.cpu import SCHEMA, arguments
from reinforce_ada.types import PoolStats


class Kernels(Protocol):
    """What the module of a form provides. It writes into the tensors it is given, allocates nothing and never waits for the device."""

    workspace_size: int  # how many float64 numbers `advantages` works in

    def advantages(
        self,
        rewards: Tensor,
        order: Tensor | None,
        offsets: Tensor,
        pool_count: Tensor | None,
        pool_mean: Tensor | None,
        pool_m2: Tensor | None,
        pool_min: Tensor | None,
        pool_max: Tensor | None,
        baseline_values: Tensor | None,
        class_weights: Tensor | None,
        baseline: int,
        scale: int,
        ddof: int,
        eps: float,
        keep_single: bool,
        workspace: Tensor,
        out: Tensor,
        /,
    ) -> None:
        """Writes the advantages of the rows in segments to `out` [N], which is full of NaN.

        Segment s has the rows order[offsets[s]] up to order[offsets[s + 1]], without `order` those from offsets[s] on; its number is
        that of its group in pool_*, baseline_values [G] and class_weights [G, 2], all float64. rewards float32, bfloat16 or float16,
        order int64 [N], offsets int64 [S + 1]. Rows of no segment stay NaN. Without `order` the offsets are the caller's: wherever
        they do not go from 0 to N without decreasing, all rows stay NaN, and nothing outside of the tensors is read.
        """


def group_advantages(
    backend: str,
    rewards: Tensor,
    group_of: Tensor | None,
    cu_seqlens: Tensor | None,
    num_groups: int | None,
    pool: PoolStats | None,
    baseline: str | Tensor,
    scale: str,
    class_weights: Tensor | None,
    ddof: int,
    eps: float,
    singleton: str,
) -> Tensor:
    """[N] of the dtype of the rewards, by the form `backend`; see the public function."""
    args = arguments(rewards, group_of, cu_seqlens, num_groups, pool, baseline, scale, class_weights, ddof, eps, singleton)
    operator = form(backend)
    run: Any = operator.forward if is_eager(args) else operator.op  # there is no gradient to arrange
    result: Tensor = run(*args)
    return result


class Form:
    """The kernels of one backend as a torch operator, reinforce_ada::group_advantages_<backend>."""

    def __init__(self, backend: str) -> None:
        self._kernels = cast("Kernels", import_module(f"reinforce_ada.ops.group_advantages.{backend}"))
        self.op = NativeOp(
            f"group_advantages_{backend}", SCHEMA, self.forward, lambda rewards, *_: torch.empty_like(rewards), device_type=None
        )

    def forward(self, rewards: Tensor, group_of: Tensor | None, cu_seqlens: Tensor | None, num_groups: int | None, *rest: Any) -> Tensor:
        """The operator on tensors that nothing traces."""
        if cu_seqlens is not None:
            order, offsets = None, cu_seqlens
        else:
            assert group_of is not None
            order, offsets = segments(group_of, num_groups)
        out = torch.full_like(rewards, math.nan)
        workspace = rewards.new_empty(self._kernels.workspace_size, dtype=torch.float64)
        self._kernels.advantages(*(rewards, order, offsets, *rest, workspace, out))
        return out


def segments(group_of: Tensor, num_groups: int | None) -> tuple[Tensor, Tensor]:
    """(order, offsets): rows sorted by group, and where each segment of them begins. The device is not waited for.

    With G known, segment g is group g and offsets is [G + 1]; else the s-th segment is the s-th of the group numbers there are, and the
    rest of offsets [N + 1] are empty segments. Rows whose number is out of range lie in no segment.
    """
    numbers, order = group_of.sort(stable=True)
    if num_groups is None:
        first = torch.ones_like(numbers, dtype=torch.bool)
        first[1:] = numbers[1:] != numbers[:-1]
        numbers, num_groups = (first & (numbers >= 0)).cumsum(0) - 1, numbers.shape[0]
    return order, torch.searchsorted(numbers, torch.arange(num_groups + 1, dtype=torch.int64, device=numbers.device))


_forms: dict[str, Form] = {}


def form(backend: str) -> Form:
    """The operator of "cuda" or "triton", made when it is first asked for."""
    _make(backend)
    return _forms[backend]


@run_when_traced  # it could not trace the making of an operator
def _make(backend: str) -> None:
    if backend not in _forms:
        _forms[backend] = Form(backend)
