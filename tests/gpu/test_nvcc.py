"""The CUDA sources compiled by nvcc for every target, warnings and spills being errors, and what the machine code holds."""

from __future__ import annotations

import re

import pytest

from gpu_proof import nvcc
from gpu_proof.catalogue import CUDA_KERNELS, DTYPES, cuda_kernel, cuda_verdicts
from gpu_proof.targets import NVCC_TARGETS

QUICK = ("sm_90",)
JOBS = [
    pytest.param(source, target, id=f"{source.stem}-{target}", marks=() if target in QUICK else pytest.mark.slow)
    for source in nvcc.SOURCES
    for target in NVCC_TARGETS
]


@pytest.fixture(scope="module", autouse=True)
def _warm(request):
    """Compiles what this run asks for, two files at a time."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    nvcc.warm([(p.params["source"], p.params["target"]) for p in params if p and "target" in p.params])


def test_there_is_a_compiler():
    assert nvcc.nvcc() is not None, "no nvcc on the path, in CUDA_HOME or among the packages of this environment"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("source", "target"), JOBS)
def test_compiles_without_a_warning(source, target):
    unit = nvcc.compile_unit(source, target)
    assert not unit.failed, unit.messages
    assert "warning" not in unit.messages
    assert ".local" not in unit.ptx


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("source", "target"), JOBS)
def test_machine_code(source, target):
    unit = nvcc.compile_unit(source, target)
    wrong = {}
    for entry in unit.entries:
        found = [f"{check}: {seen}" for check, holds, seen in cuda_verdicts(source.parent.name, entry, target) if not holds]
        wrong |= {entry.name: found} if found else {}
    assert wrong == {}
    assert unit.entries


@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda source: source.stem)
def test_every_kernel_is_in_the_catalogue_with_every_dtype(source):
    op = source.parent.name
    of_kernel: dict[str, set[str]] = {}
    for entry in nvcc.compile_unit(source, QUICK[0]).entries:
        name, dtype = cuda_kernel(op, entry.name)
        of_kernel.setdefault(name, set()).add(dtype)
    assert set(of_kernel) == set(CUDA_KERNELS[op])
    assert {name: found for name, found in of_kernel.items() if found not in (set(DTYPES), {"any"})} == {}


@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda source: source.stem)
def test_every_entry_point_is_documented(source):
    """In the header, with T for the element type."""
    header = source.with_suffix(".h").read_text()
    types = r"(float32|bfloat16|float16)"
    documented = set(re.findall(r"\b\w+_T(?:_\w+)?\b|\b\w+\b", header))
    for entry in nvcc.compile_unit(source, QUICK[0]).entries:
        assert re.sub(types, "T", entry.name) in documented, f"{entry.name} is not in {source.with_suffix('.h').name}"


def test_every_operator_with_cuda_sources_is_in_the_catalogue():
    assert {source.parent.name for source in nvcc.SOURCES} == set(CUDA_KERNELS)
