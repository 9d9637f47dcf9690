"""A custom loss: a function of each token's logprob in plain PyTorch, in the place of a built-in loss.

It is called as `loss(logprobs, old_logprobs, advantages, mask)` and returns one loss a token. Everything around it stays as it is:
rollout correction, KL, entropy bonus, aggregation and metrics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.loading import load
from reinforce_ada.ops._checks import describe
from reinforce_ada.ops._torch import is_eager, run_when_traced
from reinforce_ada.ops.policy_loss.settings import LOSSES, WHERE, CustomLoss
from reinforce_ada.outside import one_line

IN_PYTORCH = "a loss written in PyTorch"  # as `Form.lacks` lists it: a custom loss, or one that only the reference has


_loaded: dict[str, CustomLoss] = {}


def loss_of(where: str, loss: str | CustomLoss) -> str | CustomLoss:
    """Return the function that "module:function" or "file.py:function" names; the name of a built-in loss, or a function, as it is."""
    if not isinstance(loss, str):
        _check(where, loss, loss)
        return loss
    if ":" not in loss:
        return loss
    _load(where, loss)
    return _loaded[loss]


@run_when_traced  # it could not trace an import
def _load(where: str, spec: str) -> None:
    loss = load(where, "loss", spec)
    _check(where, spec, loss)
    _loaded[spec] = loss


def _check(where: str, named: object, loss: object) -> None:
    if not callable(loss) or isinstance(loss, type):
        given = f"loss {one_line(repr(named))} is {'a class' if isinstance(loss, type) else 'not callable'}"
        raise InputError(where, given, "a function of (logprobs, old_logprobs, advantages, mask)")


def needs_of(loss: str | CustomLoss) -> tuple[str, ...]:
    """Return what a form has to support for this loss, as `resolve` takes it."""
    return () if loss in LOSSES else (IN_PYTORCH,)


def shown(loss: str | CustomLoss) -> str:
    """Return a loss as messages show it."""
    return repr(loss) if isinstance(loss, str) else str(getattr(loss, "__qualname__", type(loss).__name__))


def evaluate(loss: CustomLoss, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """Return the checked loss of each token; all tensors have one value per token, 0 where the mask is False.

    Raises:
        InputError: for anything but one loss per token in the dtype of `logp`, and for a loss that does not depend on `logp`. On the CPU
            the backward raises it too, for a gradient that is not finite at a token whose inputs are.
    """
    differentiable = torch.is_grad_enabled() and logp.requires_grad
    # Elsewhere the values are not looked at: a GPU would have to be waited for, a traced tensor has none.
    watched = differentiable and logp.is_cpu and is_eager((logp,))
    given = logp.view_as(logp) if watched else logp
    out: Any = loss(given, old, adv, mask)
    if not isinstance(out, Tensor):
        raise InputError(WHERE, f"loss {shown(loss)} returned {type(out).__name__}", "a tensor with one loss a token")
    if out.shape != logp.shape or out.dtype != logp.dtype or out.device != logp.device:
        raise InputError(WHERE, f"loss {shown(loss)} returned {describe(out)}", f"{describe(logp)}, one loss a token")
    if differentiable and not out.requires_grad:
        raise InputError(WHERE, f"loss {shown(loss)} returned a tensor without a gradient", "a differentiable function of the logprobs")
    if watched:
        _watch(loss, given, old, adv, mask, out)
    return out


def _watch(loss: CustomLoss, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, out: Tensor) -> None:
    """Make the backward raise if the loss turns a finite incoming gradient into one that is not finite."""
    incoming: list[Tensor] = []

    def check(grad: Tensor) -> None:
        if not incoming:  # what the loss has kept of the logprobs is differentiated, not the loss
            return
        wrong = mask & ~grad.isfinite() & logp.isfinite() & old.isfinite() & adv.isfinite() & incoming.pop().isfinite()
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            values = f"logprob {logp[at].item():.4g}, old logprob {old[at].item():.4g}, advantage {adv[at].item():.4g}"
            given = f"loss {shown(loss)} has the gradient {grad[at].item()} at token {list(at)} ({values})"
            raise InputError(WHERE, given, "a finite gradient of every counted token")

    hooks: tuple[tuple[Any, Any], ...] = ((out, incoming.append), (logp, check))
    for tensor, hook in hooks:
        tensor.register_hook(hook)
