"""What is set around a call does not change it: default dtype and device, autocast, inference mode, torch.compile with changing sizes; and
what would change it in silence, the transforms of torch.func and forward-mode AD, is refused or right."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from calls import Call, calls
from conformance import assert_same_bits
from torch import Tensor

import reinforce_ada.ops
from reinforce_ada.errors import InputError

# torch's own forward-mode rules are compiled by torch.jit when the first of them is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CALLS = calls()
EXACT = calls(torch.float64)
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
every_form = pytest.mark.parametrize("form", ["cpu", "reference"])
OF_EACH = {name: CALLS[name] for name in ("token_logprobs everything", "linear_token_logprobs everything", "group_advantages pool given",
                                          "policy_loss entropy", "linear_policy_loss entropy")}  # fmt: skip
one_of_each = pytest.mark.parametrize("call", OF_EACH.values(), ids=OF_EACH.keys())

# Everything that allocates names its dtype and device

FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
             "randperm", "scalar_tensor", "tensor", "zeros"}  # fmt: skip
SOURCES = sorted(Path(reinforce_ada.ops.__file__).parent.rglob("*.py"))


def unnamed(source: str) -> list[int]:
    """Lines with a call of a torch factory that leaves its dtype or device to torch's defaults."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]


def test_every_factory_call_names_dtype_and_device() -> None:
    assert unnamed("x = torch.empty(3)\ny = torch.zeros(3, dtype=d)\nz = torch.ones(3, dtype=d, device=x.device)") == [1, 2]
    assert {str(path): lines for path in SOURCES if (lines := unnamed(path.read_text()))} == {}


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@every_form
@every_call
def test_defaults_do_not_matter(call: Call, form: str) -> None:
    expected = call.evaluate(form)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        for device in ("cpu", "meta"):
            with defaults(dtype, device):
                actual = call.evaluate(form)
            assert_same_bits(expected, actual, f"default {dtype} on {device}")


@pytest.mark.usefixtures("fresh_compiler")
@one_of_each
def test_defaults_do_not_matter_to_what_is_compiled(call: Call) -> None:
    expected = call.evaluate("cpu")
    names = list(call.tensors)
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "meta")):
        with defaults(dtype, device):
            compiled = torch.compile(
                lambda *tensors: call.results("cpu", dict(zip(names, tensors, strict=True))), fullgraph=True, backend="aot_eager"
            )
            actual = call.evaluate_with(compiled)
        assert_same_bits(expected, actual, f"default {dtype} on {device}")


