"""The kernels of group_advantages in CUDA: csrc/ops/group_advantages/group_advantages_cuda.h on tensors."""

from __future__ import annotations

from torch import Tensor

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import address, coded
from reinforce_ada.ops.group_advantages.contract import Inputs
from reinforce_ada.ops.group_advantages.gpu import in_segments

_WORKSPACE: int = cuda.group_advantages_workspace()  # doubles


def advantages(x: Inputs) -> Tensor:
    """Return the advantages, [N] in the dtype of the rewards; NaN for rows out of range."""
    return in_segments(x, _launch, _WORKSPACE)


def _launch(x: Inputs, order: Tensor | None, offsets: Tensor, workspace: Tensor, out: Tensor) -> None:
    cuda.group_advantages(
        x.rewards.get_device(), stream(x.rewards),
        *coded(x.rewards),
        address(order), address(offsets), x.rewards.shape[0], offsets.shape[0] - 1,
        address(x.pool_count), address(x.pool_mean), address(x.pool_m2), address(x.pool_min), address(x.pool_max),
        address(x.baseline_values), address(x.class_weights),
        x.baseline, x.scale, x.ddof, x.eps, x.keep_single,
        address(workspace), address(out),
    )  # fmt: skip
