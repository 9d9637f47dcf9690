"""token_logprobs in plain PyTorch: this form defines the contract. It computes in float64 if the logits are float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._torch import once, refuse_transforms


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    soft_cap: float | None,
    entropy: bool,
    sum_p2: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (logprobs, entropy or None, sum_p2 or None), each [T] float32 (float64 for float64 logits); see the public function."""
    ignored = token_ids == IGNORED
    # Before anything else, so that a NaN in an ignored row reaches neither the results nor, as 0 * NaN, the gradient.
    z = head(logits.masked_fill(ignored[:, None], 0), logit_scale, soft_cap)
    log_p = (z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)).log_softmax(-1)
    logprobs = log_p.gather(1, token_ids.clamp(min=0)[:, None]).squeeze(1).masked_fill(ignored, 0)
    h = _entropy(log_p).masked_fill(ignored, 0) if entropy else None
    s = (2 * log_p.detach()).exp().sum(-1).masked_fill(ignored, 0) if sum_p2 else None
    return logprobs, h, s


def head(x: Tensor, logit_scale: float, soft_cap: float | None) -> Tensor:
    """Return logits from the matmul's result x: z = logit_scale x, then soft_cap tanh(z / soft_cap); float32 (float64 stays)."""
    z = x if x.dtype == torch.float64 else x.float()
    z = z if logit_scale == 1.0 else z * logit_scale
    return z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)


def with_gradient_in(out: Tensor, logits: Tensor) -> Tensor:
    """Return the logits, whose gradient will be copied into `out` and use that memory."""
    if not torch.compiler.is_compiling():
        refuse_transforms("token_logprobs with grad_out", (logits,))
    x: Tensor = _GradientIn.apply(logits, out)  # type: ignore[no-untyped-call]
    return x


class _GradientIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        return logits.view_as(logits)

    @staticmethod
    @partial(once, "token_logprobs with grad_out")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors  # raises if it was written to, by an earlier backward too
        return out.copy_(grad).detach(), None


def _entropy(log_p: Tensor) -> Tensor:
    """Return -sum p log p, where a token of probability 0 (a logit of -inf) adds nothing, not 0 * -inf."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
