"""Log-probabilities of given tokens from logits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import describe
from reinforce_ada.ops._dispatch import declare_native, operator, resolve
from reinforce_ada.ops._torch import share_memory
from reinforce_ada.ops.token_logprobs import reference
from reinforce_ada.ops.token_logprobs.checks import check_head, check_matrix, check_temperature, check_tokens, check_values
from reinforce_ada.ops.token_logprobs.contract import WHERE, TokenLogprobs, arguments, torch_operator

__all__ = ["TokenLogprobs", "token_logprobs"]

declare_native(WHERE, "cuda", "triton", "cpu", make=torch_operator)


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    logit_scale: float = ...,
    soft_cap: float | None = ...,
    entropy: Literal[False] = ...,
    sum_p2: Literal[False] = ...,
    inplace_backward: bool = ...,
    grad_out: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    logit_scale: float = ...,
    soft_cap: float | None = ...,
    entropy: bool = ...,
    sum_p2: bool = ...,
    inplace_backward: bool = ...,
    grad_out: Tensor | None = ...,
    backend: str = ...,
) -> TokenLogprobs: ...


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    entropy: bool = False,
    sum_p2: bool = False,
    inplace_backward: bool = False,
    grad_out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | TokenLogprobs:
    """Return the log-probability of one token in each row of logits, in one sweep and without a softmax in memory.

        z = logit_scale logits, then, with a soft cap, z = soft_cap tanh(z / soft_cap); then z / temperature; p = softmax(z)
        logprobs[t] = z[t, token_ids[t]] - logsumexp(z[t])
        entropy[t] = -sum_j p[t, j] log p[t, j]      sum_p2[t] = sum_j p[t, j]^2

    Differentiable in the logits through `logprobs` and `entropy`; once, not twice. `sum_p2` and the settings are constants.
    A logit of -inf has probability 0 (with a soft cap it is -soft_cap like any very negative one). A row whose token is -100 is not
    read: its results and its gradient are 0, whatever it holds.
    A row whose incoming gradients are 0 gets the gradient 0, whatever it holds.

    An id or temperature out of its range raises where the host sees it. The cuda and triton forms never wait for the device: there an id
    outside [0, V) makes its logprob and its row of the gradient NaN, and a wrong temperature makes
    everything of its row NaN.

    Args:
        logits: [T, V], float32, bfloat16 or float16 (float64: reference form). Rows may lie any distance apart (a slice of a
            larger tensor is not copied); within a row the logits must be contiguous.
        token_ids: [T] int64 or int32, in [0, V), or -100 to ignore the row.
        temperature: a positive number, or [T] for one temperature a row.
        logit_scale: multiplies the logits (Cohere's logit_scale, 1 / Granite's logits_scaling), where the model has not done so.
        soft_cap: limit of the logits' magnitude (Gemma 2's final_logit_softcapping), where the model has not applied it.
        entropy, sum_p2: also return them.
        inplace_backward: let the gradient overwrite the logits, so that no second [T, V] is allocated; forms that cannot do
            so allocate one. The logits must not be a leaf, and nothing else may need them in the backward pass: a second
            backward, or another operation that saved them, raises.
        grad_out: [T, V] of the logits' dtype, for logits that need a gradient: its memory becomes the gradient (of a leaf too, where its
            strides are the leaf's), so that none is allocated. If anything writes to it before the backward, a second backward included,
            the backward raises. Not together with `inplace_backward`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        logprobs [T] float32 (float64 for float64 logits), or `TokenLogprobs` when `entropy` or `sum_p2` is asked for.

    Raises:
        InputError: for shapes, dtypes, devices, strides, ids or temperatures that do not fit; BackendError for a backend that
            cannot run here.

    Source: the quantity every policy-gradient loss needs (arXiv 2402.03300, eq. 3); one-sweep normalizer after arXiv 1805.02867.
    """
    _check(logits, token_ids, temperature, inplace_backward)
    if grad_out is not None:
        _check_grad_out(grad_out, logits, inplace_backward)
    check_head(WHERE, logit_scale, soft_cap)
    form = resolve(WHERE, backend, logits.device, logits.dtype)
    scoring = (temperature, logit_scale, soft_cap, entropy, sum_p2)
    if form != "reference":
        logprobs, h, s, *_ = operator(WHERE, form)(*arguments(logits, token_ids, *scoring, inplace_backward, grad_out))
        results = logprobs, h if entropy else None, s if sum_p2 else None
    else:
        if not torch.compiler.is_compiling():  # a traced tensor has no values to check
            check_values(WHERE, token_ids, logits.shape[1], temperature)
        if grad_out is not None:
            logits = reference.with_gradient_in(grad_out, logits)
        results = reference.token_logprobs(logits, token_ids.long(), *scoring)
    return TokenLogprobs(*results) if entropy or sum_p2 else results[0]


def _check(logits: Tensor, token_ids: Tensor, temperature: float | Tensor, inplace_backward: bool) -> None:
    check_matrix(WHERE, "logits", logits)
    num_tokens, vocab = logits.shape
    if vocab == 0:
        raise InputError(WHERE, "logits of an empty vocabulary", "V >= 1")
    check_tokens(WHERE, token_ids, num_tokens, logits.device)
    check_temperature(WHERE, temperature, num_tokens, logits.device)
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise InputError(WHERE, "inplace_backward=True with logits that are a leaf", "logits computed by another operation")
    if inplace_backward and num_tokens > 1 and abs(logits.stride(0)) < vocab:
        raise InputError(WHERE, "inplace_backward=True with rows that overlap", "rows of their own", "logits.contiguous()")


def _check_grad_out(grad_out: Tensor, logits: Tensor, inplace_backward: bool) -> None:
    if inplace_backward:
        raise InputError(WHERE, "grad_out and inplace_backward=True", "one place for the gradient", "leave one out")
    if not (logits.requires_grad and torch.is_grad_enabled()):
        raise InputError(WHERE, "grad_out for logits that need no gradient", "logits.requires_grad, outside torch.no_grad()")
    if grad_out.shape != logits.shape or grad_out.dtype != logits.dtype or grad_out.device != logits.device or grad_out.requires_grad:
        given = f"grad_out is {describe(grad_out)}{' and requires a gradient' * grad_out.requires_grad}"
        raise InputError(WHERE, given, f"{describe(logits)}, without a gradient of its own")
    num_tokens, vocab = logits.shape
    if (vocab > 1 and grad_out.stride(1) != 1) or (num_tokens > 1 and abs(grad_out.stride(0)) < vocab):
        raise InputError(WHERE, f"grad_out has stride {grad_out.stride()}", "stride 1 in the last dimension and rows of their own")
    if share_memory(grad_out, logits):
        raise InputError(WHERE, "grad_out in the memory of the logits", "memory of its own", "or inplace_backward=True")
