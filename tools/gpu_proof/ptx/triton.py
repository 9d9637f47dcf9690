"""Triton's launches, compiled for a GPU and run by the PTX machine on tensors in the memory of the CPU."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from gpu_proof.ptx.memory import Buffer, Memory
from gpu_proof.ptx.program import Program, parse
from gpu_proof.ptx.run import run
from gpu_proof.records import leaves

_SCRATCH = 2  # pointers that Triton adds to every entry and these kernels do not use
_compiled: dict[Any, tuple[Program, int, list[tuple[int, ...]]]] = {}  # program, warps, where what it takes is found
launches: dict[str, int] = {}  # kernel -> how often it ran


@contextmanager
def compiled_for(capability: int) -> Iterator[None]:
    """Within it, `kernel[grid](...)` compiles for this compute capability and runs the PTX, with CPU tensors as its memory."""

    def on_machine(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        launches[kernel.__name__] = launches.get(kernel.__name__, 0) + 1
        _launch(kernel, capability, grid, args, given)

    before = JITFunction.run
    JITFunction.run = on_machine
    active, driver._active = driver._active, _Driver(capability)
    try:
        yield
    finally:
        JITFunction.run = before
        driver._active = active


class _Driver:
    """What launchers ask Triton about the device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target


def _launch(kernel: Any, capability: int, grid: Any, args: Sequence[Any], given: dict[str, Any]) -> None:
    target = GPUTarget("cuda", capability, 32)
    bind, backend = _binder(kernel, target)
    values, specialization, options = bind(*args, **given)
    key = (kernel, capability, str(specialization), tuple(sorted(options.items())))
    if key not in _compiled:
        _, signature, constants, attributes = kernel._pack_args(backend, given, values, specialization, options)
        binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
        paths = [leaf.path for leaf in leaves(signature) if leaf.value != "constexpr"]
        _compiled[key] = parse(binary.asm["ptx"], None, binary.metadata.shared), binary.metadata.num_warps, paths
    program, num_warps, paths = _compiled[key]
    by_path = {leaf.path: leaf.value for leaf in leaves(values)}
    passed = [by_path[path] for path in paths]
    grid = tuple(grid(values) if callable(grid) else grid)
    execute(program, grid + (1,) * (3 - len(grid)), 32 * num_warps, [*passed, *(0,) * _SCRATCH])


@cache
def _binder(kernel: Any, target: GPUTarget) -> tuple[Any, Any]:
    """What finds the types, constants and multiples of 16 of a launch, as Triton's own launcher does."""
    backend = make_backend(target)
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend


def execute(program: Program, grid: tuple[int, int, int], threads: int, args: Sequence[Any]) -> None:
    """Runs the entry; tensors among the arguments are the memory it may touch, whole storages."""
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in args if isinstance(a, Tensor) and a.untyped_storage().nbytes()}
    memory = Memory([Buffer(torch.empty(0, dtype=torch.uint8).set_(s).numpy()) for s in storages.values()], program.constants)
    block = bytearray(sum(8 for _ in program.params) + 8)
    for param, value in zip(program.params, args, strict=True):
        block[param.offset : param.offset + param.size] = _bytes(value, param.size)
    with np.errstate(all="ignore"):
        run(program, grid, threads, bytes(block), memory)


def _bytes(value: Any, size: int) -> bytes:
    if isinstance(value, Tensor):
        return value.data_ptr().to_bytes(size, "little")
    if isinstance(value, float):
        return struct.pack("<f", value)
    return int(value).to_bytes(size, "little", signed=int(value) < 0)
