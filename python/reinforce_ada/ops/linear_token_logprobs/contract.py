"""Inputs and outputs of a native form of linear_token_logprobs, and its registration with torch. Device-independent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._torch import NativeOp, constant, parameters, resolved
from reinforce_ada.ops.token_logprobs.contract import empty_scores, incoming_gradients, scoring

WHERE = "linear_token_logprobs"


class Inputs(NamedTuple):
    """The arguments of a native form."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [T] int64
    temperatures: Tensor | None  # [T] float32, or None for `temperature` in every row
    temperature: float
    logit_scale: float
    soft_cap: float  # 0: none
    entropy: bool
    sum_p2: bool
    extra_bytes: int | None  # that may be held, see the public function; None for the backend's own choice

    @property
    def head(self) -> Head:
        """Return the output head."""
        return Head(self.weight, self.bias, self.temperatures, self.temperature, self.logit_scale, self.soft_cap)


class GradientInputs(NamedTuple):
    """The inputs of the gradients of hidden, weight and bias, besides the normalizers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    soft_cap: float
    entropy: Tensor
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    of_hidden: bool
    of_weight: bool
    of_bias: bool
    extra_bytes: int | None

    @property
    def head(self) -> Head:
        """Return the output head."""
        return Head(self.weight, self.bias, self.temperatures, self.temperature, self.logit_scale, self.soft_cap)


Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]  # of hidden [T, D], weight [V, D] and bias [V]; empty where not wanted


@dataclass(frozen=True, slots=True)
class Head:
    """The output head, which turns hidden states into logits: z = logit_scale (hidden weight^T + bias), capped, over the temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperatures: Tensor | None  # [T] float32
    temperature: float
    logit_scale: float
    soft_cap: float  # 0: none

    @property
    def vocab(self) -> int:
        """Return V."""
        return self.weight.shape[0]

    @property
    def scoring(self) -> tuple[Tensor | None, float, float, float]:
        """Return the numbers that turn the products into log-probabilities, as records have them."""
        return self.temperatures, self.temperature, self.logit_scale, self.soft_cap

    def at(self, rows: Tensor | slice) -> Head:
        """Return the head of these tokens."""
        return self if self.temperatures is None else replace(self, temperatures=take(self.temperatures, rows))

    def piece(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return the head with these rows of the weight and of the bias."""
        return self.weight[rows], None if self.bias is None else self.bias[rows]


class ScoredTokens(NamedTuple):
    """Tokens with the values that the gradient of their logits needs, each [T]; None for an incoming gradient that is 0."""

    ids: Tensor
    normalizers: tuple[Tensor, ...]
    entropy: Tensor  # empty where grad_entropy is None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None

    def at(self, rows: Tensor | slice) -> ScoredTokens:
        """Return these of the tokens."""
        entropy = take(self.entropy, rows) if len(self.entropy) else self.entropy
        g, h = (None if grad is None else take(grad, rows) for grad in (self.grad_logprobs, self.grad_entropy))
        return ScoredTokens(take(self.ids, rows), tuple(take(x, rows) for x in self.normalizers), entropy, g, h)

    def reached(self) -> Tensor:
        """Return whether a gradient reaches the token, [T]."""
        nonzero = [grad != 0 for grad in (self.grad_logprobs, self.grad_entropy) if grad is not None]
        return reduce(or_, nonzero) & (self.ids != IGNORED) if nonzero else torch.zeros_like(self.ids, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Plan:
    """The part that is held at once: the logits of `tokens` hidden states against `piece` rows of the weight."""

    tokens: int
    piece: int

    def pieces(self, vocab: int) -> Iterator[slice]:
        """Return the pieces of the vocabulary."""
        return (slice(i, min(i + self.piece, vocab)) for i in range(0, vocab, self.piece))


def take(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Return x[rows], without a copy if the rows are consecutive."""
    if isinstance(rows, slice):
        return x[rows]
    first, last = int(rows[0]), int(rows[-1])
    return x[first : last + 1] if last - first + 1 == len(rows) else x.index_select(0, rows)


class Kernels(Protocol):
    """The functions that the module of a backend provides; `NORMALIZERS` and `empty_normalizers` as in token_logprobs."""

    NORMALIZERS: tuple[str, ...]

    def empty_normalizers(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return memory for the normalizers of these rows."""

    def scores(self, x: Inputs) -> tuple[Tensor, ...]:
        """Return (*Scores, *normalizers)."""

    def gradients(self, x: GradientInputs, *normalizers: Tensor, onto: Tensor | None = None) -> Gradients:
        """Return the gradients that are wanted. With `onto`, the weight's gradient is added to `onto` instead."""


def arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    soft_cap: float | None,
    entropy: bool,
    sum_p2: bool,
    extra_bytes: int | None,
) -> Inputs:
    """Return the inputs of a native form for the checked arguments of the public function."""
    ids, head = constant(token_ids, torch.int64), scoring(temperature, logit_scale, soft_cap)
    return Inputs(resolved(hidden), resolved(weight), bias, ids, *head, entropy, sum_p2, extra_bytes)


def empty_gradients(hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool) -> Gradients:
    """Return memory for the gradients."""
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


def torch_operator(backend: str, kernels: Kernels) -> NativeOp:
    """Return the operator of a backend's kernels: (*Scores, *normalizers) of `Inputs`, differentiable in hidden, weight and bias."""
    normalizers = ", ".join(f"Tensor {name}" for name in kernels.NORMALIZERS)
    count = len(GradientInputs._fields)
    gradient_op = NativeOp(
        f"{WHERE}_gradient",
        backend,
        f"({parameters(GradientInputs)}, {normalizers}) -> (Tensor, Tensor, Tensor)",
        lambda *given: kernels.gradients(GradientInputs(*given[:count]), *given[count:]),
        lambda hidden, weight, *rest: empty_gradients(hidden, weight, *rest[count - 6 : count - 3]),
    )

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        x, saved = saved_inputs(ctx, grads, *needed)
        results = gradient_op(*x, *saved)
        return *(grad if wanted else None for grad, wanted in zip(results, needed, strict=True)), *(None,) * 8

    def fake(*given: Any) -> tuple[Tensor, ...]:
        x = Inputs(*given)
        return *empty_scores(x.hidden, x.entropy, x.sum_p2), *kernels.empty_normalizers(x.hidden)

    results = f"Tensor logprobs, Tensor entropy, Tensor sum_p2, {normalizers}"
    schema = f"({parameters(Inputs)}) -> ({results})"
    forward = lambda *given: kernels.scores(Inputs(*given))  # noqa: E731
    return NativeOp(WHERE, backend, schema, forward, fake, setup_context=setup_context, backward=backward)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what `saved_inputs` returns."""
    hidden, weight, bias, token_ids, temperatures, *ctx.scalars, ctx.with_entropy, _, ctx.extra_bytes = inputs
    _, entropy, sum_p2, *normalizers = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, temperatures, entropy, *normalizers)
    ctx.mark_non_differentiable(sum_p2, *normalizers)
    ctx.set_materialize_grads(False)


def saved_inputs(
    ctx: Any, grads: Sequence[Tensor | None], of_hidden: bool, of_weight: bool, of_bias: bool
) -> tuple[GradientInputs, Sequence[Tensor]]:
    """Return the inputs from which a backward with these incoming gradients computes its own, and the normalizers."""
    *head, entropy = ctx.saved_tensors[:6]
    wanted = (of_hidden, of_weight, of_bias, ctx.extra_bytes)
    saved: Any = (*head, *ctx.scalars, entropy, *incoming_gradients(ctx, grads), *wanted)
    return GradientInputs._make(saved), ctx.saved_tensors[6:]
