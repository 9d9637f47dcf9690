"""The CUDA kernels of group_advantages: csrc/ops/group_advantages/group_advantages_cuda.h on tensors, for the torch side in gpu.py."""

from __future__ import annotations

from torch import Tensor

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import DTYPE_CODES, address

workspace_size: int = cuda.group_advantages_workspace()  # doubles


def advantages(
    rewards: Tensor,
    order: Tensor | None,
    offsets: Tensor,
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
    workspace: Tensor,
    out: Tensor,
) -> None:
    """Writes the advantages [N] of the rows in segments [S]; offsets [S + 1] are the caller's own where there is no order."""
    cuda.group_advantages(
        rewards.get_device(),
        stream(rewards),
        address(rewards),
        DTYPE_CODES[rewards.dtype],
        address(order),
        address(offsets),
        rewards.shape[0],
        offsets.shape[0] - 1,
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
        address(workspace),
        address(out),
    )
