"""Where the gradient of `token_logprobs` goes: over the logits, into given memory, through torch's tracers."""

import math
from collections.abc import Callable

import pytest
import torch
from conformance import assert_same_bits
from token_logprobs_scene import dtypes, evaluate, every_build, every_form, native_form
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from reinforce_ada.errors import InputError
from reinforce_ada.ops import TokenLogprobs, token_logprobs
from reinforce_ada.ops._dispatch import operator

# The gradient over the logits


def in_place_and_fresh(leaf: Tensor, ids: Tensor, loss: Callable[[Tensor, TokenLogprobs], Tensor], backend: str) -> list[Tensor]:
    grads = []
    for inplace in (True, False):
        logits = leaf * 2
        out = token_logprobs(logits, ids, entropy=True, inplace_backward=inplace, backend=backend)
        grads.append(torch.autograd.grad(loss(logits, out), leaf)[0])
    return grads


@every_build
@dtypes
def test_in_place_gradient_is_the_same(backend: str, dtype: torch.dtype) -> None:
    leaf = torch.randn(5, 1003).to(dtype).requires_grad_()
    ids = torch.tensor([0, 1002, -100, 500, 7])
    in_place, fresh = in_place_and_fresh(leaf, ids, lambda _, out: (out.logprobs * out.entropy).sum(), backend)
    assert_same_bits([in_place], [fresh])


@native_form
def test_in_place_gradient_takes_no_memory(backend: str) -> None:
    seen: list[int] = []
    logits = torch.randn(3, 50, requires_grad=True) * 2
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    token_logprobs(logits, torch.tensor([1, 2, 3]), inplace_backward=True, backend=backend).sum().backward()
    assert seen == [logits.data_ptr()]


