"""The kernels of token_logprobs in CUDA: csrc/ops/token_logprobs/token_logprobs_cuda.h on tensors."""

from __future__ import annotations

from torch import Tensor

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import address, matrix, row_address
from reinforce_ada.ops.token_logprobs.contract import GradientInputs, Inputs, Scores
from reinforce_ada.ops.token_logprobs.gpu import NORMALIZERS, empty_normalizers

__all__ = ["NORMALIZERS", "empty_normalizers", "forward", "gradient"]


def forward(x: Inputs, out: Scores, row_max: Tensor, log2_sum: Tensor) -> None:
    """See contract.Kernels."""
    cuda.token_logprobs_forward(
        x.logits.get_device(), stream(x.logits),
        *matrix(x.logits),
        address(x.token_ids), address(x.temperatures), x.temperature, x.logit_scale, x.soft_cap,
        address(out.logprobs), address(row_max), address(log2_sum),
        address(out.entropy) if x.entropy else 0, address(out.sum_p2) if x.sum_p2 else 0,
    )  # fmt: skip


def gradient(grad: Tensor, x: GradientInputs, row_max: Tensor, log2_sum: Tensor) -> None:
    """See contract.Kernels."""
    cuda.token_logprobs_gradient(
        x.logits.get_device(), stream(x.logits), row_address(grad), grad.stride(0),
        *matrix(x.logits),
        address(x.token_ids), address(x.temperatures), x.temperature, x.logit_scale, x.soft_cap,
        address(row_max), address(log2_sum), address(x.entropy), address(x.grad_logprobs), address(x.grad_entropy),
    )  # fmt: skip
