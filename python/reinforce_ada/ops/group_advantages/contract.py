"""Inputs and outputs of a native form of group_advantages, and its registration with torch. Device-independent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from reinforce_ada.ops._torch import NativeOp, constant, dense, is_eager, parameters
from reinforce_ada.ops.group_advantages.checks import BASELINES, SCALES, WHERE
from reinforce_ada.types import PoolStats

_VALUES = len(BASELINES)  # Baseline::values in csrc/ops/group_advantages/group_advantages.h
_Pool: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_DOUBLE = np.dtype(np.float64)
_NO_POOL: _Pool = (None, None, None, None, None)


class Inputs(NamedTuple):
    """The arguments of a native form: contiguous, on the device of the rewards; pool statistics are None unless they are read."""

    rewards: Tensor  # [N] float32, bfloat16 or float16
    group_of: Tensor | None  # [N] int64
    cu_seqlens: Tensor | None  # [G + 1] int64
    num_groups: int | None
    pool_count: Tensor | None  # [G] float64, as the next ones
    pool_mean: Tensor | None
    pool_m2: Tensor | None
    pool_min: Tensor | None
    pool_max: Tensor | None
    baseline_values: Tensor | None
    class_weights: Tensor | None  # [G, 2] float64
    baseline: int  # an index into BASELINES; one past its end for baseline_values
    scale: int  # an index into SCALES
    ddof: int
    eps: float
    keep_single: bool

    @property
    def statistics(self) -> tuple[Tensor | None, ...]:
        """Return the values per group: pool_count to class_weights."""
        return self[4:11]

    @property
    def choices(self) -> tuple[int, int, int, float, bool]:
        """Return the settings: baseline to keep_single."""
        return self[11:]


def arguments(
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
) -> Inputs:
    """Return the inputs of a native form for the checked arguments of the public function."""
    device = rewards.device
    return Inputs(
        constant(rewards),
        None if group_of is None else dense(group_of),
        None if cu_seqlens is None else dense(cu_seqlens, torch.int64),
        num_groups,
        *(_NO_POOL if pool is None else _pool(pool, baseline, scale, singleton, device)),
        _float64(baseline, device) if isinstance(baseline, Tensor) else None,
        None if class_weights is None else _float64(class_weights, device),
        BASELINES.index(baseline) if isinstance(baseline, str) else _VALUES,
        SCALES.index(scale),
        ddof,
        eps,
        singleton == "reward",
    )


def _pool(pool: PoolStats, baseline: str | Tensor, scale: str, singleton: str, device: torch.device) -> _Pool:
    """Return the statistics that are read, in the order of PoolStats, and None for the others, since converting an array takes 1 us."""
    by_baseline = isinstance(baseline, str) and baseline != "group"
    by_scale = scale == "pool"
    if not (by_baseline or by_scale):
        return _NO_POOL
    by_count = by_scale or singleton == "reward" or (isinstance(baseline, str) and baseline == "leave-one-out")
    return (
        _float64(pool.count, device) if by_count else None,
        _float64(pool.mean, device) if by_baseline else None,
        _float64(pool.m2, device) if by_scale else None,
        _float64(pool.min, device),
        _float64(pool.max, device),
    )


def _float64(x: Any, device: torch.device) -> Tensor:
    """Return a contiguous float64 tensor on the device, without gradient."""
    if type(x) is np.ndarray and x.dtype is _DOUBLE:
        tensor = torch.from_numpy(x)  # 0.4 us; as_tensor takes 1.3
    else:
        tensor = x if isinstance(x, Tensor) and x.dtype is torch.float64 else torch.as_tensor(x, dtype=torch.float64, device=device)
    return constant(tensor if tensor.device == device else tensor.to(device))


def torch_operator(backend: str, kernels: Any) -> Callable[[Inputs], Tensor]:
    """Return a function that runs `kernels.advantages`, which returns [N] in the rewards' dtype; a traced call is a torch operator."""
    forward = lambda *given: kernels.advantages(Inputs(*given))  # noqa: E731
    op = NativeOp(WHERE, backend, f"({parameters(Inputs)}) -> Tensor", forward, lambda rewards, *_: torch.empty_like(rewards))

    def run(x: Inputs) -> Tensor:
        result: Tensor = kernels.advantages(x) if is_eager(x) else op(*x)  # there is no gradient to arrange
        return result

    return run
