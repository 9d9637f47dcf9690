"""The cases of group_advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from reinforce_ada.bench.baselines import bincount, candidates, index_add, runnable, verl_loop
from reinforce_ada.bench.case import Candidate, Case, Goal, Run, Setup
from reinforce_ada.bench.checks import close
from reinforce_ada.ops import group_advantages
from reinforce_ada.ops.group_advantages import reference
from reinforce_ada.types import PoolStats

_OP = "group_advantages"
_ROWS = [512, 65536, 1 << 22]
_GROUP_SIZE = 8
_LOOPED = 65536  # rows that a Python loop handles in a second


def cases() -> Iterator[Case]:
    """Yield cases with mean, with mean and std, and with given pools; of groups that lie together or do not."""
    for rows in _ROWS:
        shape = {"N": rows, "G": rows // _GROUP_SIZE}
        quick = shape if rows == 512 else None
        limits = {512: (Goal("us", 4),), 1 << 22: (Goal("time", 2, "streaming its bytes"),)}.get(rows, ())
        for order, bound in (("sorted", 4), ("shuffled", 2.5)):
            for scale, what in (("none", "mean"), ("group", "mean and std")):
                build = partial(_build, shuffled=order == "shuffled", scale=scale)
                goals = (Goal("speedup", bound, "best"), *limits)
                yield Case(_OP, f"{what}, {order}", shape, "float32", build, goals, "index_add fp32", quick)
        yield Case(_OP, "pool given, sorted", shape, "float32", _with_pool, limits, "eager", quick)


def _inputs(case: Case, device: str, shuffled: bool) -> tuple[Tensor, Tensor]:
    rows = case.shape["N"]
    group_of = torch.arange(rows, device=device) // _GROUP_SIZE
    return torch.randn(rows, device=device), group_of[torch.randperm(rows, device=device)] if shuffled else group_of


def _build(case: Case, device: str, shuffled: bool, scale: str) -> Setup:
    rewards, group_of = _inputs(case, device, shuffled)
    groups, with_std = case.shape["G"], scale == "group"
    expected = group_advantages(rewards.double(), group_of, scale=scale, backend="reference")

    def check(results: Tensor, loose: bool) -> None:
        close("advantages", results, expected, 1e-4 if loose else 1e-6, 1e-3 if loose else 1e-6)

    args = rewards, group_of, groups, with_std
    takes_too_long = len(rewards) > (512 if with_std else _LOOPED)
    found, absent = runnable(
        {
            "index_add fp32": (None, partial(index_add, *args, torch.float32)),
            "index_add float64": (None, partial(index_add, *args, torch.float64)),
            "bincount": (None if device == "cpu" else "runs on a CPU", partial(bincount, *args)),
            "verl's loop": (
                "takes too long at this size; see the smaller ones" if takes_too_long else None,
                partial(verl_loop, rewards, group_of, with_std),
            ),
        }
    )
    return _setup(partial(group_advantages, rewards, group_of, scale=scale), found, check, rewards, [group_of], 16, absent)


def _with_pool(case: Case, device: str) -> Setup:
    """Set up the case with given statistics, for which eager needs one gather and a subtraction."""
    rewards, group_of = _inputs(case, device, shuffled=False)
    pool = PoolStats(*reference.moments(rewards.double(), group_of, case.shape["G"]))
    mean, cu_seqlens = pool.mean, torch.arange(0, len(rewards) + 1, _GROUP_SIZE, device=device)
    expected = rewards.double() - mean[group_of]

    def check(results: Tensor, loose: bool) -> None:
        close("advantages", results, expected, 1e-5 if loose else 1e-6)

    eager: dict[str, Run] = {"eager": lambda: rewards - mean.float()[group_of]}
    held = [group_of, cu_seqlens, *pool]
    # rewards and advantages; offsets and five statistics for each group of eight
    bytes_per_row = 8 + (8 + 5 * 8) // _GROUP_SIZE
    return _setup(partial(group_advantages, rewards, cu_seqlens=cu_seqlens, pool=pool), eager, check, rewards, held, bytes_per_row, {})


def _setup(
    subject: Run,
    found: Mapping[str, Run],
    check: Callable[[Tensor, bool], None],
    rewards: Tensor,
    held: list[Tensor],
    bytes_per_row: int,
    absent: dict[str, str],
) -> Setup:
    read = rewards.new_ones((bytes_per_row - 4) * len(rewards) // 4)
    written = torch.empty_like(rewards)

    def stream() -> Tensor:
        written.fill_(1.0)
        return read.sum()

    return Setup(
        subject=subject,
        others=[*candidates(found, lambda run: run()), Candidate("streaming its bytes", stream, floor=True)],
        check=check,
        held=[rewards, *held, read, written],
        moved_bytes=bytes_per_row * len(rewards),
        absent=absent,
    )