@native_form
@pytest.mark.parametrize("through_torch", [False, True], ids=["thin", "torch.library"])
def test_in_place_twice_raises(backend: str, through_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through_torch:
        monkeypatch.setattr("reinforce_ada.ops._torch.is_eager", lambda args: False)
    logits = torch.randn(3, 50, requires_grad=True) * 2
    total = token_logprobs(logits, torch.tensor([1, 2, 3]), inplace_backward=True, backend=backend).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@native_form
@pytest.mark.parametrize("through_torch", [False, True], ids=["thin", "torch.library"])
def test_in_place_with_another_reader_raises(backend: str, through_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square saved the logits and is differentiated last (it was recorded first): it must not use the gradient instead."""
    if through_torch:
        monkeypatch.setattr("reinforce_ada.ops._torch.is_eager", lambda args: False)
    logits = torch.randn(3, 50, requires_grad=True) * 2
    squares = logits.square().sum()
    total = squares + token_logprobs(logits, torch.tensor([1, 2, 3]), inplace_backward=True, backend=backend).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# The gradient in memory that the caller has


@every_form
@dtypes
def test_gradient_in_given_memory(backend: str, dtype: torch.dtype) -> None:
    """Of a leaf and of what another operation computed, between rows that are not touched: the bits of a fresh one, and no copy."""
    values, ids = torch.randn(5, 1003).to(dtype), torch.tensor([0, 1002, -100, 500, 7])
    fresh = evaluate(values, ids, 0.7, *torch.ones(2, 5), backend=backend)[-1]
    memory = torch.full((5, 1003), math.nan, dtype=dtype)
    leaf = values.clone().requires_grad_()
    out = token_logprobs(leaf, ids, temperature=0.7, entropy=True, grad_out=memory, backend=backend)
    (out.logprobs + out.entropy).sum().backward()
    assert leaf.grad.data_ptr() == memory.data_ptr()
    assert_same_bits([memory], [fresh])

    wide = torch.full((5, 1100), 7.0).to(dtype)
    logits = leaf * 1
    out = token_logprobs(logits, ids, temperature=0.7, entropy=True, grad_out=wide[:, :1003], backend=backend)
    (grad,) = torch.autograd.grad((out.logprobs + out.entropy).sum(), logits)
    assert (grad.data_ptr(), grad.stride()) == (wide.data_ptr(), (1100, 1))
    assert_same_bits([grad], [fresh])
    assert (wide[:, 1003:] == 7).all()


@every_form
def test_given_memory_is_used_once(backend: str) -> None:
    """A second backward, another backward into the same memory, and a write to it in between raise instead of giving a wrong gradient."""
    logits, ids, memory = torch.randn(3, 50, requires_grad=True), torch.tensor([1, 2, 3]), torch.empty(3, 50)
    first, second = (token_logprobs(logits, ids, grad_out=memory, backend=backend).sum() for _ in range(2))
    first.backward(retain_graph=True)
    for total in (first, second):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    token_logprobs(logits, ids, grad_out=memory, backend=backend).sum().backward()


def test_grad_out_errors() -> None:
    logits, ids, memory = torch.zeros(2, 5, requires_grad=True), torch.tensor([0, 1]), torch.zeros(2, 5)
    for change, message in (
        ({"grad_out": memory, "inplace_backward": True, "logits": logits * 1}, "grad_out and inplace_backward=True; one place for"),
        ({"grad_out": memory, "logits": memory}, "grad_out for logits that need no gradient; logits.requires_grad, outside"),
        ({"grad_out": memory.double()}, "grad_out is [2, 5] float64 on cpu; [2, 5] float32 on cpu, without a gradient of its own"),
        ({"grad_out": memory[:1]}, "grad_out is [1, 5] float32 on cpu; [2, 5] float32 on cpu"),
        ({"grad_out": logits * 1}, "grad_out is [2, 5] float32 on cpu and requires a gradient; [2, 5] float32"),
        ({"grad_out": torch.zeros(5, 2).T}, "grad_out has stride (1, 2); stride 1 in the last dimension and rows of their own"),
        ({"grad_out": torch.zeros(1, 5).expand(2, 5)}, "grad_out has stride (0, 1); stride 1 in the last dimension and rows of"),
    ):
        with pytest.raises(InputError) as error:
            token_logprobs(**{"logits": logits, "token_ids": ids, **change})
        assert str(error.value).startswith(f"token_logprobs: {message}")


@every_form
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own, tracing the reference's Function
def test_gradient_in_given_memory_compiles(backend: str, compiler: str) -> None:
    def loss(x: Tensor, ids: Tensor, memory: Tensor) -> Tensor:
        return token_logprobs(x * 2, ids, grad_out=memory, backend=backend).sum()

    x, ids, memories = torch.randn(3, 50, requires_grad=True), torch.tensor([1, -100, 3]), torch.full((2, 3, 50), math.nan)
    (expected,) = torch.autograd.grad(loss(x, ids, memories[0]), x)
    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x, ids, memories[1]), x)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(memories[1], memories[0])


# torch: tracing, compiling, differentiating twice


@native_form
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_opcheck(backend: str, inplace: bool) -> None:
    logits = torch.randn(4, 10).bfloat16().requires_grad_()
    ids = torch.tensor([1, -100, 3, 9])
    for temperatures, entropy in ((None, False), (torch.rand(4) + 0.5, True)):
        torch.library.opcheck(
            operator("token_logprobs", backend).op, (logits, ids, temperatures, 0.7, 0.5, 3.0, entropy, entropy, inplace, None)
        )


@every_form
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph(backend: str, inplace: bool) -> None:
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        out = token_logprobs(hidden @ weight, ids, temperature=0.7, entropy=True, inplace_backward=inplace, backend=backend)
        return (out.logprobs * out.entropy).sum()

    inputs = torch.randn(6, 8, requires_grad=True), torch.randn(8, 50, requires_grad=True)
    ids = torch.tensor([1, 2, -100, 3, 49, 0])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, ids), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs, ids), inputs), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside inductor
def test_compiles_with_inductor() -> None:
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return token_logprobs(hidden @ weight, ids, inplace_backward=True, backend="cpu").square().sum()

    inputs = torch.randn(6, 8, requires_grad=True), torch.randn(8, 50, requires_grad=True)
    ids = torch.tensor([1, 2, -100, 3, 49, 0])
    expected = torch.autograd.grad(loss(*inputs, ids), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs, ids), inputs), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_calls_check_values_too() -> None:
    compiled = torch.compile(lambda x, ids: token_logprobs(x, ids, backend="cpu"), fullgraph=True, backend="aot_eager")
    with pytest.raises(InputError, match=r"token_ids\[1\] = 5; ids in \[0, 5\)"):
        compiled(torch.randn(2, 5), torch.tensor([0, 5]))


@native_form
def test_tracers_see_one_operator(backend: str) -> None:
    """make_fx on plain tensors and fake tensors: the kernel does not run behind the tracer's back. torch.func says that it cannot."""
    logits, ids = torch.randn(3, 5), torch.tensor([0, 1, 2])

    def total(x: Tensor) -> Tensor:
        return token_logprobs(x, ids, backend=backend).sum()

    graph = make_fx(total)(logits)
    assert torch.ops.reinforce_ada.token_logprobs.default in [node.target for node in graph.graph.nodes]
    with FakeTensorMode() as mode:
        assert token_logprobs(mode.from_tensor(logits), mode.from_tensor(ids), backend=backend).shape == (3,)
    with pytest.raises(InputError, match=r"a transform of torch\.func"):
        torch.func.grad(total)(logits)


def test_second_derivative_raises() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([1, 2]), backend="cpu")
    (grad,) = torch.autograd.grad(logprobs.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
