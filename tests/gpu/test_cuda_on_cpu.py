"""The CUDA sources without a GPU: compiled for the CPU, plain and sanitized, and held to the contract in processes of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest
from apart import HERE, ROOT, assert_files_took_part, run
from cases import operator_of

from gpu_proof.cuda_on_cpu.build import CXX, build_module


def emulated(arguments: Sequence[str], *, sanitized: bool = False) -> list[str]:
    """Runs pytest with the emulated kernels; the names of the tests."""
    environment = {"CUDA_ON_CPU_MODULE": str(build_module(sanitized=sanitized))}
    if sanitized:  # leaks are not looked for: Python and torch keep what they allocate until the end
        environment |= {"LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so')}", "ASAN_OPTIONS": "detect_leaks=0"}
        environment |= {"UBSAN_OPTIONS": "print_stacktrace=1"}
    return run(["-p", "gpu_proof.cuda_on_cpu.plugin", "--capture=sys", *arguments], environment)


def sanitized(arguments: Sequence[str]) -> list[str]:
    return emulated(arguments, sanitized=True)


def _library(name: str) -> str:
    return subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


FILES = [p.stem for p in sorted(HERE.glob("cases_*.py")) if any((ROOT / f"csrc/ops/{operator_of(p.stem)}").glob("*_cuda.cu"))]
CASES = ["tests/gpu/on_cpu.py"]
LARGE_CASES = ["tests/gpu/on_cpu.py", "-m", "slow"]


@pytest.mark.process(emulated, CASES)
def test_every_case_passes(result: list[str]) -> None:
    assert_files_took_part(result, FILES)


@pytest.mark.slow  # a tenth of the whole suite's time
@pytest.mark.process(sanitized, CASES)
def test_every_case_passes_sanitized(result: list[str]) -> None:
    assert_files_took_part(result, FILES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.process(emulated, LARGE_CASES)
def test_every_large_case_passes(result: list[str]) -> None:
    assert result


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.process(sanitized, LARGE_CASES)
def test_every_large_case_passes_sanitized(result: list[str]) -> None:
    assert result
