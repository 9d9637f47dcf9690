"""Advantages of completions against the statistics of their group or pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._dispatch import declare_native, operator, resolve
from reinforce_ada.ops._torch import has_tangent
from reinforce_ada.ops.group_advantages import cpu, reference
from reinforce_ada.ops.group_advantages.checks import (
    BASELINES,
    SCALES,
    SINGLETONS,
    WHERE,
    check_choices,
    check_rows,
    count_groups,
    group_numbers,
)
from reinforce_ada.ops.group_advantages.contract import arguments, torch_operator
from reinforce_ada.ops.group_advantages.conventions import CONVENTIONS
from reinforce_ada.types import PoolStats

__all__ = ["BASELINES", "CONVENTIONS", "SCALES", "SINGLETONS", "group_advantages"]

declare_native(WHERE, "cuda", "triton", "cpu", make=torch_operator)


def group_advantages(
    rewards: Tensor,
    group_of: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    pool: PoolStats | None = None,
    baseline: str | Tensor = "pool",
    scale: str = "none",
    class_weights: Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
    backend: str = "auto",
) -> Tensor:
    """Return the advantage of each completion, which says how much better its reward is than its baseline.

        A[i] = (r[i] - b) / (std + eps) * class_weights[g, A >= 0]        g = group_of[i]

    with b the mean of the pool or of the group, or for "leave-one-out" the mean of the pool's other completions,
    (count * mean - r) / (count - 1). Moments are float64 and centred, whatever the dtype of the rewards.

    No signal gives exactly 0, whatever rounding does: if the statistics behind the baseline are degenerate (min == max), or for
    "leave-one-out" the pool has no other completion, the advantage is 0. A tensor baseline is used as it is. No spread gives no division:
    if the statistics behind the scale have `ddof` rewards or fewer, or min == max, the advantage is not divided.

    A group number out of range and wrong offsets raise where the host sees them. The cuda and triton forms never wait for the device: there
    a row whose group is out of range is NaN, and so are all rows where cu_seqlens does not go from 0 to N without decreasing.

    The conventions of other trainers are in `CONVENTIONS`: `group_advantages(rewards, group_of, **CONVENTIONS["trl-group"])`.

    Args:
        rewards: [N], float32, bfloat16, float16 or float64, finite.
        group_of: [N] int64, the group of each completion, in [0, G), in any order. Give this or `cu_seqlens`.
        cu_seqlens: [G + 1] int32 or int64, where completions of a group lie together: group g has rows cu_seqlens[g] up to
            cu_seqlens[g + 1]; from 0 to N. Empty groups are allowed.
        pool: statistics of the raw rewards of each group's pool, each [G], which include the group's own rewards; None: the
            pool is the group.
        baseline: "pool", "group", "leave-one-out" (of the pool), or one value a group as a tensor [G].
        scale: "none", or divide by (std + eps) of the "pool", of the "group", or of all rewards of this call ("batch").
        class_weights: [G, 2], factors for advantages < 0 and for advantages >= 0. With a tensor baseline at the reward threshold
            these are the wrong and the correct completions.
        ddof: std = sqrt(m2 / (count - ddof)); 1 in verl, TRL and Reinforce-Ada.
        eps: added to the std; 1e-6 in verl and Reinforce-Ada, 1e-4 in TRL.
        singleton: the advantage where the statistics of the baseline are of one completion: "zero", or "reward" as it is (before the
            scale), which is what a mean of 0 gives in verl's GRPO and RLOO. Not for a tensor baseline.
        backend: "auto", "cuda", "triton", "cpu" (these three all but float64) or "reference".

    Returns:
        [N], dtype of the rewards, without gradient.

    Raises:
        InputError: for shapes, dtypes, names and group numbers that do not fit; BackendError for a backend that cannot run here.

    Source: arXiv 2510.04996 (pool mean), 2402.03300 (group mean and std), 2402.14740 (leave-one-out), 2503.20783 (no std).
    """
    if class_weights is None and (backend == "auto" or backend == "cpu"):
        common = None
        if cu_seqlens is None:
            common = cpu.common_case(rewards, group_of, False, pool, baseline, scale, ddof, eps, singleton)
        elif group_of is None:
            common = cpu.common_case(rewards, cu_seqlens, True, pool, baseline, scale, ddof, eps, singleton)
        if common is not None:
            return common
    check_rows(rewards, group_of, cu_seqlens)
    check_choices(baseline, scale, ddof, eps, singleton)
    if has_tangent((rewards,)):
        raise InputError(WHERE, "rewards with a tangent (forward-mode AD)", "rewards.detach(): advantages are constants")
    per_group = cu_seqlens is not None or pool is not None or class_weights is not None or isinstance(baseline, Tensor)
    num_groups = count_groups(cu_seqlens, pool, baseline, class_weights) if per_group else None
    form = resolve(WHERE, backend, rewards.device, rewards.dtype)
    if form != "reference":
        inputs = arguments(rewards, group_of, cu_seqlens, num_groups, pool, baseline, scale, class_weights, ddof, eps, singleton)
        result: Tensor = operator(WHERE, form)(inputs)
        return result
    rewards = rewards.detach()
    group_of, num_groups = group_numbers(rewards, group_of, cu_seqlens, num_groups)
    stats = None if pool is None else PoolStats(*(_float64(x, rewards) for x in pool))
    baseline = _float64(baseline, rewards) if isinstance(baseline, Tensor) else baseline
    weights = None if class_weights is None else _float64(class_weights, rewards)
    return reference.group_advantages(rewards, group_of, num_groups, stats, baseline, scale, weights, ddof, eps, singleton)


def _float64(x: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64, device=like.device).detach()
