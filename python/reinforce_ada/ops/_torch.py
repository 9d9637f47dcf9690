"""Registration of native operators with torch: one description, two ways in.

A traced call (torch.compile, export, make_fx, fake tensors) goes through `torch.library`; an eager call on plain tensors takes a
plain `autograd.Function`, which costs 6 us instead of 21 (forward) and 35 instead of 87 (forward and backward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reinforce_ada.errors import InputError

NAMESPACE = "reinforce_ada"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, float, bool))
_traced, _modes, _transformed = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def is_watched() -> bool:
    """Return whether torch.compile, a dispatch mode, torch.func or forward-mode AD traces or transforms what is called now."""
    return _traced() or _modes() > 0 or _transformed() or forward_ad._current_level >= 0


def is_eager(args: Sequence[Any]) -> bool:
    """Return whether a call may bypass torch's dispatcher, because nothing watches it and every tensor is a plain one."""
    if is_watched():
        return False
    for a in args:  # noqa: SIM110  all() over a generator takes three times as long
        if type(a) not in _PLAIN and isinstance(a, Tensor):
            return False
    return True


def dense(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor as a kernel may read it, a plain array without gaps, in `dtype` if one is given; itself if it is such an array.

    The code that takes its `address` must hold the result, which may be the only reference to a copy.
    """
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    if _traced():
        return tensor.resolve_neg().contiguous()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()  # asked first: 0.05 us instead of 0.3


def resolved(tensor: Tensor) -> Tensor:
    """Return the tensor without a pending negation, which a kernel would not see. Asking first takes 0.07 us instead of 0.3."""
    return tensor.resolve_neg() if _traced() or tensor.is_neg() else tensor


def constant(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the `dense` tensor without gradient and tangent."""
    return dense(tensor.detach() if tensor.requires_grad or forward_ad._current_level >= 0 else tensor, dtype)


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor for a native kernel, 0 for None. A kernel knows no strides, so the tensor must be contiguous."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise RuntimeError(f"a kernel was handed a tensor of shape {list(tensor.shape)} with strides {tensor.stride()}: use dense()")
    return tensor.data_ptr()


def coded(tensor: Tensor | None) -> tuple[int, int]:
    """Return the address of a tensor and the code of its dtype, as entry points take the two; zeros for None."""
    return (0, 0) if tensor is None else (address(tensor), DTYPE_CODES[tensor.dtype])


def matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """Return a matrix as entry points take it: address, dtype, rows, columns, and the distance of the rows."""
    return row_address(x), DTYPE_CODES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def row_address(matrix: Tensor) -> int:
    """Return the address of a matrix whose rows may lie any distance apart; the kernel also gets that distance, `matrix.stride(0)`."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise RuntimeError(f"a kernel was handed rows of shape {list(matrix.shape)} with strides {matrix.stride()}")
    return matrix.data_ptr()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two matrices with contiguous rows have an element in common; while tracing this is not known, and False."""
    if _traced() or not a.numel() or not b.numel() or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    start = [x.storage_offset() for x in (a, b)]
    stop = [x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + x.shape[1] for x in (a, b)]
    if start[0] >= stop[1] or start[1] >= stop[0]:
        return False
    stride = a.stride(0)
    if a.shape[0] > 1 and b.shape[0] > 1 and b.stride(0) == stride:  # side by side in the rows of a larger matrix
        shift = (start[1] - start[0]) % stride
        return shift < a.shape[1] or shift > stride - b.shape[1]
    return True


def refuse_transforms(where: str, tensors: Sequence[Any]) -> None:
    """Raise InputError if a transform of torch.func is active or a tensor carries a tangent, which a native form would silently lose."""
    if _transformed():
        given = "a call inside a transform of torch.func (grad, vjp, jvp, vmap, ...)"
    elif has_tangent(tensors):
        given = "a tensor with a tangent (forward-mode AD)"
    else:
        return
    raise InputError(where, given, "reverse-mode autograd, as in loss.backward()", 'or backend="reference", plain PyTorch')


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Return whether one of the tensors is a dual tensor of forward-mode AD."""
    if forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(isinstance(x, Tensor) and unpack(x).tangent is not None for x in tensors)


def once(where: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward of an autograd.Function whose gradients can be used and kept; differentiating them raises.

    torch's `once_differentiable` raises only if the incoming gradient requires one. Otherwise it returns constants, and a penalty on
    the gradient, added to a loss, would count for nothing.
    """

    def run(ctx: Any, *incoming: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *incoming)
        # What the gradients depend on, as far as it is at hand: whoever asks for a derivative in it shall meet the error.
        sources = [x for x in (*incoming, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        with torch.no_grad():
            grads = backward(ctx, *incoming)
        final: Any = _Final.apply
        return tuple(None if grad is None else final(where, grad.detach().requires_grad_(), *sources) for grad in grads)

    return run


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, where: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.where = where
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(f'{ctx.where}: trying to differentiate twice; backend="reference", plain PyTorch, has second derivatives')


_F = TypeVar("_F", bound=Callable[..., Any])


def run_when_traced(function: _F) -> _F:
    """Return a function of Python values that tracing runs as it is, taking its result as a constant, instead of looking inside."""
    # What torch.compiler.assume_constant_result does, without importing the compiler, and Triton with it.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_TYPES: dict[Any, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", int | None: "SymInt?", float: "float"},
    list[float]: "float[]",
}


def parameters(record: type, written: str = "") -> str:
    """Return the fields of a record type as the argument list of a torch schema; the field named by `written` is marked as mutated."""
    types = {name: _TYPES[kind] for name, kind in get_type_hints(record).items()}
    return ", ".join(f"{'Tensor(a!)' if name == written else kind} {name}" for name, kind in types.items())


class NativeOp:
    """A native operator on the kernels of a backend: callable, and differentiable if `backward` is given.

    torch knows it as reinforce_ada::<name> on the cpu, as reinforce_ada::<name>_<backend> elsewhere.

    Args:
        name, backend: see above.
        schema: torch schema of the arguments and results, e.g. "(Tensor x, float scale) -> Tensor".
        forward: computes on real tensors. It must not return an alias of an argument.
        fake: has the same signature and returns empty tensors of the right shape, dtype and strides.
        setup_context: takes `(ctx, inputs, output)`, as for torch.autograd.Function, and saves what `backward` needs.
        backward: takes `(ctx, *grads)`; it runs under tracing too, so it must call torch functions and other `NativeOp`s only.
        mutates: names of the arguments that `forward` writes to.
    """

    def __init__(
        self,
        name: str,
        backend: str,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
    ) -> None:
        device_type = "cpu" if backend == "cpu" else None  # a GPU's kernels are tested on tensors of the CPU too
        full = f"{NAMESPACE}::{name}{'' if backend == 'cpu' else f'_{backend}'}"
        self.op = torch.library.custom_op(full, forward, mutates_args=tuple(mutates), device_types=device_type, schema=schema)
        self.op.register_fake(fake)
        self._name = name
        self.forward = forward
        self._written = [i for i, argument in enumerate(self.op._opoverload._schema.arguments) if argument.name in mutates]
        self._function: Any = None
        if backward is not None:
            self.op.register_autograd(backward, setup_context=setup_context)
            self._function = _thin_function(name, forward, setup_context, backward)

    def __call__(self, *args: Any) -> Any:
        if not is_eager(args):
            if not _traced():
                refuse_transforms(self._name, args)
            return self.op(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            # Without a formula torch's own path runs: it raises when someone differentiates through it (a double backward).
            return self.op(*args) if self._function is None else self._function.apply(*args)
        result = self.forward(*args)
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

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(once(name, backward))}
    return type(name, (torch.autograd.Function,), methods)
