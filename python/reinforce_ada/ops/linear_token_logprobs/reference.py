"""linear_token_logprobs in plain PyTorch, at once or in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._torch import once, refuse_transforms
from reinforce_ada.ops.token_logprobs import reference

# What a chunk holds for each of its logits at the worst moment (in the backward, with entropy and a soft cap, all in float32 but the
# matmul's result and its gradient); float64 holds twice as much.
BYTES_PER_LOGIT = 40


def check_extra_bytes(where: str, extra_bytes: int | None, least: int) -> None:
    """Check that the bound is None or enough for the logits of one token."""
    if extra_bytes is not None and extra_bytes < least:
        raise InputError(where, f"max_extra_bytes={extra_bytes}", f"at least {least}, for the logits of one token")


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    soft_cap: float | None,
    entropy: bool,
    sum_p2: bool,
    chunk: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (logprobs, entropy or None, sum_p2 or None), each [T] float32 (float64 for float64 inputs), `chunk` tokens at a time."""
    with torch.autocast(hidden.device.type, enabled=False):
        if chunk is None:
            # MKL multiplies strided matrices with other kernels, whose results differ in the last bits.
            x = F.linear(hidden.contiguous(), weight.contiguous(), bias)
            return reference.token_logprobs(x, token_ids, temperature, logit_scale, soft_cap, entropy, sum_p2)
        args = (hidden, weight, bias, token_ids, temperature, logit_scale, soft_cap, entropy, sum_p2, chunk)
        if not torch.compiler.is_compiling():
            refuse_transforms("linear_token_logprobs with max_extra_bytes", args)
        results: tuple[Tensor, Tensor | None, Tensor | None] = _Chunked.apply(*args)  # type: ignore[no-untyped-call]
        return results


class _Chunked(torch.autograd.Function):
    """The function that computes the logits of a chunk of tokens again in the backward instead of keeping those of all tokens."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden, weight, bias, token_ids, temperature, logit_scale, soft_cap, entropy, sum_p2, chunk = args
        parts = []
        for rows in _chunks(hidden.shape[0], chunk):
            x = F.linear(hidden[rows], weight, bias)
            at = _at(temperature, rows)
            parts.append(reference.token_logprobs(x, token_ids[rows], at, logit_scale, soft_cap, entropy, sum_p2))
        logprobs, h, s = zip(*parts, strict=True)
        results = torch.cat(logprobs), torch.cat(h) if entropy else None, torch.cat(s) if sum_p2 else None
        per_token = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, token_ids, per_token, results[1])
        ctx.temperature, ctx.logit_scale, ctx.soft_cap, ctx.chunk = temperature, logit_scale, soft_cap, chunk
        if sum_p2:
            ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    @partial(once, "linear_token_logprobs with max_extra_bytes")
    def backward(ctx: Any, g: Tensor, h: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        with torch.autocast(g.device.type, enabled=False):
            return *_chunked_gradients(ctx, g, h), *(None,) * 7


def _chunked_gradients(ctx: Any, g: Tensor, h: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias, None if not needed, from g of the logprobs and h of the entropy."""
    hidden, weight, bias, token_ids, per_token, entropy = ctx.saved_tensors
    temperature = ctx.temperature if per_token is None else per_token
    inputs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
    grads = [torch.zeros_like(x) if needed else None for x, needed in inputs]
    grad_hidden, grad_weight, grad_bias = grads
    for rows in _chunks(hidden.shape[0], ctx.chunk):
        x = F.linear(hidden[rows], weight, bias)
        z = reference.head(x, ctx.logit_scale, ctx.soft_cap)
        of_entropy = None if h is None else (h[rows], entropy[rows])
        dz = _logits_gradient(z, token_ids[rows], _at(temperature, rows), g[rows], of_entropy)
        dx = _head_gradient(dz, z, ctx.logit_scale, ctx.soft_cap).to(x.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = dx @ weight
        if grad_weight is not None:
            grad_weight.addmm_(dx.T, hidden[rows])  # in the dtype of the weight: no second [V, D]
        if grad_bias is not None:
            grad_bias += dx.sum(0)
    return grads


def _logits_gradient(z: Tensor, token_ids: Tensor, temperature: float | Tensor, g: Tensor, entropy: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return (g ([j == y] - p) - h p (log p + H)) / temperature for the gradients g of logprobs and (h, H) of the entropy."""
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    log_p = (z / temperature).log_softmax(-1)
    p = log_p.exp()
    factor = g[:, None]
    if entropy is not None:
        factor = factor + entropy[0][:, None] * (log_p.masked_fill_(log_p == -torch.inf, 0) + entropy[1][:, None])
    dz = p.mul_(-factor)
    dz.scatter_add_(1, token_ids.clamp(min=0)[:, None], g[:, None])
    return dz.masked_fill_((token_ids == IGNORED)[:, None], 0).div_(temperature)


def _head_gradient(dz: Tensor, z: Tensor, logit_scale: float, soft_cap: float | None) -> Tensor:
    """Return the gradient before `reference.head`, whose results are z."""
    if soft_cap is not None:
        dz = dz * (1 - (z / soft_cap).square())
    return dz * logit_scale


def _chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    """Return at least one chunk, which may be empty."""
    return (slice(i, i + chunk) for i in range(0, max(num_tokens, 1), chunk))


def _at(temperature: float | Tensor, rows: slice) -> float | Tensor:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature
