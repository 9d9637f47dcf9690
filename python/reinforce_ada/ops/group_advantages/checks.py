"""Checks of group_advantages before any native code sees an address; group numbers and offsets are checked where they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.ops._checks import describe
from reinforce_ada.ops._ragged import check_cu_seqlens, first_wrong_offset, sequence_of, wrong_offset
from reinforce_ada.types import PoolStats

WHERE = "group_advantages"
BASELINES = ("pool", "group", "leave-one-out")
SCALES = ("none", "pool", "group", "batch")
SINGLETONS = ("zero", "reward")
MOST = 2**31
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_rows(rewards: Tensor, group_of: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check the rewards, and that exactly one argument says which of them belong together."""
    shape = rewards.shape
    if len(shape) != 1 or rewards.dtype not in _DTYPES:
        raise InputError(WHERE, f"rewards is {describe(rewards)}", "[N] float32, bfloat16, float16 or float64")
    if (group_of is None) == (cu_seqlens is None):
        given = "neither group_of nor cu_seqlens" if group_of is None else "both group_of and cu_seqlens"
        raise InputError(WHERE, given, "exactly one of them")
    if cu_seqlens is not None:
        check_cu_seqlens(WHERE, cu_seqlens, rewards.device)
        return
    assert group_of is not None
    here = rewards.is_cpu and group_of.is_cpu  # comparing devices takes three times as long
    if group_of.shape != shape or group_of.dtype is not torch.int64 or not (here or group_of.device == rewards.device):
        raise InputError(WHERE, f"group_of is {describe(group_of)}", f"{list(rewards.shape)} int64 on {rewards.device}")


def check_choices(baseline: str | Tensor, scale: str, ddof: int, eps: float, singleton: str) -> None:
    """Check names and numbers."""
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise unknown_name(WHERE, "baseline", baseline, BASELINES)
    if scale not in SCALES:
        raise unknown_name(WHERE, "scale", scale, SCALES)
    if singleton not in SINGLETONS:
        raise unknown_name(WHERE, "singleton", singleton, SINGLETONS)
    if not (isinstance(ddof, int) and 0 <= ddof < MOST and 0 <= eps < MOST):
        raise InputError(WHERE, f"ddof={ddof}, eps={eps}", f"both at least 0 and below {MOST}, ddof an integer")


def count_groups(cu_seqlens: Tensor | None, pool: PoolStats | None, baseline: str | Tensor, class_weights: Tensor | None) -> int:
    """Return G, which the arguments with one value per group give; there is at least one such argument."""
    if class_weights is None and not isinstance(baseline, Tensor):
        sizes = {x.shape for x in pool} if pool is not None else set()
        if cu_seqlens is not None:
            sizes.add((cu_seqlens.shape[0] - 1,))
        size = sizes.pop()
        if not sizes and len(size) == 1:
            return int(size[0])
    shapes: dict[str, tuple[int, ...]] = {}
    if cu_seqlens is not None:
        shapes["cu_seqlens"] = (cu_seqlens.shape[0] - 1,)
    if pool is not None:
        shapes |= {f"pool.{name}": tuple(x.shape) for name, x in pool._asdict().items()}
    if isinstance(baseline, Tensor):
        shapes["baseline"] = tuple(baseline.shape)
    if class_weights is not None:
        if class_weights.ndim != 2 or class_weights.shape[1] != 2:
            raise InputError(WHERE, f"class_weights is {describe(class_weights)}", "[G, 2]")
        shapes["class_weights"] = (class_weights.shape[0],)
    (first, shape), *others = shapes.items()
    if len(shape) != 1:
        raise InputError(WHERE, f"{first} has shape {list(shape)}", "one value a group, [G]")
    for name, other in others:
        if other != shape:
            given = f"{first} for {list(shape)} groups and {name} for {list(other)}"
            raise InputError(WHERE, given, "one value a group, [G], in each")
    return shape[0]


def group_numbers(rewards: Tensor, group_of: Tensor | None, cu_seqlens: Tensor | None, groups: int | None) -> tuple[Tensor, int]:
    """Return (group_of, G) from either argument that says which rows belong together, after checking values that are not traced."""
    rows, traced = rewards.shape[0], torch.compiler.is_compiling()
    if cu_seqlens is not None:
        at = None if traced else first_wrong_offset(cu_seqlens, rows)
        if at is not None:
            raise wrong_offset(WHERE, cu_seqlens, at, rows)
        return sequence_of(cu_seqlens, rows), cu_seqlens.shape[0] - 1
    assert group_of is not None
    num_groups = groups
    if num_groups is None:
        num_groups = int(group_of.max()) + 1 if rows else 0
        if num_groups > 4 * rows + 65536 and int(group_of.min()) >= 0:  # numbers like hashes: their ranks name the same groups
            group_of = torch.unique(group_of, return_inverse=True)[1]
            num_groups = int(group_of.max()) + 1
    outside = group_of < 0 if groups is None else (group_of < 0) | (group_of >= groups)
    if not traced and outside.any():
        raise wrong_group(group_of, int(outside.nonzero()[0]), groups)
    return group_of, num_groups


def wrong_group(group_of: Tensor, row: int, groups: int | None) -> InputError:
    """Return the error for a group number out of range."""
    needed = "group numbers of at least 0" if groups is None else f"group numbers in [0, {groups})"
    return InputError(WHERE, f"group_of[{row}] = {int(group_of[row])}", needed)
