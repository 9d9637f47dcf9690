"""The kernels of group_advantages on the CPU: csrc/ops/group_advantages on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu, missing
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import DTYPE_CODES, address, coded, is_watched
from reinforce_ada.ops.group_advantages.checks import BASELINES, MOST, SCALES, SINGLETONS, WHERE, wrong_group
from reinforce_ada.ops.group_advantages.contract import Inputs

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
    """Return the result of an eager call without a pool on plain contiguous tensors; None for any other call, which takes the long way.

    It looks once at each thing that the checks and conversions of the long way look at several times: 4 us instead of 7 at N = 512.
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
