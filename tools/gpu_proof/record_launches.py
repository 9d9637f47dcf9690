"""Calls everything in `calls.py` and writes the launches to a file: `python -m gpu_proof.record_launches cuda|hip FILE`. Nothing runs."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from gpu_proof import calls
from gpu_proof.launches import BACKENDS, Launch, describe
from reinforce_ada.ops import _dispatch

PROCESSORS = {"cuda": 132, "hip": 304}  # of an H100 and an MI300X


class Recorder:
    """Takes the place of a launch; `dtype` is that of the call at hand."""

    def __init__(self, backend: str) -> None:
        self.backend, self.target = backend, GPUTarget(*BACKENDS[backend])
        self.compiler = make_backend(self.target)
        self.dtype = ""
        self.binders: dict[Any, Any] = {}
        self.found: dict[Any, Launch] = {}

    def run(self, fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not warmup
        kernel = id(fn)  # its hash is computed anew each time, from all that it refers to
        if kernel not in self.binders:
            self.binders[kernel] = create_function_from_signature(fn.signature, fn.params, self.compiler)
        bound, specialization, extra = self.binders[kernel](*args, **kwargs)
        names = {param.name: param.is_constexpr for param in fn.params}
        constants = tuple(repr(bound[name]) for name, constant in names.items() if constant)
        key = (kernel, tuple(specialization), constants, tuple(extra.items()))
        if key not in self.found:
            self.found[key] = self._launch(fn, bound, specialization, extra, kwargs, grid)
        elif self.dtype not in self.found[key].dtypes:
            before = self.found[key]
            self.found[key] = replace(before, dtypes=(*before.dtypes, self.dtype))

    def _launch(self, fn: Any, bound: Any, specialization: Any, extra: Any, kwargs: dict[str, Any], grid: Any) -> Launch:
        names = {param.name: param.is_constexpr for param in fn.params}
        _, signature, constexprs, attributes = fn._pack_args(self.compiler, kwargs, bound, specialization, extra)
        return Launch(
            module=fn.fn.__module__,
            kernel=fn.fn.__name__,
            backend=self.backend,
            signature=tuple(signature.items()),
            constexprs=tuple(sorted(constexprs.items())),
            attributes=tuple(sorted((path, tuple(map(tuple, found))) for path, found in attributes.items() if found)),
            options=tuple(sorted((key, value) for key, value in kwargs.items() if key not in names)),
            dtypes=(self.dtype,),
            grid=tuple(int(n) for n in (grid(bound) if callable(grid) else grid)),
            arguments=describe(names, bound),
        )


class NoDevice:
    """Stands where Triton's driver of a device would: all that launchers ask it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target


def record(backend: str, file: Path) -> None:
    for forms in _dispatch._forms.values():
        if "triton" in forms:  # which then takes the tensors there are, and launches as on a device
            forms["triton"] = replace(forms["triton"], devices=None, missing=lambda: None)
    recorder = Recorder(backend)
    driver.set_active(NoDevice(recorder.target))
    torch.version.hip = "6.4" if backend == "hip" else None
    properties = SimpleNamespace(multi_processor_count=PROCESSORS[backend], warp_size=recorder.target.warp_size)
    torch.cuda.get_device_properties = lambda device=None: cast(Any, properties)
    JITFunction.run = lambda self, *args, **kwargs: recorder.run(self, *args, **kwargs)
    for dtype, call in calls.calls():
        recorder.dtype = dtype
        call()
    file.write_bytes(pickle.dumps(tuple(recorder.found.values())))


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