@every_form
@every_call
def test_autocast_and_inference_mode_do_not_matter(call: Call, form: str) -> None:
    expected = call.evaluate(form)

    def under_autocast(*tensors: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call.results(form, dict(zip(call.tensors, tensors, strict=True)))

    assert_same_bits(expected, call.evaluate_with(under_autocast), "autocast")
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            results = call.results(form, call.tensors)
            assert_same_bits(expected[: len(results)], results, mode.__name__)
        assert not any(x.requires_grad for x in results)


# torch.compile with sizes that change


def resized(call: Call, num_tokens: int) -> Call:
    """With other token counts: the tensors of a value a token are repeated or cut; the last sequence takes the difference."""
    sizes = {x.shape[0] for name, x in call.tensors.items() if name in ("logits", "hidden", "logprobs", "rewards")}
    (before,) = sizes

    def change(name: str, x: Tensor) -> Tensor:
        if name == "cu_seqlens":
            return torch.cat([x[:-1].clamp(max=num_tokens), x.new_tensor([num_tokens])])
        return x[torch.arange(num_tokens) % before] if x.shape[:1] == (before,) and name != "weight" else x

    return call.with_tensors(change)


WORDS = (
    *("everything", "temperatures", "in chunks", "offsets", "pool given", "weights", "gspo", "ppo", "sapo on policy"),
    *("seq-mean-token-sum-norm", "k3", "corrected sequence", "per token", "entropy"),
)
COMPILED = [name for name in CALLS if name.split(" ", 1)[1] in WORDS]


# Tracing takes seconds, and for the reference, with as many graph nodes as the loss has operations, up to 25.
QUICK = ("token_logprobs everything", "linear_token_logprobs everything", "group_advantages offsets", "policy_loss corrected sequence",
         "linear_policy_loss ppo")  # fmt: skip
TRACED = [
    pytest.param(name, form, marks=() if form == "cpu" and name in QUICK else pytest.mark.slow)
    for name in COMPILED
    for form in ("cpu", "reference")
]


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")  # by torch's tracer
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "form"), TRACED)
def test_compiles_with_sizes_that_change(name: str, form: str) -> None:
    """One graph for all token counts, with the values of eager calls."""
    call = CALLS[name]
    names = list(call.tensors)

    def run(*tensors: Tensor) -> list[Tensor]:
        return call.results(form, dict(zip(names, tensors, strict=True)))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (9, 6, 17):
        other = resized(call, num_tokens)
        for a, b in zip(other.evaluate_with(compiled), other.evaluate(form), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_numbers_that_change() -> None:
    call = CALLS["linear_policy_loss entropy"]
    tensors = {name: x for name, x in call.tensors.items() if name != "temperature"}

    def run(number: float) -> Tensor:
        options = {"temperature": number, "logit_scale": number, "soft_cap": 10 * number, "entropy_coef": number, "backend": "cpu"}
        return reinforce_ada.ops.linear_policy_loss(**tensors, **options)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (0.5, 0.75, 1.25):
        torch.testing.assert_close(compiled(number), run(number))


# Derivatives that no operator has


def tangents_of(call: Call) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    leaves = call.leaves() or ["rewards"]
    return {name: torch.randn(call.tensors[name].shape, generator=g, dtype=call.tensors[name].dtype) for name in leaves}


def first(call: Call, form: str) -> Callable[..., Tensor]:
    """The first result as a function of the leaves."""
    names = list(tangents_of(call))
    return lambda *leaves: call.results(form, {**call.tensors, **dict(zip(names, leaves, strict=True))})[0]


def forward_mode(call: Call, form: str) -> Tensor:
    tangents = tangents_of(call)
    with fwd.dual_level():
        duals = [fwd.make_dual(call.tensors[name], t) for name, t in tangents.items()]
        tangent: Tensor = fwd.unpack_dual(first(call, form)(*duals)).tangent
        return tangent


def jvp(call: Call, form: str) -> Tensor:
    tangents = tangents_of(call)
    result: Tensor = torch.func.jvp(first(call, form), tuple(call.tensors[n] for n in tangents), tuple(tangents.values()))[1]
    return result


@pytest.mark.parametrize("differentiate", [forward_mode, jvp])
@every_call
def test_forward_mode_is_refused(call: Call, differentiate: Callable[[Call, str], Tensor]) -> None:
    with pytest.raises(InputError, match=r"tangent|torch\.func"):
        differentiate(call, "cpu")
    with pytest.raises(InputError, match=r"tangent|torch\.func"):
        differentiate(call, "auto")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch 2.15 says it of its own forward mode
@pytest.mark.parametrize("differentiate", [forward_mode, jvp])
@pytest.mark.parametrize("name", EXACT)
def test_forward_mode_of_the_reference_is_right_or_refused(name: str, differentiate: Callable[[Call, str], Tensor]) -> None:
    """In float64, as reverse mode has it, which is checked against differences elsewhere."""
    call = EXACT[name]
    if call.operator == "group_advantages" or "max_extra_bytes" in call.options:
        with pytest.raises(InputError, match=r"tangent|torch\.func"):
            differentiate(call, "reference")
    else:
        torch.testing.assert_close(differentiate(call, "reference"), reverse_mode(call, tangents_of(call)), rtol=1e-9, atol=1e-12)


def reverse_mode(call: Call, tangents: dict[str, Tensor]) -> Tensor:
    """The same number from loss.backward()."""
    leaves = [call.tensors[name].clone().requires_grad_() for name in tangents]
    out = first(call, "reference")(*leaves)
    rows = [torch.autograd.grad(x, leaves, retain_graph=True, materialize_grads=True) for x in out.flatten()]
    return torch.stack([sum((g * t).sum() for g, t in zip(row, tangents.values(), strict=True)) for row in rows]).view(out.shape)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x]))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@one_of_each
def test_transforms_are_refused(call: Call, transform: Callable[..., Any]) -> None:
    (name, *_) = tangents_of(call)
    with pytest.raises(InputError, match=r"tangent|torch\.func"):
        transform(lambda x: call.results("cpu", {**call.tensors, name: x})[0], call.tensors[name])


@every_call
def test_second_derivatives_are_refused(call: Call) -> None:
    """Also where they would come in beside the first, as a penalty on the gradient does: nothing of it may get lost."""
    if not call.leaves():
        return
    tensors = {name: x.clone().requires_grad_() if name in call.leaves() else x for name, x in call.tensors.items()}
    leaves = [tensors[name] for name in call.leaves()]
    result = call.results("cpu", tensors)[0].sum()
    grads = torch.autograd.grad(result, leaves, create_graph=True, allow_unused=True)
    penalty = sum(g.pow(2).sum() for g in grads if g is not None)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (result + penalty).backward()
