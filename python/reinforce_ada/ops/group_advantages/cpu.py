"""The kernels of group_advantages on the CPU: csrc/ops/group_advantages on tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu, missing
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import DTYPE_CODES, address, coded, is_watched
from reinforce_ada.ops.group_advantages.checks import BASELINES, MOST, SCALES, SINGLETONS, WHERE, wrong_group
from reinforce_ada.ops.group_advantages.contract import Inputs
from reinforce_ada.types import PoolStats

_CODES = {  # (baseline, scale, singleton) as the kernel takes them
    (baseline, scale, singleton): (b, s, singleton == "reward")
    for b, baseline in enumerate(BASELINES)
    for s, scale in enumerate(SCALES)
    for singleton in SINGLETONS
}
_num_threads, _empty_like, _int64 = torch.get_num_threads, torch.empty_like, torch.int64
_DOUBLE = np.dtype(np.float64)


def common_case(
    rewards: Tensor,
    index: Tensor | None,
    by_offsets: bool,
    pool: PoolStats | None,
    baseline: str | Tensor,
    scale: str,
    ddof: int,
    eps: float,
    singleton: str,
) -> Tensor | None:
    """Return the result of an eager call on plain contiguous tensors; None for any other call, which the long way looks at.

    `index` is group_of, or with `by_offsets` cu_seqlens. This looks once at each thing that the checks and conversions of the long way look
    at several times: at N = 512 a call takes 4 us instead of 7, and one with a pool 8 us instead of 17.
    """
    if type(rewards) is not Tensor or type(index) is not Tensor or type(baseline) is not str or is_watched() or missing() is not None:
        return None
    codes, dtype = _CODES.get((baseline, scale, singleton)), DTYPE_CODES.get(rewards.dtype)
    if codes is None or dtype is None or index.dtype is not _int64:
        return None
    rows = rewards.numel()  # and not .shape, which makes an object: 0.2 us for the two
    if rewards.dim() != 1 or index.dim() != 1 or not (rewards.is_cpu and index.is_cpu):
        return None
    if not (type(ddof) is int and 0 <= ddof < MOST and 0 <= eps < MOST):
        return None
    if not (rewards.is_contiguous() and index.is_contiguous()) or rewards.is_neg():
        return None
    if by_offsets or pool is not None:
        return _with_statistics(rewards, dtype, index, codes, ddof, eps, by_offsets, pool)
    if index.numel() != rows:
        return None
    out = _empty_like(rewards)
    wrong = cpu.group_advantages(
        rewards.data_ptr(), dtype, index.data_ptr(), 0, rows, -1, 0, 0, 0, 0, 0, 0, 0, codes[0], codes[1], ddof, eps, codes[2],
        out.data_ptr(), _num_threads(),
    )  # fmt: skip
    return out if wrong < 0 else None


def _with_statistics(
    rewards: Tensor,
    dtype: int,
    index: Tensor,
    codes: tuple[int, int, bool],
    ddof: int,
    eps: float,
    by_offsets: bool,
    pool: PoolStats | None,
) -> Tensor | None:
    """Finish `common_case` where G is known from offsets or from plain float64 arrays or tensors [G]."""
    num_groups = index.numel() - 1 if by_offsets else -1
    held = []
    for x in pool if type(pool) is PoolStats else ():
        plain = torch.from_numpy(x) if type(x) is np.ndarray and x.dtype is _DOUBLE and x.flags.c_contiguous else x
        if type(plain) is not Tensor or plain.dtype is not torch.float64 or plain.dim() != 1 or not plain.is_cpu:
            return None
        if num_groups < 0:
            num_groups = plain.numel()
        if plain.numel() != num_groups or not plain.is_contiguous() or plain.is_neg():
            return None
        held.append(plain)
    if num_groups < 0 or (pool is not None and not held) or not (by_offsets or index.numel() == rewards.numel()):
        return None
    count, mean, m2, low, high = (x.data_ptr() for x in held) if held else (0, 0, 0, 0, 0)
    out, at = torch.empty_like(rewards), index.data_ptr()
    groups, offsets = (0, at) if by_offsets else (at, 0)
    wrong = cpu.group_advantages(
        rewards.data_ptr(), dtype, groups, offsets, rewards.numel(), num_groups, count, mean, m2, low, high, 0, 0, codes[0], codes[1],
        ddof, eps, codes[2], out.data_ptr(), _num_threads(),
    )  # fmt: skip
    return out if wrong < 0 else None


def advantages(x: Inputs) -> Tensor:
    """Return the advantages, [N] in the dtype of the rewards. Raises: InputError for group numbers and offsets out of range."""
    out = torch.empty_like(x.rewards)
    rows = x.rewards.shape[0]
    wrong = cpu.group_advantages(
        *coded(x.rewards),
        address(x.group_of),
        address(x.cu_seqlens),
        rows,
        -1 if x.num_groups is None else x.num_groups,
        address(x.pool_count), address(x.pool_mean), address(x.pool_m2), address(x.pool_min), address(x.pool_max),
        address(x.baseline_values), address(x.class_weights),
        x.baseline, x.scale, x.ddof, x.eps, x.keep_single,
        address(out),
        _num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        if x.cu_seqlens is not None:
            raise wrong_offset(WHERE, x.cu_seqlens, wrong, rows)
        assert x.group_of is not None
        raise wrong_group(x.group_of, wrong, x.num_groups)
    return out
