"""Log-probabilities of given tokens from hidden states and the output head."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import describe
from reinforce_ada.ops._dispatch import declare_native, operator, resolve
from reinforce_ada.ops.linear_token_logprobs import reference
from reinforce_ada.ops.linear_token_logprobs.contract import WHERE, arguments, torch_operator
from reinforce_ada.ops.token_logprobs import TokenLogprobs
from reinforce_ada.ops.token_logprobs.checks import check_bias, check_head, check_matrix, check_temperature, check_tokens, check_values

__all__ = ["linear_token_logprobs"]

declare_native(WHERE, "triton", "cpu", make=torch_operator)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    soft_cap: float | None = ...,
    temperature: float | Tensor = ...,
    entropy: Literal[False] = ...,
    sum_p2: Literal[False] = ...,
    max_extra_bytes: int | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    soft_cap: float | None = ...,
    temperature: float | Tensor = ...,
    entropy: bool = ...,
    sum_p2: bool = ...,
    max_extra_bytes: int | None = ...,
    backend: str = ...,
) -> TokenLogprobs: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    sum_p2: bool = False,
    max_extra_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor | TokenLogprobs:
    """Return the log-probability of one token for each hidden state, through the output head of a language model.

        z = logit_scale (hidden weight^T + bias), then, with a soft cap, z = soft_cap tanh(z / soft_cap)
        results = token_logprobs(z, token_ids, temperature=temperature)

    The matmul runs in the dtype of its inputs, like a model's head, also under autocast; everything after it in float32.
    Differentiable in hidden, weight and bias through `logprobs` and `entropy`.

    `max_extra_bytes` bounds the memory beyond the inputs, the results and the returned gradients: logits are computed for as many tokens at
    a time as fit, in the cpu form also for a piece of the vocabulary at a time, and once more in the backward. The weight's
    gradient is then the sum over chunks in the dtype of the weight. Without it the cpu form takes 8 MB; the reference lets autograd keep
    the logits of all tokens. Several micro-batches accumulate into `weight.grad` as usual.
    The triton form never stores logits; its backward keeps their gradient for all tokens and a piece of the vocabulary, as large as
    `max_extra_bytes` (256 MB if it is None) allows, and for fewer tokens at a time only if a piece of 128 does not fit.

    An id or temperature out of its range raises where the host sees it. The triton form never waits for the device: there an id outside
    [0, V) makes its logprob and every gradient to which it contributes NaN, and a wrong temperature also all results of its row.

    Args:
        hidden: [T, D], float32, bfloat16 or float16 (float64 for checks); in the reference finite also where the token is ignored.
        weight: [V, D], of the same dtype.
        token_ids: [T] int64 or int32, in [0, V), or -100: such a row has results and gradient 0.
        bias: [V], of the same dtype.
        logit_scale: factor on the logits (Cohere's logit_scale; 1 / logits_scaling for Granite).
        soft_cap: limit of the logits' magnitude (Gemma 2's final_logit_softcapping).
        temperature: a positive number, or [T] for one temperature a token.
        entropy, sum_p2: also return them, see `token_logprobs`.
        max_extra_bytes: at least that of one token's logits, 40 V (80 V for float64).
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        logprobs [T] float32 (float64 for float64 inputs), or `TokenLogprobs` when `entropy` or `sum_p2` is asked for.

    Raises:
        InputError: for arguments that do not fit; BackendError for a backend that cannot run here.

    Source: token_logprobs behind a linear head, chunked as in arXiv 2411.09009 (Cut Your Losses).
    """
    _check_head(hidden, weight, bias, logit_scale, soft_cap)
    check_tokens(WHERE, token_ids, hidden.shape[0], hidden.device)
    check_temperature(WHERE, temperature, hidden.shape[0], hidden.device)
    row_bytes = weight.shape[0] * reference.BYTES_PER_LOGIT * (2 if weight.dtype == torch.float64 else 1)
    reference.check_extra_bytes(WHERE, max_extra_bytes, row_bytes)
    scoring = (temperature, logit_scale, soft_cap, entropy, sum_p2)
    form = resolve(WHERE, backend, hidden.device, hidden.dtype)
    if form != "reference":
        logprobs, h, s, *_ = operator(WHERE, form)(*arguments(hidden, weight, bias, token_ids, *scoring, max_extra_bytes))
        results = logprobs, h if entropy else None, s if sum_p2 else None
    else:
        if not torch.compiler.is_compiling():  # a traced tensor has no values to check
            check_values(WHERE, token_ids, weight.shape[0], temperature)
        chunk = None if max_extra_bytes is None else max_extra_bytes // row_bytes
        results = reference.linear_token_logprobs(hidden, weight, bias, token_ids.long(), *scoring, chunk)
    return TokenLogprobs(*results) if entropy or sum_p2 else results[0]


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, soft_cap: float | None) -> None:
    check_matrix(WHERE, "hidden", hidden)
    check_matrix(WHERE, "weight", weight)
    vocab, width = weight.shape
    if hidden.shape[1] != width or hidden.dtype != weight.dtype or hidden.device != weight.device or vocab == 0:
        given = f"hidden is {describe(hidden)}, weight {describe(weight)}"
        raise InputError(WHERE, given, "[T, D] and [V, D] of one dtype and device, V >= 1", "cast one with .to(dtype)")
    check_bias(WHERE, bias, weight)
    check_head(WHERE, logit_scale, soft_cap)
