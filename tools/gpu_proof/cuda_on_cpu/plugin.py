"""A pytest plugin: the CUDA sources, compiled for the CPU, in the place of reinforce_ada._cuda, and every call of them in guarded memory.

    CUDA_ON_CPU_MODULE=<what build.build_module returned> python -m pytest -p gpu_proof.cuda_on_cpu.plugin tests/ops -k cuda

with tools on PYTHONPATH, and for a sanitized module the sanitizer's library preloaded. Each call of a kernel runs twice on copies
of its tensors, with two orders of threads and blocks, which must give the same bits. A copy is as aligned as the tensor, lies between
guards full of NaN, and has guards between rows that lie further apart than they are long; touching a guard fails.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from inspect import getmembers, isfunction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_proof.native_module import load_as

PATH = os.environ["CUDA_ON_CPU_MODULE"]
OPERATORS = ("token_logprobs", "group_advantages", "policy_loss")
SEEDS = (1, 2)
GUARD = 512  # bytes on either side: more than the widest access, and than a warp's
ALIGNMENT = 32  # what a copy keeps of the address
POISON = 0xFF  # NaN in every floating format, -1 in int64

calls = dict.fromkeys(OPERATORS, 0)


MODULE: Any = load_as("reinforce_ada._cuda", PATH)
_library = ctypes.CDLL(PATH)
_library.cuda_on_cpu_seed.argtypes = [ctypes.c_uint64]
_library.cuda_on_cpu_guard.argtypes = [ctypes.c_size_t] * 2


class Copy(NamedTuple):
    original: Tensor
    copy: Tensor
    buffer: np.ndarray
    inside: list[tuple[int, int, int]]  # where its rows begin and end in the buffer, and how far into the original they begin; bytes

    def guards(self) -> list[tuple[int, int]]:
        """What lies outside of its rows, up to GUARD bytes from each: a far offset may put gigabytes between two rows."""
        begins, ends = [begin for begin, _, _ in self.inside], [end for _, end, _ in self.inside]
        before = [(max(begin - GUARD, end), begin) for begin, end in zip(begins, [0, *ends], strict=False)]
        behind = [(end, min(end + GUARD, begin)) for end, begin in zip(ends, [*begins[1:], len(self.buffer)], strict=True)]
        return before + behind

    def bits(self) -> bytes:
        return b"".join(self.buffer[begin:end].tobytes() for begin, end, _ in self.inside)


class Guarded:
    """Copies of a call's tensors, each in a poisoned buffer of its own; the same tensor given twice is one copy."""

    def __init__(self) -> None:
        self.copies: dict[tuple[Any, ...], Copy] = {}

    def copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        key = (value.data_ptr(), value.dtype, *value.shape, *value.stride())
        if key not in self.copies:
            self.copies[key] = _copy(value.detach())
        return self.copies[key].copy

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Guards are up meanwhile; afterwards each must be as it was."""
        for copy in self.copies.values():
            address = copy.buffer.ctypes.data
            for begin, end in copy.guards():
                _library.cuda_on_cpu_guard(address + begin, address + end)
        try:
            yield
        finally:
            _library.cuda_on_cpu_clear_guards()
        for copy in self.copies.values():
            if any((copy.buffer[begin:end] != POISON).any() for begin, end in copy.guards()):
                raise AssertionError("written outside of a tensor")

    def write_back(self) -> None:
        """Through the addresses, as kernels write: autograd's versions stay."""
        for copy in self.copies.values():
            for begin, end, offset in copy.inside:
                ctypes.memmove(copy.original.data_ptr() + offset, copy.buffer.ctypes.data + begin, end - begin)


def _copy(tensor: Tensor) -> Copy:
    size = tensor.element_size()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    row, step = (tensor.shape[-1], tensor.stride(0)) if tensor.dim() == 2 and tensor.stride(0) > tensor.shape[1] else (span, span)
    buffer = np.empty(span * size + 2 * GUARD + 2 * ALIGNMENT, np.uint8)
    first = GUARD + (tensor.data_ptr() - buffer.ctypes.data - GUARD) % ALIGNMENT
    first += (first + span * size) % 2  # bytes are guarded in pairs: the one past the end is what an index too far by one meets
    inside = [(first + i * size, first + (i + row) * size, i * size) for i in range(0, span, step)]
    flat = torch.from_numpy(buffer)[first : first + span * size].view(tensor.dtype)
    copy = Copy(tensor, flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset()), buffer, inside)
    for begin, end in copy.guards():
        buffer[begin:end] = POISON
    for begin, end, offset in inside:
        ctypes.memmove(buffer.ctypes.data + begin, tensor.data_ptr() + offset, end - begin)
    return copy


def _guarded(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        calls[op] += 1
        bits: list[list[bytes]] = []
        for seed in SEEDS:
            memory = Guarded()
            copies = [memory.copy(a) for a in args]
            named = {name: memory.copy(a) for name, a in options.items()}
            _library.cuda_on_cpu_seed(seed)
            with memory.watched():
                result = function(*copies, **named)
            bits.append([copy.bits() for copy in memory.copies.values()])
        for one, other, copy in zip(*bits, memory.copies.values(), strict=True):
            if one != other:
                what = f"{op}: {function.__name__} writes a {copy.original.dtype} {tuple(copy.original.shape)}"
                raise AssertionError(f"{what} that depends on the order in which threads run")
        memory.write_back()
        return result

    return call


def _guard_kernels() -> None:
    for op in OPERATORS:
        kernels = import_module(f"reinforce_ada.ops.{op}.cuda")
        for name, function in getmembers(kernels, isfunction):
            if function.__module__ == kernels.__name__ and not name.startswith("_"):
                setattr(kernels, name, _guarded(op, function))


_guard_kernels()


def pytest_sessionstart() -> None:
    from reinforce_ada.ops._gpu import cuda

    assert cuda is MODULE, f"the operators took {cuda}"
    assert cuda.build_info()["emulated"], f"{PATH} needs a GPU"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{count} calls of {op}" for op, count in calls.items())
    terminalreporter.write_line(f"CUDA sources on the CPU: {counts}, each twice ({MODULE.build_info()['compiler']})")
