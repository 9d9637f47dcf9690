"""Inputs and outputs of a native form of token_logprobs, and its registration with torch. Device-independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reinforce_ada.ops._torch import NativeOp, constant, dense, parameters, resolved

WHERE = "token_logprobs"


class TokenLogprobs(NamedTuple):
    """The results of a sweep over the vocabulary for each token; None for those that were not requested.

    Attributes:
        logprobs: [T], nats.
        entropy: [T], nats.
        sum_p2: [T], in (0, 1].
    """

    logprobs: Tensor
    entropy: Tensor | None
    sum_p2: Tensor | None


class Scores(NamedTuple):
    """The same results from a native form: float32, and empty for those that were not requested."""

    logprobs: Tensor
    entropy: Tensor
    sum_p2: Tensor


class Inputs(NamedTuple):
    """The arguments of a native form."""

    logits: Tensor  # [T, V] float32, bfloat16 or float16, rows logits.stride(0) apart
    token_ids: Tensor  # [T] int64
    temperatures: Tensor | None  # [T] float32, or None for `temperature` in every row
    temperature: float
    logit_scale: float
    soft_cap: float  # 0: none
    entropy: bool
    sum_p2: bool
    inplace_backward: bool
    grad_out: Tensor | None


class GradientInputs(NamedTuple):
    """The inputs of the gradient of the logits, besides the normalizers."""

    logits: Tensor
    token_ids: Tensor
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    soft_cap: float
    entropy: Tensor  # empty where grad_entropy is None
    grad_logprobs: Tensor | None  # None: 0 for every token
    grad_entropy: Tensor | None


class Kernels(Protocol):
    """The functions that the module of a backend provides. A GPU form allocates nothing in the latter two and never waits for the device.

    `NORMALIZERS` names what the forward saves for the gradient besides the entropy, so that the probabilities keep their accuracy with
    logits of any size. A row whose token is -100 is not read.
    """

    NORMALIZERS: tuple[str, ...]

    def empty_normalizers(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return memory for the normalizers of these rows."""

    def forward(self, x: Inputs, out: Scores, *normalizers: Tensor) -> None:
        """Write the scores and the normalizers."""

    def gradient(self, grad: Tensor, x: GradientInputs, *normalizers: Tensor) -> None:
        """Write `grad` [T, V], which may be the logits themselves.

        grad[j] = (g ([j == y] - p[j]) - h p[j] (log p[j] + entropy)) dz[j]/dx[j] / t, 0 in a row with g = h = 0, which is not read.
        """


def scoring(temperature: float | Tensor, logit_scale: float, soft_cap: float | None) -> tuple[Tensor | None, float, float, float]:
    """Return (temperatures, temperature, logit_scale, soft_cap) as records have them."""
    if isinstance(temperature, Tensor):
        return dense(temperature, torch.float32), 1.0, float(logit_scale), float(soft_cap or 0)
    return None, float(temperature), float(logit_scale), float(soft_cap or 0)


def arguments(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    soft_cap: float | None,
    entropy: bool,
    sum_p2: bool,
    inplace_backward: bool,
    grad_out: Tensor | None,
) -> Inputs:
    """Return the inputs of a native form for the checked arguments of the public function."""
    ids, head = constant(token_ids, torch.int64), scoring(temperature, logit_scale, soft_cap)
    return Inputs(resolved(logits), ids, *head, entropy, sum_p2, inplace_backward, grad_out)


def empty_scores(rows: Tensor, entropy: bool, sum_p2: bool) -> Scores:
    """Return memory for the scores of these rows."""
    num_tokens, dtype = rows.shape[0], torch.float32
    logprobs, h = rows.new_empty(num_tokens, dtype=dtype), rows.new_empty(num_tokens if entropy else 0, dtype=dtype)
    return Scores(logprobs, h, rows.new_empty(num_tokens if sum_p2 else 0, dtype=dtype))


def incoming_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of logprobs and entropy. An entropy that was not requested is empty, and so would its gradient be."""
    g, h = grads[0], grads[1] if ctx.with_entropy else None
    return None if g is None else dense(g), None if h is None else dense(h)


def torch_operator(backend: str, kernels: Kernels) -> NativeOp:
    """Return the operator of a backend's kernels: (*Scores, *normalizers) of `Inputs`, differentiable in the logits."""
    normalizers = ", ".join(f"Tensor {name}" for name in kernels.NORMALIZERS)
    new_gradient, over_logits, into = _gradient_operators(backend, kernels, normalizers)

    def forward(*given: Any) -> tuple[Tensor, ...]:
        x = Inputs(*given)
        out, saved = empty_scores(x.logits, x.entropy, x.sum_p2), kernels.empty_normalizers(x.logits)
        kernels.forward(x, out, *saved)
        return *out, *saved

    def fake(*given: Any) -> tuple[Tensor, ...]:
        x = Inputs(*given)
        return *empty_scores(x.logits, x.entropy, x.sum_p2), *kernels.empty_normalizers(x.logits)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        logits, token_ids, temperatures, entropy, grad_out, *saved = ctx.saved_tensors
        rest = (token_ids, temperatures, *ctx.head, entropy, *incoming_gradients(ctx, grads), *saved)
        if ctx.inplace_backward:
            grad = logits.detach()  # shares memory and version: whatever still needs the logits then finds them changed, and raises
            over_logits(grad, *rest)
        elif grad_out is not None:
            grad = grad_out.detach()  # an alias that nothing else holds, which a leaf takes as its gradient without a copy
            into(grad, logits, *rest)
        else:
            grad = new_gradient(logits, *rest)
        return grad, *(None,) * 9

    results = f"Tensor logprobs, Tensor entropy, Tensor sum_p2, {normalizers}"
    schema = f"({parameters(Inputs)}) -> ({results})"
    return NativeOp(WHERE, backend, schema, forward, fake, setup_context=_setup_context, backward=backward)


def _gradient_operators(backend: str, kernels: Kernels, normalizers: str) -> tuple[NativeOp, NativeOp, NativeOp]:
    """Return the operators of the gradient: one that returns it, one that writes it over the logits, and one that writes it elsewhere."""
    count = len(GradientInputs._fields)

    def write(grad: Tensor, *given: Any) -> None:
        kernels.gradient(grad, GradientInputs(*given[:count]), *given[count:])

    def gradient(logits: Tensor, *rest: Any) -> Tensor:
        grad = logits.new_empty(logits.shape)
        write(grad, logits, *rest)
        return grad

    return (
        NativeOp(
            f"{WHERE}_gradient",
            backend,
            f"({parameters(GradientInputs)}, {normalizers}) -> Tensor",
            gradient,
            lambda logits, *_: logits.new_empty(logits.shape),
        ),
        NativeOp(
            f"{WHERE}_gradient_over_logits",
            backend,
            f"({parameters(GradientInputs, written='logits')}, {normalizers}) -> ()",
            lambda logits, *rest: write(logits, logits, *rest),
            lambda *_: None,
            mutates=("logits",),
        ),
        NativeOp(
            f"{WHERE}_gradient_into",
            backend,
            f"(Tensor(a!) grad, {parameters(GradientInputs)}, {normalizers}) -> ()",
            write,
            lambda *_: None,
            mutates=("grad",),
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, temperatures, *ctx.head, ctx.with_entropy, _, ctx.inplace_backward, grad_out = inputs
    _, entropy, sum_p2, *normalizers = output
    ctx.save_for_backward(logits, token_ids, temperatures, entropy, grad_out, *normalizers)
    ctx.mark_non_differentiable(sum_p2, *normalizers)
    ctx.set_materialize_grads(False)
