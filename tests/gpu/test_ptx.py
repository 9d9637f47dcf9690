"""The compiled kernels, run: PTX of Triton and of nvcc, on the machine of tools/gpu_proof/ptx, through the operators and their cases."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from apart import HERE, ROOT, assert_files_took_part, run
from cases import operator_of

from gpu_proof import nvcc
from gpu_proof.ptx import cuda as ptx_cuda
from gpu_proof.targets import NVCC_TARGETS

# What compilers of torch see of a kernel does not depend on its machine code.
ALL = "not torch and not compiles and not fake"
QUICK = "bf16 and not tanh and not pieces and not memory"


def files(pattern: str) -> list[str]:
    """The files of cases whose operator has such a source."""
    return [path.stem for path in sorted(HERE.glob("cases_*.py")) if any(ROOT.glob(pattern.format(op=operator_of(path.stem))))]


TRITON_FILES = files("python/reinforce_ada/ops/{op}/triton.py")
CUDA_FILES = files("csrc/ops/{op}/*_cuda.cu")
QUICK_FILES = [f"cases_{op}" for op in ("token_logprobs", "group_advantages", "policy_loss")]


def triton(capability: int, chosen: str) -> list[str]:
    environment = {"PTX_BACKEND": "triton", "PTX_CAPABILITY": str(capability), "TRITON_DEFAULT_FP_FUSION": "1"}
    return run([str(HERE / "compiled.py"), "-k", chosen], environment)


def cuda(target: str, chosen: str) -> list[str]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(launchers(), folder)
        for source in nvcc.SOURCES:
            (folder / f"{source.stem}.ptx").write_text(nvcc.compile_unit(source, target).ptx)
        environment = {"PTX_BACKEND": "cuda", "PTX_CAPABILITY": target.removeprefix("sm_"), "PTX_FOLDER": name}
        return run([str(HERE / "compiled.py"), "-k", chosen], environment)


@cache
def launchers() -> Path:
    """The launchers of csrc as a module that runs PTX; its folder goes with this process."""
    folder = TemporaryDirectory()
    _kept.append(folder)
    return ptx_cuda.build(Path(folder.name))


_kept: list[TemporaryDirectory[str]] = []


@pytest.mark.process(triton, 90, QUICK)
def test_what_triton_compiled_computes_the_operators(result: list[str]) -> None:
    assert_files_took_part(result, [*QUICK_FILES, "cases_linear_token_logprobs"])


@pytest.mark.process(cuda, "sm_90", QUICK)
def test_what_nvcc_compiled_computes_the_operators(result: list[str]) -> None:
    assert_files_took_part(result, QUICK_FILES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.process(triton, 90, ALL)
def test_every_case_of_what_triton_compiled(result: list[str]) -> None:
    assert_files_took_part(result, TRITON_FILES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.process(cuda, "sm_90", f"({ALL}) or every_kernel")
def test_every_case_of_what_nvcc_compiled(result: list[str]) -> None:
    assert_files_took_part(result, CUDA_FILES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [pytest.param(c, marks=pytest.mark.process(triton, c, QUICK)) for c in (80, 100)])
def test_what_triton_compiled_for_others(result: list[str], capability: int) -> None:
    assert_files_took_part(result, [*QUICK_FILES, "cases_linear_token_logprobs"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.process(cuda, t, QUICK)) for t in NVCC_TARGETS if t != "sm_90"])
def test_what_nvcc_compiled_for_others(result: list[str], target: str) -> None:
    assert_files_took_part(result, QUICK_FILES)
