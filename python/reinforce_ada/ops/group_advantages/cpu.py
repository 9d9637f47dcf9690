"""group_advantages on the CPU: csrc/ops/group_advantages behind torch's registration."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._ragged import wrong_offset
from reinforce_ada.ops._torch import NativeOp, address, is_eager
from reinforce_ada.ops.group_advantages.checks import BASELINES, SCALES, WHERE, wrong_group

_VALUES = len(BASELINES)  # Baseline::values in csrc/ops/group_advantages/group_advantages.h


def group_advantages(
    rewards: Tensor,
    group_of: Tensor | None,
    cu_seqlens: Tensor | None,
    num_groups: int | None,
    pool: Tensor | None,
    baseline: str | Tensor,
    scale: str,
    class_weights: Tensor | None,
    ddof: int,
    eps: float,
) -> Tensor:
    """[N] float32; `pool` is [5, G], the tensors of one value a group are contiguous float64. See the public function."""
    values, code = (baseline, _VALUES) if isinstance(baseline, Tensor) else (None, BASELINES.index(baseline))
    rewards = rewards.contiguous()
    group_of = None if group_of is None else group_of.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    args = (rewards, group_of, cu_seqlens, num_groups, pool, values, class_weights, code, SCALES.index(scale), ddof, eps)
    # There is no gradient to arrange, and at N = 512 the way through NativeOp takes as long as the kernel.
    result: Tensor = _forward(*args) if is_eager(args[:7]) else _op(*args)
    return result


def _forward(
    rewards: Tensor,
    group_of: Tensor | None,
    cu_seqlens: Tensor | None,
    num_groups: int | None,
    pool: Tensor | None,
    baseline_values: Tensor | None,
    class_weights: Tensor | None,
    baseline: int,
    scale: int,
    ddof: int,
    eps: float,
) -> Tensor:
    out = torch.empty_like(rewards)
    rows = rewards.shape[0]
    wrong = cpu.group_advantages(
        address(rewards),
        address(group_of),
        address(cu_seqlens),
        rows,
        -1 if num_groups is None else num_groups,
        address(pool),
        address(baseline_values),
        address(class_weights),
        baseline,
        scale,
        ddof,
        eps,
        address(out),
        torch.get_num_threads(),
    )
    if wrong >= 0:
        if cu_seqlens is not None:
            raise wrong_offset(WHERE, cu_seqlens, wrong, rows)
        assert group_of is not None
        raise wrong_group(group_of, wrong, num_groups)
    return out


_op = NativeOp(
    "group_advantages",
    "(Tensor rewards, Tensor? group_of, Tensor? cu_seqlens, SymInt? num_groups, Tensor? pool, Tensor? baseline_values, "
    "Tensor? class_weights, int baseline, int scale, int ddof, float eps) -> Tensor",
    _forward,
    lambda rewards, *_: torch.empty_like(rewards),
)
