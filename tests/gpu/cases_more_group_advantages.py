"""group_advantages on a GPU: what its mutants asked for beside cases_group_advantages."""

from __future__ import annotations

import torch
from cases import each
from cases_group_advantages import SIZES, assert_conforms, draw, pool_of


def check_more_degrees_than_rewards(backend: str, device: str, scale: str) -> None:
    """With ddof = 7 no variance is left in groups of 7, pools of 2 to 8 and a batch of 7: nothing is divided there."""
    batch = draw((7, 2, 9)) if scale != "batch" else draw((3, 4))
    pool = pool_of(len(SIZES)) if scale == "pool" else None
    assert_conforms(backend, device, batch if pool is None else draw(), scale=scale, ddof=7, pool=pool)


def check_spread_of_a_long_group(backend: str, device: str) -> None:
    """The one reward that differs is in the first block of the group, or in the last."""
    for sizes in ((1500, 3), (1500, 1500)):
        for at, value in ((0, 1.0), (0, -1.0), (1499, 1.0)):
            rewards = torch.zeros(sum(sizes))
            rewards[at] = value
            offsets = torch.tensor([0, *sizes]).cumsum(0)
            assert_conforms(backend, device, {"rewards": rewards, "cu_seqlens": offsets}, scale="group")


CASES = [*each(check_more_degrees_than_rewards, ("group",), ("pool",), ("batch",)), *each(check_spread_of_a_long_group)]
