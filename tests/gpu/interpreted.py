"""Every case of every `cases_*.py` through Triton's interpreter. Not collected by default: it takes a process of its own, as in

TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gpu_proof import interpreter_guards

assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Triton is imported"

interpreter_guards.install()

FILES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
CASES = [pytest.param(case, id=f"{file}-{case.name}") for file in FILES for case in import_module(file).CASES if not case.large]


@pytest.fixture(autouse=True)
def _numpy_like_a_gpu() -> Iterator[None]:
    """Which says nothing when infinity is subtracted from infinity."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_case(case: cases.Case) -> None:
    cases.run(case, "triton", "cpu")


@triton.jit
def _copy(source, target, size, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


def test_guards_are_up() -> None:
    rows = torch.zeros(3, 16)[:, :8]
    _copy[(1,)](rows[0], torch.empty(8), 8, block=16)
    with pytest.raises(Exception, match="reads outside of every tensor"):
        _copy[(1,)](torch.zeros(8), torch.empty(9), 9, block=16)
    with pytest.raises(Exception, match="writes outside of every tensor"):
        _copy[(1,)](torch.zeros(9), torch.empty(8), 9, block=16)
    with pytest.raises(Exception, match="reads outside of every tensor"):
        _copy[(1,)](rows, torch.empty(9), 9, block=16)
