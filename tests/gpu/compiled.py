"""The cases of `cases_*.py` through compiled PTX, on the machine of tools/gpu_proof/ptx. Not collected by default: it takes a process
of its own, as in

PTX_BACKEND=triton PTX_CAPABILITY=90 python -m pytest tests/gpu/compiled.py
PTX_BACKEND=cuda PTX_CAPABILITY=90 PTX_FOLDER=<module of gpu_proof.ptx.cuda.build and *.ptx of nvcc> python -m pytest tests/gpu/compiled.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
BACKEND, CAPABILITY = os.environ["PTX_BACKEND"], int(os.environ["PTX_CAPABILITY"])

if BACKEND == "cuda":
    from gpu_proof.ptx import cuda as ptx_cuda

    FOLDER = Path(os.environ["PTX_FOLDER"])
    machine = ptx_cuda.installed(FOLDER)
    forget = ptx_cuda.forget
    launches = ptx_cuda.launches
else:
    from gpu_proof.ptx import triton as ptx_triton

    machine = ptx_triton.compiled_for(CAPABILITY)
    launches = ptx_triton.launches

    def forget() -> None:
        """Triton's launches hold nothing."""


machine.__enter__()

import cases  # noqa: E402  it imports the operators, which must find the machine

from reinforce_ada.ops import _dispatch  # noqa: E402

OPERATORS = [op for op, forms in _dispatch.table().items() if BACKEND in forms]
for op in OPERATORS:
    forms = dict(_dispatch.forms(op))
    forms[BACKEND] = replace(forms[BACKEND], devices=("cpu",), missing=lambda: None)
    _dispatch.declare(op, *forms.values())

if "linear_token_logprobs" in OPERATORS:  # which asks torch for the size of the device
    from reinforce_ada.ops.linear_token_logprobs import triton as linear

    linear._multiprocessors = lambda _: 4
    linear._warp_size = lambda _: 32

FILES = [path.stem for path in sorted(HERE.glob("cases_*.py")) if cases.operator_of(path.stem) in OPERATORS]
CASES = [pytest.param(case, id=f"{file}-{case.name}") for file in FILES for case in import_module(file).CASES if not case.large]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    forget()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_case(case: cases.Case) -> None:
    cases.run(case, BACKEND, "cpu")


def test_every_kernel_ran() -> None:
    assert launches
    if BACKEND == "cuda":
        assert set(launches) == set(ptx_cuda.entries_in(FOLDER)), "kernels that no case launches"
