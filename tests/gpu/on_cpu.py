"""Every case of the operators that have CUDA kernels, on the CPU. Not collected by default: it takes a process of its own, as in

CUDA_ON_CPU_MODULE=<what cuda_on_cpu.build.build_module returned> python -m pytest -p gpu_proof.cuda_on_cpu.plugin tests/gpu/on_cpu.py

with tools on PYTHONPATH.
"""

from __future__ import annotations

from importlib import import_module

import cases
import pytest

from gpu_proof.cuda_on_cpu.plugin import OPERATORS

FILES = [f"cases_{op}" for op in sorted(OPERATORS)]
CASES = [
    pytest.param(case, id=f"{file}-{case.name}", marks=[pytest.mark.slow] if case.large else [])
    for file in FILES
    for case in import_module(file).CASES
]


@pytest.mark.parametrize("case", CASES)
def test_case(case: cases.Case) -> None:
    cases.run(case, "cuda", "cpu")
