"""The launchers of csrc, built for the CPU, with nvcc's PTX run in the place of their kernels."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pybind11
import torch
from torch import Tensor

from gpu_proof import ROOT
from gpu_proof.ptx.memory import Buffer, Memory
from gpu_proof.ptx.program import Program, PtxError, entries, parse
from gpu_proof.ptx.run import run

CSRC = ROOT / "csrc"
HOST = Path(__file__).parent / "host"
launches: dict[str, int] = {}  # entry -> how often it ran
_seen: dict[int, Any] = {}  # address -> storage that a call has shown to the launchers


def sources() -> list[Path]:
    """The translation units of reinforce_ada._cuda."""
    return [CSRC / "bindings_cuda.cpp", *sorted(CSRC.glob("common/*.cu")), *sorted(CSRC.glob("ops/*/*_cuda.cu"))]


def build(folder: Path) -> Path:
    """The launchers as a Python module in `folder`."""
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-fPIC", "-fvisibility=default", "-fno-strict-aliasing", "-w"]
    includes = [f"-I{p}" for p in (HOST, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        subprocess.run([*compiler, *includes, "-x", "c++", "-c", str(source), "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources(), HOST / "ptx_host.cpp"]))
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler[0], "-shared", *objects, "-o", str(module), "-ldl"], check=True)
    return module


def entries_in(folder: Path) -> dict[str, str]:
    """Entry -> the PTX text that has it."""
    texts = [path.read_text() for path in sorted(folder.glob("*.ptx"))]
    return {entry: text for text in texts for entry in entries(text)}


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """reinforce_ada._cuda is the module built in `folder`, whose launches run the PTX there; before anything imports reinforce_ada.ops."""
    assert "reinforce_ada.ops" not in sys.modules
    module, ptx = next(folder.glob("_cuda.*")), entries_in(folder)
    spec = spec_from_file_location("reinforce_ada._cuda", module)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["reinforce_ada._cuda"] = loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)

    @cache
    def program(entry: str) -> Program:
        if entry not in ptx:
            raise PtxError(f"no PTX has {entry}")
        return parse(ptx[entry], entry)

    def on_launch(entry: str, x: int, y: int, threads: int, arguments: list[bytes]) -> None:
        launches[entry] = launches.get(entry, 0) + 1
        _execute(program(entry), (x, y, 1), threads, arguments)

    ctypes.PyDLL(str(module)).reinforce_ada_set_hook(ctypes.py_object(on_launch))
    before = Tensor.data_ptr

    def recorded(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        _seen[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return before(tensor)

    Tensor.data_ptr = recorded  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Tensor.data_ptr = before  # type: ignore[method-assign]


def forget() -> None:
    """Lets go of the tensors that calls have shown."""
    _seen.clear()


def _execute(program: Program, grid: tuple[int, int, int], threads: int, arguments: list[bytes]) -> None:
    if [p.size for p in program.params] != [len(a) for a in arguments]:
        raise PtxError(f"{program.name} takes {[p.size for p in program.params]} bytes, the launch passes {[len(a) for a in arguments]}")
    words = np.frombuffer(b"".join(a for a in arguments if len(a) % 8 == 0), np.uint64)
    named = [s for s in _seen.values() if s.nbytes() and ((words >= s.data_ptr()) & (words <= s.data_ptr() + s.nbytes())).any()]
    memory = Memory([Buffer(torch.empty(0, dtype=torch.uint8).set_(s).numpy()) for s in named], program.constants)
    block = bytearray(max(p.offset + p.size for p in program.params))
    for param, content in zip(program.params, arguments, strict=True):
        block[param.offset : param.offset + param.size] = content
    with np.errstate(all="ignore"):
        run(program, grid, threads, bytes(block), memory)
