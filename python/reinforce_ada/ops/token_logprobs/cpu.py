"""token_logprobs on the CPU: csrc/ops/token_logprobs behind torch's registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, address, constant, dense, resolved, row_address
from reinforce_ada.ops.token_logprobs.checks import check_temperature_values, wrong_token

_WHERE = "token_logprobs"


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    soft_cap: float | None,
    entropy: bool,
    sum_p2: bool,
    inplace_backward: bool,
    grad_out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logprobs, entropy or None, sum_p2 or None), each [T] float32; see the public function."""
    per_token = isinstance(temperature, Tensor)
    temperatures = dense(temperature, torch.float32) if isinstance(temperature, Tensor) else None
    head = (temperatures, 1.0 if per_token else float(temperature), float(logit_scale), float(soft_cap or 0))
    ids = constant(token_ids, torch.int64)
    logprobs, _, h, s = _forward_op(resolved(logits), ids, *head, entropy, sum_p2, inplace_backward, grad_out)
    return logprobs, h if entropy else None, s if sum_p2 else None


def _forward(
    logits: Tensor,
    token_ids: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    entropy: bool,
    sum_p2: bool,
    inplace_backward: bool,
    grad_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab = logits.shape
    check_values(_WHERE, token_ids, vocab, temperatures)
    logprobs, normalizers, h, s = empty_results(logits, entropy, sum_p2)
    cpu.token_logprobs_forward(
        row_address(logits),
        DTYPE_CODES[logits.dtype],
        num_tokens,
        vocab,
        logits.stride(0),
        address(token_ids),
        address(temperatures),
        temperature,
        logit_scale,
        soft_cap,
        address(logprobs),
        address(normalizers),
        address(h),
        address(s),
        torch.get_num_threads(),
    )
    return logprobs, normalizers, h, s


def check_values(where: str, token_ids: Tensor, vocab: int, temperatures: Tensor | None) -> None:
    """Ids and temperatures; not in the public function, because under torch.compile their values are known only when the operator runs."""
    row = cpu.first_invalid_token(address(token_ids), token_ids.shape[0], vocab)
    if row >= 0:
        raise wrong_token(where, token_ids, row, vocab)
    if temperatures is not None:
        check_temperature_values(where, temperatures)


def empty_results(rows: Tensor, entropy: bool, sum_p2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, normalizers [T, 2], entropy, sum_p2) for each of the `rows`, empty where not asked for."""
    num_tokens = rows.shape[0]
    return (
        rows.new_empty(num_tokens, dtype=torch.float32),
        rows.new_empty((num_tokens, 2), dtype=torch.float64),
        rows.new_empty(num_tokens if entropy else 0, dtype=torch.float32),
        rows.new_empty(num_tokens if sum_p2 else 0, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, temperatures, *ctx.head, _, _, ctx.inplace_backward, grad_out = inputs
    _, normalizers, entropy, sum_p2 = output
    ctx.save_for_backward(logits, token_ids, temperatures, normalizers, entropy, grad_out)
    ctx.mark_non_differentiable(normalizers, sum_p2)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, _: None, grad_entropy: Tensor | None, __: None) -> tuple[Any, ...]:
    logits, token_ids, temperatures, normalizers, entropy, grad_out = ctx.saved_tensors
    g, h = (None if grad is None else dense(grad) for grad in (grad_logprobs, grad_entropy))
    rest = (token_ids, temperatures, *ctx.head, normalizers, entropy, g, h)
    if ctx.inplace_backward:
        grad = logits.detach()  # shares memory and version: whoever still needs the logits then finds them changed, and raises
        _gradient_over_logits_op(grad, *rest)
    elif grad_out is not None:
        grad = grad_out.detach()  # an alias that nobody else holds, which a leaf takes as its gradient without a copy
        _gradient_into_op(grad, logits, *rest)
    else:
        grad = _gradient_op(logits, *rest)
    return grad, *(None,) * 9


def write_gradient(
    grad: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    normalizers: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    first_id: int = 0,
    bias_sums: Tensor | None = None,
) -> None:
    """Writes the gradient of logits that begin at the vocabulary's `first_id`, and adds its columns to `bias_sums` (float64)."""
    cpu.token_logprobs_gradient_piece(
        row_address(logits),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        first_id,
        address(token_ids),
        address(temperatures),
        temperature,
        logit_scale,
        soft_cap,
        address(normalizers),
        address(entropy),
        address(grad_logprobs),
        address(grad_entropy),
        row_address(grad),
        grad.stride(0),
        address(bias_sums),
        torch.get_num_threads(),
    )


def _gradient(logits: Tensor, *rest: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    write_gradient(grad, logits, *rest)
    return grad


def _gradient_over_logits(logits: Tensor, *rest: Any) -> None:
    write_gradient(logits, logits, *rest)


_SAVED = (
    "Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, float soft_cap, "
    "Tensor normalizers, Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy"
)

_gradient_op = NativeOp(
    "token_logprobs_gradient",
    f"(Tensor logits, {_SAVED}) -> Tensor",
    _gradient,
    lambda logits, *_: logits.new_empty(logits.shape),
)

_gradient_over_logits_op = NativeOp(
    "token_logprobs_gradient_over_logits",
    f"(Tensor(a!) logits, {_SAVED}) -> ()",
    _gradient_over_logits,
    lambda *_: None,
    mutates=("logits",),
)

_gradient_into_op = NativeOp(
    "token_logprobs_gradient_into",
    f"(Tensor(a!) grad, Tensor logits, {_SAVED}) -> ()",
    write_gradient,
    lambda *_: None,
    mutates=("grad",),
)

_forward_op = NativeOp(
    "token_logprobs",
    "(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, float soft_cap, "
    "bool entropy, bool sum_p2, bool inplace_backward, Tensor? grad_out) -> "
    "(Tensor logprobs, Tensor normalizers, Tensor entropy, Tensor sum_p2)",
    _forward,
    lambda logits, *settings: empty_results(logits, *settings[5:7]),
    setup_context=_setup_context,
    backward=_backward,
)
