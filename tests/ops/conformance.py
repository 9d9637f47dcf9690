"""What every form of every operator is held to; the tests of an operator say on which inputs.

A build is a form, and for the native one also an instruction set. `builds(op)` lists those the registry declares; the `backend`
fixture selects one and hands over the name that the operator takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reinforce_ada.ops import _dispatch, _native


class Build(NamedTuple):
    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"


def builds(op: str, *, reference: bool = True, every_isa: bool = True) -> list[Any]:
    """The builds of the declared forms of `op` that take tensors on the CPU, as pytest parameters; a form that cannot run is a skip.

    `every_isa=False` takes the native form once, for what does not depend on the instruction set. Forms for other devices have their own
    tests (tests/gpu). The report says once why each of them is left out, and which instruction sets this CPU lacks: see `left_out`.
    """
    params: list[Any] = []
    for backend, form in _dispatch.forms(op).items():
        if (backend == "reference" and not reference) or not on_cpu(form):
            continue
        reason = form.missing()
        isas: list[str | None] = [None]
        if backend == "cpu" and reason is None and every_isa:
            isas = list(_native.cpu.build_info()["usable_isas"])
        marks = () if reason is None else pytest.mark.skip(reason=reason)
        params += [pytest.param(build, id=str(build), marks=marks) for build in (Build(backend, isa) for isa in isas)]
    return params


def on_cpu(form: _dispatch.Form) -> bool:
    """Whether a form takes tensors on the CPU."""
    return form.devices is None or "cpu" in form.devices


def left_out() -> list[str]:
    """The forms that `builds` leaves out, with the devices they are for and the reason they could not run here either, and likewise the
    instruction sets."""
    info = _native.cpu.build_info() if _native.missing() is None else {"built_isas": [], "usable_isas": []}
    unusable = [isa for isa in info["built_isas"] if isa not in info["usable_isas"]]
    isas = [
        f"cpu: no test runs the {isa} build, which this CPU (or REINFORCE_ADA_ISA) lacks; make test-avx512 emulates it" for isa in unusable
    ]
    return isas + [
        f"{op}: {name} takes tensors on {' or '.join(form.devices or ())} ({form.missing() or 'tests/gpu runs it'})"
        for op in _dispatch.table()
        for name, form in _dispatch.forms(op).items()
        if not on_cpu(form)
    ]


@contextmanager
def using(build: Build) -> Iterator[str]:
    """Selects the build's instruction set; yields the name of its backend."""
    if build.isa is None:
        yield build.backend
        return
    selected = _native.cpu.build_info()["selected_isa"]
    _native.cpu.select_isa(build.isa)
    try:
        yield build.backend
    finally:
        _native.cpu.select_isa(selected)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN (the largest value for integers), so what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in given:  # a view of something is not new
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


def assert_no_worse(actual: Tensor, truth: Tensor, plain: Tensor, tol: float, what: str = "") -> None:
    """|actual - truth| <= max |plain - truth| + tol: no further from float64 than plain PyTorch in the same dtype, up to `tol`.

    An infinite truth must be met exactly.
    """
    assert actual.shape == truth.shape == plain.shape, what
    assert not actual.isnan().any(), f"{what}: NaN"
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].double(), truth[~finite]), f"{what}: infinities"
    if finite.any():
        error = (actual.double() - truth)[finite].abs().max().item()
        allowed = (plain.double() - truth)[finite].abs().max().item() + tol
        assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(first: Sequence[Tensor | None], second: Sequence[Tensor | None], what: str = "") -> None:
    """Equal bit for bit (NaN equals NaN)."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a is None or b is None:
            assert a is b, f"{what}: result {i}"
        else:
            assert torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5)), f"{what}: result {i} differs"
            assert torch.equal(a.isnan(), b.isnan()), f"{what}: result {i} differs in NaN"


def assert_repeatable(run: Callable[[], Sequence[Tensor | None]]) -> None:
    """The same bits twice, in poisoned memory, and with 1 and 2 threads. `run` returns results and gradients."""
    with threads(2):
        first = run()
        assert_same_bits(first, run(), "second run")
        with poisoned_memory():
            assert_same_bits(first, run(), "poisoned memory")
    with threads(1):
        assert_same_bits(first, run(), "one thread")


def assert_one_derivative(results: Callable[[], Tensor], leaf: Tensor, other: Tensor) -> None:
    """A second backward gives the same gradient again, since nothing is kept that the first could spoil; a second derivative raises."""
    loss = results().square().sum()
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    first = leaf.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 2 * first)
    (grad,) = torch.autograd.grad(loss, other, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()
    with torch.no_grad():
        assert not results().requires_grad


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same sequences as rows [N, L], with poison in the padding."""
    lengths = batch["cu_seqlens"].diff().tolist()
    rows = {}
    for name, x in batch.items():
        if name == "cu_seqlens" or x.shape == (len(lengths),):
            continue
        out = torch.zeros(len(lengths), max(lengths), dtype=x.dtype)
        if x.dtype != torch.bool:
            out.fill_(math.nan)
        for i, part in enumerate(x.split(lengths)):
            out[i, : len(part)] = part
        rows[name] = out
    return {**rows, "advantages": rows.get("advantages", batch["advantages"])}
