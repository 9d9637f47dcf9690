"""Triton's launches, compiled for a GPU and run by the PTX machine on tensors in the memory of the CPU."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpu_proof.ptx.memory import Buffer, Memory
from gpu_proof.ptx.program import Program, parse
from gpu_proof.ptx.run import run

_POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
_SCRATCH = 2  # pointers that Triton adds to every entry and these kernels do not use
_compiled: dict[Any, tuple[Program, int]] = {}
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
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: given.pop(name) for name in list(given) if name in names}
    for param in kernel.params:
        if param.name not in values:
            values[param.name] = param.default
    if callable(grid):
        grid = grid(values)
    signature, constants, attributes = _specialised(kernel, values)
    key = (kernel, capability, tuple(signature.items()), tuple(constants.items()), tuple(attributes), tuple(sorted(given.items())))
    if key not in _compiled:
        source = ASTSource(kernel, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in attributes})
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)
        _compiled[key] = parse(binary.asm["ptx"], None, binary.metadata.shared), binary.metadata.num_warps
    program, num_warps = _compiled[key]
    passed = [values[name] for name in names if signature[name] != "constexpr"]
    execute(program, tuple(grid) + (1,) * (3 - len(grid)), 32 * num_warps, [*passed, *(0,) * _SCRATCH])


def _specialised(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """(signature, constants, divisible by 16) as Triton's own launcher would find them."""
    signature, constants, divisible = {}, {}, []
    for param in kernel.params:
        name, value = param.name, values[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return signature, constants, divisible


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
