"""group_advantages on the CPU: csrc/ops/group_advantages behind torch's registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu, missing
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, address, constant, dense, is_eager, is_watched
from reinforce_ada.ops.group_advantages.checks import BASELINES, MOST, SCALES, SINGLETONS, WHERE, wrong_group
from reinforce_ada.types import PoolStats

_VALUES = len(BASELINES)  # Baseline::values in csrc/ops/group_advantages/group_advantages.h
_NO_POOL = (None, None, None, None, None)
_CODES = {  # (baseline, scale, singleton) as the kernel takes them
    (baseline, scale, singleton): (b, s, singleton == "reward")
    for b, baseline in enumerate(BASELINES)
    for s, scale in enumerate(SCALES)
    for singleton in SINGLETONS
}
_num_threads, _int64 = torch.get_num_threads, torch.int64


def common_case(
    rewards: Tensor, group_of: Tensor | None, baseline: str | Tensor, scale: str, ddof: int, eps: float, singleton: str
) -> Tensor | None:
    """The result of an eager call without a pool on plain contiguous tensors; None for any other, which the long way looks at.

    One look at each thing that the checks and conversions of the long way look at several times: 4 us instead of 7 at N = 512.
    """
    if type(rewards) is not Tensor or type(group_of) is not Tensor or type(baseline) is not str or is_watched() or missing() is not None:
        return None
    codes, dtype = _CODES.get((baseline, scale, singleton)), DTYPE_CODES.get(rewards.dtype)
    if codes is None or dtype is None or group_of.dtype is not _int64:
        return None
    rows = rewards.numel()  # and not .shape, which makes an object: 0.2 us for the two
    if rewards.dim() != 1 or group_of.dim() != 1 or group_of.numel() != rows or not (rewards.is_cpu and group_of.is_cpu):
        return None
    if not (type(ddof) is int and 0 <= ddof < MOST and 0 <= eps < MOST):
        return None
    if not (rewards.is_contiguous() and group_of.is_contiguous()) or rewards.is_neg():
        return None
    out = torch.empty_like(rewards)
    wrong = cpu.group_advantages(
        rewards.data_ptr(), dtype, group_of.data_ptr(), 0, rows, -1, 0, 0, 0, 0, 0, 0, 0, codes[0], codes[1], ddof, eps, codes[2],
        out.data_ptr(), _num_threads(),
    )  # fmt: skip
    return out if wrong < 0 else None


def group_advantages(
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
    """[N] of the dtype of the rewards; see the public function."""
    args = arguments(rewards, group_of, cu_seqlens, num_groups, pool, baseline, scale, class_weights, ddof, eps, singleton)
    # There is no gradient to arrange, so an eager call needs no autograd.Function either.
    run: Any = _forward if is_eager(args) else _op
    result: Tensor = run(*args)
    return result


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
) -> tuple[Any, ...]:
    """What an operator of `SCHEMA` takes for those of the public function, on the device of the rewards."""
    device = rewards.device
    return (
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


def _pool(pool: PoolStats, baseline: str | Tensor, scale: str, singleton: str, device: torch.device) -> tuple[Tensor | None, ...]:
    """The statistics that are read, in the order of PoolStats: converting an array takes 1 us."""
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
    """A contiguous float64 tensor on the device, without gradient."""
    tensor = x if isinstance(x, Tensor) and x.dtype is torch.float64 else torch.as_tensor(x, dtype=torch.float64, device=device)
    if tensor.device != device:
        tensor = tensor.to(device)
    return constant(tensor)


def _forward(
    rewards: Tensor,
    group_of: Tensor | None,
    cu_seqlens: Tensor | None,
    num_groups: int | None,
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
) -> Tensor:
    out = torch.empty_like(rewards)
    rows = rewards.shape[0]
    wrong = cpu.group_advantages(
        address(rewards),
        DTYPE_CODES[rewards.dtype],
        address(group_of),
        address(cu_seqlens),
        rows,
        -1 if num_groups is None else num_groups,
        address(pool_count),
        address(pool_mean),
        address(pool_m2),
        address(pool_min),
        address(pool_max),
        address(baseline_values),
        address(class_weights),
        baseline,
        scale,
        ddof,
        eps,
        keep_single,
        address(out),
        _num_threads(),
    )
    if wrong >= 0:
        if cu_seqlens is not None:
            raise wrong_offset(WHERE, cu_seqlens, wrong, rows)
        assert group_of is not None
        raise wrong_group(group_of, wrong, num_groups)
    return out


SCHEMA = (
    "(Tensor rewards, Tensor? group_of, Tensor? cu_seqlens, SymInt? num_groups, Tensor? pool_count, Tensor? pool_mean, Tensor? pool_m2, "
    "Tensor? pool_min, Tensor? pool_max, Tensor? baseline_values, Tensor? class_weights, int baseline, int scale, int ddof, float eps, "
    "bool keep_single) -> Tensor"
)

_op = NativeOp(
    "group_advantages",
    SCHEMA,
    _forward,
    lambda rewards, *_: torch.empty_like(rewards),
)
