"""Registration of native operators with torch: one description, two ways in.

A traced call (torch.compile, export, make_fx, fake tensors) goes through `torch.library`; an eager call on plain tensors takes a
plain `autograd.Function`, which costs 6 us instead of 21 (forward) and 35 instead of 87 (forward and backward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "reinforce_ada"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, float, bool))
_traced, _modes, _transformed = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def is_eager(args: Sequence[Any]) -> bool:
    """Whether a call may pass torch's dispatcher by: nothing traces or transforms it, and every tensor is a plain one."""
    if _traced() or _modes() or _transformed():
        return False
    for a in args:  # noqa: SIM110  all() over a generator takes three times as long
        if type(a) not in _PLAIN and isinstance(a, Tensor):
            return False
    return True


def address(tensor: Tensor | None) -> int:
    """What a native kernel takes for a tensor: its address, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


_F = TypeVar("_F", bound=Callable[..., Any])


def run_when_traced(function: _F) -> _F:
    """A function of Python values that tracing runs as it is and takes the result of as a constant, instead of looking inside."""
    # What torch.compiler.assume_constant_result does, without importing the compiler, and Triton with it.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class NativeOp:
    """A native operator: callable, differentiable where `backward` is given, known to torch as reinforce_ada::<name>.

    Args:
        name: in the namespace `reinforce_ada`.
        schema: torch schema of the arguments and results, e.g. "(Tensor x, float scale) -> Tensor".
        forward: computes on real tensors. It may not be an alias of an argument that it returns.
        fake: the same signature; returns empty tensors of the right shape, dtype and strides.
        setup_context: `(ctx, inputs, output)`, as for torch.autograd.Function; saves what `backward` needs.
        backward: `(ctx, *grads)`; it runs under tracing too, so it must call torch functions and other `NativeOp`s only.
        mutates: names of the arguments that `forward` writes to.
        device_type: of the tensors it takes; None for any.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
        device_type: str | None = "cpu",
    ) -> None:
        self.op = torch.library.custom_op(
            f"{NAMESPACE}::{name}", forward, mutates_args=tuple(mutates), device_types=device_type, schema=schema
        )
        self.op.register_fake(fake)
        self._forward = forward
        self._written = [i for i, argument in enumerate(self.op._opoverload._schema.arguments) if argument.name in mutates]
        self._function: Any = None
        if backward is not None:
            self.op.register_autograd(backward, setup_context=setup_context)
            self._function = _thin_function(name, forward, setup_context, backward)

    def __call__(self, *args: Any) -> Any:
        if not is_eager(args):
            return self.op(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            # Without a formula torch's own path runs: it raises when someone differentiates through it (a double backward).
            return self.op(*args) if self._function is None else self._function.apply(*args)
        result = self._forward(*args)
        for i in self._written:
            # A write through an address is invisible to autograd; unmarked, another reader of the tensor would get wrong gradients.
            torch.autograd.graph.increment_version(args[i])
        return result


def _thin_function(name: str, forward: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Any) -> Any:
    # Not as a setup_context of the Function's own: apply would then bind the signature anew in each call, for 30 us.
    def forward_and_save(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    # A second derivative through the incoming gradient alone would be a part of the truth: it raises.
    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), methods)
