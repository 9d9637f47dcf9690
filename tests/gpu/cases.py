"""What the checks of the GPU forms share. A file `cases_<operator>.py` lists them as CASES, for whoever can run a backend:

- tests/gpu/interpreted.py, Triton's interpreter on the CPU, about 1.5 million elements a second: all but the large ones,
- the CUDA sources compiled for the CPU, and a GPU: all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from conformance import assert_no_worse, assert_same_bits, poisoned_memory
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """`check(backend, device)` raises AssertionError where the form does not hold to the contract."""

    name: str
    check: Callable[[str, str], None]
    large: bool = False


def each(check: Callable[..., None], *choices: tuple[Any, ...], dtypes: bool = False, large: bool = False) -> list[Case]:
    """A case for each of the choices, and with `dtypes` for each dtype: check(backend, device[, dtype], *choice)."""
    labels = DTYPES if dtypes else {"": None}
    cases = []
    for choice in choices or ((),):
        for label, dtype in labels.items():
            given = (dtype, *choice) if dtypes else choice
            name = "-".join([check.__name__.removeprefix("check_"), *([label] if label else []), *map(str, choice)])
            cases.append(Case(name, lambda backend, device, given=given: check(backend, device, *given), large))
    return cases


def operator_of(file: str) -> str:
    """Whose cases `cases_<operator>` has."""
    return file.removeprefix("cases_")


def run(case: Case, backend: str, device: str) -> None:
    """The case, with the same random numbers each time."""
    torch.manual_seed(0)
    case.check(backend, device)


def interpreted(backend: str) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def assert_rounded_no_worse(backend: str, actual: Tensor, truth: Tensor, plain: Tensor, tol: float, what: str = "") -> None:
    """As assert_no_worse. The interpreter rounds bfloat16 towards zero: there it is held to one step of it, everywhere."""
    if interpreted(backend) and actual.dtype == torch.bfloat16:
        assert not actual.isnan().any(), f"{what}: NaN"
        error = (actual.double() - truth).abs() - torch.finfo(torch.bfloat16).eps * truth.abs()
        assert error.numel() == 0 or error.max() <= tol, f"{what}: {error.max()} beyond a step of bfloat16"
    else:
        assert_no_worse(actual, truth, plain, tol, what)


def assert_repeatable(results: Callable[[], Sequence[Tensor | None]]) -> None:
    """The same bits twice, and in memory full of NaN."""
    first = results()
    assert_same_bits(first, results(), "second run")
    with poisoned_memory():
        assert_same_bits(first, results(), "poisoned memory")


def assert_same_up_to_alignment(backend: str, first: Sequence[Tensor], second: Sequence[Tensor], what: str = "") -> None:
    """Equal up to rounding: rows that begin elsewhere in 16 bytes are loaded in other widths, and so summed in another order. The
    interpreter knows no widths: there bit for bit."""
    if interpreted(backend):
        return assert_same_bits(first, second, what)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=max(2e-6, torch.finfo(a.dtype).eps), atol=1e-7, equal_nan=True, msg=lambda m: f"{what}: {m}")
    return None


def inside(x: Tensor, fill: Any, *, before: int = 3, after: int = 5) -> tuple[Tensor, Tensor]:
    """(a copy of x [..., n] in the middle of a larger buffer full of `fill`, at an odd address, and the buffer).

    Rows keep `before + after` elements of it between them.
    """
    buffer = torch.full((*x.shape[:-1], before + x.shape[-1] + after), fill, dtype=x.dtype, device=x.device)
    view = buffer[..., before : before + x.shape[-1]]
    view.copy_(x)
    return view, buffer
