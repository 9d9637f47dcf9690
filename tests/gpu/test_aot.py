"""Every Triton kernel compiled for every target, and what its machine code must and must not hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import pytest

from gpu_proof import launches
from gpu_proof.aot import compile_all
from gpu_proof.catalogue import DTYPES, TRITON_KERNELS, Variant, due, entries, entry_kernels, quick, verdicts
from gpu_proof.machine_code import Facts
from gpu_proof.targets import TRITON_TARGETS

# What the default run compiles for. The others are left to make test-gpu-static, and to make gpu-docs, which compiles everything for every
# target and which test_gpu_docs.py demands after each change of a kernel.
QUICK_TARGETS = ("sm_90", "gfx942")


class Asked(NamedTuple):
    """Some of the compilations of one kernel for one target; to list them takes 8 s of a processor, which collecting tests must not."""

    op: str
    kernel: str
    target: str
    is_quick: bool

    def __str__(self) -> str:
        return f"{self.op}-{self.target}-{self.kernel}-{'quick' if self.is_quick else 'rest'}"

    def variants(self) -> list[Variant]:
        return [v for v in by_kernel()[self.op, self.kernel, self.target] if (v in quick()) == self.is_quick]


@cache
def by_kernel() -> dict[tuple[str, str, str], list[Variant]]:
    found: dict[tuple[str, str, str], list[Variant]] = {}
    for v in entries():
        found.setdefault((v.op, v.launch.kernel, v.target), []).append(v)
    return found


CASES = [
    pytest.param(asked, id=str(asked), marks=() if is_quick and target in QUICK_TARGETS else pytest.mark.slow)
    for op, kernels in TRITON_KERNELS.items()
    for kernel in kernels
    for target in TRITON_TARGETS
    for is_quick in (True, False)
    for asked in [Asked(op, kernel, target, is_quick)]
]


@pytest.fixture(scope="session")
def facts(request) -> dict[Variant, Facts | str]:
    """Of everything this run asks for, compiled by two processes before the first test looks."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [one for call in calls if call and isinstance(one := call.params.get("asked"), Asked)]
    found = compile_all((variant.launch, variant.target) for one in asked for variant in one.variants())
    return {Variant(launch, target): result for (launch, target), result in found}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("asked", CASES)
def test_machine_code(asked, facts):
    variants = asked.variants()
    assert variants
    wrong = []
    for variant in variants:
        found = facts[variant]
        assert isinstance(found, Facts), f"{variant} does not compile: {found}"
        checks = verdicts(variant.kernel, variant.target, found, *due(variant))
        wrong += [f"{variant}: {check}: {seen}" for check, holds, seen in checks if not holds]
    assert wrong == []


# -------------------- the catalogue is whole


def test_every_kernel_is_in_the_catalogue():
    assert {op: set(kernels) for op, kernels in TRITON_KERNELS.items()} == entry_kernels()


def test_every_kernel_is_launched_with_every_dtype_on_every_target():
    launched = {(v.op, v.launch.kernel, dtype, v.target) for v in entries() for dtype in v.launch.dtypes}
    assert launched == {
        (op, k, dtype, target) for op, ks in TRITON_KERNELS.items() for k in ks for dtype in DTYPES for target in TRITON_TARGETS
    }


def test_every_kernel_and_dtype_is_compiled_by_the_default_run():
    """The dtype of its code: one that sums what others wrote has float32 alone."""

    def on_sm_90(variants: Iterable[Variant]) -> set[tuple[str, str, str]]:
        return {(v.op, v.launch.kernel, due(v)[0]) for v in variants if v.target == "sm_90"}

    assert on_sm_90(quick()) == on_sm_90(entries())


@pytest.mark.parametrize("op", TRITON_KERNELS)
def test_streams_are_launched_divisible_by_16_and_not(op):
    for name, kernel in TRITON_KERNELS[op].items():
        if kernel.streams_in:
            assert {due(v)[1] for v in entries() if v.op == op and v.launch.kernel == name} == {True, False}, name
        if kernel.streams_out:  # what the operators allocate themselves is always aligned
            assert True in {due(v)[2] for v in entries() if v.op == op and v.launch.kernel == name}, name


def test_a_matrix_kernel_is_one_that_multiplies():
    """The catalogue's word against the sources': a kernel with dots that were not looked for would go unchecked."""
    for op, kernels in TRITON_KERNELS.items():
        text = "".join(path.read_text() for path in sorted((launches.OPS / op).rglob("*.py")))
        assert any(kernel.dots for kernel in kernels.values()) == bool(re.search(r"\btl\.dot(_scaled)?\(", text)), op
