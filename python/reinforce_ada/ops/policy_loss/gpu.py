"""policy_loss on a GPU: what its CUDA and its Triton form share, behind torch's registration."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from reinforce_ada.ops._torch import NativeOp, run_when_traced
from reinforce_ada.ops.policy_loss.contract import SCHEMA, Inputs, Results, empty_results, fake, gradients, setup_context


class Kernels(Protocol):
    """What the module of a form provides. It writes into the tensors it is given, allocates nothing and never waits for the device."""

    def workspace_size(self, num_tokens: int, num_sequences: int, /) -> int:
        """How many float64 numbers `evaluate` works in."""

    def evaluate(self, inputs: Inputs, value: Tensor, metrics: Tensor, grad: Tensor, grad_entropy: Tensor, workspace: Tensor, /) -> None:
        """Writes value [] float32, metrics float64 as METRICS lists them, grad as logprobs, with entropy_grad also grad_entropy as entropy.

        A cu_seqlens that does not go from 0 to T without decreasing makes everything NaN;
        nothing outside of the tensors is read.
        """


def policy_loss(backend: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(loss, metrics in the order of `METRICS`), float32 and float64, by the form `backend`; see the public function."""
    value, metrics, _, _ = form(backend).evaluate(*inputs)
    return value, metrics


class Form:
    """The kernels of one backend as a torch operator, reinforce_ada::policy_loss_<backend>."""

    def __init__(self, backend: str) -> None:
        self._kernels = cast("Kernels", import_module(f"reinforce_ada.ops.policy_loss.{backend}"))
        self.evaluate = NativeOp(
            f"policy_loss_{backend}", SCHEMA, self._evaluate, fake, setup_context=setup_context, backward=_backward, device_type=None
        )

    def _evaluate(self, *given: Any) -> Results:
        inputs = Inputs(*given)
        results, logprobs = empty_results(inputs.logprobs, inputs.entropy, inputs.entropy_grad), inputs.logprobs
        workspace = logprobs.new_empty(self._kernels.workspace_size(logprobs.numel(), inputs.num_sequences), dtype=torch.float64)
        self._kernels.evaluate(inputs, *results, workspace)
        return results


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_value is None:
        return gradients(None, None)
    # Always multiplied: to see that the factor is 1 would be to wait for the device.
    grad, grad_entropy = (x * grad_value for x in ctx.saved_tensors)
    return gradients(grad, grad_entropy if ctx.wants_entropy else None)


_forms: dict[str, Form] = {}


def form(backend: str) -> Form:
    """The operator of "cuda" or "triton", made when it is first asked for."""
    _make(backend)
    return _forms[backend]


@run_when_traced  # it could not trace the making of an operator
def _make(backend: str) -> None:
    if backend not in _forms:
        _forms[backend] = Form(backend)
