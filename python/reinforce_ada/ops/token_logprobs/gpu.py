"""token_logprobs on a GPU: what its CUDA and its Triton form share, behind torch's registration."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from reinforce_ada.ops._torch import NativeOp, constant, dense, resolved, run_when_traced


class Kernels(Protocol):
    """What the module of a form provides. It writes into the tensors it is given, allocates nothing and never waits for the device.

    With z = logit_scale x, under a soft cap (0: none) soft_cap tanh(z / soft_cap), and temperature t of the row:

        row_max = max_j z[j]      log2_sum = log2 sum_j 2^((z[j] - row_max) log2(e) / t)

    so that p[j] = 2^((z[j] - row_max) log2(e) / t - log2_sum) keeps its accuracy with logits of any size (in which unit row_max is, is
    the form's own affair). A row whose token is -100
    is not read. A token outside the vocabulary makes the logprob and the gradient of its row NaN, a temperature that is not positive
    and finite everything of its row; neither reads anything outside of the logits.
    """

    def forward(
        self,
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
        /,
    ) -> None:
        """Writes the last five, [T] float32 each; entropy and sum_p2 are empty where they are not wanted.

        logits: [T, V] float32, bfloat16 or float16, rows `logits.stride(0)` apart. token_ids: [T] int64. temperatures: [T] float32, or
        None for `temperature` in every row.
        """

    def gradient(
        self,
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
        /,
    ) -> None:
        """Writes `grad` [T, V], which may be the logits themselves; entropy is read where grad_entropy is given.

        grad[j] = (g ([j == y] - p[j]) - h p[j] (log p[j] + entropy)) dz[j]/dx[j] / t, 0 in a row with g = h = 0, which is not read.
        """


def token_logprobs(
    backend: str,
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
    """(logprobs, entropy or None, sum_p2 or None), each [T] float32, by the form `backend`; see the public function."""
    per_token = isinstance(temperature, Tensor)
    temperatures = dense(temperature, torch.float32) if isinstance(temperature, Tensor) else None
    head = (temperatures, 1.0 if per_token else float(temperature), float(logit_scale), float(soft_cap or 0))
    run = form(backend).forward
    logprobs, _, _, h, s = run(resolved(logits), constant(token_ids, torch.int64), *head, entropy, sum_p2, inplace_backward, grad_out)
    return logprobs, h if entropy else None, s if sum_p2 else None


class Form:
    """The kernels of one backend as torch operators: reinforce_ada::token_logprobs_<backend> and those of its gradient."""

    def __init__(self, backend: str) -> None:
        self._kernels = cast("Kernels", import_module(f"reinforce_ada.ops.token_logprobs.{backend}"))
        self.gradient = NativeOp(
            f"token_logprobs_gradient_{backend}",
            f"(Tensor logits, {_SAVED}) -> Tensor",
            self._gradient,
            lambda logits, *_: logits.new_empty(logits.shape),
            device_type=None,
        )
        self.gradient_over_logits = NativeOp(
            f"token_logprobs_gradient_over_logits_{backend}",
            f"(Tensor(a!) logits, {_SAVED}) -> ()",
            lambda logits, *rest: self._kernels.gradient(logits, logits, *rest),
            lambda *_: None,
            mutates=("logits",),
            device_type=None,
        )
        self.gradient_into = NativeOp(
            f"token_logprobs_gradient_into_{backend}",
            f"(Tensor(a!) grad, Tensor logits, {_SAVED}) -> ()",
            self._kernels.gradient,
            lambda *_: None,
            mutates=("grad",),
            device_type=None,
        )
        self.forward = NativeOp(
            f"token_logprobs_{backend}",
            "(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, float soft_cap, "
            "bool entropy, bool sum_p2, bool inplace_backward, Tensor? grad_out) -> "
            "(Tensor logprobs, Tensor row_max, Tensor log2_sum, Tensor entropy, Tensor sum_p2)",
            self._forward,
            lambda logits, *settings: _empty_results(logits, *settings[5:7]),
            setup_context=_setup_context,
            backward=self._backward,
            device_type=None,
        )

    def _forward(self, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *inputs, entropy, sum_p2, _, _ = args
        results = _empty_results(logits, entropy, sum_p2)
        self._kernels.forward(logits, *inputs, *results)
        return results

    def _gradient(self, logits: Tensor, *rest: Any) -> Tensor:
        grad = logits.new_empty(logits.shape)
        self._kernels.gradient(grad, logits, *rest)
        return grad

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        logits, token_ids, temperatures, row_max, log2_sum, entropy, grad_out = ctx.saved_tensors
        g, h = (None if grad is None else dense(grad) for grad in (grads[0], grads[3] if ctx.with_entropy else None))
        rest = (token_ids, temperatures, *ctx.head, row_max, log2_sum, entropy, g, h)
        if ctx.inplace_backward:
            grad = logits.detach()  # shares memory and version: whoever still needs the logits then finds them changed, and raises
            self.gradient_over_logits(grad, *rest)
        elif grad_out is not None:
            grad = grad_out.detach()  # an alias that nobody else holds, which a leaf takes as its gradient without a copy
            self.gradient_into(grad, logits, *rest)
        else:
            grad = self.gradient(logits, *rest)
        return grad, *(None,) * 9


_SAVED = (
    "Tensor token_ids, Tensor? temperatures, float temperature, float logit_scale, float soft_cap, "
    "Tensor row_max, Tensor log2_sum, Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy"
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, temperatures, *ctx.head, ctx.with_entropy, _, ctx.inplace_backward, grad_out = inputs
    _, row_max, log2_sum, entropy, sum_p2 = output
    ctx.save_for_backward(logits, token_ids, temperatures, row_max, log2_sum, entropy, grad_out)
    ctx.mark_non_differentiable(row_max, log2_sum, sum_p2)
    ctx.set_materialize_grads(False)


def _empty_results(logits: Tensor, entropy: bool, sum_p2: bool) -> tuple[Tensor, ...]:
    """(logprobs, row_max, log2_sum, entropy, sum_p2), the last two empty where not asked for."""
    num_tokens = logits.shape[0]
    sizes = (num_tokens, num_tokens, num_tokens, num_tokens if entropy else 0, num_tokens if sum_p2 else 0)
    return tuple(logits.new_empty(size, dtype=torch.float32) for size in sizes)


_forms: dict[str, Form] = {}


def form(backend: str) -> Form:
    """The operators of "cuda" or "triton", made when they are first asked for."""
    _make(backend)
    return _forms[backend]


@run_when_traced  # it could not trace the making of an operator
def _make(backend: str) -> None:
    if backend not in _forms:
        _forms[backend] = Form(backend)
