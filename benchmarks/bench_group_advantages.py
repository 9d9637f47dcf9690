"""group_advantages on the CPU against the two index_add that a trainer would write.

pytest benchmarks/bench_group_advantages.py --benchmark-json=group_advantages.json -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reinforce_ada.ops import group_advantages
from reinforce_ada.ops.group_advantages import reference
from reinforce_ada.types import PoolStats

GROUP_SIZE = 8
rows = pytest.mark.parametrize("rows", [512, 65536, 1 << 22])
orders = pytest.mark.parametrize("order", ["sorted", "shuffled"])


def eager(rewards: Tensor, group_of: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Reward minus the group's mean, summed in `dtype`; the operator sums in float64."""
    r = rewards.to(dtype)
    count = torch.zeros(groups, dtype=dtype).index_add_(0, group_of, torch.ones_like(r))
    mean = torch.zeros(groups, dtype=dtype).index_add_(0, group_of, r) / count.clamp_(min=1)
    return rewards - mean.float()[group_of]


def eager_std(rewards: Tensor, group_of: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The same over the group's std + 1e-6."""
    r = rewards.to(dtype)
    count = torch.zeros(groups, dtype=dtype).index_add_(0, group_of, torch.ones_like(r))
    mean = torch.zeros(groups, dtype=dtype).index_add_(0, group_of, r) / count.clamp(min=1)
    centred = r - mean[group_of]
    m2 = torch.zeros(groups, dtype=dtype).index_add_(0, group_of, centred * centred)
    std = (m2 / (count - 1).clamp(min=1)).sqrt() + 1e-6
    return (centred / std[group_of]).float()


def calls(rows: int) -> int:
    """Enough calls a timing for the clock."""
    return max(1, 65536 // rows)


def repeated(form: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            form()

    return run


def make(rows: int, order: str) -> tuple[Tensor, Tensor, int]:
    group_of = torch.arange(rows) // GROUP_SIZE
    if order == "shuffled":
        group_of = group_of[torch.randperm(rows)]
    return torch.randn(rows), group_of, rows // GROUP_SIZE


@rows
@orders
@pytest.mark.parametrize(("scale", "form"), [("none", eager), ("group", eager_std)], ids=["mean", "mean and std"])
def test_group(interleave: Callable[..., dict[str, float]], rows: int, order: str, scale: str, form: Callable[..., Tensor]) -> None:
    rewards, group_of, groups = make(rows, order)
    actual = group_advantages(rewards, group_of, scale=scale, backend="cpu")
    torch.testing.assert_close(actual, form(rewards, group_of, groups, torch.float64), rtol=1e-3, atol=1e-5)
    n = calls(rows)
    ratios = interleave(
        repeated(lambda: group_advantages(rewards, group_of, scale=scale, backend="cpu"), n),
        {
            "float32": repeated(lambda: form(rewards, group_of, groups, torch.float32), n),
            "float64": repeated(lambda: form(rewards, group_of, groups, torch.float64), n),
        },
        moved_bytes=16 * rows * n,  # rewards, group numbers, advantages
        op=f"group_advantages, {order}, scale {scale}",
        dtype=rewards.dtype,
        shape=(rows, groups),
        calls=n,
    )
    assert ratios["float64"] >= 1.5  # which sums as accurately


@rows
def test_pool(interleave: Callable[..., dict[str, float]], rows: int) -> None:
    """Statistics given, groups lying together."""
    rewards, group_of, groups = make(rows, "sorted")
    pool = PoolStats(*reference.moments(rewards.double(), group_of, groups))
    mean, cu_seqlens = pool.mean, torch.arange(0, rows + 1, GROUP_SIZE)
    expected = rewards - mean.float()[group_of]
    torch.testing.assert_close(group_advantages(rewards, cu_seqlens=cu_seqlens, pool=pool, backend="cpu"), expected)
    n = calls(rows)
    interleave(
        repeated(lambda: group_advantages(rewards, cu_seqlens=cu_seqlens, pool=pool, backend="cpu"), n),
        {"eager": repeated(lambda: rewards - mean.float()[group_of], n)},
        moved_bytes=(8 * rows + 48 * groups) * n,
        op="group_advantages, pool given",
        dtype=rewards.dtype,
        shape=(rows, groups),
        calls=n,
    )
