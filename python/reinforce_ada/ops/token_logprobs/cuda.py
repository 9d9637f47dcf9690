"""The CUDA kernels of token_logprobs: csrc/ops/token_logprobs/token_logprobs_cuda.h on tensors, for the torch side in gpu.py."""

from __future__ import annotations

from torch import Tensor

from reinforce_ada.ops._gpu import cuda, stream
from reinforce_ada.ops._torch import DTYPE_CODES, address, row_address


def forward(
    logits: Tensor,
    token_ids: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    logprobs: Tensor,
    row_max: Tensor,
    log2_sum: Tensor,
    entropy: Tensor,
    sum_p2: Tensor,
) -> None:
    """Writes logprobs, row_max and log2_sum [T], and entropy and sum_p2 [T] where they are not empty."""
    cuda.token_logprobs_forward(
        logits.get_device(),
        stream(logits),
        row_address(logits),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        address(token_ids),
        address(temperatures),
        temperature,
        logit_scale,
        soft_cap,
        address(logprobs),
        address(row_max),
        address(log2_sum),
        address(entropy) if entropy.numel() else 0,
        address(sum_p2) if sum_p2.numel() else 0,
    )


def gradient(
    grad: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    row_max: Tensor,
    log2_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Writes the gradient of the logits, which may be the logits themselves; row_max, log2_sum and entropy are the forward's."""
    cuda.token_logprobs_gradient(
        logits.get_device(),
        stream(logits),
        row_address(grad),
        grad.stride(0),
        row_address(logits),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        address(token_ids),
        address(temperatures),
        temperature,
        logit_scale,
        soft_cap,
        address(row_max),
        address(log2_sum),
        address(entropy),
        address(grad_logprobs),
        address(grad_entropy),
    )
